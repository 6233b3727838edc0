"""Small models, tokenizers and images for the tools for Hugging Face."""

import io
import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import sentencepiece

from sigjax.data.example import preprocess
from tools import convert_to_hf

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
WORDS = """a photo of the red cat and two small dogs on some green grass, seen
from above; drawing: bird's nest no. 42! ein schönes Foto von Straße und Haus
фотография кошки ΟΔΟΣ ὁδός μιά γάτα 猫の写真 고양이
사진 café naïve (x) "quoted" """
TEXTS = [
  "",
  " ",
  "a photo of a cat",
  "A PHOTO of Two CATS.",
  "  two   spaces ",
  "tab\there\n new line",
  "bird's-nest, no. 42!",
  "Straße STRASSE ΟΔΟΣ ΟΔΟΣ.",
  "İstanbul",
  "ｆｕｌｌ ｗｉｄｔｈ ｶﾞ A～B",
  "½ ﬁne ™",
  "cafe\u0301 nai\u0308ve",
  "\u1100\u1161\u11a8",
  "한글 고양이",
  "猫の写真です",
  "👩‍👩‍👧 🏳️‍🌈",
  "zero\u200bwidth\u00a0",
  "a</s>b <unk> <pad>",
  "▁a▁ b",
  "a photo " * 30,
  "x" * 200,
  "\x00\x07",
]
BOTH = dict(width=48, depth=2, mlp_dim=96, num_heads=3)


def spm(path, lower=True, **kwargs):
  """Trains a SentencePiece model on WORDS."""
  rng = np.random.default_rng(0)
  words = (WORDS.lower() if lower else WORDS).split()
  lines = [" ".join(rng.choice(words, 9)) for _ in range(300)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    **{
      **dict(
        vocab_size=97,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
      ),
      **kwargs,
    },
  )
  path.write_bytes(model.getvalue())
  return path


def write_config(folder, image=(), text=(), res=32, length=12, **kwargs):
  """Writes config.json and tokenizer.model for a model like the golden ones."""
  model = dict(
    image={**BOTH, "patch_size": 8, **dict(image)},
    text={**BOTH, "vocab_size": 97, **dict(text)},
    out_dim=[None, 48],
  )
  config = dict(
    model=model,
    pp_image=f"decode|resize({res})|value_range(-1,1)",
    pp_text=f"lower|tokenize({length})|keep('text')",
  )
  config.update({k: v for k, v in kwargs.items() if k.startswith("pp_")})
  config = {k: v for k, v in config.items() if v}
  model.update({k: v for k, v in kwargs.items() if not k.startswith("pp_")})
  (folder / "config.json").write_text(json.dumps(config))
  if not (folder / "tokenizer.model").exists():
    spm(folder / "tokenizer.model")
  return config


def golden_folder(folder):
  """Fills a folder as tools.convert_from_hf does, with a golden model."""
  write_config(
    folder, pp_image="decode|resize(32)|value_range(-1,1)|keep('image')"
  )
  shutil.copy(GOLDEN / "siglip_tiny.npz", folder / "params.npz")
  return folder


def convert_golden(folder, name="siglip_tiny"):
  """Converts a golden file, with what write_config wrote, to folder / "hf"."""
  convert_to_hf.convert(
    GOLDEN / f"{name}.npz",
    folder / "hf",
    folder / "config.json",
    folder / "tokenizer.model",
  )


NAFLEX = dict(
  image=dict(kind="naflex"),
  pp_image="decode|resize_to_patches(25,8)|keep('image')",
)


def random_params(model, res, length, seed=0):
  """Returns parameters of which every array is random."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros((1, res, res, 3), np.float32),
    np.zeros((1, length), np.int32),
  )["params"]
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes
  )


def jpeg(path, seed):
  """Writes a picture of coloured blocks, 60 x 45."""
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(blocks).resize((60, 45)).save(path, "JPEG", quality=95)
  return path


def png(seed, height, width, mode="RGB"):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
  data = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(data, "PNG")
  return data.getvalue()


def pictures(pngs):
  return [Image.open(io.BytesIO(data)) for data in pngs]


def ours(pp, key, values, tokenizer=None):
  """Returns what a pipe string makes of some values."""
  fn = preprocess.parse(pp, tokenizer=tokenizer)
  return np.stack([fn({key: v}, np.random.default_rng(0))[key] for v in values])


def same_arrays(path, want):
  got = dict(np.load(path))
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == want[name].dtype == np.float32
    assert got[name].tobytes() == want[name].tobytes(), name
