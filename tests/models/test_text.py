"""The text tower: pooling, vocabulary, length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors
from sigjax.models import text as text_lib

TINY = dict(width=16, depth=1, mlp_dim=24, num_heads=2, vocab_size=11)
TEXT = np.array([[3, 4, 5, 6, 1, 1], [10, 9, 8, 7, 0, 1]], np.int32)


def build(**kwargs):
  model = text_lib.TextTransformer(**{**TINY, **kwargs})
  shapes = jax.eval_shape(model.init, jax.random.key(0), TEXT)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(np.float32) / 4, shapes
  )
  return model, params, jax.jit(lambda p, text: model.apply(p, text)[0])


@pytest.mark.parametrize("pool", ["last", "map", "gap"])
def test_pooling_and_positions(pool):
  # Without positions a transformer without a mask sees a set: changing the
  # order of the tokens changes nothing, unless one position is singled out.
  _, params, apply = build(pool_type=pool)
  ordered, swapped = TEXT, TEXT[:, [5, 0, 2, 1, 4, 3]]
  set_like = jax.tree.map(lambda a: a, params)
  set_like["params"]["pos_embedding"] = jnp.zeros((1, 6, 16))
  change = np.abs(apply(set_like, ordered) - apply(set_like, swapped)).max(1)
  if pool == "last":
    assert change.min() > 1e-2
    np.testing.assert_allclose(  # All but the last may change places.
      apply(set_like, TEXT[:, [3, 2, 1, 0, 4, 5]]),
      apply(set_like, ordered),
      atol=1e-5,
    )
  else:
    assert change.max() < 1e-5
  params["params"]["pos_embedding"] *= 30
  change = np.abs(apply(params, ordered) - apply(params, swapped)).max(1)
  assert change.min() > 1e-4


def test_every_token_is_seen():
  # No mask: the first token reaches the last position, and padding is seen.
  _, params, apply = build()
  for position in range(6):
    other = TEXT.copy()
    other[:, position] = 2
    change = np.abs(apply(params, TEXT) - apply(params, other)).max(1)
    assert change.min() > 1e-3


def test_factored_embedding_is_its_product():
  _, params, apply = build(bottleneck=3)
  p = params["params"]
  assert p["Embed_0"]["embedding"].shape == (11, 3)
  table = p["Embed_0"]["embedding"] @ p.pop("embed_proj")["kernel"]
  _, _, plain = build()
  want = plain({"params": {**p, "Embed_0": {"embedding": table}}}, TEXT)
  p["embed_proj"] = build(bottleneck=3)[1]["params"]["embed_proj"]
  np.testing.assert_allclose(apply(params, TEXT), want, atol=1e-5)


def test_initial_scales():
  model = text_lib.TextTransformer(
    width=64, depth=1, num_heads=1, vocab_size=999, out_dim=64
  )
  p = jax.jit(model.init)(jax.random.key(0), TEXT)["params"]
  rows = np.linalg.norm(p["Embed_0"]["embedding"], axis=1)
  assert abs(rows.mean() - 1) < 0.05
  assert 0.008 < p["pos_embedding"].std() < 0.012
  assert p["head"]["kernel"].std() > 0.1  # Zeros would have no direction.
  assert p["head"]["bias"].shape == (64,)


@pytest.mark.parametrize("bottleneck", [0, 96])
def test_a_token_starts_with_norm_1(bottleneck):
  # Also behind a bottleneck: 768 numbers of variance 1 / 768.
  model = text_lib.TextTransformer(
    width=768, depth=1, num_heads=1, vocab_size=500, bottleneck=bottleneck
  )
  text = np.arange(500, dtype=np.int32)[None]
  (_, out), params = jax.jit(model.init_with_output)(jax.random.key(1), text)
  x = out["embedded"] - params["params"]["pos_embedding"]
  assert abs(768 * np.var(x) - 1) < 0.05
  assert np.linalg.norm(x, axis=2).std() < 0.15


def test_a_bottleneck_of_96_saves_168_million_parameters():
  def count(bottleneck):
    model = text_lib.TextTransformer(
      variant="B", vocab_size=250_000, bottleneck=bottleneck
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), TEXT)["params"]
    tables = [shapes[k] for k in ("Embed_0", "embed_proj") if k in shapes]
    return sum(x.size for x in jax.tree.leaves(tables))

  assert count(96) == 250_000 * 96 + 96 * 768 == 24_073_728
  assert count(0) == 250_000 * 768 == 192_000_000


def test_unknown_tokens_are_loud():
  _, params, apply = build()
  z = apply(params, np.array([[0] * 5 + [10], [0] * 5 + [11]], np.int32))
  assert np.isfinite(z[0]).all() and np.isnan(z[1]).all()


@pytest.mark.parametrize("length", [1, 5, 7])
def test_another_length_is_an_error(length):
  model, params, _ = build()
  with pytest.raises(errors.UserError, match=f"{length} tokens.*length 6"):
    jax.eval_shape(model.apply, params, jnp.zeros((2, length), jnp.int32))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(TINY, pool_type="tok"), "choose from: gap, last, map"),
    (dict(variant="B/16"), 'variant "B/16" is not known'),
    (dict(), 'needs a variant .such as "B". or width'),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(errors.UserError, match=message):
    model = text_lib.TextTransformer(**kwargs)
    jax.eval_shape(model.init, jax.random.key(0), TEXT)
