"""Multi-head attention of both towers."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
  query: Float[Array, "B L N H"],
  key: Float[Array, "B M N H"],
  value: Float[Array, "B M N H"],
  mask: Bool[Array, "B 1 1 M"] | None = None,
) -> Float[Array, "B L N H"]:
  """Attention of N heads of width H to the keys that the mask allows, or all.

  The softmax is in float32, both products in the inputs' dtype. (With a float32
  softmax, flax's own function computes the second product in float32, too.)
  """
  dtype = query.dtype
  logits = jnp.einsum("blhd,bmhd->bhlm", query * query.shape[-1] ** -0.5, key)
  logits = logits.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits).astype(dtype)
  return jnp.einsum("bhlm,bmhd->blhd", weights, value)


def layer(num_heads: int, dtype: str) -> nn.Module:
  """Returns a multi-head attention layer: layer(x) or layer(query, keys).

  Its argument `mask` is that of attend().
  """
  return nn.MultiHeadDotProductAttention(
    num_heads,
    dtype=dtype,
    attention_fn=attend,
    kernel_init=nn.initializers.xavier_uniform(),
  )


def of_keys(
  mask: Bool[Array, "B M"] | None,
) -> Bool[Array, "B 1 1 M"] | None:
  """Returns the mask of attend() with which all tokens see the same keys."""
  return None if mask is None else mask[:, None, None, :]
