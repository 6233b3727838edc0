"""The captioning decoder against the original implementation's results."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import trees
from sigjax.models import decoder, transformer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/decoder_tiny.npz"
SIZE = transformer.Sizes(width=32, depth=2, mlp_dim=64, num_heads=4)


@pytest.fixture(scope="module")
def golden():
  """Returns the golden parameters, as nested dicts, and its io."""
  flat = dict(np.load(GOLDEN))
  io = {k[3:]: x for k, x in flat.items() if k.startswith("io/")}
  names = {k[7:]: x for k, x in flat.items() if k.startswith("params/")}
  names["pos_embedding"] = io["positions"]
  return trees.unflatten(names), io


def stacked(params):
  """Returns the parameters of a scan."""
  blocks = [params[f"EncDecBlock{i}"] for i in range(SIZE.depth)]
  rest = {k: x for k, x in params.items() if "EncDecBlock" not in k}
  return rest | {"EncDecBlock": jax.tree.map(lambda *x: np.stack(x), *blocks)}


def logits(model, params, encoded, text, parallel, mask=None):
  x, kernel, bias = model.apply(
    {"params": params}, encoded, text, parallel, mask
  )
  return x @ kernel + bias[None, None]


@pytest.mark.parametrize("scan", [False, True])
def test_golden_results(golden, scan):
  """Both modes, in batches that mix them; and that padding is not seen."""
  params, io = golden
  params = stacked(params) if scan else params
  model = decoder.Decoder(SIZE, 53, scan=scan)
  encoded, text = io["encoded"], io["targets"]
  like = jax.eval_shape(
    model.init, jax.random.key(0), encoded, text, np.zeros(3, bool)
  )
  assert not trees.difference(like["params"], params)
  more = np.concatenate([encoded, np.full_like(encoded, 9)[:, :2]], axis=1)
  mask = np.arange(14)[None] < np.full((3, 1), 12)
  fn = jax.jit(
    lambda parallel: logits(model, params, more, text, parallel, mask)
  )
  for first in (False, True):
    parallel = np.array([first, not first, first])
    want = np.where(
      parallel[:, None, None], io["logits_parallel"], io["logits_causal"]
    )
    np.testing.assert_allclose(fn(parallel), want, atol=2e-5)


def test_what_a_token_sees(golden):
  """The tokens before it, or none; and always the image."""
  params, io = golden
  model = decoder.Decoder(SIZE, 53)

  def seen(embedded, encoded, parallel, token):
    table = params["EmbedTargets"]["embedding"]
    change = {"EmbedTargets": {"embedding": table + embedded}}
    text = np.arange(3, 12)[None]
    out = logits(model, params | change, encoded, text, parallel)
    return jnp.sum(jnp.square(out[0, token]))

  grad = jax.jit(jax.grad(seen, (0, 1)))
  zeros = jnp.zeros((54, 32))
  for parallel in (False, True):
    by_token, by_patch = grad(zeros, io["encoded"][:1], np.full(1, parallel), 4)
    used = np.flatnonzero(np.abs(by_token).sum(1))
    # Token 4's input is the one before it, behind START.
    assert used.tolist() == ([53] if parallel else [decoder.START, 3, 4, 5, 6])
    assert np.abs(by_patch).sum(2).min() > 0


def test_it_starts_at_chance_in_bfloat16():
  model = decoder.Decoder(SIZE, 53, dtype="bfloat16", remat="full")
  rng = np.random.default_rng(0)
  args = (
    rng.normal(size=(2, 4, 24)).astype(np.float32),
    rng.integers(2, 53, (2, 5)).astype(np.int32),
    np.array([True, False]),
  )

  def fn(key):
    params = model.init(key, *args)["params"]
    grads = jax.grad(
      lambda p: jnp.sum(model.apply({"params": p}, *args)[0][:, 0, :3])
    )
    return params, logits(model, params, *args), grads(params)

  params, out, grads = jax.jit(fn)(jax.random.key(0))
  assert not np.any(out)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  norm = np.linalg.norm(params["EmbedTargets"]["embedding"], axis=1).mean()
  assert norm == pytest.approx(1, rel=0.2)
  used = [k for k, x in trees.flatten(grads).items() if np.any(x)]
  assert len(used) == len(trees.flatten(grads)) - 2  # but the logits layer's
