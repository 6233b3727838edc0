"""Texts to token ids: SentencePiece models, with an end token that sticks.

Id 1 ends a text and fills what is left of the row, as in the c4_en and Gemma
vocabularies of the released models. It is always the last of a row, for the
text tower reads its representation there.
"""

import io
import logging
import os
import shutil

import numpy as np
import sentencepiece

from sigjax import errors
from sigjax.weights import fetch

log = logging.getLogger("sigjax")

EOS = 1

# The vocabularies of the released models.
NAMES = {
  "c4_en": "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
  "mc4": "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
  "gemma": "gs://big_vision/gemma_tokenizer.model",
}


class Tokenizer:
  """A SentencePiece model from a file.

  Raises:
    UserError: no such file, no SentencePiece model, or its end token is not 1.
  """

  def __init__(self, path):
    try:
      with open(path, "rb") as f:
        data = f.read()
      # An empty file would load, as a model without pieces.
      self._model = sentencepiece.SentencePieceProcessor(
        model_proto=data or b"empty"
      )
    except (OSError, RuntimeError) as e:
      reason = e.strerror if isinstance(e, OSError) else "not a model"
      raise errors.UserError(
        f"SentencePiece model {path} cannot be read: {reason}"
      ) from e
    if self._model.eos_id() != EOS:
      raise errors.UserError(
        f"SentencePiece model {path} ends texts with id "
        f"{self._model.eos_id()}, but it has to be {EOS}"
      )
    self.vocab_size = self._model.vocab_size()

  def __call__(self, text, length, pad=EOS):
    """Returns the ids of a text and 1, (length,) int32, cut so that 1 is last.

    What is left of the row is `pad`: 1 of SigLIP, 0 of SigLIP 2.
    """
    row = np.full(length, pad, np.int32)
    ids = self._model.encode(text)[: length - 1]
    row[: len(ids)] = ids
    row[len(ids)] = EOS
    return row

  def batch(self, texts, length):
    """Returns the ids of n texts, (n, length) int32."""
    rows = [self(text, length) for text in texts]
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)


def train(texts, vocab_size, path):
  """Trains a unigram model of vocab_size pieces, the same every time.

  It has fewer where the texts yield no more, which is logged.

  Args:
    texts: an iterable of str; for lower-cased text, lower-case it before.
    vocab_size: the number of ids, those of padding (0, not used by Tokenizer),
      end (1) and unknown (2) included.
    path: where the model is written, all at once.

  Raises:
    UserError: there are no texts, or they have more characters than pieces.
  """
  model = io.BytesIO()
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise errors.UserError("no tokenizer from no texts")
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      vocab_size=vocab_size,
      pad_id=0,
      eos_id=EOS,
      unk_id=2,
      bos_id=-1,
      character_coverage=0.9995,
      byte_fallback=False,
      num_threads=1,
      shuffle_input_sentence=False,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  except RuntimeError as e:
    # The last sentence says what is wrong.
    reason = " ".join(str(e).split()).split("] ")[-1]
    raise errors.UserError(
      f"no tokenizer of {vocab_size} pieces from these texts: {reason}"
    ) from e
  aside = f"{path}.{os.getpid()}.tmp"
  with open(aside, "wb") as f:
    f.write(model.getvalue())
  found = Tokenizer(aside).vocab_size
  if found < vocab_size:
    log.info(
      "%d texts yield a vocabulary of %d pieces, not of %d",
      len(texts),
      found,
      vocab_size,
    )
  os.replace(aside, path)


def of_run(copy, texts, *, path=None, vocab_size=None, captions="captions"):
  """The tokenizer of a run, of which the workdir keeps a copy.

  Args:
    copy: the workdir's copy; if it is there already, it is what is used.
    texts: fn(captions) -> iterable of str, the training captions.
    path: a SentencePiece model to copy: a file, a URL, or one of NAMES; or
    vocab_size: the size of one to train, on lower-cased training captions.
    captions: the feature that holds them.

  Raises:
    UserError: neither or both of path and vocab_size, or what Tokenizer, train
      and fetch.local refuse.
  """
  if (path is None) == (vocab_size is None):
    raise errors.UserError(
      "config.tokenizer takes either path or vocab_size (to train one)"
    )
  if not os.path.exists(copy):
    if path is None:
      train((text.lower() for text in texts(captions)), vocab_size, copy)
    else:
      path = _local(path)
      Tokenizer(path)  # refuses what is none before it is copied
      aside = f"{copy}.{os.getpid()}.tmp"
      shutil.copyfile(path, aside)
      os.replace(aside, copy)
  return Tokenizer(copy)


def _local(path):
  """Returns the local path of a SentencePiece model, fetched if need be."""
  known = f"known are: {', '.join(NAMES)}"
  url = NAMES.get(str(path), path)
  if fetch.is_url(url):
    return fetch.local(url, known)
  if not os.path.exists(path):
    raise errors.UserError(
      f"there is no SentencePiece model {path}{errors.closest(path, NAMES)}; "
      f"{known}"
    )
  return path
