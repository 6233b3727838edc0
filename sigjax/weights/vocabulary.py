"""The vocabulary of a run: released, from a file, or trained on its captions.

The workdir keeps a copy, so that the run can be resumed and its predictions
repeated without the original.
"""

from collections.abc import Callable, Iterable
import os
import pathlib
import shutil

from sigjax import errors
from sigjax.data.example import tokenizer
from sigjax.runtime import files

# The vocabularies of the released models.
NAMES = {
  "c4_en": "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
  "mc4": "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
  "gemma": "gs://big_vision/gemma_tokenizer.model",
}


def of_run(
  copy: pathlib.Path,
  texts: Callable[[str], Iterable[str]],
  *,
  path: str | os.PathLike[str] | None = None,
  vocab_size: int | None = None,
  captions: str = "captions",
) -> tokenizer.Tokenizer:
  """Returns the tokenizer of a run; makes the workdir's copy if there is none.

  Args:
    copy: the workdir's copy. If it exists, it is used.
    texts: fn(captions) -> the training captions.
    path: a SentencePiece model to copy: a file, a URL, or one of NAMES; or
    vocab_size: the size of a model to train on lower-cased training captions.
    captions: the feature that holds the captions.

  Raises:
    UserError: neither or both of path and vocab_size are given, or the model
      cannot be fetched, read or trained.
  """
  if (path is None) == (vocab_size is None):
    raise errors.UserError(
      "config.tokenizer takes either path or vocab_size (to train one)"
    )
  if not copy.exists():
    if vocab_size is not None:
      tokenizer.train(
        (text.lower() for text in texts(captions)), vocab_size, copy
      )
    else:
      found = _local(path)
      tokenizer.Tokenizer(found)  # checked before it is copied
      with files.replacing(copy) as aside:
        shutil.copyfile(found, aside)
  return tokenizer.Tokenizer(copy)


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
