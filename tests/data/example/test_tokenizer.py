"""The tokenizer, against SentencePiece itself and by construction."""

import os

import numpy as np
import pytest
import sentencepiece

from sigjax import errors
from sigjax.data.example import tokenizer

TEXTS = [
  f"a {color} {thing} in the {place}"
  for color in ("red", "green", "blue")
  for thing in ("apple", "house", "dog", "river")
  for place in ("morning", "forest", "rain")
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "test.model"
  tokenizer.train(TEXTS, 26, path)
  return path


def test_ids_are_sentencepieces_then_ends(path):
  tok = tokenizer.Tokenizer(path)
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  want = model.encode("a red dog")
  assert 1 not in want and len(want) > 1
  row = tok("a red dog", 12)
  assert row.dtype == np.int32
  assert row.tolist() == want + [1] * (12 - len(want))
  assert tok.vocab_size == 26
  assert model.decode(want) == "a red dog"
  assert (model.eos_id(), model.unk_id(), model.bos_id()) == (1, 2, -1)


def test_long_text_keeps_the_end_token(path):
  tok = tokenizer.Tokenizer(path)
  full = tok("a red dog in the rain", 30)
  n = int((full != 1).sum())
  assert tok("a red dog in the rain", n + 1).tolist() == full[: n + 1].tolist()
  for length in (n, 3, 2):  # n pieces do not fit n places: the end needs one
    assert tok("a red dog in the rain", length).tolist() == [
      *full[: length - 1],
      1,
    ]
  assert tok("a red dog", 1).tolist() == [1]


def test_empty_text_is_all_ends(path):
  assert tokenizer.Tokenizer(path)("", 4).tolist() == [1, 1, 1, 1]


def test_end_token_written_as_text_is_no_end_token(path):
  assert 1 not in tokenizer.Tokenizer(path)("</s>", 30)[:2]


def test_training_is_deterministic_and_leaves_one_file(path, tmp_path):
  again = tmp_path / "again.model"
  tokenizer.train(iter(TEXTS), 26, again)
  assert again.read_bytes() == path.read_bytes()
  assert os.listdir(tmp_path) == ["again.model"]


def test_too_few_texts(tmp_path):
  path = tmp_path / "old.model"
  path.write_bytes(b"old")
  with pytest.raises(
    errors.UserError, match="of 5 pieces can be trained on these"
  ):
    tokenizer.train(TEXTS, 5, path)
  with pytest.raises(errors.UserError, match="are no texts"):
    tokenizer.train(["", " "], 50, path)
  assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 1
  tokenizer.train(TEXTS, 5000, path)  # as many as there are
  tok = tokenizer.Tokenizer(path)
  assert 26 < tok.vocab_size < 200
  assert tok("a red dog", 8).tolist() != [1] * 8


@pytest.mark.parametrize(
  "content, reason",
  [(None, "No such file"), (b"", "not a model"), (b"text", "not a model")],
)
def test_unreadable_model_is_named(tmp_path, content, reason):
  path = tmp_path / "broken.model"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(errors.UserError) as e:
    tokenizer.Tokenizer(path)
  assert f"{path} cannot be read: {reason}" in str(e.value)


def test_model_with_another_end_token_is_refused(tmp_path):
  path = tmp_path / "other.model"
  with open(path, "wb") as f:  # SentencePiece's defaults: unk 0, bos 1, eos 2
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS),
      model_writer=f,
      vocab_size=26,
      minloglevel=2,
    )
  with pytest.raises(errors.UserError, match="ends texts with id 2"):
    tokenizer.Tokenizer(path)
