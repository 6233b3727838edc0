"""Tar shards, as WebDataset and img2dataset write them, with random access.

Consecutive members whose names differ only after the last dot are one sample:
000000000.jpg, 000000000.txt, 000000000.json. If the same name appears again
later, it begins another sample, as in webdataset. The index tells where the
members of a sample lie; it is made from the headers alone.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import json as json_lib
from typing import Any

import numpy as np

from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.formats import tar_headers
from sigjax.data.formats.tar_headers import BLOCK, Damaged
from sigjax.data.shards import files, index

IMAGES = ("jpg", "jpeg", "png", "webp")
# `head` is where the image's headers begin and `lead` is their length, both in
# blocks of 512 bytes, as are text_at and json_at. Sizes are in bytes. A sample
# without a text (or json) has text_at 0, where no member's data can begin.
_ROW = np.dtype(
  [
    (name, "<u2" if name == "lead" else "<u4")
    for name in ("head", "lead", "image", "text_at", "text", "json_at", "json")
  ]
)
# Where a member's headers begin, where its data begins, and its size, in bytes.
_Place = tuple[int, int, int]
_NOWHERE: _Place = (0, 0, 0)


def _samples(
  window: files.Window,
) -> tuple[list[tuple[bytes, dict[str, _Place]]], bool]:
  """Reads a shard's headers.

  Returns:
    [(name without extension, {"image", "txt" or "json": place})], and whether
    the shard is whole.
  """
  samples: list[tuple[bytes, dict[str, _Place]]] = []
  at = 0
  while True:
    try:
      found = tar_headers.member(window, at)
    except Damaged:
      return samples, False
    if found is None:
      return samples, True
    name, data, size = found
    end = data + size
    if end > window.size:
      return samples, False
    key, _, ending = (name or b"").rpartition(b".")
    # macOS adds a file ._NAME with its attributes before each file NAME.
    hidden = key.rpartition(b"/")[2].startswith(b"._")
    if key and b"/" not in ending and not hidden:
      ending = ending.decode("latin-1").lower()
      part = "image" if ending in IMAGES else ending
      if not samples or samples[-1][0] != key or part in samples[-1][1]:
        samples.append((key, {}))
      if part in ("image", "txt", "json"):
        samples[-1][1][part] = at, data, size
    at = -(-end // BLOCK) * BLOCK


def _build(
  opened: files.Files, number: int, size: int
) -> tuple[np.ndarray, index.Faults]:
  """Builds the index of a tar; see index.Kind."""
  samples, whole = _samples(files.Window(opened, number, size))
  rows, wrong = [], {}
  for key, parts in samples:
    if not parts:
      continue  # other files, such as .npz
    head, data, image = parts.get("image", _NOWHERE)
    _, text_at, text = parts.get("txt", _NOWHERE)
    _, json_at, json = parts.get("json", _NOWHERE)
    fault = None
    if not data:
      fault = "missing image"
    elif not text_at and not json_at:
      fault = "missing caption"
    elif (
      max(image, text, json, max(data, text_at, json_at) // BLOCK) >= 2**32
      or (data - head) // BLOCK >= 2**16
    ):
      fault = "oversized member"
    if fault:
      faults.merge(wrong, {fault: (1, key.decode(errors="replace"))})
    else:
      rows.append(
        (
          head // BLOCK,
          (data - head) // BLOCK,
          image,
          text_at // BLOCK,
          text,
          json_at // BLOCK,
          json,
        )
      )
  if not whole:
    faults.merge(wrong, {"truncated shard": (1, opened.paths[number])})
  return np.array(rows, _ROW), wrong


_INDEX = index.Kind("samples", _ROW, _build)


def _parsed(data: bytes, where: str) -> dict[str, Any]:
  """Returns the object in a sample's .json."""
  try:
    found = json_lib.loads(data)
  except (ValueError, RecursionError) as e:
    raise BadExample(
      f"{where}: its .json does not parse: {e}", kind="JSON does not parse"
    ) from e
  if not isinstance(found, dict):
    raise BadExample(
      f"{where}: its .json is not an object", kind="JSON does not parse"
    )
  return found


class TarRecords:
  """Random access to the samples of tar shards; see tar().

  Attributes:
    identity: of the shards.
  """

  def __init__(
    self, shards: index.Shards, captions: str | None, json: Sequence[str]
  ):
    self._shards = shards
    self._captions, self._json = captions, json
    self._index = shards.index(_INDEX)
    self.identity = shards.identity

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._read(i, with_image=True)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image, which is not read."""
    return self._read(i, with_image=False)

  def _read(self, i: int, with_image: bool) -> dict[str, Any]:
    number, row = self._index.locate(i)
    head, lead, image, text_at, text, json_at, json = row
    from_json = bool(self._captions) or not text_at
    path = self._shards.paths[number]
    if text > captions_lib.MAX_CAPTION and not from_json:
      raise BadExample(
        f"{path}: a caption of {text} bytes", kind="caption too long"
      )
    lead *= BLOCK
    spans = [(head * BLOCK, lead + image if with_image else lead)]
    if not from_json:
      spans.append((text_at * BLOCK, text))
    if json_at and (from_json or self._json):
      spans.append((json_at * BLOCK, json))
    first, *others = self._shards.files.spans(number, spans)
    name = self._name(path, first, lead, image)
    example: dict[str, Any] = {"key": name}
    if with_image:
      example["image"] = first[lead:]
    if not from_json:
      example["captions"] = [captions_lib.caption(others[0])]
    if from_json or self._json:
      fields = {}
      if json_at:
        fields = _parsed(others[-1], f"{path}: {name}")
      for key in self._json:
        example[key] = fields.get(key)
      if from_json:
        example.update(self._of_json(fields, f"{path}: {name}"))
    return example

  def _name(self, path: str, data: bytes, lead: int, image: int) -> str:
    """Returns a sample's name, read from the headers before its image.

    Raises:
      BadExample: they are not the headers of a member of `image` bytes.
    """
    try:
      found = tar_headers.member(lambda start, n: data[start : start + n], 0)
    except Damaged:
      found = None
    if found and found[0] and found[1:] == (lead, image):
      return found[0].decode(errors="replace").rpartition(".")[0]
    raise BadExample(
      f"{path} changed after it was indexed", kind="unreadable shard"
    )

  def _of_json(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the captions in a sample's .json, by language with these."""
    key = self._captions or "caption"
    value, more = fields.get(key), {}
    if isinstance(value, dict):
      value, more["language"] = captions_lib.of_languages(value)
    texts = [value] if isinstance(value, str) else value
    if (
      not isinstance(texts, list)
      or not texts
      or not all(isinstance(text, str) for text in texts)
    ):
      raise BadExample(
        f'{where}: its .json has no text at "{key}"', kind="missing caption"
      )
    return {"captions": list(map(captions_lib.caption, texts)), **more}

  def column(self, name: str) -> Iterator[np.ndarray] | None:
    """Yields the values at key `name` of all samples' .json, in order.

    They are read once, and kept as indices are. Returns None if no .json of up
    to 100 samples, spread over the shards, has this key.
    """
    what = self._shards.what

    def fields(read: Callable[[int, int], bytes], row: Any) -> dict[str, Any]:
      json_at, json = row[-2:]
      try:
        return _parsed(read(json_at * BLOCK, json), what) if json_at else {}
      except BadExample:
        return {}  # a sample without a value passes no filter

    def build(
      opened: files.Files, number: int, size: int
    ) -> tuple[np.ndarray, index.Faults]:
      window = files.Window(opened, number, size)
      rows = self._index.of_shard(number).tolist()
      values = [fields(window, row).get(name) for row in rows]
      # As JSON: an array would turn integers beside None into floats.
      return np.frombuffer(json_lib.dumps(values).encode(), np.uint8), {}

    def known(i: int) -> bool:
      number, row = self._index.locate(i)
      read = functools.partial(self._shards.files.read, number)
      return name in fields(read, row)

    if not any(map(known, range(0, len(self), -(-len(self) // 100)))):
      return None
    kind = index.Kind(f"values-{name}", np.dtype(np.uint8), build)
    return (
      source_lib.as_column(json_lib.loads(data.tobytes() or b"[]"), name, what)
      for data in self._shards.column(kind)
    )


def tar(
  shards: str | Sequence[str],
  captions: str | None = None,
  json: Sequence[str] = (),
) -> source_lib.Source:
  """Opens tar shards of images with captions: WebDataset, img2dataset.

  An example is a sample with an image (.jpg, .jpeg, .png, .webp) and a caption:
  {"image": bytes, "captions": [str], "key": the sample's name}.

  Args:
    shards: paths, local or in a bucket, with globs and brace lists:
      "data/{00000..00099}.tar", "gs://bucket/*.tar", or a list of such.
    captions: key of the .json that holds the caption, or several, or {"en":
      caption or several, ...}, which gives the feature "language", too; None:
      the .txt or, for samples without a .txt, "caption" of the .json.
    json: keys of the .json that become features, such as ("width", "url"); the
      value is None for samples without the key. Filters (`only`) may also use
      keys that are not listed here.

  Returns:
    A Source. Its `faults` count samples without an image or a caption, and the
    examples that truncated or missing shards lack.

  Raises:
    UserError: there is no example.
  """
  paths = files.expand(shards, "tar shards")
  found = index.Shards(paths, "tar shards")
  records = TarRecords(found, captions, tuple(json))
  return source_lib.Source(
    source_lib.brief_name("tar", shards),
    records,
    faults=faults.counts(found.faults),
  )
