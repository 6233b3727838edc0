"""Keeps a share of a batch's negative pairs (SigLIP, section 4.8 and figure 6).

Each pair has a key, a uint32. The n negatives of the whole batch with the
largest keys are kept. The n-th largest key is found without sorting, digit by
digit from the top: it has 8 digits of 4 bits, and for each the texts go once
round the ring, while every device counts the keys that reach 16 thresholds.
Keys equal to the n-th get equal weights that add up to what is left of n, so
the result depends neither on the order nor on the devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from sigjax import errors, losses
from sigjax.ring import Ring

DIGIT = 4  # bits; more bits are fewer trips, but more thresholds in each
WORD = 1 << 10  # counts are (high, low), high * WORD + low, see _total
MAX_BATCH = 1 << 20  # counts of a larger batch could overflow

Keys = UInt32[Array, "m n"]
Count = tuple[Array, Array]  # (high, low), uint32, low < WORD
Relate = Callable[..., tuple[Array, Array | None]]


class Negatives(NamedTuple):
  """Which negatives are kept; see losses.ring_sigmoid_loss."""

  share: float
  which: str


def of(section: Mapping[str, Any], B: int) -> Negatives:
  """Returns the Negatives that a dict describes.

  Args:
    section: dict(share=, which=).
    B: the batch size.

  Raises:
    UserError: a wrong key or value, a share that keeps no pair, or B is larger
      than counts can hold.
  """
  negatives = errors.call(Negatives, section, "negatives")
  share, which = negatives
  errors.pick(KEYS, which, "negatives: which")
  pairs = B * (B - 1)
  if isinstance(share, bool) or not isinstance(share, (int, float)):
    raise errors.UserError(f"negatives: share has to be a number, not {share}")
  if not 0 < share <= 1:
    raise errors.UserError(
      f"negatives: share is {share}, but has to be above 0 and at most 1"
    )
  if not round(share * pairs):
    raise errors.UserError(
      f"negatives: share {share} keeps none of the {pairs} negative pairs of "
      f"a batch of {B}; raise it"
    )
  if B > MAX_BATCH:
    raise errors.UserError(
      f"negatives: a batch of {B} is larger than {MAX_BATCH}, the most that "
      "they are counted for"
    )
  return negatives


def weights(
  negatives: Negatives,
  draw: Array | None,
  cosine: Float[Array, "B B"],
  positive: Bool[Array, "B B"],
  counts: Bool[Array, "B B"] | None,
) -> Float[Array, "B B"]:
  """Returns the weights of all pairs: the reference, which sorts all keys.

  Args:
    negatives: from `of`.
    draw: words that name the random draw, uint32; None unless it is random.
    cosine: of each pair.
    positive, counts: from losses.relate.
  """
  B = len(cosine)
  rows = jnp.arange(B, dtype=jnp.uint32)
  key = KEYS[negatives.which](draw, rows, rows, cosine)
  negative = _negative(positive, counts)
  N = jnp.sum(negative, dtype=jnp.uint32)
  high, low = _wanted(negatives.share, B, (N // WORD, N % WORD))
  n = high * WORD + low
  down = jnp.sort(jnp.where(negative, key, 0), axis=None, descending=True)
  nth = down[n - 1]
  beyond, tied = negative & (key > nth), negative & (key == nth)
  rest = n - jnp.sum(beyond, dtype=jnp.uint32)
  size = jnp.maximum(jnp.sum(tied, dtype=jnp.uint32), 1)
  tie = rest.astype(jnp.float32) / size.astype(jnp.float32)
  return jnp.where(positive | beyond, 1.0, jnp.where(tied, tie, 0.0))


def select(
  ring: Ring,
  negatives: Negatives,
  draw: Array | None,
  relate: Relate,
  images: tuple,
  texts: tuple,
) -> Callable[..., Float[Array, "m n"]]:
  """Finds the n-th largest key of a batch's negatives, inside jax.shard_map.

  Args:
    ring: of the devices.
    negatives, draw: see weights.
    relate: fn(diagonal, image groups, text groups), see losses.relate.
    images, texts: (z, groups, position) as they visit the ring; position is
      (b,) uint32, the place in the batch.

  Returns:
    fn(image, text, cosine, positive, counts) -> the weights of a tile.
  """
  keys = KEYS[negatives.which]
  rows = len(images[2])
  if negatives.which == "random":  # embeddings need not travel
    images, texts = (None, *images[1:]), (None, *texts[1:])

  def trip(i, state):
    """Finds digit i of the n-th largest key."""
    start, n, _, beyond = state
    shift = jnp.uint32(32 - DIGIT) - DIGIT * i.astype(jnp.uint32)
    steps = start + (jnp.arange(1 << DIGIT, dtype=jnp.uint32) << shift)

    def pairs(diagonal, image, text, found, by_text):
      cosine = None if image[0] is None else losses.dot(image[0], text[0].T)
      key = keys(draw, image[2], text[2], cosine)
      negative = _negative(*relate(diagonal, image[1], text[1]))
      reached = negative[:, :, None] & (key[:, :, None] >= steps[None, None])
      return found + jnp.sum(reached, axis=1, dtype=jnp.uint32), by_text

    zero = ring.zeros(rows, 1 << DIGIT).astype(jnp.uint32)
    found, _ = ring.visit(pairs, images, texts, zero, None)
    reached = _total(found, ring)
    # The first threshold of the first trip is 0: all negatives reach it.
    wanted = _wanted(negatives.share, ring.batch, [x[0] for x in reached])
    n = jax.tree.map(lambda new, n: jnp.where(i == 0, new, n), wanted, n)
    digit = jnp.sum(_at_least(reached, n)[1:], dtype=jnp.uint32)
    ladder = [jnp.append(x, y) for x, y in zip(reached, beyond)]
    at, above = (tuple(x[digit + k] for x in ladder) for k in (0, 1))
    return start + (digit << shift), n, at, above

  none = jnp.uint32(0), jnp.uint32(0)
  start = jnp.uint32(0), none, none, none
  nth, n, at, beyond = lax.fori_loop(0, 32 // DIGIT, trip, start)
  tied = _float(_minus(at, beyond))
  tie = jnp.minimum(_float(_minus(n, beyond)) / jnp.maximum(tied, 1), 1)

  def weigh(image, text, cosine, positive, counts):
    key = keys(draw, image[2], text[2], cosine)
    kept = jnp.where(key == nth, tie, (key > nth).astype(jnp.float32))
    kept = jnp.where(_negative(positive, counts), kept, 0.0)
    return jnp.where(positive, 1.0, kept)

  return weigh


def _negative(positive, counts):
  return ~positive if counts is None else ~positive & counts


# --- Keys: the largest are kept ----------------------------------------------


def _hardest(draw, image, text, cosine) -> Keys:
  """Returns the cosines as uint32 in the same order.

  The logit, and with it a negative's loss, rises with the cosine, as t > 0. The
  cosine itself has the same bits in each trip, whatever XLA makes of the rest.
  """
  del draw, image, text
  cosine = lax.optimization_barrier(cosine)
  cosine = jnp.where(cosine == 0, 0.0, cosine)  # -0 is no other number
  bits = lax.bitcast_convert_type(cosine, jnp.uint32)
  # Negative floats are ordered by their bits the other way round.
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _easiest(draw, image, text, cosine) -> Keys:
  return ~_hardest(draw, image, text, cosine)


def _random(draw, image, text, cosine) -> Keys:
  """Returns a hash of the draw and of both places in the batch."""
  del cosine
  seed = jnp.uint32(0)
  for word in draw:
    seed = _mix(seed ^ word)
  rows = _mix(seed ^ image * jnp.uint32(0x9E3779B9))
  return _mix(rows[:, None] ^ _mix(text + jnp.uint32(0x85EBCA6B))[None, :])


def _mix(x: Array) -> Array:
  """A bijection of uint32 in which each input bit changes each output bit."""
  x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
  x = (x ^ x >> 15) * jnp.uint32(0x846CA68B)
  return x ^ x >> 16


# The choices of config.loss.negatives.which: fn(draw, places of images, places
# of texts, cosines) -> keys.
KEYS = {"random": _random, "hardest": _hardest, "easiest": _easiest}


# --- Counts of up to 2^40 pairs, in two words: there is no int64 --------------


def _total(rows: Array, ring: Ring) -> Count:
  """Returns the sum of (b, K) uint32 over rows and devices, as (K,) words.

  A row has at most 2^20 pairs and the batch 2^20 rows, so the sums of both
  halves stay below 2^31.
  """
  add = lambda x: lax.psum(jnp.sum(x, axis=0, dtype=jnp.uint32), ring.axes)
  low = add(rows % WORD)
  return add(rows // WORD) + low // WORD, low % WORD


def _wanted(share: float, B: int, N) -> Count:
  """Returns n, of N negatives.

  It is round(share * B * (B - 1)), less round(share * M) for the M pairs that
  groups exclude; M is known only on the devices. n is at least 1.
  """
  whole, pairs = round(share * B * (B - 1)), B * (B - 1)
  words = lambda x: (jnp.uint32(x // WORD), jnp.uint32(x % WORD))
  excluded = jnp.round(jnp.float32(share) * _float(_minus(words(pairs), N)))
  high = jnp.floor(excluded / WORD)
  less = tuple(x.astype(jnp.uint32) for x in (high, excluded - WORD * high))
  n, one = _minus(words(whole), less), words(1)
  some = _at_least(words(whole - 1), less)
  return jnp.where(some, n[0], one[0]), jnp.where(some, n[1], one[1])


def _at_least(x, y) -> Array:
  return (x[0] > y[0]) | ((x[0] == y[0]) & (x[1] >= y[1]))


def _minus(x, y) -> Count:
  borrow = (x[1] < y[1]).astype(jnp.uint32)
  return x[0] - y[0] - borrow, x[1] + WORD * borrow - y[1]


def _float(x) -> Array:
  return x[0].astype(jnp.float32) * WORD + x[1].astype(jnp.float32)
