"""The vocabulary of a run: released, from a file, or trained on its captions.

The workdir keeps a copy, so that the run can be resumed and its predictions
repeated without the original.
"""

import base64
from collections.abc import Callable, Iterable
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

from sigjax import errors
from sigjax.data.example import tokenizer
from sigjax.runtime import files, hosts, identity

log = logging.getLogger("sigjax")

# The vocabularies of the released models.
NAMES = {
  "c4_en": "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
  "mc4": "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
  "gemma": "gs://big_vision/gemma_tokenizer.model",
}


def released(name: str) -> tokenizer.Tokenizer:
  """Returns the tokenizer of a name in NAMES, fetched if need be.

  Raises:
    UserError: there is no such name, or it cannot be fetched.
  """
  errors.pick(NAMES, name, "tokenizer")
  return tokenizer.Tokenizer(_local(name))


def is_released(name: str, sha256: str) -> bool | None:
  """Returns whether a tokenizer is the released one of a name in NAMES.

  That one is fetched if need be.

  Args:
    name: the name.
    sha256: of the tokenizer's file.

  Returns:
    None if it cannot be told: the released one cannot be had, and the tokenizer
    is none of the others that were fetched.
  """
  from sigjax.weights import fetch  # a run with a local file needs no fetch

  for other, url in NAMES.items():
    file = fetch.cached(url)
    if os.path.exists(file) and identity.sha256(file) == sha256:
      return other == name
  try:
    return identity.sha256(_local(name)) == sha256
  except errors.UserError:
    return None


def of_run(
  copy: files.Path,
  texts: Callable[[str], Iterable[str]],
  source: str,
  trained: bool,
  *,
  path: str | os.PathLike[str] | None = None,
  vocab_size: int | None = None,
  captions: str = "captions",
  character_coverage: float = tokenizer.CHARACTER_COVERAGE,
  byte_fallback: bool = False,
) -> tuple[tokenizer.Tokenizer, dict[str, Any]]:
  """Returns the tokenizer of a run; keep() writes it into the workdir.

  The workdir's copy is used as long as it was made from what the config asks
  for; otherwise the tokenizer is made anew. Once there is a checkpoint, it
  cannot change any more.

  All processes call this together. The primary one makes the tokenizer and
  sends it to the others. Nothing is written here, because the command may yet
  be refused.

  Args:
    copy: the workdir's copy, WORKDIR/tokenizer.model.
    texts: fn(captions) -> the training captions.
    source: the name of the training data.
    trained: whether the workdir has a checkpoint.
    path: a SentencePiece model to copy: a file, a URL, or one of NAMES; or
    vocab_size: the size of a model to train on lower-cased training captions.
    captions: the feature that holds the captions.
    character_coverage, byte_fallback: of a model to train; see tokenizer.train.

  Returns:
    The tokenizer and its record: what it was made from, and "sha256".

  Raises:
    UserError: neither or both of path and vocab_size are given; the model
      cannot be fetched, read or trained; or it is not the one that the
      checkpoint was trained with.
  """
  # Records of older versions have neither, which means the defaults.
  changed: dict[str, Any] = {}
  if character_coverage != tokenizer.CHARACTER_COVERAGE:
    changed["character_coverage"] = character_coverage
  if byte_fallback:
    changed["byte_fallback"] = byte_fallback
  if path is not None and changed:
    raise errors.UserError(
      f"config.tokenizer.{next(iter(changed))} is of a tokenizer to train, but "
      f"path={str(path)!r} is a trained one; leave it out"
    )
  if path is not None and vocab_size is None:
    wanted = {"path": str(path)}
  elif vocab_size is not None and path is None:
    wanted = {
      "vocab_size": vocab_size,
      "captions": captions,
      "source": source,
      **changed,
    }
  else:
    raise errors.UserError(
      "config.tokenizer takes either path or vocab_size (to train one)"
    )
  made, made_from = None, None
  if hosts.is_primary():
    made, made_from = _make(copy, texts, trained, wanted)
  sent = hosts.broadcast(
    json.dumps([made_from, made and base64.b64encode(made.model).decode()])
  )
  made_from, model = json.loads(sent)
  made = made or tokenizer.Tokenizer(copy, base64.b64decode(model))
  return made, {**made_from, "sha256": identity.sha256(made.model)}


def keep(
  copy: files.Path, made: tokenizer.Tokenizer, record: dict[str, Any]
) -> None:
  """Writes what of_run returned to WORKDIR/tokenizer.model and .json."""
  files.write(copy, made.model)
  files.write(_record(copy), json.dumps(record, indent=1))


def _make(
  copy: files.Path,
  texts: Callable[[str], Iterable[str]],
  trained: bool,
  wanted: dict[str, Any],
) -> tuple[tokenizer.Tokenizer, dict[str, Any]]:
  """Returns a tokenizer and what it was made from; {} if that is not known."""
  found, made_from, digest = _open(copy), *_recorded(_record(copy))
  if found and (digest is None or digest == identity.sha256(found.model)):
    if made_from == wanted:
      return found, wanted
    if trained and not made_from:  # of a run from before there were records
      return found, {}
    if trained and _same(made_from, wanted, digest):
      return found, made_from
    if trained:
      raise errors.UserError(
        f"config.tokenizer has {_shown(wanted)}, but {copy} was made from "
        f"{_shown(made_from)}, and the checkpoints need that one; set "
        "config.tokenizer to it, or take another --workdir"
      )
    log.info("%s was not made for this config; it is made anew", copy)
  elif copy.exists():
    log.warning("%s is damaged; it is made anew", copy)

  if "path" in wanted:
    made = tokenizer.Tokenizer(_local(wanted["path"]))
  else:
    made = _train(texts(wanted["captions"]), **wanted)
  if trained and digest not in (None, identity.sha256(made.model)):
    raise errors.UserError(
      f"{copy} is missing or damaged, and {_shown(wanted)} gives another "
      "tokenizer than the checkpoints were trained with; put a copy of the "
      "old one there"
    )
  return made, wanted


def _train(
  texts: Iterable[str],
  vocab_size: int,
  captions: str,
  source: str,
  **options: Any,
) -> tokenizer.Tokenizer:
  """Returns a tokenizer that is trained as `wanted` of _make says."""
  del captions, source
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "tokenizer.model"
    tokenizer.train(
      (text.lower() for text in texts), vocab_size, path, **options
    )
    return tokenizer.Tokenizer(path)


def _open(copy: files.Path) -> tokenizer.Tokenizer | None:
  """Returns the tokenizer of a file; None if it is missing or damaged."""
  try:
    return tokenizer.Tokenizer(copy)
  except errors.UserError:
    return None


def _record(copy: files.Path) -> files.Path:
  return copy.with_suffix(".json")


def _recorded(
  record: files.Path,
) -> tuple[dict[str, Any], str | None]:
  """Returns (what the copy was made from, its SHA-256); ({}, None): unknown."""
  try:
    made_from = json.loads(record.read_text())
    return made_from, made_from.pop("sha256")
  except (OSError, ValueError, AttributeError, KeyError, TypeError):
    return {}, None


def _same(made_from: dict[str, Any], wanted: dict[str, Any], sha: Any) -> bool:
  """Whether both give the same model, though their records differ."""
  if "path" in wanted:  # a file may move
    try:
      return identity.sha256(_local(wanted["path"])) == sha
    except (errors.UserError, OSError):
      return False
  return {**made_from, "source": None} == {**wanted, "source": None}


def _shown(made_from: dict[str, Any]) -> str:
  return ", ".join(f"{k}={v!r}" for k, v in made_from.items())


def _local(path: str | os.PathLike[str] | None) -> str:
  """Returns the local path of a SentencePiece model, fetched if need be."""
  known = f"known are: {', '.join(NAMES)}"
  url = NAMES.get(str(path), str(path))
  if "://" in url:
    from sigjax.weights import fetch  # a run with a local file needs no fetch

    if fetch.is_url(url):
      return fetch.local(url, known)
  if not os.path.exists(url):
    raise errors.UserError(
      f"there is no SentencePiece model {path}{errors.closest(path, NAMES)}; "
      f"{known}"
    )
  return url
