"""The losses: SigLIP's sigmoid loss, CLIP's softmax loss, each twice.

`sigmoid_loss` is Algorithm 1 of the SigLIP paper, as plain as it is printed.
`ring_sigmoid_loss` gives the same value and the same gradients for a batch
split over devices, and never holds more than one tile of its B x B pairs.
docs/loss.md derives why one pass is enough; ring.py is how devices do it.

Throughout: zimg, ztxt are (B, E) embeddings with L2-normalised rows, t is the
temperature, already exponentiated, and b the bias, both scalars. bfloat16
embeddings are multiplied in bfloat16, float32 ones in full float32 on every
platform; sums are always float32.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sigjax import errors
from sigjax import ring as ring_lib

F32 = jnp.float32


def sigmoid_loss(zimg, ztxt, t, b):
  """Algorithm 1 of the SigLIP paper: the reference, B x B logits at once.

  Args:
    zimg: (B, E) image embeddings.
    ztxt: (B, E) text embeddings; text i belongs to image i.
    t: () temperature.
    b: () bias.

  Returns:
    () float32: the sum over all pairs, divided by B.
  """
  logits = _dot(zimg, ztxt.T) * t + b
  labels = 2 * jnp.eye(len(zimg)) - 1  # 1 on the diagonal, -1 elsewhere
  return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / len(zimg)


def softmax_loss(zimg, ztxt, t, b=0.0):
  """CLIP's symmetric loss: the reference; arguments as sigmoid_loss.

  The mean of two cross-entropies: each image picks its text out of all texts,
  and each text its image. A bias cancels in a softmax, so b is not used.
  """
  del b
  logits = _dot(zimg, ztxt.T) * t
  of_texts = jax.nn.log_softmax(logits, axis=1)
  of_images = jax.nn.log_softmax(logits, axis=0)
  return -jnp.mean(jnp.diag(of_texts) + jnp.diag(of_images)) / 2


def ring_sigmoid_loss(
  zimg,
  ztxt,
  t,
  b,
  *,
  mesh,
  axes=("data",),
  tile=1024,
  direction="forward",
  comm="ring",
):
  """sigmoid_loss of a batch split over D devices (SigLIP, section 3.3).

  One trip of the texts round the ring gives the value and, if it is to be
  differentiated, all four gradients as well.

  Args:
    zimg: (B, E) image embeddings, bfloat16 or float32, rows split over axes.
    ztxt: (B, E) text embeddings, likewise; text i belongs to image i.
    t: () temperature.
    b: () bias.
    mesh: the mesh of devices.
    axes: the mesh axes that split the batch, together one ring.
    tile: pairs are worked through in tiles of at most tile x tile.
    direction: "forward", or "both": half the texts go round each way, so that
      both directions of every link carry some.
    comm: "ring"; "all_gather": every device gets all texts at once, which waits
      once instead of D times but takes memory for B texts and their gradients;
      "auto": "all_gather" if a device has fewer than 256 texts, whose block
      takes no longer than a permute takes to begin, else "ring".

  Returns:
    () float32, the same on every device.

  Raises:
    UserError (a ValueError), while tracing: an argument is not as said here, or
      D does not divide B.
  """
  ring = _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, comm)
  return _run(_sigmoid_share, ring, mesh, zimg, ztxt, t, b)


def ring_softmax_loss(
  zimg, ztxt, t, b=0.0, *, mesh, axes=("data",), tile=1024, direction="forward"
):
  """softmax_loss of a batch split over D devices; else as ring_sigmoid_loss.

  The gradient of a pair needs the normalisers of its row and its column, which
  need all pairs: one trip for the value, a second for the gradients.
  """
  ring = _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, "ring")
  return _run(_softmax_share, ring, mesh, zimg, ztxt, t, b)


# The choices of a config. Each is called as
#   loss(zimg, ztxt, t, b, *, mesh, axes, **options) -> () float32
LOSSES = {"sigmoid": ring_sigmoid_loss, "softmax": ring_softmax_loss}


def make(mesh, axes, *, name="sigmoid", dtype="float32", **options):
  """Returns fn(zimg, ztxt, t, b) -> () float32, as a config asks for it.

  Args:
    mesh, axes: see ring_sigmoid_loss.
    name: one of LOSSES.
    dtype: the embeddings are rounded to it first; "bfloat16" on accelerators,
      whose products of float32 are several times slower.
    **options: of that loss, such as tile.

  Raises:
    UserError: an unknown name, or an option that the loss does not take.
  """
  fn = errors.pick(LOSSES, name, "config.loss.name")
  dtype = jnp.dtype(
    errors.pick(
      {d: d for d in ("float32", "bfloat16")}, dtype, "config.loss.dtype"
    )
  )

  def loss(zimg, ztxt, t, b):
    return errors.call(
      fn,
      options,
      "config.loss",
      zimg.astype(dtype),
      ztxt.astype(dtype),
      t,
      b,
      mesh=mesh,
      axes=axes,
    )

  return loss


def logit_stats(zimg, ztxt, t, b):
  """Mean logit of the B positive and the B * (B - 1) negative pairs.

  Exact in O(B E), for the sum of <zimg_i, ztxt_j> over all i and j is the inner
  product of two sums. Arguments as sigmoid_loss; no gradient flows.

  Returns:
    {"pos": () float32, "neg": () float32}; neg is not finite if B is 1.
  """
  zimg, ztxt, t, b = lax.stop_gradient((zimg, ztxt, t, b))
  zimg, ztxt, B = zimg.astype(F32), ztxt.astype(F32), len(zimg)
  pos = jnp.sum(zimg * ztxt)
  neg = jnp.sum(jnp.sum(zimg, axis=0) * jnp.sum(ztxt, axis=0)) - pos
  # Not by B * (B - 1), which is no int32 from B = 46,342.
  return {"pos": pos / B * t + b, "neg": neg / B / (B - 1) * t + b}


# --- One device's share: its b images, and the texts as they come by ----------


def _sigmoid_share(ring, zimg, ztxt, t, b, with_grads):
  """Returns the loss and, if with_grads, its gradients (else None)."""

  def pairs(positive, zi, zt, by_image, dzt):
    loss, db, dzi = by_image
    logits = _dot(zi, zt.T) * t + b
    # -log_sigmoid(label * logit) is softplus(x); sigmoid(x) is its slope.
    x = jnp.where(positive, -logits, logits)
    softplus = jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    loss += jnp.sum(softplus, axis=1)
    if not with_grads:
      return (loss, None, None), None
    slope = 1 / (1 + jnp.exp(-x))  # 0, as it should be, if exp overflows
    slope = jnp.where(positive, -slope, slope)  # by the logit
    db += jnp.sum(slope, axis=1)
    slope = slope.astype(zi.dtype)
    return (loss, db, dzi + _dot(slope, zt)), dzt + _dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  sums = ((row, row, zero), zero) if with_grads else ((row, None, None), None)
  (loss, db, dzimg), dztxt = ring.visit(pairs, zimg, ztxt, *sums)
  if not with_grads:
    return ring.mean(loss), None
  return ring.mean(loss), _gradients(ring, zimg, ztxt, t, dzimg, dztxt, db)


def _softmax_share(ring, zimg, ztxt, t, b, with_grads):
  """Returns the loss and, if with_grads, its gradients (else None)."""
  del b

  def normalisers(positive, zi, zt, by_image, by_text):
    del positive
    logits = _dot(zi, zt.T) * t
    return (
      jnp.logaddexp(by_image, jax.nn.logsumexp(logits, axis=1)),
      jnp.logaddexp(by_text, jax.nn.logsumexp(logits, axis=0)),
    )

  def pairs(positive, image, text, dzi, dzt):
    (zi, by_image), (zt, by_text) = image, text
    logits = _dot(zi, zt.T) * t
    slope = (
      jnp.exp(logits - by_image[:, None]) + jnp.exp(logits - by_text[None, :])
    ) / 2 - positive.astype(F32)
    slope = slope.astype(zi.dtype)
    return dzi + _dot(slope, zt), dzt + _dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  by_image, by_text = ring.visit(
    normalisers, zimg, ztxt, row - jnp.inf, row - jnp.inf
  )
  positives = jnp.sum(zimg.astype(F32) * ztxt.astype(F32), axis=1) * t
  loss = ring.mean((by_image + by_text) / 2 - positives)
  if not with_grads:
    return loss, None
  dzimg, dztxt = ring.visit(
    pairs, (zimg, by_image), (ztxt, by_text), zero, zero
  )
  return loss, _gradients(ring, zimg, ztxt, t, dzimg, dztxt, row)


def _gradients(ring, zimg, ztxt, t, dzimg, dztxt, db):
  """Gradients of the mean, from each embedding's sum of slope * the other one.

  That of t needs no sum over pairs of its own: the sum of slope_ij * <zimg_i,
  ztxt_j> over i and j is the sum of <zimg_i, dzimg_i> over i.
  """
  dt = ring.mean(jnp.sum(zimg.astype(F32) * dzimg, axis=1))
  scale = t / ring.batch
  return (
    (dzimg * scale).astype(zimg.dtype),
    (dztxt * scale).astype(ztxt.dtype),
    dt,
    ring.mean(db),
  )


def _dot(x, y):
  """x @ y, multiplied in their own type, summed in float32."""
  # Left to itself a TPU or GPU would round float32 to bfloat16 or TF32 first.
  precision = lax.Precision.HIGHEST if x.dtype == F32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=F32)


# --- All devices --------------------------------------------------------------


def _run(share, ring, mesh, zimg, ztxt, t, b):
  """The loss, of which every device does a share.

  Differentiated, it computes value and gradients in one go and keeps nothing
  but the gradients, so the backward pass is a mere scaling.
  """

  def run(with_grads, *args):
    split, whole = P(ring.axes), P()
    return jax.shard_map(
      functools.partial(share, ring, with_grads=with_grads),
      mesh=mesh,
      in_specs=(split, split, whole, whole),
      out_specs=(whole, (split, split, whole, whole) if with_grads else None),
    )(*args)

  def scale(gradients, g):
    return jax.tree.map(
      lambda x: (x.astype(F32) * g).astype(x.dtype), gradients
    )

  loss = jax.custom_vjp(lambda *args: run(False, *args)[0])
  loss.defvjp(functools.partial(run, True), scale)
  return loss(zimg, ztxt, jnp.asarray(t, F32), jnp.asarray(b, F32))


def _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, comm):
  """Checks the arguments of a ring loss and returns the ring."""
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  for axis in axes:
    if axis not in mesh.shape:
      raise errors.UserError(
        f'axes: the mesh has no axis "{axis}"'
        f"{errors.closest(axis, mesh.shape)}; it has: "
        f"{', '.join(mesh.shape)}"
      )
  devices = math.prod(mesh.shape[axis] for axis in axes)
  for name, z in (("zimg", zimg), ("ztxt", ztxt)):
    if z.ndim != 2:
      raise errors.UserError(f"{name} has to be (B, E), not {z.shape}")
    if z.dtype not in (jnp.bfloat16, F32):
      raise errors.UserError(
        f"{name} has to be bfloat16 or float32, not {z.dtype}"
      )
    if not len(z) or len(z) % devices:
      raise errors.UserError(
        f"{name}: {len(z)} rows do not divide over {devices} devices"
      )
  if zimg.shape != ztxt.shape or zimg.dtype != ztxt.dtype:
    raise errors.UserError(
      f"ztxt is {ztxt.dtype} {ztxt.shape}, "
      f"but zimg is {zimg.dtype} {zimg.shape}"
    )
  for name, x in (("t", t), ("b", b)):
    if jnp.shape(x):
      raise errors.UserError(f"{name} has to be a scalar, not {jnp.shape(x)}")
  if not isinstance(tile, int) or tile < 1:
    raise errors.UserError(f"tile has to be a whole number from 1, not {tile}")
  auto = "all_gather" if len(zimg) // devices < 256 else "ring"
  ways = {"ring": "ring", "all_gather": "all_gather", "auto": auto}
  errors.pick({"forward": 1, "both": 2}, direction, "direction")
  return ring_lib.Ring(
    len(zimg), devices, axes, tile, direction, errors.pick(ways, comm, "comm")
  )
