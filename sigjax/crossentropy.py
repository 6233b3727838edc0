"""Cross-entropy over a large vocabulary, without all logits at once.

With T tokens and V words the logits are (T, V): of a vocabulary of 256k, 4 MiB
of float32 for every 4 tokens. Here they are computed for `chunk` tokens at a
time, and their gradients while they are there, as in the sigmoid loss. The
gradient with respect to the kernel (W, V) is summed over the chunks: it is an
array that the backward pass has to hold in any case, so that computing it early
takes no more memory than computing the logits once more would, and one product
of the four is saved.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sigjax import losses, sharding

F32 = jnp.float32


def cross_entropy(
  features: Float[Array, "T W"],
  kernel: Float[Array, "W V"],
  bias: Float[Array, " V"],
  targets: Int[Array, " T"],
  weights: Float[Array, " T"],
  *,
  chunk: int = 512,
  mesh: Mesh | None = None,
) -> Float[Array, ""]:
  """Returns sum_t weights_t * -log softmax(features_t @ kernel + bias)_target.

  Args:
    features: bfloat16 or float32. bfloat16 is multiplied as it is, float32 in
      full float32 on every platform. Sums are float32.
    kernel, bias: rounded to the features' dtype; float32.
    targets: in [0, V).
    weights: float32; 0 for what does not count. No gradient flows into them.
    chunk: how many tokens' logits there are at a time, on each device.
    mesh: the devices, over all of which tokens are split; None if that is not
      known. Each works through its own tokens, and the gradients of the kernel
      are added up once.

  Returns:
    () float32. Differentiable by features, kernel and bias.
  """

  def run(with_grads, x, kernel, *others):
    fn = functools.partial(_share, chunk, with_grads)
    # Rounded before it is gathered, if it is split: half as much is sent.
    kernel = kernel.astype(x.dtype)
    return sharding.on_each_device(fn, mesh, whole=(1, 2))(x, kernel, *others)

  def scale(grads, g):
    by = lambda x: (x.astype(F32) * g).astype(x.dtype)
    return *jax.tree.map(by, grads), None, None  # targets and weights

  def forward(*args):
    value, dx, dkernel, dbias = run(True, *args)
    dkernel = jnp.sum(dkernel, 0).astype(args[1].dtype)
    return jnp.sum(value), (dx, dkernel, jnp.sum(dbias, 0))

  fn = jax.custom_vjp(lambda *args: jnp.sum(run(False, *args)[0]))
  fn.defvjp(forward, scale)
  return fn(features, kernel, bias, targets, weights)


def _share(chunk, with_grads, features, kernel, bias, targets, weights):
  """Returns (value (1,), dfeatures, dkernel (1, W, V), dbias (1, V))."""
  tokens, width = features.shape
  chunk = min(chunk, tokens)
  pad = -tokens % chunk
  rows = lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(
    -1, chunk, *x.shape[1:]
  )
  row = bias.astype(F32)[None]

  def visit(sums, part):
    x, target, weight = part
    logits = losses.dot(x, kernel) + row
    logits -= jnp.max(logits, axis=1, keepdims=True)
    of_target = jnp.arange(logits.shape[1])[None] == target[:, None]
    # Not by index: a gather is slow on a TPU, this is fused with the sum.
    right = jnp.sum(jnp.where(of_target, logits, 0), axis=1)
    each = jnp.exp(logits)
    total = jnp.sum(each, axis=1, keepdims=True)
    value = jnp.sum(weight * (jnp.log(total[:, 0]) - right))
    if not with_grads:
      return (sums[0] + value, None, None), None
    slope = weight[:, None] * (each / total - of_target.astype(F32))
    dbias = sums[2] + jnp.sum(slope, axis=0)
    slope = slope.astype(x.dtype)
    dkernel = sums[1] + losses.dot(x.T, slope)
    dx = losses.dot(slope, kernel.T).astype(x.dtype)
    return (sums[0] + value, dkernel, dbias), dx

  zeros: Any = None, None
  if with_grads:
    zeros = jnp.zeros(kernel.shape, F32), jnp.zeros(kernel.shape[1], F32)
  parts = rows(features), rows(targets), rows(weights)
  start = jnp.zeros((), F32), *zeros
  found: Any = lax.scan(visit, start, parts)
  (value, dkernel, dbias), dx = found
  if not with_grads:
    return value[None], None, None, None
  dx = dx.reshape(-1, width)[:tokens]
  return value[None], dx, dkernel[None], dbias.astype(bias.dtype)[None]
