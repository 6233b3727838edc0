"""Which attention is taken where; and the plain one against flax's layer."""

import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, sharding
from sigjax.models import attention

CASE = attention.Case(12, 64, "bfloat16", 196, False)
SO400M = dict(heads=16, head=72, length=729)


def way(name, platform, capability="9.0", kind="a chip"):
  device = types.SimpleNamespace(
    platform=platform, device_kind=kind, compute_capability=capability
  )
  mesh = types.SimpleNamespace(devices=np.array([device]))
  return attention.Way(name, mesh)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
  "platform, more, want",
  [
    ("tpu", {}, "pallas"),
    ("tpu", dict(head=68), "xla"),
    ("tpu", dict(kind="TPU v4"), "pallas"),
    ("tpu", dict(SO400M, kind="TPU v4"), "xla"),
    ("tpu", dict(SO400M, kind="TPU v5"), "pallas"),
    ("gpu", {}, "cudnn"),
    ("gpu", dict(dtype="float32"), "xla"),
    ("gpu", dict(masked=True, length=49), "xla"),
    ("gpu", dict(capability="7.5"), "xla"),
    ("gpu", dict(capability="gfx90a"), "xla"),
    ("cpu", {}, "xla"),
  ],
)
def test_auto(platform, more, want):
  more = dict(more)
  of_device = {k: more.pop(k) for k in ("capability", "kind") if k in more}
  chosen = way("auto", platform, **of_device)
  assert attention.choose(chosen, CASE._replace(**more)) == want
  # Devices that are not known: a program for any platform.
  assert attention.choose(attention.Way("pallas"), CASE) == "xla"


@pytest.mark.parametrize(
  "name, platform, more, text",
  [
    ("palas", "tpu", {}, 'attention "palas" is not known.*"pallas"'),
    ("pallas", "gpu", {}, "is for TPUs, not for gpu"),
    ("pallas", "tpu", dict(head=68), "takes heads of .*, not 68"),
    ("cudnn", "tpu", {}, "is for NVIDIA GPUs, not for tpu"),
    ("cudnn", "gpu", dict(dtype="float32"), 'needs config.model.dtype "bfl'),
    ("cudnn", "gpu", dict(masked=True, length=49), "even .*, not 49"),
  ],
)
def test_what_is_named_has_to_be_there(name, platform, more, text):
  with pytest.raises(errors.UserError, match=text):
    attention.choose(way(name, platform), CASE._replace(**more))


def test_a_chip_with_too_little_memory_is_named():
  with pytest.raises(
    errors.UserError, match="32 MiB of VMEM for 729 tokens of 1152, and .* 16;"
  ):
    attention.choose(
      way("pallas", "tpu", kind="TPU v4"), CASE._replace(**SO400M)
    )


def test_cudnn_is_given_each_devices_rows(monkeypatch):
  """With JAX's plain attention in place of cuDNN's, which needs a GPU."""
  plain, seen = jax.nn.dot_product_attention, []

  def instead(q, k, v, mask, implementation):
    seen.append((q.shape, implementation))
    return plain(q, k, v, mask=mask)

  monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
  rng = np.random.default_rng(0)
  q, k, v = jnp.asarray(rng.standard_normal((3, 16, 6, 16)), jnp.float32)
  mask = rng.random((16, 6)) < 0.6
  mask[:, 3] = True
  for allowed in (None, mask):
    args = (q, k, v, allowed, 2, sharding.make_mesh())
    want = attention.WAYS["xla"](*args)
    got = jax.jit(lambda *x, args=args: attention.WAYS["cudnn"](*x, *args[3:]))(
      *args[:3]
    )
    np.testing.assert_allclose(got, want, atol=1e-6)
  assert seen == [((2, 6, 2, 8), "cudnn")] * 2


@pytest.mark.parametrize("masked", [False, True])
def test_the_layer_is_flax_own(masked):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 6, 16)), jnp.float32)
  keys = jnp.asarray(rng.standard_normal((2, 5, 16)), jnp.float32)
  mask = jnp.asarray([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
  mask = mask if masked else None
  ours = attention.MultiHeadDotProductAttention(2, "float32")
  flax = nn.MultiHeadDotProductAttention(
    2, kernel_init=nn.initializers.xavier_uniform()
  )
  params = ours.init(jax.random.key(0), x, keys)
  # The same names, shapes and numbers.
  jax.tree.map(
    np.testing.assert_array_equal, params, flax.init(jax.random.key(0), x, keys)
  )
  noise = lambda p: p + rng.normal(0, 0.3, p.shape).astype(np.float32)
  params = jax.tree.map(noise, params)
  weights = rng.standard_normal((2, 6, 16)).astype(np.float32)

  def value_and_gradients(layer, mask):
    def fn(params, x, keys):
      out = layer.apply(params, x, keys, mask=mask)
      return jnp.sum(out * weights), out

    return jax.grad(fn, (0, 1, 2), has_aux=True)(params, x, keys)

  allowed = None if mask is None else mask[:, None, None, :]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    value_and_gradients(ours, mask),
    value_and_gradients(flax, allowed),
  )


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_for_all_rows_is_flax_own_too(masked):
  rng = np.random.default_rng(0)
  query, keys, weights = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((1, 16), (2, 5, 16), (2, 16))
  )
  mask = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool) if masked else None
  ours = attention.AttentionOfOneQuery(2, "float32")
  flax = nn.MultiHeadDotProductAttention(
    2, kernel_init=nn.initializers.xavier_uniform()
  )
  params = ours.init(jax.random.key(0), query, keys)
  each = lambda query: jnp.broadcast_to(query[None], (2, 1, 16))
  jax.tree.map(
    np.testing.assert_array_equal,
    params,
    flax.init(jax.random.key(0), each(query), keys),
  )
  noise = lambda p: p + rng.normal(0, 0.3, p.shape).astype(np.float32)
  params = jax.tree.map(noise, params)

  def found(layer):
    def fn(params, query, keys):
      out = layer(params, query, keys)
      return jnp.sum(out * weights), out

    return jax.grad(fn, (0, 1, 2), has_aux=True)(params, query, keys)

  def theirs(params, query, keys):
    allowed = None if mask is None else mask[:, None, None, :]
    return flax.apply(params, each(query), keys, mask=allowed)[:, 0]

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    found(lambda *args: ours.apply(*args, mask=mask)),
    found(theirs),
  )
