"""Cross-entropy in chunks against the whole one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import crossentropy, sharding

T, W, V = 40, 6, 31


def made(seed=0):
  rng = np.random.default_rng(seed)
  weights = rng.uniform(size=T) * (rng.uniform(size=T) < 0.7)
  return (
    rng.normal(size=(T, W)).astype(np.float32),
    rng.normal(size=(W, V)).astype(np.float32),
    (30 * rng.normal(size=V)).astype(np.float32),
    rng.integers(0, V, T).astype(np.int32),
    weights.astype(np.float32),
  )


def whole(features, kernel, bias, targets, weights):
  """The value and the gradients, all logits at once, in float64."""
  x, kernel, bias, weights = map(np.float64, (features, kernel, bias, weights))
  logits = x @ kernel + bias
  log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  value = -np.sum(weights * log_p[np.arange(T), targets])
  slope = weights[:, None] * (np.exp(log_p) - np.eye(V)[targets])
  return value, (slope @ kernel.T, x.T @ slope, slope.sum(0))


@pytest.mark.parametrize("devices", [0, 1, 4])
@pytest.mark.parametrize("chunk", [3, 512])
def test_chunks_are_the_whole(devices, chunk):
  """On any number of devices; 0: of which nothing is known."""
  mesh = None
  if devices:
    data = min(devices, 2)
    mesh = sharding.make_mesh(
      data=data, fsdp=devices // data, devices=jax.devices()[:devices]
    )
  fn = lambda *args: (
    3.0 * crossentropy.cross_entropy(*args, chunk=chunk, mesh=mesh)
  )
  both = lambda *args: (fn(*args), jax.value_and_grad(fn, (0, 1, 2))(*args))
  alone, (value, grads) = jax.jit(both)(*made())
  want, want_grads = whole(*made())
  assert alone == pytest.approx(3 * want, rel=1e-6)
  assert value == pytest.approx(3 * want, rel=1e-6)
  for got, right in zip(grads, want_grads):
    np.testing.assert_allclose(got, 3 * right, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_summed_in_float32():
  args = made()
  fn = jax.value_and_grad(crossentropy.cross_entropy, (0, 1, 2))
  rounded = args[0].astype(jnp.bfloat16), args[1].astype(jnp.bfloat16)
  value, grads = jax.jit(fn)(rounded[0], *args[1:])
  want, want_grads = whole(*rounded, *args[2:])
  assert value == pytest.approx(want, rel=1e-5)
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
  for got, right in zip(grads, want_grads):
    np.testing.assert_allclose(np.float64(got), right, rtol=2e-2, atol=2e-2)


def test_memory_is_that_of_a_chunk():
  """By the compiler: far from (tokens, vocabulary), forwards and backwards."""
  tokens, width, words, chunk = 2048, 8, 20_000, 64
  like = jax.ShapeDtypeStruct
  args = (
    like((tokens, width), jnp.float32),
    like((width, words), jnp.float32),
    like((words,), jnp.float32),
    like((tokens,), jnp.int32),
    like((tokens,), jnp.float32),
  )
  fn = lambda *args: crossentropy.cross_entropy(*args, chunk=chunk)
  grads = jax.jit(jax.value_and_grad(fn, (0, 1, 2)))
  memory = grads.lower(*args).compile().memory_analysis()
  logits = 4 * tokens * words
  # A chunk's logits and their gradients, and the kernel's gradient.
  assert memory.temp_size_in_bytes < 6 * 4 * chunk * words < logits / 5
