"""Texts to token ids: SentencePiece models whose id 1 ends every text.

Id 1 ends a text and pads the rest of the row, as in the c4_en and Gemma
vocabularies of the released models. The last id of a row is always 1, because
the text tower reads the representation of the last token.
"""

from collections.abc import Iterable
import io
import itertools
import logging
import os
import pathlib
import re

from jaxtyping import Int
import numpy as np
import sentencepiece

from sigjax import errors
from sigjax.runtime import files

log = logging.getLogger("sigjax")

EOS = 1
_EXTRA = re.compile("▁?<extra_id_[0-9]+>")
CHARACTER_COVERAGE = 0.9995  # SentencePiece's own default


class Tokenizer:
  """A SentencePiece model.

  Args:
    path: its file.
    model: the bytes of that file, where they are known already: then it is not
      read, and only named in errors.

  Attributes:
    model: the bytes of its file.
    vocab_size: the number of ids.
    rows: V, the rows that a table of embeddings needs: vocab_size, without the
      symbols <extra_id_0>, .. at its end, which T5 added and which no ordinary
      text contains. The table of siglip/b16_256_i18n has none for them.

  Raises:
    UserError: the file is missing or is no SentencePiece model, or the model's
      end token is not 1.
  """

  model: bytes
  vocab_size: int
  rows: int

  def __init__(self, path: str | os.PathLike[str], model: bytes | None = None):
    try:
      self.model = files.path(path).read_bytes() if model is None else model
      # SentencePiece loads an empty file as a model without pieces.
      self._pieces = sentencepiece.SentencePieceProcessor(
        model_proto=self.model or b"empty"
      )
    except (OSError, RuntimeError) as e:
      reason = e.strerror if isinstance(e, OSError) else "not a model"
      raise errors.UserError(
        f"SentencePiece model {path} cannot be read: {reason}"
      ) from e
    if self._pieces.eos_id() != EOS:
      raise errors.UserError(
        f"SentencePiece model {path} ends texts with id "
        f"{self._pieces.eos_id()}, but it has to be {EOS}"
      )
    self.vocab_size = self.rows = self._pieces.vocab_size()
    while self.rows and _EXTRA.fullmatch(self._pieces.IdToPiece(self.rows - 1)):
      self.rows -= 1

  def __call__(
    self, text: str, length: int, pad: int = EOS
  ) -> Int[np.ndarray, " length"]:
    """Returns the ids of a text and 1, padded or cut to a length.

    Args:
      text: any text; "" gives the end token alone.
      length: L. A text of L pieces or more is cut to L - 1 pieces and 1.
      pad: fills the rest of the row: 1 in SigLIP, 0 in SigLIP 2.

    Returns:
      (L,) int32.
    """
    row = np.full(length, pad, np.int32)
    ids = self._pieces.encode(text)[: length - 1]
    row[: len(ids)] = ids
    row[len(ids)] = EOS
    return row

  def text(self, ids: Iterable[int]) -> str:
    """Returns the text of some ids, up to the first 1; all below vocab_size."""
    before = itertools.takewhile(lambda i: i != EOS, map(int, ids))
    return self._pieces.decode(list(before))

  def count(self, text: str) -> int:
    """Returns the number of ids of a text, the end token included."""
    return len(self._pieces.encode(text)) + 1


def train(
  texts: Iterable[str],
  vocab_size: int,
  path: str | os.PathLike[str],
  character_coverage: float = CHARACTER_COVERAGE,
  byte_fallback: bool = False,
) -> None:
  """Trains a unigram model; the same texts give the same model.

  Args:
    texts: training texts. Lower-case them first if the tokenizer is to read
      lower-cased text.
    vocab_size: the number of ids to aim for, including those of padding (0,
      which Tokenizer does not use), end (1) and unknown (2). The model has
      fewer if the texts yield fewer; that is logged.
    path: the file to write.
    character_coverage: the share of the texts' letters whose characters become
      pieces; others are unknown (2). 1 for several scripts: the letters of a
      rare one may be rarer than one in 2000.
    byte_fallback: whether characters that are no piece are encoded as bytes of
      UTF-8, each a piece, so that nothing is unknown; takes 256 of the pieces.

  Raises:
    UserError: there are no texts, character_coverage is no share, or vocab_size
      is too small for the texts' characters.
  """
  if not 0.9 <= character_coverage <= 1:
    raise errors.UserError(
      f"character_coverage is {character_coverage!r}, but has to be a share "
      "from 0.9 to 1, such as 0.9995"
    )
  model = io.BytesIO()
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise errors.UserError("no tokenizer can be trained: there are no texts")
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      vocab_size=vocab_size,
      pad_id=0,
      eos_id=EOS,
      unk_id=2,
      bos_id=-1,
      character_coverage=character_coverage,
      byte_fallback=byte_fallback,
      num_threads=1,
      shuffle_input_sentence=False,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  except RuntimeError as e:
    # The last sentence says what is wrong.
    reason = " ".join(str(e).split()).split("] ")[-1]
    raise errors.UserError(
      f"no tokenizer of {vocab_size} pieces can be trained on these texts: "
      f"{reason}"
    ) from e
  with files.replacing(pathlib.Path(path)) as aside:
    aside.write_bytes(model.getvalue())
    found = Tokenizer(aside).vocab_size
  if found < vocab_size:
    log.warning(
      "%d texts yield a vocabulary of %d pieces, not of %d: set vocab_size to "
      "%d, here and in the model, or train on more texts",
      len(texts),
      found,
      vocab_size,
      found,
    )
