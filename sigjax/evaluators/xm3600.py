"""Retrieval on Crossmodal-3600 (arXiv 2205.12522): 36 languages."""

from collections.abc import Sequence
import hashlib
import json
import os
from typing import Any

from sigjax import errors
from sigjax.data.shards import files
from sigjax.data.source import Source
from sigjax.evaluators import retrieval


def xm3600(
  *,
  path: str,
  images: str,
  pp_image: str,
  pp_text: str,
  bad_fraction: float,
  languages: Sequence[str] | None = None,
  batch_size: int = 256,
  ks: Sequence[int] = (1, 5, 10),
) -> retrieval.Retrieval:
  """Returns retrieval in each language, and its plain mean over languages.

  Args:
    path: the published captions.jsonl, local or in a bucket.
    images: the folder of images, named KEY.jpg.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a caption given as "text".
    bad_fraction: the largest fraction of examples that may be unusable.
    languages: such as ("en", "he"); None: all that the file has.
    batch_size: B of the embedding.
    ks: the k of recall at k.

  Raises:
    UserError: the file cannot be read, has no such language, or images are
      missing.
  """
  return retrieval.Retrieval(
    data=open_source(path, images, languages),
    pp_image=pp_image,
    pp_text=pp_text,
    bad_fraction=bad_fraction,
    by="language",
    equal_captions=False,
    batch_size=batch_size,
    ks=ks,
  )


class _Records:
  """Images, each with its captions and the language of each caption."""

  def __init__(self, rows: list[dict[str, Any]], images: str, identity: str):
    self._rows, self._images, self.identity = rows, images, identity

  def __len__(self) -> int:
    return len(self._rows)

  def brief(self, i: int) -> dict[str, Any]:
    return dict(self._rows[i])

  def __getitem__(self, i: int) -> dict[str, Any]:
    place = _place(self._images, self._rows[i]["key"])
    return {**self._rows[i], "image": files.read_whole(place)}


def open_source(
  path: str, images: str, languages: Sequence[str] | None
) -> Source:
  """Opens the captions and images; see xm3600.

  Returns:
    A Source of {"key": str, "image": bytes, "captions": [str, ...],
    "language": [str, ...]}, one language for each caption. Images without a
    caption in the languages are not in it.
  """
  try:
    data = files.read_whole(path)
  except OSError as e:
    raise errors.UserError(
      f"{path} cannot be read ({e.strerror or e}); path= is the captions.jsonl "
      "of Crossmodal-3600"
    ) from e
  found = []
  for n, line in enumerate(data.decode(errors="replace").split("\n"), 1):
    if line.strip():
      found.append(_row(line, f"{path}, line {n}"))
  present = dict.fromkeys(name for _, texts in found for name in texts)
  for name in languages or ():
    errors.pick(present, name, f"language of {path}")
  rows = []
  for key, texts in found:
    pairs = [
      (name, text)
      for name in languages or present
      for text in texts.get(name, ())
      if text and text.strip()
    ]
    if pairs:
      rows.append(
        dict(
          key=key,
          captions=[text for _, text in pairs],
          language=[name for name, _ in pairs],
        )
      )
  places = [_place(images, row["key"]) for row in rows]
  missing = [
    place for place, stamp in zip(places, files.stamps(places)) if stamp is None
  ]
  if missing:
    raise errors.UserError(
      f"{len(missing)} of the {len(rows)} images of {path} are missing, the "
      f"first is {missing[0]}; images= is the folder with all of them"
    )
  digest = hashlib.sha256(json.dumps([rows, images]).encode()).hexdigest()
  return Source("xm3600", _Records(rows, images, digest))


def _place(images: str, key: str) -> str:
  return os.path.join(files.canonical(images), f"{key}.jpg")


def _row(line: str, where: str) -> tuple[str, dict[str, list[str]]]:
  """Returns the key of an image, and the captions of each language."""
  try:
    row = json.loads(line)
    return row["image/key"], {
      name: value["caption"]
      for name, value in row.items()
      if isinstance(value, dict)
    }
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f'{where}: it has to be {{"image/key": KEY, "en": {{"caption": [...]}}, '
      "...}, as in the captions.jsonl of Crossmodal-3600"
    ) from e
