"""Texts to token ids: SentencePiece models, with an end token that sticks.

Id 1 ends a text and fills what is left of the row, as in the c4_en and Gemma
vocabularies of the released models. It is always the last of a row, for the
text tower reads its representation there.
"""

import io
import os
import shutil

import numpy as np
import sentencepiece

from sigjax import errors

EOS = 1


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
          model_proto=data or b"empty")
    except (OSError, RuntimeError) as e:
      reason = e.strerror if isinstance(e, OSError) else "not a model"
      raise errors.UserError(
          f"SentencePiece model {path} cannot be read: {reason}") from e
    if self._model.eos_id() != EOS:
      raise errors.UserError(
          f"SentencePiece model {path} ends texts with id "
          f"{self._model.eos_id()}, but it has to be {EOS}")
    self.vocab_size = self._model.vocab_size()

  def __call__(self, text, length):
    """Returns the ids of a text, (length,) int32, cut so that the last is 1."""
    row = np.full(length, EOS, np.int32)
    ids = self._model.encode(text)[:length - 1]
    row[:len(ids)] = ids
    return row

  def batch(self, texts, length):
    """Returns the ids of n texts, (n, length) int32."""
    rows = [self(text, length) for text in texts]
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)


def train(texts, vocab_size, path):
  """Trains a unigram model of exactly vocab_size pieces, the same every time.

  Args:
    texts: an iterable of str; for lower-cased text, lower-case it before.
    vocab_size: the number of ids, those of padding (0, not used by Tokenizer),
      end (1) and unknown (2) included.
    path: where the model is written, all at once.

  Raises:
    UserError: there are no texts, or they do not yield that many pieces.
  """
  model = io.BytesIO()
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise errors.UserError("no tokenizer from no texts")
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model,
        vocab_size=vocab_size, pad_id=0, eos_id=EOS, unk_id=2, bos_id=-1,
        character_coverage=0.9995, byte_fallback=False, num_threads=1,
        shuffle_input_sentence=False, minloglevel=2)
  except RuntimeError as e:
    # The last sentence says what would do: "... set it to a value <= 123."
    reason = " ".join(str(e).split()).split("] ")[-1]
    raise errors.UserError(
        f"no tokenizer of {vocab_size} pieces from these texts: {reason}"
    ) from e
  aside = f"{path}.{os.getpid()}.tmp"
  with open(aside, "wb") as f:
    f.write(model.getvalue())
  os.replace(aside, path)


def of_run(copy, texts, *, path=None, vocab_size=None, captions="captions"):
  """The tokenizer of a run, of which the workdir keeps a copy.

  Args:
    copy: the workdir's copy; if it is there already, it is what is used.
    texts: fn(captions) -> iterable of str, the training captions.
    path: a SentencePiece model to copy, or
    vocab_size: the size of one to train, on lower-cased training captions.
    captions: the feature that holds them.

  Raises:
    UserError: neither or both of path and vocab_size, or what Tokenizer and
      train refuse.
  """
  if (path is None) == (vocab_size is None):
    raise errors.UserError(
        "config.tokenizer takes either path or vocab_size (to train one)")
  if not os.path.exists(copy):
    if path is None:
      train((text.lower() for text in texts(captions)), vocab_size, copy)
    else:
      Tokenizer(path)  # refuses what is none before it is copied
      aside = f"{copy}.{os.getpid()}.tmp"
      shutil.copyfile(path, aside)
      os.replace(aside, copy)
  return Tokenizer(copy)
