"""CLIP's softmax loss, twice, for the paper's comparison; see losses.py."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sigjax import losses
from sigjax import ring as ring_lib
from sigjax.losses import Groups, Rows, Scalar
from sigjax.ring import Ring


def softmax_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar = 0.0,
  groups: Groups = None,
  *,
  positives: str | None = None,
) -> Float[Array, ""]:
  """CLIP's symmetric loss: the reference; arguments as in sigmoid_loss.

  The mean of two cross-entropies: of each image over all texts, and of each
  text over all images. A bias cancels in a softmax, so b is not used. Pairs
  that count for nothing leave both; a row of several positives has the target
  1/k on each of its k.
  """
  del b
  losses.check_groups(groups, positives, len(zimg))
  diagonal = jnp.eye(len(zimg), dtype=bool)
  positive, counts = losses.relate(positives, diagonal, groups, groups)
  logits = losses.dot(zimg, ztxt.T) * t
  if counts is not None:
    logits = jnp.where(counts, logits, -jnp.inf)
  total = 0.0
  for axis in (1, 0):
    logs = jnp.where(positive, jax.nn.log_softmax(logits, axis=axis), 0)
    k = jnp.sum(positive, axis=axis, dtype=jnp.float32)
    total -= jnp.mean(jnp.sum(logs, axis=axis) / k)
  return total / 2


def ring_softmax_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar = 0.0,
  groups: Groups = None,
  *,
  mesh: Mesh,
  axes: str | tuple[str, ...] = ("data",),
  tile: int = 1024,
  direction: str = "forward",
  positives: str | None = None,
) -> Float[Array, ""]:
  """softmax_loss of a batch split over D devices; see ring_sigmoid_loss.

  A pair's gradient needs the normalisers of its row and column, which need all
  pairs: one trip for the value, a second one for the gradients.
  """
  ring = losses.ring_of(zimg, ztxt, t, b, mesh, axes, tile, direction, "ring")
  losses.check_groups(groups, positives, len(zimg))
  share = functools.partial(_softmax_share, positives)
  return losses.on_all_devices(share, ring, mesh, zimg, ztxt, t, b, groups)


def _softmax_share(
  positives, ring: Ring, zimg, ztxt, t, b, groups, draw, with_grads: bool
):
  """Returns the loss and, if with_grads, its gradients (else None)."""
  del b, draw

  def tile(diagonal, image, text):
    """Returns logits, -inf where a pair counts for nothing, and positives."""
    logits = losses.dot(image[0], text[0].T) * t
    positive, counts = losses.relate(positives, diagonal, image[1], text[1])
    if counts is not None:
      logits = jnp.where(counts, logits, -jnp.inf)
    return logits, positive

  def normalisers(diagonal, image, text, by_image, by_text):
    logits, positive = tile(diagonal, image, text)

    def add(sums, axis):
      normaliser, k, right = sums
      log_sum = jax.nn.logsumexp(logits, axis=axis)
      normaliser = jnp.logaddexp(normaliser, log_sum)
      if k is not None:
        k += jnp.sum(positive, axis=axis, dtype=jnp.float32)
        right += jnp.sum(jnp.where(positive, logits, 0), axis=axis)
      return normaliser, k, right

    return add(by_image, 1), add(by_text, 0)

  def merge(x, y):
    return jnp.logaddexp(x[0], y[0]), *ring_lib.add(x[1:], y[1:])

  def pairs(diagonal, image, text, dzi, dzt):
    logits, positive = tile(diagonal, image, text)
    (zi, _, by_image, share_i), (zt, _, by_text, share_t) = image, text
    over_texts = jnp.exp(logits - by_image[:, None])
    over_images = jnp.exp(logits - by_text[None, :])
    target = positive.astype(jnp.float32)
    if share_i is not None:
      target *= (share_i[:, None] + share_t[None, :]) / 2
    slope = (over_texts + over_images) / 2 - target
    slope = slope.astype(zi.dtype)
    return dzi + losses.dot(slope, zt), dzt + losses.dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  # The logarithm of no sum; and of several positives, their number and sum.
  several = positives == "all"
  empty = (row - jnp.inf, row, row) if several else (row - jnp.inf, None, None)
  images, texts = (zimg, groups), (ztxt, groups)
  (by_image, k_image, right_image), (by_text, k_text, right_text) = ring.visit(
    normalisers, images, texts, empty, empty, merge
  )
  share_image = share_text = None
  if several:
    share_image, share_text = 1 / k_image, 1 / k_text
    right = (right_image * share_image + right_text * share_text) / 2
  else:
    right = (
      jnp.sum(zimg.astype(jnp.float32) * ztxt.astype(jnp.float32), axis=1) * t
    )
  loss = ring.mean((by_image + by_text) / 2 - right)
  if not with_grads:
    return loss, None
  images, texts = (
    (*images, by_image, share_image),
    (*texts, by_text, share_text),
  )
  dzimg, dztxt = ring.visit(pairs, images, texts, zero, zero)
  return loss, losses.gradients(ring, zimg, ztxt, t, dzimg, dztxt, row)
