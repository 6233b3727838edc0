"""The tokenizer, against SentencePiece itself and by construction."""

import gzip
import json
import os
import pathlib
import unicodedata

from corpus import TEXTS
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sigjax import errors
from sigjax.data.example import preprocess, tokenizer


def test_ids_are_sentencepieces_then_ends(spm_path):
  tok = tokenizer.Tokenizer(spm_path)
  model = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
  want = model.encode("a red dog")
  assert 1 not in want and len(want) > 1
  row = tok("a red dog", 12)
  assert row.dtype == np.int32
  assert row.tolist() == want + [1] * (12 - len(want))
  assert tok.vocab_size == 26
  assert model.decode(want) == "a red dog" == tok.text(row)
  assert tok.text([*want, 1, *want]) == "a red dog"
  assert (model.eos_id(), model.unk_id(), model.bos_id()) == (1, 2, -1)


def test_symbols_that_t5_added_need_no_rows(tmp_path):
  """As in the vocabulary of siglip/b16_256_i18n, of 250,000 rows."""
  file = tmp_path / "extra.model"
  extra = [f"▁<extra_id_{i}>" for i in (1, 0)]
  proto = sentencepiece_model_pb2.ModelProto()
  tokenizer.train(TEXTS, 26, file)
  proto.ParseFromString(file.read_bytes())
  for piece in extra:
    proto.pieces.add(piece=piece, score=0.0, type=4)  # user-defined
  file.write_bytes(proto.SerializeToString())
  tok = tokenizer.Tokenizer(file)
  assert (tok.rows, tok.vocab_size) == (26, 28)


def test_long_text_keeps_the_end_token(spm_path):
  tok = tokenizer.Tokenizer(spm_path)
  full = tok("a red dog in the rain", 30)
  n = int((full != 1).sum())
  assert tok("a red dog in the rain", n + 1).tolist() == full[: n + 1].tolist()
  for length in (n, 3, 2):  # n pieces do not fit n places: the end needs one
    assert tok("a red dog in the rain", length).tolist() == [
      *full[: length - 1],
      1,
    ]
  assert tok("a red dog", 1).tolist() == [1]


def test_empty_text_is_all_ends(spm_path):
  assert tokenizer.Tokenizer(spm_path)("", 4).tolist() == [1, 1, 1, 1]


def test_end_token_written_as_text_is_no_end_token(spm_path):
  assert 1 not in tokenizer.Tokenizer(spm_path)("</s>", 30)[:2]


def test_training_is_deterministic_and_leaves_one_file(spm_path, tmp_path):
  again = tmp_path / "again.model"
  tokenizer.train(iter(TEXTS), 26, again)
  assert again.read_bytes() == spm_path.read_bytes()
  assert os.listdir(tmp_path) == ["again.model"]


def test_too_few_texts(tmp_path, caplog):
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
  assert f"of {tok.vocab_size} pieces, not of 5000: set" in caplog.text
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


def test_no_bytes_raise_anything_but_user_error(spm_path, tmp_path):
  whole, rng = spm_path.read_bytes(), np.random.default_rng(0)
  broken, fine = tmp_path / "broken.model", 0
  for _ in range(300):
    data = bytearray(whole)
    # The pieces and options take 1,500 bytes, the table of characters the rest.
    size = rng.choice([60, 1500, len(data)])
    for _ in range(rng.integers(1, 4)):
      data[-1 - rng.integers(size) if rng.random() < 0.5 else 0] = rng.integers(
        256
      )
      data[rng.integers(size)] = rng.integers(256)
    if rng.random() < 0.2:
      del data[rng.integers(len(data)) :]
    broken.write_bytes(data)
    try:
      tokens = tokenizer.Tokenizer(broken)("a red dog in the rain é", 8)
      assert tokens.shape == (8,)
      fine += 1
    except errors.UserError as e:
      assert "\n" not in str(e)
  assert 5 < fine < 295  # neither all survive nor none


@pytest.mark.parametrize("length, share", [(3, 1), (50, 0)])
def test_the_share_of_texts_that_are_cut(spm_path, length, share):
  tok = tokenizer.Tokenizer(spm_path)
  pp = f"decode|resize(8)|choice('c')|lower|tokenize({length})|keep('image')"
  examples = [dict(c=[text.upper()]) for text in TEXTS]
  numbers = np.arange(len(TEXTS))
  assert preprocess.cut_share(examples.__getitem__, numbers, pp, tok) == share


def test_the_share_of_cut_texts_is_that_of_an_even_sample(spm_path):
  tok = tokenizer.Tokenizer(spm_path)
  n = tok.count("a dog")
  assert tok("a dog", n)[-2:].tolist() == [*tok("a dog", n + 1)[-3:-2], 1]
  asked = []

  def brief(i):
    asked.append(i)
    if i % 1000 == 0:
      raise preprocess.BadExample("it is broken")
    return dict(c="a dog" if i < 75_000 else "a dog in the rain")

  share = lambda length: preprocess.cut_share(
    brief, np.arange(100_000), f"first('c')|tokenize({length})", tok
  )
  assert share(n) == pytest.approx(0.25, abs=0.01)
  assert len(asked) == 1000 and min(asked) == 0 and max(asked) == 99_999
  assert share(n - 1) == 1
  keep = "decode|keep('image')"
  assert preprocess.cut_share(brief, np.arange(9), keep, tok) == 0


# ---- Other scripts ----


@pytest.fixture(scope="module")
def names():
  """All names of emoji in Thai and Amharic: Unicode CLDR 48.2, Unicode-3.0."""
  path = pathlib.Path(__file__).parents[2] / "golden/cldr_names.json.gz"
  return json.loads(gzip.decompress(path.read_bytes()))


def unknown(path, texts):
  """Returns how many texts a model does not give back as they were.

  SentencePiece reads texts in Unicode's form NFKC.
  """
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  same = lambda text: " ".join(unicodedata.normalize("NFKC", text).split())
  lost = 0
  for text in texts:
    ids = model.encode(text)
    lost += model.unk_id() in ids or model.decode(ids) != same(text)
  return lost


def test_rare_scripts_are_not_lost(names, tmp_path):
  path = tmp_path / "t.model"
  th, am = names["th"], names["am"]
  assert len(th) == 2293 and len(am) == 2274
  english = ["a name in letters that are known to all of us"] * 20_000
  some = [*english, *th[::2], *am[::2]]
  tokenizer.train(some, 800, path)
  assert unknown(path, th + am) > 100
  tokenizer.train(some, 800, path, byte_fallback=True)
  assert unknown(path, th + am) == 0
  tokenizer.train([*english, *th, *am], 800, path, character_coverage=1.0)
  assert unknown(path, th + am) == 0


def test_a_coverage_that_is_no_share(tmp_path):
  for share in (0.5, 1.1, 99.95):
    with pytest.raises(errors.UserError, match="has to be a share"):
      tokenizer.train(["a"], 9, tmp_path / "m", character_coverage=share)
