"""The tokenizer of a run, and its copy in the workdir."""

import os

import pytest

from sigjax import errors
from sigjax.data.example import tokenizer
from sigjax.weights import vocabulary

TEXTS = [
  f"a {color} {thing} in the {place}"
  for color in ("red", "green", "blue")
  for thing in ("apple", "house", "dog", "river")
  for place in ("morning", "forest", "rain")
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "test.model"
  tokenizer.train(TEXTS, 26, path)
  return path


def test_of_run_trains_once_and_then_keeps_its_copy(path, tmp_path):
  copy = tmp_path / "tokenizer.model"
  asked = []

  def texts(key):
    asked.append(key)
    return [text.upper() for text in TEXTS]

  tok = vocabulary.of_run(copy, texts, vocab_size=26, captions="alt")
  assert copy.read_bytes() == path.read_bytes()  # lower-cased
  assert asked == ["alt"] and tok.vocab_size == 26
  again = vocabulary.of_run(copy, None, vocab_size=20)  # the copy counts
  assert again.vocab_size == 26


def test_of_run_copies_a_model(path, tmp_path):
  copy = tmp_path / "tokenizer.model"
  with pytest.raises(errors.UserError, match="absent.model"):
    vocabulary.of_run(copy, None, path=tmp_path / "absent.model")
  assert not os.listdir(tmp_path)
  vocabulary.of_run(copy, None, path=path)
  assert copy.read_bytes() == path.read_bytes()
  assert os.listdir(tmp_path) == ["tokenizer.model"]
  for wrong in ({}, {"path": path, "vocab_size": 26}):
    with pytest.raises(errors.UserError, match="either path or vocab_size"):
      vocabulary.of_run(copy, None, **wrong)
