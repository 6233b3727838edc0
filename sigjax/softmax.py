"""CLIP's softmax loss, twice, for the paper's comparison; see losses.py."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sigjax import losses
from sigjax.losses import Rows, Scalar
from sigjax.ring import Ring


def softmax_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar = 0.0,
) -> Float[Array, ""]:
  """CLIP's symmetric loss: the reference; arguments as in sigmoid_loss.

  The mean of two cross-entropies: of each image over all texts, and of each
  text over all images. A bias cancels in a softmax, so b is not used.
  """
  del b
  logits = losses.dot(zimg, ztxt.T) * t
  over_texts = jax.nn.log_softmax(logits, axis=1)
  over_images = jax.nn.log_softmax(logits, axis=0)
  return -jnp.mean(jnp.diag(over_texts) + jnp.diag(over_images)) / 2


def ring_softmax_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar = 0.0,
  *,
  mesh: Mesh,
  axes: str | tuple[str, ...] = ("data",),
  tile: int = 1024,
  direction: str = "forward",
) -> Float[Array, ""]:
  """softmax_loss of a batch split over D devices; see ring_sigmoid_loss.

  A pair's gradient needs the normalisers of its row and column, which need all
  pairs: one trip for the value, a second one for the gradients.
  """
  ring = losses.ring_of(zimg, ztxt, t, b, mesh, axes, tile, direction, "ring")
  return losses.on_all_devices(_softmax_share, ring, mesh, zimg, ztxt, t, b)


def _softmax_share(ring: Ring, zimg, ztxt, t, b, with_grads: bool):
  """Returns the loss and, if with_grads, its gradients (else None)."""
  del b

  def normalisers(positive, zi, zt, by_image, by_text):
    del positive
    logits = losses.dot(zi, zt.T) * t
    by_image = jnp.logaddexp(by_image, jax.nn.logsumexp(logits, axis=1))
    return by_image, jnp.logaddexp(by_text, jax.nn.logsumexp(logits, axis=0))

  def pairs(positive, image, text, dzi, dzt):
    (zi, by_image), (zt, by_text) = image, text
    logits = losses.dot(zi, zt.T) * t
    over_texts = jnp.exp(logits - by_image[:, None])
    over_images = jnp.exp(logits - by_text[None, :])
    slope = (over_texts + over_images) / 2 - positive.astype(jnp.float32)
    slope = slope.astype(zi.dtype)
    return dzi + losses.dot(slope, zt), dzt + losses.dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  empty = row - jnp.inf  # the logarithm of no sum
  by_image, by_text = ring.visit(normalisers, zimg, ztxt, empty, empty)
  positives = (
    jnp.sum(zimg.astype(jnp.float32) * ztxt.astype(jnp.float32), axis=1) * t
  )
  loss = ring.mean((by_image + by_text) / 2 - positives)
  if not with_grads:
    return loss, None
  images, texts = (zimg, by_image), (ztxt, by_text)
  dzimg, dztxt = ring.visit(pairs, images, texts, zero, zero)
  return loss, losses.gradients(ring, zimg, ztxt, t, dzimg, dztxt, row)
