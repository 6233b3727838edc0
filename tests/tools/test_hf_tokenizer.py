"""SentencePiece's ids and those of transformers."""

import unicodedata

import hf_case  # beside this file
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from sigjax import errors
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import two_towers
from sigjax.weights import npz
from tools import convert_to_hf
from tools.hf import tokenizer as hf_tokenizer

BYTES = dict(byte_fallback=True, vocab_size=400)
GEMMA = dict(
  model_type="bpe",
  normalization_rule_name="identity",
  bos_id=2,
  unk_id=3,
  add_dummy_prefix=False,
  remove_extra_whitespaces=False,
  user_defined_symbols=["<h1>", "\n\n", "▁▁▁", "[@BOS@]"],
  **BYTES,
)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
  "kind",
  [
    {},
    BYTES,
    dict(normalization_rule_name="identity"),
    dict(
      user_defined_symbols=["▁<extra_id_0>", "<sad>"],
      required_chars="</s>unkpd",
    ),
    dict(model_type="bpe", vocab_size=150),
    GEMMA,
  ],
  ids=["c4", "mc4", "identity", "extra", "bpe", "gemma"],
)
def test_tokens(hf, tmp_path, kind, lower):
  _, transformers = hf
  hf_case.spm(tmp_path / "tokenizer.model", lower, **kind)
  tokenizer = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.model")
  pp_text = f"tokenize(16{', pad=0' if kind is GEMMA else ''})"
  config = hf_case.write_config(
    tmp_path,
    text=dict(vocab_size=tokenizer.vocab_size),
    length=16,
    pp_text="lower|" * lower + pp_text,
  )
  model = two_towers.TwoTowers(**config["model"])
  npz.save_params(tmp_path / "w.npz", hf_case.random_params(model, 32, 16))
  convert_to_hf.convert(tmp_path / "w.npz", tmp_path / "hf")
  texts = hf_case.TEXTS + [
    "a <h1>b</h1>\n\nc   d     e",
    "<H1> <h1",
    "[@BOS@] a [@bos@]",
    "a <extra_id_0>b",
    "<sad> a<sad>",
  ]
  if kind is BYTES:
    texts.remove("a</s>b <unk> <pad>")  # see hf_tokenizer: "<" is unknown
  rng = np.random.default_rng(1)
  # Without what combines, see hf_tokenizer.
  letters = [
    c
    for c in sorted(set("".join(texts)))
    if not "\u1100" <= c < "\u1200"
    and not any(map(unicodedata.combining, unicodedata.normalize("NFKC", c)))
  ]
  texts += ["".join(rng.choice(letters, 12)) for _ in range(300)]
  got = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")(
    text=texts, padding="max_length", max_length=16, truncation=True
  )
  want = hf_case.ours(config["pp_text"], "text", texts, tokenizer)
  assert list(got) == ["input_ids"]  # no mask: padding is seen
  wrong = [t for t, g, w in zip(texts, got["input_ids"], want) if g != [*w]]
  assert not wrong


@pytest.mark.parametrize(
  "kind, message",
  [
    (dict(model_type="char", vocab_size=30), "is neither unigram nor BPE"),
    (dict(treat_whitespace_as_suffix=True), "puts spaces behind words"),
    (
      dict(model_type="bpe", vocab_size=150, user_defined_symbols=["<h1>"]),
      "has symbols of its own (<h1>)",
    ),
    (dict(eos_id=3), "ends texts with id 3"),
  ],
  ids=str,
)
def test_tokenizers_that_are_refused(tmp_path, kind, message):
  with pytest.raises(errors.UserError) as e:
    hf_tokenizer.convert(hf_case.spm(tmp_path / "a.model", **kind), True, 999)
  assert message in str(e.value)


def test_a_tokenizer_json_that_differs_is_not_written(tmp_path, monkeypatch):
  monkeypatch.setattr(hf_tokenizer, "_normalizers", lambda spec, lower: [])
  with pytest.raises(errors.UserError, match="tokenizer.json would give"):
    hf_tokenizer.files(hf_case.spm(tmp_path / "a.model"), True, 999, 12, 1)


def edited(path, edit):
  """Applies edit(list of pieces), which may change them, to a model file."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  pieces = list(proto.pieces)
  edit(pieces)
  del proto.pieces[:]
  proto.pieces.extend(pieces)
  path.write_bytes(proto.SerializeToString())
  return path


def test_bpe_goes_by_scores_not_by_ids(tmp_path):
  def edit(pieces):
    pieces[3:] = pieces[:2:-1]

  path = hf_case.spm(tmp_path / "a.model", model_type="bpe", vocab_size=150)
  hf_tokenizer.files(edited(path, edit), True, 150, 12, 1)  # compares all


def test_a_unigram_model_that_lacks_a_character(tmp_path):
  def edit(pieces):
    next(p for p in pieces if p.piece == "o").piece = "oooooo"

  path = hf_case.spm(tmp_path / "a.model")
  with pytest.raises(errors.UserError, match="no pieces, such as 'o'"):
    hf_tokenizer.convert(edited(path, edit), True, 97)


def test_symbols_beyond_the_embedding_table(tmp_path):
  def edit(pieces):
    pieces.append(pieces.pop(3))

  path = hf_case.spm(tmp_path / "a.model", user_defined_symbols=["▁<extra_0>"])
  hf_tokenizer.files(edited(path, edit), True, 96, 12, 1)
  with pytest.raises(errors.UserError, match="96 pieces, but .*_size is 95"):
    hf_tokenizer.files(path, True, 95, 12, 1)
