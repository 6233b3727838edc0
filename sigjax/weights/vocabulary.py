"""The vocabulary of a run: released, from a file, or trained on its captions.

The workdir keeps a copy, so that the run can be resumed and its predictions
repeated without the original.
"""

from collections.abc import Callable, Iterable
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

from sigjax import errors
from sigjax.data.example import tokenizer
from sigjax.runtime import files

log = logging.getLogger("sigjax")

# The vocabularies of the released models.
NAMES = {
  "c4_en": "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
  "mc4": "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
  "gemma": "gs://big_vision/gemma_tokenizer.model",
}


def of_run(
  copy: pathlib.Path,
  texts: Callable[[str], Iterable[str]],
  source: str,
  trained: bool,
  *,
  path: str | os.PathLike[str] | None = None,
  vocab_size: int | None = None,
  captions: str = "captions",
) -> tokenizer.Tokenizer:
  """Returns the tokenizer of a run, and keeps a copy of it in the workdir.

  A JSON file beside the copy records what it was made from. The copy is used as
  long as that is what the config asks for, and otherwise made anew. Once there
  is a checkpoint, the tokenizer cannot change any more.

  Args:
    copy: the workdir's copy, WORKDIR/tokenizer.model.
    texts: fn(captions) -> the training captions.
    source: the name of the training data.
    trained: whether the workdir has a checkpoint.
    path: a SentencePiece model to copy: a file, a URL, or one of NAMES; or
    vocab_size: the size of a model to train on lower-cased training captions.
    captions: the feature that holds the captions.

  Raises:
    UserError: neither or both of path and vocab_size are given; the model
      cannot be fetched, read or trained; or it is not the one that the
      checkpoint was trained with.
  """
  if path is not None and vocab_size is None:
    wanted = {"path": str(path)}
  elif vocab_size is not None and path is None:
    wanted = {"vocab_size": vocab_size, "captions": captions, "source": source}
  else:
    raise errors.UserError(
      "config.tokenizer takes either path or vocab_size (to train one)"
    )
  found, made_from, digest = _open(copy), *_recorded(_record(copy))
  if found and (digest is None or digest == _digest(copy)):
    if made_from == wanted:
      return found
    if trained and (made_from is None or _same(made_from, wanted, digest)):
      return found  # without a record: of a run from before there were any
    if trained:
      raise errors.UserError(
        f"config.tokenizer has {_shown(wanted)}, but {copy} was made from "
        f"{_shown(made_from)}, and the checkpoints need that one; set "
        "config.tokenizer to it, or take another --workdir"
      )
    log.info("%s was not made for this config; it is made anew", copy)
  elif copy.exists():
    log.warning("%s is damaged; it is made anew", copy)

  with files.replacing(copy) as aside:
    if vocab_size is not None:
      tokenizer.train(
        (text.lower() for text in texts(captions)), vocab_size, aside
      )
    else:
      original = _local(path)
      tokenizer.Tokenizer(original)  # so that an error names this file
      shutil.copyfile(original, aside)
    made = tokenizer.Tokenizer(aside)
    if trained and digest not in (None, _digest(aside)):
      raise errors.UserError(
        f"{copy} is missing or damaged, and {_shown(wanted)} gives another "
        "tokenizer than the checkpoints were trained with; put a copy of the "
        "old one there"
      )
  files.write(
    _record(copy), json.dumps({**wanted, "sha256": _digest(copy)}, indent=1)
  )
  return made


def _open(copy: pathlib.Path) -> tokenizer.Tokenizer | None:
  """Returns the tokenizer of a file; None if it is missing or damaged."""
  try:
    return tokenizer.Tokenizer(copy)
  except errors.UserError:
    return None


def _record(copy: pathlib.Path) -> pathlib.Path:
  return copy.with_suffix(".json")


def _recorded(
  record: pathlib.Path,
) -> tuple[dict[str, Any] | None, str | None]:
  """Returns (what the copy was made from, its SHA-256); None if not known."""
  try:
    made_from = json.loads(record.read_text())
    return made_from, made_from.pop("sha256")
  except (OSError, ValueError, AttributeError, KeyError, TypeError):
    return None, None


def _same(made_from: dict[str, Any], wanted: dict[str, Any], sha: Any) -> bool:
  """Whether both give the same model, though their records differ."""
  if "path" in wanted:  # a file may move
    try:
      return _digest(pathlib.Path(_local(wanted["path"]))) == sha
    except (errors.UserError, OSError):
      return False
  return {**made_from, "source": None} == {**wanted, "source": None}


def _digest(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _shown(made_from: dict[str, Any] | None) -> str:
  return ", ".join(f"{k}={v!r}" for k, v in (made_from or {}).items())


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
