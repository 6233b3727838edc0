"""How devices that share a batch visit all its pairs of image and text.

Each of D devices holds b = B / D images and b texts. The images stay, the texts
go round the ring, and with them the sums that belong to them; after D steps
every pair has met and every sum is home. A block of b x b pairs is worked
through in tiles, so no array has more than b x E or tile x tile numbers (with
comm "all_gather", B x E).

docs/loss.md draws it; SigLIP, section 3.3 and figure 1.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Ring(NamedTuple):
  """The devices, and how they go about it. For use inside jax.shard_map."""

  batch: int  # B
  devices: int  # D
  axes: tuple  # of the mesh, together one ring
  tile: int  # rows and columns of a tile, at most
  direction: str = "forward"  # or "both": half the texts go each way
  comm: str = "ring"  # or "all_gather": all texts on every device at once

  def zeros(self, *shape):
    """Sums to begin with; every device has its own."""
    return lax.pcast(jnp.zeros(shape, jnp.float32), self.axes, to="varying")

  def mean(self, x):
    """The sum of x, here and on all other devices, divided by B."""
    return lax.psum(jnp.sum(x), self.axes) / self.batch

  def visit(self, pairs, images, texts, by_image, by_text):
    """Lets every text meet every image.

    The last four arguments are each an array, a tuple of arrays or None.

    Args:
      pairs: pairs(positive, images, texts, by_image, by_text) -> by_image,
        by_text adds the pairs of one tile to its sums; it is given the rows of
        that tile, and positive: (rows of images, rows of texts) bool, whether
        text and image belong together.
      images: (b, ...), stay.
      texts: (b, ...), travel and are only read.
      by_image: (b, ...) sums over all texts, stay.
      by_text: (b, ...) sums over all images, travel; with comm "all_gather"
        they have to begin at 0 and pairs has to add to them.

    Returns:
      by_image and by_text after all pairs.
    """
    way = _gathered if self.comm == "all_gather" else _round
    return way(self, pairs, images, texts, by_image, by_text)


def _round(ring, pairs, images, texts, by_image, by_text):
  """Ring.visit: the texts go once round the ring."""
  D = ring.devices
  b = ring.batch // D
  half = b // 2 if ring.direction == "both" else 0
  lanes = [(0, half, -1), (half, b, 1)] if half else [(0, b, 1)]

  def send(x, way):
    perm = [(i, (i + way) % D) for i in range(D)]
    return lax.ppermute(x, ring.axes, perm) if D > 1 else x

  def step(_, state, at_home=False):
    by_image, travelling = state
    left = []
    for (start, _, way), (texts, by_text) in zip(lanes, travelling):
      # The sums follow their texts, at the start of the next step: were they
      # sent at the end of this one, XLA would hold the texts back until then.
      if not at_home:
        by_text = send(by_text, way)
      ahead = send(texts, way)  # under way while the block is computed
      by_image, by_text = _block(
        ring.tile,
        pairs,
        start if at_home else None,
        images,
        texts,
        by_image,
        by_text,
      )
      left.append((ahead, by_text))
    return by_image, left

  state = (
    by_image,
    [_cut((texts, by_text), start, stop - start) for start, stop, _ in lanes],
  )
  by_image, travelled = lax.fori_loop(1, D, step, step(0, state, at_home=True))
  home = [
    send(by_text, way) for (_, _, way), (_, by_text) in zip(lanes, travelled)
  ]
  return by_image, jax.tree.map(lambda *x: jnp.concatenate(x), *home)


def _gathered(ring, pairs, images, texts, by_image, by_text):
  """Ring.visit: every device gets all texts, and sums for all of them."""
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
  """by_image, by_text after these images have met these texts, tile by tile.

  Text j belongs to image j + first, or to none of these if first is None; the
  rest is as in Ring.visit.
  """

  def rows(i, m, sums):
    by_image, by_text = sums
    some = _cut(images, i, m)

    def columns(j, n, sums):
      mine, by_text = sums
      positive = (
        jnp.zeros((m, n), bool)
        if first is None
        else (
          (i + jnp.arange(m))[:, None] == (first + j + jnp.arange(n))[None, :]
        )
      )
      mine, theirs = pairs(
        positive, some, _cut(texts, j, n), mine, _cut(by_text, j, n)
      )
      return mine, _put(by_text, theirs, j)

    mine, by_text = _each(
      _len(texts), tile, columns, (_cut(by_image, i, m), by_text)
    )
    return _put(by_image, mine, i), by_text

  return _each(_len(images), tile, rows, (by_image, by_text))


def _each(n, tile, visit, state):
  """state after state = visit(start, size, state) for the tiles of range(n)."""
  tile = min(n, tile)
  whole, rest = divmod(n, tile)
  state = lax.fori_loop(0, whole, lambda i, s: visit(i * tile, tile, s), state)
  return visit(whole * tile, rest, state) if rest else state


def _len(tree):
  return len(jax.tree.leaves(tree)[0])


def _cut(tree, start, size):
  return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree, part, start):
  return jax.tree.map(
    lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part
  )
