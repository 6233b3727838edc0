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

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32
import numpy as np

from sigjax import errors
from sigjax import ring as ring_lib
from sigjax.ring import Ring

F32 = jnp.float32
Rows = Float[Array, "B E"]
Scalar = Float[Array, ""] | float
Groups = Int32[Array, "B G"] | None
Loss = Callable[..., Float[Array, ""]]


def sigmoid_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar,
  groups: Groups = None,
  key: Array | None = None,
  *,
  positives: str | None = None,
  negatives: Mapping[str, Any] | None = None,
) -> Float[Array, ""]:
  """Algorithm 1 of the SigLIP paper: the reference, with B x B logits at once.

  Args:
    zimg: (B, E) image embeddings.
    ztxt: (B, E) text embeddings; text i belongs to image i.
    t: () temperature.
    b: () bias.
    groups, key, positives, negatives: see ring_sigmoid_loss.

  Returns:
    () float32: the sum over all pairs, divided by B.
  """
  check_groups(groups, positives, len(zimg))
  chosen, draw = _chosen(negatives, key, len(zimg))
  cosine, diagonal = dot(zimg, ztxt.T), jnp.eye(len(zimg), dtype=bool)
  positive, weight = relate(positives, diagonal, groups, groups)
  if chosen:
    from sigjax import negatives as lib

    weight = lib.weights(
      chosen, draw, lax.stop_gradient(cosine), positive, weight
    )
  weight = jnp.ones(()) if weight is None else weight.astype(F32)
  logits = cosine * t + b
  labels = jnp.where(positive, 1.0, -1.0)  # 1 on the diagonal
  return -jnp.sum(weight * jax.nn.log_sigmoid(labels * logits)) / len(zimg)


def ring_sigmoid_loss(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar,
  groups: Groups = None,
  key: Array | None = None,
  *,
  mesh: Mesh,
  axes: str | tuple[str, ...] = ("data",),
  tile: int = 1024,
  direction: str = "forward",
  comm: str = "ring",
  positives: str | None = None,
  negatives: Mapping[str, Any] | None = None,
) -> Float[Array, ""]:
  """sigmoid_loss of a batch split over D devices (SigLIP, section 3.3).

  One trip of the texts round the ring gives the value and, if it is
  differentiated, all four gradients.

  Args:
    zimg: (B, E) image embeddings, bfloat16 or float32, rows split over axes.
    ztxt: (B, E) text embeddings, likewise; text i belongs to image i.
    t: () temperature.
    b: () bias.
    groups: (B, G) int32, rows split over axes, if there are positives. Two rows
      that agree in a column are a true pair.
    key: of jax.random, for random negatives: other keys keep other pairs.
    mesh: the mesh of devices.
    axes: the mesh axes that split the batch; together they are one ring.
    tile: logits are computed in tiles of at most tile x tile.
    direction: "forward", or "both": half of the texts travel each way, which
      uses both directions of every link.
    comm: "ring"; "all_gather": every device gets all texts at once, which waits
      once instead of D times but holds B texts and their gradients; "auto":
      "all_gather" below 256 texts a device, where a block takes less time than
      a permute needs to start, else "ring".
    positives: what a true pair off the diagonal is: "mask": no pair at all;
      "all": a positive. None: a negative, and groups are not given.
    negatives: dict(share=, which=): keeps a share of the negatives, 0 to 1, of
      the whole batch: "random" ones, the "hardest" or the "easiest". The sum is
      still divided by B. None keeps all. See negatives.py.

  Returns:
    () float32, the same on every device.

  Raises:
    UserError (a ValueError), while tracing: a wrong argument, or D does not
      divide B.
  """
  ring = ring_of(zimg, ztxt, t, b, mesh, axes, tile, direction, comm)
  check_groups(groups, positives, len(zimg))
  chosen, draw = _chosen(negatives, key, len(zimg))
  share = functools.partial(_sigmoid_share, positives, chosen)
  return on_all_devices(share, ring, mesh, zimg, ztxt, t, b, groups, draw)


# What a true pair off the diagonal is, see ring_sigmoid_loss.
POSITIVES = {None: "a negative", "mask": "no pair", "all": "a positive"}


def check_groups(groups: Groups, positives: str | None, B: int) -> None:
  """Raises UserError unless groups are (B, G), and given if they are used."""
  errors.pick(POSITIVES, positives, "positives")
  if positives and groups is None:
    raise errors.UserError(
      f'positives is "{positives}", but the batch has no "group": add '
      """group('concept'), or another feature, to config.pp, and 'group' """
      "to its keep"
    )
  if groups is None:
    return
  if positives is None:
    raise errors.UserError(
      'the batch has a "group" that positives None does not use: set '
      'config.loss.positives to "mask" or "all", or keep no group in config.pp'
    )
  if groups.ndim != 2 or len(groups) != B or groups.dtype != jnp.int32:
    raise errors.UserError(
      f"groups have to be ({B}, G) int32, not {groups.shape} {groups.dtype}"
    )


def relate(
  positives: str | None, diagonal: Array, image: Groups, text: Groups
) -> tuple[Array, Array | None]:
  """Returns, of the pairs of m images and n texts, (positive, counts).

  Args:
    positives: see ring_sigmoid_loss.
    diagonal: (m, n) bool, where text and image are of one row.
    image, text: their groups, (m, G) and (n, G), or None.

  Returns:
    (m, n) bool, True for positives; and (m, n) bool, False for pairs that count
    for nothing, or None if all count.
  """
  if image is None or text is None:
    return diagonal, None
  same = jnp.any(image[:, None] == text[None, :], axis=2)
  if positives == "all":
    return diagonal | same, None
  return diagonal, diagonal | ~same


def _chosen(section, key, B):
  """Returns what negatives.py needs: Negatives, and the words of the key."""
  if section is None:
    return None, None
  from sigjax import negatives  # few runs need it

  chosen = negatives.of(section, B)
  if chosen.which != "random":
    return chosen, None
  if key is None:
    raise errors.UserError("negatives: random ones need a key, of jax.random")
  return chosen, jax.random.key_data(key).ravel()


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
  """Returns fn(zimg, ztxt, t, b, groups=, key=) as a config describes it.

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

  given: dict[str, Any] = dict(mesh=mesh, axes=axes, groups=None)
  if "negatives" in inspect.signature(fn).parameters:
    given["key"] = None
  errors.check(fn, options, "config.loss", *[None] * 4, **given)

  def loss(zimg, ztxt, t, b, groups=None, key=None):
    z = zimg.astype(to), ztxt.astype(to)
    more = dict(given, groups=groups)
    if "key" in given:
      more["key"] = key
    return fn(*z, t, b, **more, **options)

  return loss


def logit_stats(
  zimg: Rows, ztxt: Rows, t: Scalar, b: Scalar
) -> dict[str, Float[Array, ""]]:
  """Mean logit of the B positive and of the B * (B - 1) negative pairs.

  Exact in O(B E): the sum of <zimg_i, ztxt_j> over all i and j is the inner
  product of two sums. No gradient flows. Arguments as in sigmoid_loss. A
  positive is a pair on the diagonal, whatever the loss makes of the others.

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


def _sigmoid_share(
  positives, chosen, ring: Ring, zimg, ztxt, t, b, groups, draw, with_grads
):
  """Returns the loss and, if with_grads, its gradients (else None)."""
  relation = functools.partial(relate, positives)
  images, texts, weigh = (zimg, groups), (ztxt, groups), None
  if chosen:
    from sigjax import negatives

    place = jnp.arange(len(zimg)) + lax.axis_index(ring.axes) * len(zimg)
    place = place.astype(jnp.uint32)
    images, texts = (*images, place), (*texts, place)
    weigh = negatives.select(ring, chosen, draw, relation, images, texts)

  def pairs(diagonal, image, text, by_image, dzt):
    loss, db, dzi = by_image
    zi, zt = image[0], text[0]
    cosine = dot(zi, zt.T)
    positive, weight = relation(diagonal, image[1], text[1])
    if weigh:
      weight = weigh(image, text, cosine, positive, weight)
    logits = cosine * t + b
    # -log_sigmoid(label * logit) is softplus(x); sigmoid(x) is its slope.
    x = jnp.where(positive, -logits, logits)
    softplus = jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    if weight is not None:
      softplus *= weight.astype(F32)  # a product keeps NaN
    loss += jnp.sum(softplus, axis=1)
    if not with_grads:
      return (loss, None, None), None
    slope = 1 / (1 + jnp.exp(-x))  # correctly 0 where exp overflows
    slope = jnp.where(positive, -slope, slope)  # with respect to the logit
    if weight is not None:
      slope *= weight.astype(F32)
    db += jnp.sum(slope, axis=1)
    slope = slope.astype(zi.dtype)
    return (loss, db, dzi + dot(slope, zt)), dzt + dot(slope.T, zi)

  row, zero = ring.zeros(len(zimg)), ring.zeros(*zimg.shape)
  sums = ((row, row, zero), zero) if with_grads else ((row, None, None), None)
  (loss, db, dzimg), dztxt = ring.visit(pairs, images, texts, *sums)
  if not with_grads:
    return ring.mean(loss), None
  return ring.mean(loss), gradients(ring, zimg, ztxt, t, dzimg, dztxt, db)


def gradients(
  ring: Ring,
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  dzimg: Float[Array, "b E"],
  dztxt: Float[Array, "b E"],
  db: Float[Array, " b"],
) -> tuple[Rows, Rows, Array, Array]:
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


def on_all_devices(
  share: Callable,
  ring: Ring,
  mesh: Mesh,
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar,
  groups: Groups,
  draw: Any = None,
) -> Float[Array, ""]:
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
      in_specs=(split, split, whole, whole, split, whole),
      out_specs=(whole, grads),
    )(*args)

  def scale(grads, g):
    by = lambda x: (x.astype(F32) * g).astype(x.dtype)
    return *jax.tree.map(by, grads), None, None  # groups and draw have none

  loss = jax.custom_vjp(lambda *args: run(False, *args)[0])
  loss.defvjp(functools.partial(run, True), scale)
  t, b = jnp.asarray(t, F32), jnp.asarray(b, F32)
  return loss(zimg, ztxt, t, b, groups, draw)


def ring_of(
  zimg: Rows,
  ztxt: Rows,
  t: Scalar,
  b: Scalar,
  mesh: Mesh,
  axes: str | Sequence[str],
  tile: int,
  direction: str,
  comm: str,
) -> Ring:
  """Returns the ring, after a check of a ring loss's arguments."""
  names = (axes,) if isinstance(axes, str) else tuple(axes)
  for axis in names:
    errors.pick(mesh.shape, axis, "axes: the mesh axis")
  devices = math.prod(mesh.shape[axis] for axis in names)
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
  comm = errors.pick(ways, comm, "comm")
  order = ring_lib.order(devices_on(mesh, names))
  return Ring(B, devices, names, order, tile, direction, comm)


def devices_on(mesh: Mesh, axes: tuple[str, ...]) -> list[Any]:
  """Returns the devices of one ring: along axes, at the start of all others."""
  at = [mesh.axis_names.index(axis) for axis in axes]
  along = np.moveaxis(mesh.devices, at, range(len(at)))
  return list(along.reshape(*along.shape[: len(at)], -1)[..., 0].flat)
