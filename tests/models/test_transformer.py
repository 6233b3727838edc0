"""What the towers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.models import transformer


@pytest.mark.parametrize(
  "dtype, rounding", [("float32", 0), ("bfloat16", 2**-8)]
)
def test_gelu_and_its_gradient_are_those_of_float64(dtype, rounding):
  """In bfloat16 the result alone is rounded."""
  x = jnp.asarray(np.r_[np.linspace(-8, 8, 1001), -100, 0, 100], dtype)
  dout = jnp.asarray(np.linspace(-2, 2, len(x)), dtype)
  got, pull = jax.vjp(transformer.gelu, x)

  def by_numpy(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  at, step = np.asarray(x, np.float64), 1e-5
  slope = (by_numpy(at + step) - by_numpy(at - step)) / (2 * step)
  wanted = by_numpy(at), np.asarray(dout, np.float64) * slope
  # tanh near -1 has few digits of what is left of it.
  for array, want, atol in zip((got, *pull(dout)), wanted, (1e-6, 2e-5)):
    assert array.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(array, np.float64), want, rtol=max(rounding, 1e-6), atol=atol
    )
