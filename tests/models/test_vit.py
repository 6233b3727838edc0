"""The image tower, against a forward pass in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, trees
from sigjax.models import transformer, vit

TINY = dict(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=8)


def build(image_shape=(3, 16, 24, 3), **kwargs):
  """Returns a ViT, random parameters (no zeros, no ones) and images."""
  model = vit.ViT(**{**TINY, **kwargs})
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(image_shape))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(np.float32) / 2, shapes
  )
  return model, params, rng.uniform(-3, 3, image_shape).astype(np.float32)


def numpy_vit(params, image, positions, pool):
  """An independent forward pass; loops over patches and heads."""
  p = {
    name: np.asarray(leaf, np.float64)
    for name, leaf in trees.flatten(params["params"]).items()
  }

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * p[name + "/scale"] + p[name + "/bias"]

  def dense(x, name, head=None):
    kernel, bias = p[name + "/kernel"], p[name + "/bias"]
    return x @ (kernel if head is None else kernel[:, head]) + (
      bias if head is None else bias[head]
    )

  def attend(x, name):
    total = p[name + "/out/bias"]
    for i in range(TINY["num_heads"]):
      q, k, v = (dense(x, f"{name}/{n}", i) for n in ("query", "key", "value"))
      weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
      weights /= weights.sum(-1, keepdims=True)
      total = total + weights @ v @ p[name + "/out/kernel"][i]
    return total

  def one(image):
    rows = []
    for top in range(0, image.shape[0], 8):
      for left in range(0, image.shape[1], 8):
        patch = image[top : top + 8, left : left + 8].reshape(-1)
        rows.append(patch @ p["embedding/kernel"].reshape(len(patch), -1))
    x = np.stack(rows) + p["embedding/bias"] + positions
    if pool == "tok":
      x = np.concatenate([p["cls"][0], x])
    for i in range(TINY["depth"]):
      block = f"Transformer/encoderblock_{i}"
      x = x + attend(
        norm(x, f"{block}/LayerNorm_0"),
        f"{block}/MultiHeadDotProductAttention_0",
      )
      y = dense(norm(x, f"{block}/LayerNorm_1"), f"{block}/MlpBlock_0/Dense_0")
      y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
      x = x + dense(y, f"{block}/MlpBlock_0/Dense_1")
    x = norm(x, "Transformer/encoder_norm")
    return dense(x[0] if pool == "tok" else x.mean(0), "head")

  return np.stack([one(i) for i in np.float64(image)])


@pytest.mark.parametrize("pool", ["gap", "tok"])
def test_forward_is_that_of_numpy(pool):
  model, params, image = build(pool_type=pool, out_dim=5)
  z, out = jax.jit(model.apply)(params, image)
  want = numpy_vit(params, image, params["params"]["pos_embedding"][0], pool)
  np.testing.assert_allclose(z, want, rtol=1e-5, atol=1e-5)
  assert out["pre_logits"].shape == (3, 16)


def test_sincos2d_positions():
  # 16 channels are 4 frequencies: 1, 10^-4/3, 10^-8/3, 10^-4.
  table = vit.sincos2d(2, 3, 16)
  y, x, i = 1, 2, 2
  angle = 10_000 ** (-i / 3)
  want = [
    np.sin(x * angle),
    np.cos(x * angle),
    np.sin(y * angle),
    np.cos(y * angle),
  ]
  np.testing.assert_allclose(table[0, 3 * y + x, i::4], want, rtol=1e-6)

  model, params, image = build(pool_type="gap", posemb="sincos2d", out_dim=5)
  assert "pos_embedding" not in params["params"]
  z, _ = jax.jit(model.apply)(params, image)
  want = numpy_vit(params, image, table[0], "gap")
  np.testing.assert_allclose(z, want, rtol=1e-5, atol=1e-5)


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
  model, params, image = build((2, 23, 31, 3))
  apply = jax.jit(lambda image: model.apply(params, image)[0])
  # Copies: JAX may read a NumPy array after the call has returned.
  whole = apply(image.copy())
  image[:, 16:], image[:, :, 24:] = 9, 9
  np.testing.assert_array_equal(apply(image.copy()), whole)
  image[:, 15, 23] = 9
  assert np.abs(apply(image.copy()) - whole).max() > 1e-3


def test_dropout_only_while_training():
  model, params, image = build(dropout=0.5, depth=1, scan=True)
  apply = jax.jit(
    lambda train, seed: model.apply(
      params, image, train, rngs={"dropout": jax.random.key(seed)}
    )[0],
    static_argnums=0,
  )
  plain = apply(False, 0)
  np.testing.assert_array_equal(apply(False, 1), plain)
  assert np.abs(apply(True, 0) - plain).max() > 1e-2
  assert np.abs(apply(True, 0) - apply(True, 1)).max() > 1e-2
  np.testing.assert_array_equal(apply(True, 0), apply(True, 0))


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_drops_on_its_own(scan):
  # Blocks that only add 1: after two, dropout of one half leaves 0, 2 or 4.
  model = transformer.Encoder(
    transformer.Sizes(8, 2, 8, 1), dropout=0.5, scan=scan
  )
  x = jnp.zeros((1, 1, 64))
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  shapes = jax.eval_shape(model.init, rngs, x)
  params = trees.map_named(
    lambda name, a: jnp.full(
      a.shape,
      float(name.endswith("Dense_1/bias") or "encoder_norm/scale" in name),
    ),
    shapes,
  )
  y = jax.jit(model.apply)(params, x, rngs=rngs)
  assert len(np.unique(np.round(y, 3))) == 3


@pytest.mark.parametrize(
  "variant, pixels, millions",
  [
    # From timm's table of results: vit_{base,large,so400m}_.._siglip_...
    ("B/16", 224, 92.88),
    ("L/16", 256, 315.96),
    ("So400m/14", 384, 428.23),
  ],
)
def test_sizes_of_released_towers(variant, pixels, millions):
  model = vit.ViT(variant=variant, scan=True)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3))
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert round(count / 1e6, 2) == millions


def test_what_is_given_goes_before_the_variant():
  model = vit.ViT(variant="S/16", depth=1, patch_size=8, scan=True)
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )["params"]
  assert params["embedding"]["kernel"].shape == (8, 8, 3, 384)
  kernel = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]
  assert kernel["kernel"].shape == (1, 384, 1536)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(variant="b/16"), 'variant "b" is not known'),
    (dict(variant="B"), 'in "B/16", or give patch_size'),
    (dict(width=16), "needs a variant .* or depth"),
    (dict(TINY, num_heads=3), "16 is not a multiple of num_heads 3"),
    (dict(TINY, pool_type="tokk"), 'did you mean "tok"'),
    (dict(TINY, posemb="learned"), 'did you mean "learn"'),
    (dict(TINY, remat="dot"), 'did you mean "dots"'),
    (dict(TINY, patch_size=32), "smaller than one patch"),
    (dict(TINY, width=18, posemb="sincos2d"), "divisible by 4"),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(errors.UserError, match=message):
    jax.eval_shape(
      vit.ViT(**kwargs).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
    )


def test_another_resolution_is_an_error():
  model, params, _ = build()
  with pytest.raises(errors.UserError, match=r"3 x 3 patches.*is for 6"):
    jax.eval_shape(model.apply, params, jnp.zeros((1, 24, 24, 3)))
