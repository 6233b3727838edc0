"""The table of released checkpoints, against what is known of each."""

import pathlib
import re

import jax
import numpy as np
import pytest

from sigjax import errors, trees
from sigjax.checkpoints import restore
from sigjax.models import two_towers, vit
from sigjax.weights import fetch, known, npz, vocabulary

# Width, depth, mlp, heads.
SIZES = {
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "So400m": (1152, 27, 4304, 16),
  "g-opt": (1536, 40, 6144, 16),
}

# Image size, patch, text size, vocabulary, text length, head, resolution,
# million parameters (SigLIP as published; i18n and SigLIP 2 from the model
# cards' sizes of B, L, So400m and g-opt).
SIGLIP = {
  "b16_224": ("B", 16, "B", 32_000, 64, 768, 224, 203),
  "b16_256": ("B", 16, "B", 32_000, 64, 768, 256, 203),
  "b16_384": ("B", 16, "B", 32_000, 64, 768, 384, 203),
  "b16_512": ("B", 16, "B", 32_000, 64, 768, 512, 204),
  "l16_256": ("L", 16, "L", 32_000, 64, 1024, 256, 652),
  "l16_384": ("L", 16, "L", 32_000, 64, 1024, 384, 652),
  "so400m14_224": ("So400m", 14, "So400m", 32_000, 16, 1152, 224, 877),
  "so400m14_384": ("So400m", 14, "So400m", 32_000, 64, 1152, 384, 878),
  "b16_256_i18n": ("B", 16, "B", 250_000, 64, 768, 256, 371),
  "so400m16_256_i18n": ("So400m", 16, "So400m", 256_000, 64, None, 256, 1_130),
}
SIGLIP2 = {
  "b32_256": ("B", 32, "B", 256_000, 64, 768, 256, 377),
  "b16_224": ("B", 16, "B", 256_000, 64, 768, 224, 375),
  "b16_256": ("B", 16, "B", 256_000, 64, 768, 256, 375),
  "b16_384": ("B", 16, "B", 256_000, 64, 768, 384, 376),
  "b16_512": ("B", 16, "B", 256_000, 64, 768, 512, 376),
  "l16_256": ("L", 16, "L", 256_000, 64, 1024, 256, 881),
  "l16_384": ("L", 16, "L", 256_000, 64, 1024, 384, 882),
  "l16_512": ("L", 16, "L", 256_000, 64, 1024, 512, 882),
  "so400m14_224": ("So400m", 14, "So400m", 256_000, 64, 1152, 224, 1_136),
  "so400m14_384": ("So400m", 14, "So400m", 256_000, 64, 1152, 384, 1_136),
  "so400m16_256": ("So400m", 16, "So400m", 256_000, 64, 1152, 256, 1_136),
  "so400m16_384": ("So400m", 16, "So400m", 256_000, 64, 1152, 384, 1_136),
  "so400m16_512": ("So400m", 16, "So400m", 256_000, 64, 1152, 512, 1_137),
  "g-opt16_256": ("g-opt", 16, "So400m", 256_000, 64, 1536, 256, 1_871),
  "g-opt16_384": ("g-opt", 16, "So400m", 256_000, 64, 1536, 384, 1_872),
}
AUGREG = {
  "Ti_16": ("Ti", 16),
  "S_32": ("S", 32),
  "S_16": ("S", 16),
  "B_32": ("B", 32),
  "B_16": ("B", 16),
  "B_8": ("B", 8),
  "L_16": ("L", 16),
}
PAIRS = {
  f"{family}/{name}": (*row, family == "siglip2")
  for family, rows in (("siglip", SIGLIP), ("siglip2", SIGLIP2))
  for name, row in rows.items()
}


def dense(name, *shape, bias=None):
  return {f"{name}/kernel": shape, f"{name}/bias": bias or shape[-1:]}


def attention_and_mlp(attention, mlp, size):
  """Returns {name: shape} of an attention layer and an MLP."""
  width, _, mlp_dim, heads = SIZES[size]
  out = dense(f"{attention}/out", heads, width // heads, width)
  for name in "query", "key", "value":
    out |= dense(
      f"{attention}/{name}",
      width,
      heads,
      width // heads,
      bias=(heads, width // heads),
    )
  out |= dense(f"{mlp}/Dense_0", width, mlp_dim)
  return out | dense(f"{mlp}/Dense_1", mlp_dim, width)


def norm(name, size):
  return {f"{name}/{key}": SIZES[size][:1] for key in ("scale", "bias")}


def encoder(prefix, size, scan):
  """Returns {name: shape} of the blocks of a tower."""
  depth = SIZES[size][1]
  block = (
    norm("LayerNorm_0", size)
    | norm("LayerNorm_1", size)
    | (attention_and_mlp("MultiHeadDotProductAttention_0", "MlpBlock_0", size))
  )
  out = norm(f"{prefix}/encoder_norm", size)
  for i in [""] if scan else [f"_{i}" for i in range(depth)]:
    out |= {
      f"{prefix}/encoderblock{i}/{name}": (depth,) * scan + shape
      for name, shape in block.items()
    }
  return out


def image(size, patch, resolution, scan):
  width = SIZES[size][0]
  return (
    dense("img/embedding", patch, patch, 3, width)
    | encoder("img/Transformer", size, scan)
    | {"img/pos_embedding": (1, (resolution // patch) ** 2, width)}
  )


def both(size, patch, text, vocab, length, head, resolution, scan):
  """Returns {name: shape} of a file of both towers."""
  width, text_width = SIZES[size][0], SIZES[text][0]
  pool = "img/MAPHead_0"
  out = image(size, patch, resolution, scan)
  out |= {f"{pool}/probe": (1, 1, width)} | norm(f"{pool}/LayerNorm_0", size)
  out |= attention_and_mlp(
    f"{pool}/MultiHeadDotProductAttention_0", f"{pool}/MlpBlock_0", size
  )
  out |= {
    "txt/Embed_0/embedding": (vocab, text_width),
    "txt/pos_embedding": (1, length, text_width),
    "t": (1,),
    "b": (1,),
  }
  out |= encoder("txt/Encoder_0", text, scan)
  return out | (dense("txt/head", text_width, head) if head else {})


def zeros(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, dtype)


def one_of_each_model():
  """The names of PAIRS, without those that only differ in the resolution."""
  return {str(known.KNOWN[name].model): name for name in PAIRS}.values()


@pytest.mark.parametrize("name", one_of_each_model())
def test_both_towers(name):
  *row, millions, scan = PAIRS[name]
  it = known.get(name)
  assert it.model is not None
  shapes = jax.eval_shape(
    two_towers.TwoTowers(**it.model).init,
    jax.random.key(0),
    zeros(1, it.resolution, it.resolution, 3),
    zeros(1, it.text_length, dtype="int32"),
  )["params"]
  got = {k: v.shape for k, v in trees.flatten(shapes).items()}
  assert got == both(*row, scan)
  count = sum(map(np.prod, got.values())) / 1e6
  assert count == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", PAIRS)
def test_what_belongs_to_the_weights(name):
  size, patch, text, vocab, length, head, resolution, _, scan = PAIRS[name]
  it = known.get(name)
  assert [it.text_length, it.resolution] == [length, resolution]
  assert it.model == dict(
    image=dict(
      variant=f"{size}/{patch}",
      pool_type="map",
      **({"scan": True} if scan else {}),
    ),
    text=dict(
      variant=text, vocab_size=vocab, **({"scan": True} if scan else {})
    ),
    out_dim=(None, head),
  )
  assert (
    it.tokenizer == {32: "c4_en", 256: "gemma", 250: "mc4"}[vocab // 1000]
    or name == "siglip/so400m16_256_i18n"
  )


@pytest.mark.parametrize("name", ["b16", "so400m16"])
def test_naflex(name):
  """As the model of square images, but for the patches and their positions."""
  it = known.get(f"siglip2/{name}_naflex")
  square = known.get(f"siglip2/{name}_256")
  assert (it.patches, it.resolution, it.text_length) == (256, None, 64)
  shapes = lambda it, *image: {
    k: v.shape
    for k, v in trees.flatten(
      jax.eval_shape(
        two_towers.TwoTowers(**it.model).init,
        jax.random.key(0),
        zeros(1, *image),
        zeros(1, 64, dtype="int32"),
      )["params"]
    ).items()
  }
  want = shapes(square, 256, 256, 3)
  width = want["img/embedding/bias"][0]
  want["img/embedding/kernel"] = (768, width)
  want["img/pos_embedding"] = (16, 16, width)
  assert shapes(it, 256, 770) == want
  name = f"siglip2/{name}_naflex"
  assert "resize_to_patches(256,16)" in known.pp_image(name)
  assert "resize_to_patches(576,16)" in known.pp_image(name, patches=576)
  with pytest.raises(errors.UserError, match="a number of patches"):
    known.pp_image(name, 384)
  with pytest.raises(errors.UserError, match="takes square images"):
    known.pp_image("siglip2/b16_256", patches=256)


@pytest.mark.parametrize("name", AUGREG)
def test_augreg(name):
  size, patch = AUGREG[name]
  it = known.get(f"augreg/{name}")
  assert set(it.model) == {"image"} and it.resolution == 224
  shapes = jax.eval_shape(
    vit.ViT(**it.model["image"]).init, jax.random.key(0), zeros(1, 224, 224, 3)
  )["params"]
  got = {f"img/{k}": v.shape for k, v in trees.flatten(shapes).items()}
  assert got == image(size, patch, 224, False) | {
    "img/cls": (1, 1, SIZES[size][0])
  }


def test_files_and_scores():
  # As they were published, name by name.
  files = [
    "en_b16_224_63724782",
    "en_b16_256_60500360",
    "en_b16_384_68578854",
    "en_b16_512_68580893",
    "en_l16_256_60552751",
    "en_l16_384_63634585",
    "en_so400m_224_57633886",
    "en_so400m_384_58765454",
    "i18n_b16_256_66117334",
    "i18n_so400m_16_256_78061115",
  ]
  urls = (
    [f"gs://big_vision/siglip/webli_{file}.npz" for file in files]
    + [
      f"gs://big_vision/siglip2/siglip2_{name}.npz"
      for name in [*SIGLIP2, "b16_naflex", "so400m16_naflex"]
    ]
    + [
      f"gs://vit_models/augreg/{name}-i21k-300ep-lr_0.001-aug_{how}-do_0.0-"
      "sd_0.0.npz"
      for name, how in {
        "Ti_16": "none-wd_0.03",
        "S_32": "none-wd_0.1",
        "S_16": "light1-wd_0.03",
        "B_32": "light1-wd_0.1",
        "B_16": "medium1-wd_0.1",
        "B_8": "medium2-wd_0.1",
        "L_16": "strong1-wd_0.1",
      }.items()
    ]
  )
  assert sorted(it.url for it in known.KNOWN.values()) == sorted(urls)
  # Each size and resolution has the file that says so.
  for name, it in known.KNOWN.items():
    plain = lambda s: re.sub(r"[^a-z0-9]", "", s.lower())
    words = name.split("/")[1].split("_")
    if "so400m" in name and name.startswith("siglip/") and words[-1] != "i18n":
      words[0] = "so400m"  # These leave out the patch.
    assert all(plain(word) in plain(it.url) for word in words), name
    assert it.tokenizer in [None, *vocabulary.NAMES]

  scores = lambda name: tuple(
    known.KNOWN[name].scores[k] for k in ("imagenet", "i2t", "t2i")
  )
  assert scores("siglip/b16_224") == (76.2, 64.4, 47.2)
  assert scores("siglip/so400m14_384") == (83.2, 70.2, 52.0)
  assert scores("siglip2/b32_256") == (74.0, 63.7, 47.2)
  assert scores("siglip2/g-opt16_384") == (85.0, 72.8, 56.1)
  for name, it in known.KNOWN.items():
    if it.scores:  # Captions are easier to find than images, for all of them.
      assert (
        85 >= it.scores["imagenet"] > it.scores["i2t"] > (it.scores["t2i"]) > 47
      ), name


@pytest.mark.parametrize(
  "path, want",
  [
    (
      "siglip/b16_256",
      ("gs://big_vision/siglip/webli_en_b16_256_60500360.npz", ""),
    ),
    (
      "siglip2/g-opt16_384:img",
      ("gs://big_vision/siglip2/siglip2_g-opt16_384.npz", "img"),
    ),
    ("gs://b/x.npz:txt/Encoder_0", ("gs://b/x.npz", "txt/Encoder_0")),
    ("https://h:80/x", ("https://h:80/x", "")),
    ("gs://b/x", ("gs://b/x", "")),
    (pathlib.Path("/a/x.npz:img"), ("/a/x.npz", "img")),
    ("a:b.npz", ("a:b.npz", "")),
    ("", ("", "")),
  ],
)
def test_split(path, want):
  assert known.split(path) == want


def test_loading_by_name(tmp_path, monkeypatch):
  # In the cache as if it had been fetched.
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path))
  params = {"img": {"kernel": np.ones((2, 3), np.float32)}}
  npz.save_params(fetch.cached(known.get("siglip/b16_256").url), params)
  got = npz.load_params("siglip/b16_256:img", params["img"])
  np.testing.assert_array_equal(got["kernel"], 1)
  got = restore.read_init(params, "siglip/b16_256")
  np.testing.assert_array_equal(got["img/kernel"], 1)
  # A run of one's own goes first, whatever its folder is called.
  monkeypatch.chdir(tmp_path)
  (tmp_path / "siglip/b16_256/checkpoints").mkdir(parents=True)
  with pytest.raises(errors.UserError, match="has no complete checkpoint"):
    restore.read_init(params, "siglip/b16_256")


@pytest.mark.parametrize(
  "name, message",
  [
    ("siglip/b16_265", 'did you mean "siglip/b16_256"'),
  ],
)
def test_names_that_there_are_not(name, message):
  with pytest.raises(errors.UserError, match=message):
    known.get(name)
