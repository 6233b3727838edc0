"""SigLIP's sigmoid loss, twice; softmax.py has CLIP's.

`sigmoid_loss` is Algorithm 1 of the SigLIP paper, as printed there.
`ring_sigmoid_loss` gives the same value and gradients for a batch that is split
over devices, and never holds more than one tile of its B x B logits.
docs/loss.md shows why one pass is enough; ring.py moves the texts.

In all functions zimg and ztxt are embeddings with L2-normalised rows, t is the
temperature (already exponentiated) and b the bias. bfloat16 embeddings are
multiplied in bfloat16, float32 ones in full float32 on every platform. Sums are
float32.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sigjax import errors
from sigjax.ring import Ring

F32 = jnp.float32
Rows = Float[Array, "B E"]
Scalar = Float[Array, ""] | float
Loss = Callable[..., Float[Array, ""]]


def sigmoid_loss(
  zimg: Rows, ztxt: Rows, t: Scalar, b: Scalar
) -> Float[Array, ""]:
  """Algorithm 1 of the SigLIP paper: the reference, with B x B logits at once.

  Args:
    zimg: (B, E) image embeddings.
    ztxt: (B, E) text embeddings; text i belongs to image i.
    t: () temperature.
    b: () bias.

  Returns:
    () float32: the sum over all pairs, divided by B.
  """
  logits = dot(zimg, ztxt.T) * t + b
  labels = 2 * jnp.eye(len(zimg)) - 1  # 1 on the diagonal, -1 elsewhere
  return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / len(zimg)


def ring_sigmoid_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar,
  *,
  mesh: Mesh,
  axes: str | tuple[str, ...] = ("data",),
  tile: int = 1024,
  direction: str = "forward",
  comm: str = "ring",
) -> Float[Array, ""]:
  """sigmoid_loss of a batch split over D devices (SigLIP, section 3.3).

  One trip of the texts round the ring gives the value and, if it is
  differentiated, all four gradients.

  Args:
    zimg: (B, E) image embeddings, bfloat16 or float32, rows split over axes.
    ztxt: (B, E) text embeddings, likewise; text i belongs to image i.
    t: () temperature.
    b: () bias.
    mesh: the mesh of devices.
    axes: the mesh axes that split the batch; together they are one ring.
    tile: logits are computed in tiles of at most tile x tile.
    direction: "forward", or "both": half of the texts travel each way, which
      uses both directions of every link.
    comm: "ring"; "all_gather": every device gets all texts at once, which waits
      once instead of D times but holds B texts and their gradients; "auto":
      "all_gather" below 256 texts a device, where a block takes less time than
      a permute needs to start, else "ring".

  Returns:
    () float32, the same on every device.

  Raises:
    UserError (a ValueError), while tracing: a wrong argument, or D does not
      divide B.
  """
  ring = ring_of(zimg, ztxt, t, b, mesh, axes, tile, direction, comm)
  return on_all_devices(_sigmoid_share, ring, mesh, zimg, ztxt, t, b)


def _softmax() -> Loss:
  from sigjax import softmax

  return softmax.ring_softmax_loss


# The choices of config.loss.name; each is imported when it is named.
LOSSES: dict[str, Callable[[], Loss]] = {
  "sigmoid": lambda: ring_sigmoid_loss,
  "softmax": _softmax,
}


def make(
  mesh: Mesh,
  axes: tuple[str, ...],
  *,
  name: str = "sigmoid",
  dtype: str = "float32",
  **options: Any,
) -> Loss:
  """Returns fn(zimg, ztxt, t, b) -> () float32 as a config describes it.

  Args:
    mesh, axes: see ring_sigmoid_loss.
    name: one of LOSSES.
    dtype: "float32" or "bfloat16"; embeddings are rounded to it first.
      Accelerators multiply float32 several times more slowly.
    **options: the loss's own, such as tile.

  Raises:
    UserError: an unknown name, or an option or value the loss does not take.
  """
  fn = errors.pick(LOSSES, name, "config.loss.name")()
  dtypes = {"float32": F32, "bfloat16": jnp.bfloat16}
  to = errors.pick(dtypes, dtype, "config.loss.dtype")

  errors.check(fn, options, "config.loss", *[None] * 4, mesh=mesh, axes=axes)

  def loss(zimg, ztxt, t, b):
    z = zimg.astype(to), ztxt.astype(to)
    return fn(*z, t, b, mesh=mesh, axes=axes, **options)

  # A trace on tiny shapes: a wrong value fails now, not at the first step.
  z = jax.ShapeDtypeStruct((mesh.size, 1), F32)
  jax.eval_shape(lambda x, y: loss(x, y, 1.0, 0.0), z, z)
  return loss


def logit_stats(
  zimg: Rows, ztxt: Rows, t: Scalar, b: Scalar
) -> dict[str, Float[Array, ""]]:
  """Mean logit of the B positive and of the B * (B - 1) negative pairs.

  Exact in O(B E): the sum of <zimg_i, ztxt_j> over all i and j is the inner
  product of two sums. No gradient flows. Arguments as in sigmoid_loss.

  Returns:
    {"pos": () float32, "neg": () float32}; neg is not finite if B is 1.
  """
  zimg, ztxt, t, b = lax.stop_gradient((zimg, ztxt, t, b))
  zimg, ztxt, B = zimg.astype(F32), ztxt.astype(F32), len(zimg)
  pos = jnp.sum(zimg * ztxt)
  neg = jnp.sum(jnp.sum(zimg, axis=0) * jnp.sum(ztxt, axis=0)) - pos
  # B * (B - 1) does not fit int32 from B = 46,342, so divide twice.
  return {"pos": pos / B * t + b, "neg": neg / B / (B - 1) * t + b}


# --- One device's share: its b images, and all texts as they pass ------------


def _sigmoid_share(ring: Ring, zimg, ztxt, t, b, with_grads: bool):
  """Returns the loss and, if with_grads, its gradients (else None)."""

  def pairs(positive, zi, zt, by_image, dzt):
    loss, db, dzi = by_image
    logits = dot(zi, zt.T) * t + b
    # -log_sigmoid(label * logit) is softplus(x); sigmoid(x) is its slope.
    x = jnp.where(positive, -logits, logits)
    softplus = jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    loss += jnp.sum(softplus, axis=1)
    if not with_grads:
      return (loss, None, None), None
    slope = 1 / (1 + jnp.exp(-x))  # correctly 0 where exp overflows
    slope = jnp.where(positive, -slope, slope)  # with respect to the logit
    db += jnp.sum(slope, axis=1)
    slope = slope.astype(zi.dtype)
    return (loss, db, dzi + dot(slope, zt)), dzt + dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  sums = ((row, row, zero), zero) if with_grads else ((row, None, None), None)
  (loss, db, dzimg), dztxt = ring.visit(pairs, zimg, ztxt, *sums)
  if not with_grads:
    return ring.mean(loss), None
  return ring.mean(loss), gradients(ring, zimg, ztxt, t, dzimg, dztxt, db)


def gradients(ring: Ring, zimg, ztxt, t, dzimg, dztxt, db):
  """Gradients of the mean, from each row's sum of slope * the other embedding.

  The gradient of t needs no sum over pairs of its own: the sum of slope_ij *
  <zimg_i, ztxt_j> over i and j is the sum of <zimg_i, dzimg_i> over i.
  """
  dt = ring.mean(jnp.sum(zimg.astype(F32) * dzimg, axis=1))
  dzimg, dztxt = dzimg * (t / ring.batch), dztxt * (t / ring.batch)
  dtype = zimg.dtype
  return dzimg.astype(dtype), dztxt.astype(dtype), dt, ring.mean(db)


def dot(x: Array, y: Array) -> Array:
  """x @ y, multiplied in their own type, summed in float32."""
  # By default TPUs and GPUs round float32 to bfloat16 or TF32 first.
  precision = lax.Precision.HIGHEST if x.dtype == F32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=F32)


def on_all_devices(share, ring: Ring, mesh: Mesh, zimg, ztxt, t, b):
  """Returns the loss, each device computing its share.

  If it is differentiated, the forward pass computes value and gradients and
  keeps only the gradients; the backward pass scales them.
  """

  def run(with_grads, *args):
    split, whole = P(ring.axes), P()
    grads = (split, split, whole, whole) if with_grads else None
    return jax.shard_map(
      functools.partial(share, ring, with_grads=with_grads),
      mesh=mesh,
      in_specs=(split, split, whole, whole),
      out_specs=(whole, grads),
    )(*args)

  def scale(grads, g):
    return jax.tree.map(lambda x: (x.astype(F32) * g).astype(x.dtype), grads)

  loss = jax.custom_vjp(lambda *args: run(False, *args)[0])
  loss.defvjp(functools.partial(run, True), scale)
  return loss(zimg, ztxt, jnp.asarray(t, F32), jnp.asarray(b, F32))


def ring_of(zimg, ztxt, t, b, mesh, axes, tile, direction, comm) -> Ring:
  """Returns the ring, after a check of a ring loss's arguments."""
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  for axis in axes:
    errors.pick(mesh.shape, axis, "axes: the mesh axis")
  devices = math.prod(mesh.shape[axis] for axis in axes)
  (B, *_), like = zimg.shape, lambda z: f"{z.dtype} {z.shape}"
  wrong = []
  for name, z in (("zimg", zimg), ("ztxt", ztxt)):
    if z.ndim != 2 or z.dtype not in (jnp.bfloat16, F32):
      wrong += [f"{name} has to be (B, E), bfloat16 or float32, not {like(z)}"]
  if like(zimg) != like(ztxt):
    wrong += [f"ztxt is {like(ztxt)}, but zimg is {like(zimg)}"]
  if not B or B % devices:
    wrong += [f"zimg: {B} rows do not divide over {devices} devices"]
  for name, x in (("t", t), ("b", b)):
    if jnp.shape(x):
      wrong += [f"{name} has to be a scalar, not {jnp.shape(x)}"]
  if not isinstance(tile, int) or tile < 1:
    wrong += [f"tile has to be a whole number from 1, not {tile}"]
  if wrong:
    raise errors.UserError(wrong[0])
  errors.pick({"forward": 1, "both": 2}, direction, "direction")
  auto = "all_gather" if B // devices < 256 else "ring"
  ways = {"ring": "ring", "all_gather": "all_gather", "auto": auto}
  return Ring(
    B, devices, axes, tile, direction, errors.pick(ways, comm, "comm")
  )
