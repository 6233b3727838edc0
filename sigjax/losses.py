"""The losses: SigLIP's sigmoid loss, CLIP's softmax loss, and both on a ring.

`sigmoid_loss` is Algorithm 1 of the SigLIP paper, as plain as it is printed.
`ring_sigmoid_loss` gives the same number and the same gradients for a batch
split over devices, without ever holding more than one tile of its B x B pairs.
docs/loss.md draws the ring and derives what is used here.

Throughout: zimg, ztxt are (B, E) embeddings with L2-normalised rows, bfloat16
or float32; t is the temperature, already exponentiated, b the bias, both
scalars. Of the D devices each holds b = B / D images and b texts. bfloat16
embeddings are multiplied in bfloat16, float32 ones in full float32 on every
platform, and all sums are float32.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sigjax import errors

F32 = jnp.float32


def sigmoid_loss(zimg, ztxt, t, b):
  """Algorithm 1 of the SigLIP paper: the reference, B x B logits at once.

  Args:
    zimg: (B, E) image embeddings.
    ztxt: (B, E) text embeddings; row i belongs to image i.
    t: () temperature.
    b: () bias.

  Returns:
    () float32: the sum over all pairs, divided by B.
  """
  logits = _dot(zimg, ztxt.T) * t + b
  labels = 2 * jnp.eye(len(zimg)) - 1
  return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / len(zimg)


def softmax_loss(zimg, ztxt, t, b=0.0):
  """CLIP's symmetric loss, arguments as sigmoid_loss: the reference.

  The mean of two cross-entropies: each image picks its text out of all texts,
  each text its image. A bias cancels in a softmax, so b is not used.
  """
  del b
  logits = _dot(zimg, ztxt.T) * t
  by_image = jax.nn.log_softmax(logits, axis=1)
  by_text = jax.nn.log_softmax(logits, axis=0)
  return -jnp.mean(jnp.diag(by_image) + jnp.diag(by_text)) / 2


def ring_sigmoid_loss(zimg, ztxt, t, b, *, mesh, axes=("data",), tile=1024,
                      direction="forward", comm="ring"):
  """sigmoid_loss of a batch split over devices (SigLIP, section 3.3).

  One trip of the texts round the ring gives the loss and, when it is
  differentiated, all four gradients.

  Args:
    zimg: (B, E) image embeddings, rows split over axes.
    ztxt: (B, E) text embeddings, likewise.
    t: () temperature.
    b: () bias.
    mesh: the mesh of devices.
    axes: the mesh axes that split the batch, taken together as one ring.
    tile: a block of b x b pairs is worked through in tile x tile pieces.
    direction: "forward", or "both": half the texts go round each way, using
      both directions of a link.
    comm: "ring"; "all_gather": every device gets all texts at once, which
      takes memory for B texts but waits once, not D times; or "auto":
      "all_gather" if b < 256, when a block is computed sooner than a permute
      is begun.

  Returns:
    () float32, the same on every device.

  Raises:
    UserError: an argument is not as said above; while tracing.
  """
  ring = _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, comm)
  return _run(_sigmoid_share, ring, mesh)(zimg, ztxt, t, b)


def ring_softmax_loss(zimg, ztxt, t, b=0.0, *, mesh, axes=("data",), tile=1024,
                      direction="forward"):
  """softmax_loss of a batch split over devices; as ring_sigmoid_loss.

  The softmax's normalisers need all pairs before any gradient is known: one
  trip for the loss, a second one for the gradients.
  """
  ring = _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, "ring")
  return _run(_softmax_share, ring, mesh)(zimg, ztxt, t, b)


# What config.loss.name chooses. The face of every loss here:
#   loss(zimg, ztxt, t, b, *, mesh, axes, **options) -> () float32
LOSSES = {"sigmoid": ring_sigmoid_loss, "softmax": ring_softmax_loss}


def logit_stats(zimg, ztxt, t, b):
  """Mean logit of the B positive and of the B * (B - 1) negative pairs.

  Exact, without the pairs: the sum of <zimg_i, ztxt_j> over all i, j is the
  inner product of two sums. O(B E); no gradient flows; arguments as
  sigmoid_loss.

  Returns:
    {"pos": () float32, "neg": () float32}; neg is NaN if B is 1.
  """
  zimg, ztxt, t, b = lax.stop_gradient((zimg, ztxt, t, b))
  zimg, ztxt, B = zimg.astype(F32), ztxt.astype(F32), len(zimg)
  pos = jnp.sum(zimg * ztxt)
  neg = jnp.sum(jnp.sum(zimg, 0) * jnp.sum(ztxt, 0)) - pos
  return {"pos": t * pos / B + b,
          "neg": t * neg / (B * (B - 1.0)) + b if B > 1 else neg * jnp.nan}


# --- Each loss as one device of the ring sees it: b images, b texts ----------


def _sigmoid_share(ring, zimg, ztxt, t, b, with_grads):
  """Returns the loss and, if with_grads, its gradients (else None)."""

  def pairs(positive, zi, zt, by_image, dzt):
    logits = _dot(zi, zt.T) * t + b
    # -log_sigmoid(label * logit) and its derivative share one exponential.
    x = jnp.where(positive, -logits, logits)
    e = jnp.exp(-jnp.abs(x))
    loss, db, dzi = by_image
    loss += jnp.sum(jnp.maximum(x, 0) + jnp.log1p(e), axis=1)
    if not with_grads:
      return (loss, None, None), None
    # sigmoid(logit) - [positive], but exact for a positive that is nearly 1.
    slope = jnp.where(x >= 0, 1, e) / (1 + e)
    slope = jnp.where(positive, -slope, slope)
    db += jnp.sum(slope, axis=1)
    slope = slope.astype(zi.dtype)
    return (loss, db, dzi + _dot(slope, zt)), dzt + _dot(slope.T, zi)

  zero = ring.zeros(zimg.shape)
  row = ring.zeros(zimg.shape[:1])
  if not with_grads:
    (loss, _, _), _ = ring.visit(pairs, zimg, ztxt, (row, None, None), None)
    return ring.mean(loss), None
  (loss, db, dzimg), dztxt = ring.visit(
      pairs, zimg, ztxt, (row, row, zero), zero)
  return ring.mean(loss), _gradients(ring, zimg, ztxt, t, dzimg, dztxt, db)


def _softmax_share(ring, zimg, ztxt, t, b, with_grads):
  """Returns the loss and, if with_grads, its gradients (else None)."""
  del b

  def normalisers(positive, zi, zt, by_image, by_text):
    del positive
    logits = _dot(zi, zt.T) * t
    return (jnp.logaddexp(by_image, jax.nn.logsumexp(logits, axis=1)),
            jnp.logaddexp(by_text, jax.nn.logsumexp(logits, axis=0)))

  def pairs(positive, image, text, dzi, dzt):
    (zi, by_image), (zt, by_text) = image, text
    logits = _dot(zi, zt.T) * t
    slope = (jnp.exp(logits - by_image[:, None]) / 2
             + jnp.exp(logits - by_text[None, :]) / 2
             - positive.astype(F32))
    slope = slope.astype(zi.dtype)
    return dzi + _dot(slope, zt), dzt + _dot(slope.T, zi)

  row = ring.zeros(zimg.shape[:1])
  by_image, by_text = ring.visit(
      normalisers, zimg, ztxt, row - jnp.inf, row - jnp.inf)
  positives = jnp.sum(zimg.astype(F32) * ztxt.astype(F32), axis=1) * t
  loss = ring.mean((by_image + by_text) / 2 - positives)
  if not with_grads:
    return loss, None
  zero = ring.zeros(zimg.shape)
  dzimg, dztxt = ring.visit(
      pairs, (zimg, by_image), (ztxt, by_text), zero, zero)
  return loss, _gradients(ring, zimg, ztxt, t, dzimg, dztxt, row)


def _gradients(ring, zimg, ztxt, t, dzimg, dztxt, db):
  """Gradients of the mean, from sums of slope times the other embedding.

  The temperature needs no sum over pairs of its own: the sum of slope_ij *
  <zimg_i, ztxt_j> over i, j is the sum of <zimg_i, dzimg_i> over i.
  """
  dt = ring.mean(jnp.sum(zimg.astype(F32) * dzimg, axis=1))
  scale = t / ring.batch
  return ((dzimg * scale).astype(zimg.dtype), (dztxt * scale).astype(ztxt.dtype),
          dt, ring.mean(db))


# --- The ring -----------------------------------------------------------------


class _Ring(NamedTuple):
  """D devices that share a batch, and how they go about it."""
  batch: int
  devices: int
  axes: tuple
  tile: int
  direction: str
  comm: str

  def zeros(self, shape):
    return lax.pcast(jnp.zeros(shape, F32), self.axes, to="varying")

  def mean(self, x):
    return lax.psum(jnp.sum(x), self.axes) / self.batch

  def visit(self, *args):
    return (_gather if self.comm == "all_gather" else _trip)(self, *args)


def _trip(ring, pairs, images, texts, by_image, by_text):
  """Takes the texts once round the ring, so that they meet all images.

  Args:
    ring: the _Ring.
    pairs: what is done with the pairs of one tile; see _block.
    images: arrays (b, ...) that stay.
    texts: arrays (b, ...) that travel and are only read.
    by_image: sums (b, ...) that stay.
    by_text: sums (b, ...) that travel with the texts.

  Returns:
    by_image and by_text, the latter home again, after all D blocks.
  """
  D, me = ring.devices, lax.axis_index(ring.axes)
  b = ring.batch // D
  cut = b // 2 if ring.direction == "both" else 0
  lanes = [(start, stop, way) for start, stop, way in
           [(0, cut, -1), (cut, b, 1)] if start < stop]

  def step(s, state):
    by_image, travelling = state
    out = []
    for (start, _, way), (texts, by_text) in zip(lanes, travelling):
      send = functools.partial(lax.ppermute, axis_name=ring.axes, perm=[
          (i, (i + way) % D) for i in range(D)])
      # The texts are sent on before they are used, so that they are on their
      # way while the block is computed; its sums can only follow after it.
      ahead = send(texts)
      owner = (me - way * s) % D
      by_image, by_text = _block(
          pairs, ring.tile, (owner - me) * b + start, images, texts, by_image,
          by_text)
      ahead, by_text = lax.optimization_barrier((ahead, by_text))
      out.append((ahead, send(by_text)))
    return by_image, out

  travelling = [_cut((texts, by_text), start, stop - start)
                for start, stop, _ in lanes]
  by_image, travelling = lax.fori_loop(0, D, step, (by_image, travelling))
  home = [by_text for _, by_text in travelling]
  return by_image, jax.tree.map(lambda *x: jnp.concatenate(x), *home)


def _gather(ring, pairs, images, texts, by_image, by_text):
  """As _trip, with all texts on every device at once."""
  b, D = ring.batch // ring.devices, ring.devices
  gather = functools.partial(lax.all_gather, axis_name=ring.axes, tiled=True)
  by_text = jax.tree.map(lambda x: ring.zeros((D * b, *x.shape[1:])), by_text)
  by_image, by_text = _block(
      pairs, ring.tile, -lax.axis_index(ring.axes) * b, images, gather(texts),
      by_image, by_text)
  return by_image, jax.tree.map(
      lambda x: lax.psum_scatter(x, ring.axes, tiled=True), by_text)


def _block(pairs, tile, first, images, texts, by_image, by_text):
  """Adds a block of pairs to by_image and by_text, tile by tile.

  Args:
    pairs: called as pairs(positive, images, texts, by_image, by_text) with
      the rows of one tile, positive being (rows, columns) bool; returns its
      by_image, by_text.
    tile: rows and columns of a tile, at most.
    first: text j belongs to image j + first.
    images, texts, by_image, by_text: as in _trip.

  Returns:
    by_image, by_text.
  """

  def down(i, m, sums):
    by_image, by_text = sums
    zi = _cut(images, i, m)

    def along(j, n, sums):
      mine, by_text = sums
      positive = ((i + jnp.arange(m))[:, None]
                  == (first + j + jnp.arange(n))[None, :])
      mine, theirs = pairs(
          positive, zi, _cut(texts, j, n), mine, _cut(by_text, j, n))
      return mine, _put(by_text, theirs, j)

    mine, by_text = _each(
        _rows(texts), tile, along, (_cut(by_image, i, m), by_text))
    return _put(by_image, mine, i), by_text

  return _each(_rows(images), tile, down, (by_image, by_text))


def _each(n, tile, visit, state):
  """state after visit(start, size, state) of every tile of range(n)."""
  tile = min(n, tile)
  whole, rest = divmod(n, tile)
  state = lax.fori_loop(0, whole, lambda i, s: visit(i * tile, tile, s), state)
  return visit(whole * tile, rest, state) if rest else state


def _rows(tree):
  return len(jax.tree.leaves(tree)[0])


def _cut(tree, start, size):
  return jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree, part, start):
  return jax.tree.map(
      lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


def _dot(x, y):
  """x @ y, multiplied in the type of x and y, summed in float32."""
  # Without it a TPU or GPU would round float32 to bfloat16 or TF32 first.
  precision = lax.Precision.HIGHEST if x.dtype == F32 else None
  return jnp.dot(x, y, precision=precision, preferred_element_type=F32)


def _run(share, ring, mesh):
  """Makes loss(zimg, ztxt, t, b) of what one device does.

  Asked for a gradient, it computes value and gradients together and keeps only
  the gradients, so nothing is left for the backward pass but a scaling.
  """

  def run(with_grads, *args):
    return jax.shard_map(
        functools.partial(share, ring, with_grads=with_grads), mesh=mesh,
        in_specs=(P(ring.axes), P(ring.axes), P(), P()),
        out_specs=(P(), (P(ring.axes), P(ring.axes), P(), P())
                   if with_grads else None))(*args)

  def scaled(gradients, g):
    return jax.tree.map(
        lambda x: (x.astype(F32) * g).astype(x.dtype), gradients)

  loss = jax.custom_vjp(lambda *args: run(False, *args)[0])
  loss.defvjp(functools.partial(run, True), scaled)
  return loss


def _ring(zimg, ztxt, t, b, mesh, axes, tile, direction, comm):
  """Checks the arguments of a ring loss and returns the _Ring."""
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  for axis in axes:
    if axis not in mesh.shape:
      raise errors.UserError(
          f'axes: the mesh has no axis "{axis}"'
          f'{errors.closest(axis, mesh.shape)}; it has: '
          f'{", ".join(mesh.shape)}')
  devices = math.prod(mesh.shape[axis] for axis in axes)
  for name, z in (("zimg", zimg), ("ztxt", ztxt)):
    if z.ndim != 2:
      raise errors.UserError(f"{name} has to be (B, E), not {z.shape}")
    if z.dtype not in (jnp.float32, jnp.bfloat16):
      raise errors.UserError(
          f"{name} has to be bfloat16 or float32, not {z.dtype}")
    if len(z) % devices or not len(z):
      raise errors.UserError(
          f"{name}: a batch of {len(z)} does not divide over {devices} devices")
  if zimg.shape != ztxt.shape or zimg.dtype != ztxt.dtype:
    raise errors.UserError(
        f"ztxt is {ztxt.dtype} {ztxt.shape}, but zimg is {zimg.dtype} "
        f"{zimg.shape}")
  for name, x in (("t", t), ("b", b)):
    if jnp.shape(x):
      raise errors.UserError(f"{name} has to be a scalar, not {jnp.shape(x)}")
  if tile < 1:
    raise errors.UserError(f"tile has to be at least 1, not {tile}")
  auto = "all_gather" if len(zimg) // devices < 256 else "ring"
  errors.pick(dict.fromkeys(("forward", "both")), direction, "direction")
  comm = errors.pick(
      {"ring": "ring", "all_gather": "all_gather", "auto": auto}, comm, "comm")
  return _Ring(len(zimg), devices, axes, tile, direction, comm)
