"""The tokenizer of a run, and its copy in the workdir."""

import os

from corpus import TEXTS
import pytest

from sigjax import errors
from sigjax.data.example import tokenizer
from sigjax.weights import vocabulary


def of_run(copy, texts=None, trained=False, source="pets", **section):
  """Returns the tokenizer, which is then kept as a run keeps it."""
  before = sorted(copy.parent.iterdir())
  made, record = vocabulary.of_run(copy, texts, source, trained, **section)
  assert sorted(copy.parent.iterdir()) == before
  vocabulary.keep(copy, made, record)
  return made


def upper(asked=None):
  """Returns fn(captions) -> TEXTS in capitals."""

  def texts(key):
    if asked is not None:
      asked.append(key)
    return [text.upper() for text in TEXTS]

  return texts


def test_it_is_trained_once_on_lower_cased_captions(spm_path, tmp_path):
  copy, asked = tmp_path / "tokenizer.model", []
  for _ in range(2):
    tok = of_run(copy, upper(asked), vocab_size=26, captions="alt")
    assert copy.read_bytes() == spm_path.read_bytes() and tok.vocab_size == 26
  assert asked == ["alt"]
  assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer.model"]


def test_a_model_is_copied(spm_path, tmp_path):
  copy = tmp_path / "tokenizer.model"
  (tmp_path / "text.model").write_text("text")
  for wrong in ("absent.model", "text.model"):
    with pytest.raises(errors.UserError, match=f"{wrong}"):
      of_run(copy, path=tmp_path / wrong)
  assert os.listdir(tmp_path) == ["text.model"]
  of_run(copy, path=spm_path)
  assert copy.read_bytes() == spm_path.read_bytes()
  for wrong in ({}, {"path": spm_path, "vocab_size": 26}):
    with pytest.raises(errors.UserError, match="either path or vocab_size"):
      of_run(copy, **wrong)


OTHERS = [
  dict(vocab_size=24),
  dict(vocab_size=26, captions="alt"),
  dict(vocab_size=26, source="cars"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_stale_one_is_made_anew_before_there_is_a_checkpoint(tmp_path, other):
  copy, asked = tmp_path / "tokenizer.model", []
  of_run(copy, upper(), vocab_size=26)
  tok = of_run(copy, upper(asked), **other)
  assert tok.vocab_size == other["vocab_size"] and len(asked) == 1
  of_run(copy, None, **other)  # now it is of this config


def test_with_a_checkpoint_another_one_is_refused(spm_path, tmp_path):
  copy = tmp_path / "tokenizer.model"
  of_run(copy, upper(), vocab_size=26)
  for other in OTHERS[:2]:
    with pytest.raises(errors.UserError) as e:
      of_run(copy, upper(), trained=True, **other)
    said = str(e.value)
    assert f"vocab_size={other['vocab_size']}" in said and "\n" not in said
    assert f"{copy} was made from vocab_size=26, captions='captions'" in said
    assert "another --workdir" in said
  assert copy.read_bytes() == spm_path.read_bytes()
  # The data may move, and the same model may come from a file.
  of_run(copy, None, trained=True, vocab_size=26, source="moved")
  assert of_run(copy, None, trained=True, path=spm_path).vocab_size == 26
  small = tmp_path / "small.model"
  tokenizer.train(TEXTS, 24, small)
  with pytest.raises(errors.UserError, match="has path="):
    of_run(copy, None, trained=True, path=small)


def test_a_run_from_before_records_goes_on(spm_path, tmp_path):
  copy = tmp_path / "tokenizer.model"
  copy.write_bytes(spm_path.read_bytes())
  assert of_run(copy, None, trained=True, vocab_size=9).vocab_size == 26
  assert of_run(copy, upper(), vocab_size=24).vocab_size == 24


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("damage", [b"", b"text", "half", "other", "record"])
def test_a_damaged_copy_is_made_anew(
  spm_path, tmp_path, caplog, damage, trained
):
  copy = tmp_path / "tokenizer.model"
  of_run(copy, upper(), vocab_size=26)
  if damage == "record":
    (tmp_path / "tokenizer.json").write_text("")
  elif damage == "other":
    tokenizer.train(TEXTS, 24, copy)
  elif damage == "half":
    copy.write_bytes(spm_path.read_bytes()[:-100_000])
  else:
    copy.write_bytes(damage)
  with caplog.at_level("INFO", "sigjax"):
    assert of_run(copy, upper(), trained, vocab_size=26).vocab_size == 26
  assert copy.read_bytes() == spm_path.read_bytes()
  if damage != "record":
    assert f"{copy} is damaged; it is made anew" in caplog.text
    other = lambda key: TEXTS[:20]
    copy.write_bytes(b"")
    if trained:
      with pytest.raises(errors.UserError, match="put a copy of the old one"):
        of_run(copy, other, trained, vocab_size=26)
      assert copy.read_bytes() == b""


def test_options_of_training(tmp_path, spm_path):
  """Bytes are pieces, too; records of defaults are those of older versions."""
  copy = tmp_path / "tokenizer.model"
  of_run(copy, upper(), vocab_size=26)
  assert "byte" not in copy.with_suffix(".json").read_text()
  tok = of_run(copy, upper(), vocab_size=300, byte_fallback=True)
  assert 256 < tok.vocab_size <= 300 and 2 not in tok("ก", 6)
  with pytest.raises(errors.UserError, match="byte_fallback=True.*need that"):
    of_run(copy, upper(), trained=True, vocab_size=300)
  with pytest.raises(errors.UserError, match="character_coverage is of a tok"):
    of_run(copy, path=spm_path, character_coverage=1.0)
