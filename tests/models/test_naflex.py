"""The image tower for any aspect ratio, against the original's results."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors
from sigjax.models import flops, naflex, two_towers
from sigjax.weights import npz

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIZES = dict(width=48, depth=2, mlp_dim=96, num_heads=3)


def build(scan=True, **kwargs):
  """Returns the golden model and its parameters."""
  model = two_towers.TwoTowers(
    image=dict(SIZES, kind="naflex", patch_size=8, scan=scan),
    text=dict(SIZES, vocab_size=97, scan=scan),
    out_dim=(None, 48),
    **kwargs,
  )
  like = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, 25, 194)),
    jnp.zeros((1, 12), jnp.int32),
  )["params"]
  return model, npz.load_params(GOLDEN / "naflex_tiny.npz", like)


def images():
  """Returns the golden file of inputs and results, and its images for us."""
  io = dict(np.load(GOLDEN / "naflex_tiny_io.npz"))
  places = np.stack([io["yidx"], io["xidx"]], axis=-1)
  places[io["type"] == 0] = -1
  x = np.concatenate([io["patches"], places], axis=-1)
  return io, x.astype(np.float32)


@pytest.mark.parametrize("scan", [False, True])
def test_golden_results(scan):
  model, params = build(scan)
  io, x = images()
  z, _, out = jax.jit(model.apply)({"params": params}, x, None)
  np.testing.assert_allclose(z, io["zimg"], atol=1e-5)
  np.testing.assert_allclose(
    out["img/pre_logits"], io["pre_logits_img"], atol=1e-4
  )
  there = io["type"] == 1
  np.testing.assert_allclose(
    out["img/embedded"][there], io["with_posemb"][there], atol=2e-5
  )


@pytest.mark.parametrize("grid", [(1, 40), (3, 5), (16, 16), (23, 9)])
def test_positions_are_those_of_a_resized_table(grid):
  table = np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32)
  places = np.indices(grid).reshape(2, 1, -1).transpose(1, 2, 0)
  got = naflex.positions(table, places, places[..., 0] >= 0)
  want = jax.image.resize(table, (*grid, 4), "linear")
  np.testing.assert_allclose(got[0], want.reshape(-1, 4), atol=2e-6)


@pytest.mark.parametrize(
  "pool, dtype, atol", [("map", "bfloat16", 0.02), ("gap", "float32", 1e-6)]
)
def test_padding_is_not_seen(pool, dtype, atol):
  model, params = build(dtype=dtype)
  model = model.clone(image={**model.image, "pool_type": pool})
  _, x = images()
  longer = np.full((len(x), 40, 194), -1, np.float32)
  longer[:, :25] = x
  longer[:, 25:, :-2] = 9
  apply = jax.jit(lambda x: model.apply({"params": params}, x, None)[0])
  np.testing.assert_allclose(apply(longer), apply(x), atol=atol)
  loss = lambda x: jnp.sum(apply(x)[:, 0])
  slope = np.abs(jax.grad(loss)(longer)[..., :-2]).max(-1)
  there = longer[..., -1] >= 0
  assert slope[~there].max() == 0 and slope[there].min() > 0


def test_bytes_are_mapped():
  model, params = build()
  _, x = images()
  whole = x.copy()
  pixels = np.round((x[..., :-2] + 1) * 127.5)
  whole[..., :-2] = pixels / 127.5 - 1
  small = np.concatenate([pixels, x[..., -2:]], -1).astype(np.int16)
  apply = jax.jit(lambda x: model.apply({"params": params}, x, None)[0])
  np.testing.assert_allclose(apply(small), apply(whole), atol=1e-6)


def test_flops_are_those_of_a_vit_and_the_positions():
  text = dict(text=np.zeros(12))
  count = lambda image, shape: flops.forward(
    two_towers.TwoTowers(dict(SIZES, patch_size=8, **image), SIZES),
    dict(text, image=np.zeros(shape)),
  )["img"]
  got = count(dict(kind="naflex"), (25, 194))
  assert got == count({}, (40, 40, 3)) + 2 * 25 * 256 * 48


def test_other_images_are_refused():
  model, params = build()
  with pytest.raises(errors.UserError, match=r"resize_to_patches\(length, 8\)"):
    model.apply({"params": params}, jnp.zeros((1, 16, 16, 3)), None)
