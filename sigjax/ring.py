"""How devices that share a batch visit all of its image-text pairs.

Each of D devices holds b = B / D images and b texts. Images stay. Texts travel
round the ring, together with the accumulators that belong to them; after D
steps every pair has met and every accumulator is home again. A block of b x b
pairs is computed in tiles, so that no array is larger than b x E or tile x tile
(with comm "all_gather": B x E).

docs/loss.md has a drawing; SigLIP, section 3.3 and figure 1.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = Any  # an array, a tuple of arrays, or None


def add(x: Tree, y: Tree) -> Tree:
  """Returns x + y, leaf by leaf."""
  return jax.tree.map(jnp.add, x, y)


class Ring(NamedTuple):
  """Ring configuration, for use inside jax.shard_map."""

  batch: int  # B
  devices: int  # D
  axes: tuple[str, ...]  # the mesh axes that form the ring
  order: tuple[int, ...]  # of devices round the ring: places on the axes
  tile: int  # the largest number of rows and of columns of a tile
  direction: str = "forward"  # or "both": half of the texts travel each way
  comm: str = "ring"  # or "all_gather": all texts on every device at once

  def zeros(self, *shape: int) -> Float[Array, "..."]:
    """Returns zero accumulators, float32, varying over the ring's axes."""
    return lax.pcast(jnp.zeros(shape, jnp.float32), self.axes, to="varying")

  def mean(self, x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the sum of x over all elements and devices, divided by B."""
    return lax.psum(jnp.sum(x), self.axes) / self.batch

  def visit(
    self,
    pairs: Callable[..., tuple[Tree, Tree]],
    images: Tree,
    texts: Tree,
    by_image: Tree,
    by_text: Tree,
    merge: Callable[[Tree, Tree], Tree] = add,
  ) -> tuple[Tree, Tree]:
    """Calls `pairs` on every tile of the B x B pairs.

    Args:
      pairs: fn(positive, images, texts, by_image, by_text) -> (by_image,
        by_text), which adds one tile to the accumulators of its rows; positive
        is (rows of images, rows of texts) bool, True where both belong
        together.
      images: (b, ...) arrays that stay.
      texts: (b, ...) arrays that travel and are only read.
      by_image: (b, ...) accumulators over all texts; they stay.
      by_text: (b, ...) accumulators over no images; they travel. With comm
        "all_gather" they have to be 0 and pairs has to add to them.
      merge: of two accumulators of the same texts.

    Returns:
      by_image and by_text after all pairs.
    """
    if self.comm == "all_gather":
      return _all_gather(self, pairs, images, texts, by_image, by_text)
    return _ring(self, pairs, images, texts, by_image, by_text, merge)


def _ring(ring: Ring, pairs, images, texts, by_image, by_text, merge):
  """Ring.visit with texts that go once round the ring."""
  D, order = ring.devices, ring.order
  b = ring.batch // D
  half = b // 2 if ring.direction == "both" else 0
  lanes = [(0, half, -1), (half, b, 1)] if half else [(0, b, 1)]

  def send(x, way):
    perm = [(order[i], order[(i + way) % D]) for i in range(D)]
    return lax.ppermute(x, ring.axes, perm) if D > 1 else x

  def step(_, state, at_home=False):
    by_image, travelling = state
    left = []
    for (start, stop, way), (texts, before) in zip(lanes, travelling):
      # On the way while the block is computed: these texts to the next device,
      # and what was added up for them elsewhere to this one.
      ahead, elsewhere = send(texts, way), send(before, way)
      here = _cut(by_text, start, stop - start)
      first = start if at_home else None
      by_image, here = _block(
        ring.tile, pairs, first, images, texts, by_image, here
      )
      left.append((ahead, here if at_home else merge(elsewhere, here)))
    return by_image, left

  travelling = [
    (_cut(texts, start, stop - start), None) for start, stop, _ in lanes
  ]
  state = step(0, (by_image, travelling), at_home=True)
  by_image, travelling = lax.fori_loop(1, D, step, state)
  home = [send(x, way) for (_, _, way), (_, x) in zip(lanes, travelling)]
  return by_image, jax.tree.map(lambda *x: jnp.concatenate(x), *home)


def _all_gather(ring: Ring, pairs, images, texts, by_image, by_text):
  """Ring.visit with all texts, and accumulators for them, on every device."""
  texts = lax.all_gather(texts, ring.axes, tiled=True)
  by_text = jax.tree.map(
    lambda x: ring.zeros(ring.batch, *x.shape[1:]), by_text
  )
  first = -lax.axis_index(ring.axes) * (ring.batch // ring.devices)
  by_image, by_text = _block(
    ring.tile, pairs, first, images, texts, by_image, by_text
  )
  return by_image, jax.tree.map(
    lambda x: lax.psum_scatter(x, ring.axes, tiled=True), by_text
  )


def _block(tile, pairs, first, images, texts, by_image, by_text):
  """Visits all pairs of these images and texts, tile by tile.

  Text j belongs to image j + first, or to none of these images if first is
  None. The other arguments and the result are those of Ring.visit.
  """

  def rows(i, m, sums):
    by_image, by_text = sums
    some = _cut(images, i, m)

    def columns(j, n, sums):
      mine, by_text = sums
      if first is None:
        positive = jnp.zeros((m, n), bool)
      else:
        image, text = i + jnp.arange(m), first + j + jnp.arange(n)
        positive = image[:, None] == text[None, :]
      mine, theirs = pairs(
        positive, some, _cut(texts, j, n), mine, _cut(by_text, j, n)
      )
      return mine, _put(by_text, theirs, j)

    start = _cut(by_image, i, m), by_text
    mine, by_text = _each(_len(texts), tile, columns, start)
    return _put(by_image, mine, i), by_text

  return _each(_len(images), tile, rows, (by_image, by_text))


def _each(n, tile, visit, state):
  """Applies state = visit(start, size, state) to each tile of range(n)."""
  tile = min(n, tile)
  whole, rest = divmod(n, tile)
  state = lax.fori_loop(0, whole, lambda i, s: visit(i * tile, tile, s), state)
  return visit(whole * tile, rest, state) if rest else state


def _len(tree):
  return len(jax.tree.leaves(tree)[0])


def _cut(tree, start, size):
  return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree, part, start):
  put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0)
  return jax.tree.map(put, tree, part)


def order(devices: Sequence[Any]) -> tuple[int, ...]:
  """Returns an order of devices that goes from neighbour to neighbour.

  TPUs lie on a grid and are linked to their neighbours. If they fill a box, the
  order is a closed walk along links: each device once, and the last one is a
  neighbour of the first. It does without links from one end of a torus to the
  other, unless the box is a line or all its sides are odd.

  Args:
    devices: jax.Devices; TPUs have `coords`, (x, y, z), and `core_on_chip`.

  Returns:
    Indices of devices: 0, 1, 2, .. for other devices than TPUs, and for TPUs
    that do not fill one box, such as those of several slices.
  """
  as_given = tuple(range(len(devices)))
  if not all(getattr(device, "coords", None) for device in devices):
    return as_given
  points = [(*device.coords, device.core_on_chip) for device in devices]
  found = {point: i for i, point in enumerate(points)}
  sides = [sorted(set(values)) for values in zip(*points)]
  if not len(points) == len(found) == math.prod(map(len, sides)):
    return as_given
  return tuple(found[point] for point in _closed_walk(sides))


def _closed_walk(sides):
  """Returns the points of a box, each a neighbour of the next; see order.

  With 4 rows, an even number, and 3 columns: a snake over all columns but the
  first, and back through that one.

      11    0 -> 1
      10    3 <- 2
       9    4 -> 5
       8 <- 7 <- 6
  """
  at = next((i for i, side in enumerate(sides) if len(side) % 2 == 0), 0)
  rows = sides[at]
  first, *columns = _snake([*sides[:at], *sides[at + 1 :]])
  there = _turning(rows, columns)
  back = [(row, first) for row in reversed(rows)]
  return [(*x[:at], row, *x[at:]) for row, x in there + back]


def _snake(sides):
  """Returns the points of a box, each a neighbour of the next."""
  points = [()]
  for side in sides:
    points = [(*point, x) for point, x in _turning(points, side)]
  return points


def _turning(rows, columns):
  """Returns all (row, column): there in one row, back in the next."""
  return [
    (row, column)
    for i, row in enumerate(rows)
    for column in (columns[::-1] if i % 2 else columns)
  ]
