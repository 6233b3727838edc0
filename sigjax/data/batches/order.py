"""Which element is at which position of a run.

A batch holds floor or ceil of weight * B elements of each source. What a source
contributes, batch after batch, is its sequence: one epoch after the other, each
with all n elements of the source once, in a random order of its own. A place is
an index into this sequence. The element at a place is computed from the seed
and the place alone, so starting at step 10^6 takes no longer than at step 0.

A batch may hold the end of one epoch and the beginning of the next. If an
element came last in one and first in the other, the batch would hold it twice,
and the loss would take it for its own negative. So at the beginning of an epoch
such elements are swapped with the next ones that are not in the batch. The end
of an epoch is never changed, so each epoch depends on the one before it alone.
"""

import bisect
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
import fractions
import functools
import itertools
import math
import threading

from grain import experimental
import numpy as np

from sigjax import errors

_IN_MEMORY = 1 << 16  # elements; the order of an epoch of more is computed

# The version of the order is saved with the data position, because a run has to
# go on with the order it began with. {version: rounds of the cipher that
# permutes more than _IN_MEMORY elements}. With 4 rounds, neighbours of a shard
# meet in a batch several times too often.
ROUNDS = {1: 4, 2: 16}
VERSION = 2


def golden_step(unit: int) -> int:
  """Returns a number near unit / golden ratio that is coprime to unit.

  Its multiples modulo unit visit all numbers below unit. The first few of them,
  however many, are spread evenly over the range.
  """
  step = (math.isqrt(5 * unit * unit) - unit) // 2
  while math.gcd(step, unit) > 1:
    step += 1
  return step


def floor_sum(n: int, m: int, a: int, b: int) -> int:
  """Returns the sum of (a * i + b) // m over i < n, in O(log m)."""
  total = 0
  while True:
    total += n * (n - 1) // 2 * (a // m) + n * (b // m)
    a, b = a % m, b % m
    top = a * n + b
    if top < m:
      return total
    # Count the points below the line along the other axis.
    n, b = divmod(top, m)
    a, m = m, a


class Shares:
  """How many elements of each source a batch holds.

  Of source j that is w_j * B, rounded down or up. A golden-ratio sequence
  decides which of the two. So after any number of batches, the number of
  elements of a source deviates by a few from what its weight says.

  Args:
    weights: Positive numbers, of any sum.
    batch_size: B.
  """

  def __init__(self, weights: SequenceOf[float], batch_size: int):
    exact = [fractions.Fraction(repr(w)) for w in weights]  # 0.7 is 7/10
    parts = [w / sum(exact) for w in exact]
    # `parts` times _unit are whole numbers. The factor 2^32 makes steps even.
    self._unit = math.lcm(*(x.denominator for x in parts)) << 32
    self._step = golden_step(self._unit)
    # Elements of each source in _unit batches.
    self._rate = [int(x * self._unit) * batch_size for x in parts]
    self._base = [x // self._unit for x in self._rate]
    # Rows that rounding down leaves over are points 0, 1, 2, ... on a line,
    # shifted by a fraction that depends on the step. Each goes to the source
    # between whose edges it falls.
    self._edges = [0, *itertools.accumulate(x % self._unit for x in self._rate)]

  def before(self, step: int) -> tuple[int, ...]:
    """Returns how many elements of each source the batches before step hold."""
    sums = [
      floor_sum(step, self._unit, self._step, edge) for edge in self._edges
    ]
    return tuple(
      step * base + b - a
      for base, (a, b) in zip(self._base, itertools.pairwise(sums))
    )

  def most(self, j: int) -> tuple[int, bool]:
    """Returns how many of source j a batch can hold, and if all hold that."""
    rest = self._rate[j] % self._unit
    return self._base[j] + bool(rest), not rest

  def batch_of(self, j: int, place: int) -> tuple[int, int]:
    """Returns (low, high): the places of source j in the batch of a place."""
    # The weight alone gives the step, but for less than 64 elements.
    guess = place * self._unit // self._rate[j]
    slack = 64 * self._unit // self._rate[j] + 2
    steps = range(max(guess - slack, 0), guess + slack)
    i = bisect.bisect_right(steps, place, key=lambda s: self.before(s)[j])
    return self.before(steps[i - 1])[j], self.before(steps[i - 1] + 1)[j]


class Order:
  """The sequence of one source: endless epochs, with each element once in each.

  Args:
    n: The number of elements, at most 2^32.
    seed: A tuple of integers.
    batch_of: fn(place) -> (low, high), the places of the batch that holds it.
      No batch holds an element twice if n is as large as Sequence requires.
    shuffle: Whether to shuffle; otherwise each epoch is 0, 1, ..., n - 1.
    version: A key of ROUNDS.
  """

  def __init__(
    self,
    n: int,
    seed: tuple[int, ...],
    batch_of: Callable[[int], tuple[int, int]],
    shuffle: bool = True,
    version: int = VERSION,
  ):
    self._n, self._seed, self._batch_of = n, seed, batch_of
    self._shuffle, self._rounds = shuffle, ROUNDS[version]
    # The caches are used under the lock, so that not every thread fills them.
    self._lock = threading.RLock()
    self._permutation = functools.lru_cache(4)(self._make_permutation)
    self._swaps = functools.lru_cache(4)(self._make_swaps)
    self._pool = functools.lru_cache(4)(self._make_pool)

  def _make_permutation(self, epoch: int) -> Callable[[int], int]:
    """Returns fn(i) -> the element at place i of an epoch, before swaps."""
    if not self._shuffle:
      return lambda i: i
    seed = np.random.SeedSequence([*self._seed, epoch])
    if self._n <= _IN_MEMORY:  # Grain's takes the longer the fewer there are
      return (
        np.random.default_rng(seed).permutation(self._n).tolist().__getitem__
      )
    return functools.partial(
      experimental.index_shuffle,
      max_index=self._n - 1,
      seed=int(seed.generate_state(1)[0]),
      rounds=self._rounds,
    )

  def _make_swaps(self, epoch: int) -> dict[int, int]:
    """Returns {place within the epoch: element} of places that were swapped."""
    n, first = self._n, epoch * self._n
    low, high = self._batch_of(first)
    if low == first or not self._shuffle:
      return {}
    before = set(map(self._permutation(epoch - 1), range(low - first + n, n)))
    draw, swaps, free = self._permutation(epoch), {}, high - first
    for i in range(high - first):
      element = draw(i)
      if element in before:
        while (other := draw(free)) in before:
          free += 1
        swaps[i], swaps[free] = other, element
        free += 1
    return swaps

  def at(self, place: int) -> int:
    """Returns the element at a place."""
    epoch, i = divmod(place, self._n)
    with self._lock:
      swaps, draw = self._swaps(epoch), self._permutation(epoch)
    return swaps[i] if i in swaps else draw(i)

  def spare(self, place: int, low: int, high: int, attempt: int) -> int | None:
    """Returns an element to use where the element at a place is unusable.

    It is not in the batch. While attempt < n // (high - low) - 1, it is no
    spare of another place of the batch, either.

    Args:
      place: low <= place < high.
      low: The first place of the batch.
      high: The place after its last one.
      attempt: 0, 1, ...; each gives another element.

    Returns:
      None if all n - (high - low) elements outside the batch have been given.
    """
    size = high - low
    left = self._n - size
    if attempt >= left:
      return None
    # Steps of `size`, and one more whenever they come back to the first.
    turn = left // math.gcd(left, size)
    x = (place - low + attempt * size + attempt // turn) % left
    epoch, i = divmod(high - 1, self._n)
    if low >= epoch * self._n:
      return self.at(epoch * self._n + (i + 1 + x) % self._n)
    with self._lock:  # the batch holds the end of the epoch before
      found, more = self._pool(low, high)
      found.extend(itertools.islice(more, max(x + 1 - len(found), 0)))
    return found[x]

  def _make_pool(self, low: int, high: int) -> tuple[list[int], Iterator[int]]:
    """Returns an empty list to fill, and an iterator of elements for it.

    The batch holds the end of an epoch. The iterator yields the elements that
    are not in the batch, in the order of that epoch.
    """
    first = low // self._n * self._n
    head = {self.at(place) for place in range(first + self._n, high)}
    return [], (x for x in map(self.at, range(first, low)) if x not in head)


class Sequence:
  """The element at each position of a run over one or several sources.

  Position s * B + r is row r of batch s. Rows of different sources alternate,
  so that each process reads from all sources.

  Args:
    sources: (name, number of elements) of each source.
    weights: A positive number for each source.
    batch_size: B.
    seed: 0 or more.
    shuffle: As in Order.
    version: As in Order.

  Raises:
    UserError: A source has too few elements for its share of a batch.
  """

  def __init__(
    self,
    sources: SequenceOf[tuple[str, int]],
    weights: SequenceOf[float],
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    version: int = VERSION,
  ):
    self._batch_size = batch_size
    self._shares = Shares(weights, batch_size)
    self._orders = []
    for j, (name, n) in enumerate(sources):
      self._check(name, n, j, len(sources), shuffle)
      batch_of = functools.partial(self._shares.batch_of, j)
      self._orders.append(Order(n, (seed, j), batch_of, shuffle, version))
    sizes = [n for _, n in sources]
    self._starts = [0, *itertools.accumulate(sizes)]
    self._rows = range(batch_size)
    if len(sources) > 1:  # the ranks of the golden-ratio sequence
      spread = np.arange(batch_size) * golden_step(1 << 31) % (1 << 31)
      self._rows = np.argsort(np.argsort(spread)).tolist()
    self._bounds = functools.lru_cache(64)(self._make_bounds)

  def _check(
    self, name: str, n: int, j: int, count: int, shuffle: bool
  ) -> None:
    """Raises UserError unless n elements are enough for source j of count."""
    most, always = self._shares.most(j)
    B = self._batch_size
    part = (
      f"a batch of {B}"
      if count == 1
      else (f"its {most} examples of a batch of {B}")
    )
    lower = "lower batch_size" + (", or its weight" if count > 1 else "")
    if n < most:
      raise errors.UserError(
        f"{name} has {n} elements, too few for {part}; {lower}"
      )
    if n > 1 << 32:
      raise errors.UserError(
        f"{name} has {n} elements, more than the {1 << 32} there may be of "
        "one source; make it several, mixed by weight"
      )
    # A batch across two epochs holds up to `most` elements. Swaps need as many
    # places after it, for the end of the later epoch must not change.
    if shuffle and n < 2 * most - (math.gcd(n, most) if always else 1):
      remedy = (
        lower
        if count > 1
        else (f"make batch_size a divisor of {n}, or {n // 2} at most")
      )
      raise errors.UserError(
        f"{name} has {n} elements, so that {part} across two epochs would "
        f"hold some of them twice; {remedy}"
      )

  def _make_bounds(self, step: int) -> list[tuple[int, int]]:
    """Returns (low, high) of each source: a batch's places in its sequence."""
    return list(zip(self._shares.before(step), self._shares.before(step + 1)))

  def _place(self, position: int) -> tuple[int, int, int, int]:
    """Returns (source, place in its sequence, low and high of the batch)."""
    step, row = divmod(position, self._batch_size)
    row = self._rows[row]
    for j, (low, high) in enumerate(self._bounds(step)):
      if row < high - low:
        return j, low + row, low, high
      row -= high - low
    raise AssertionError("shares do not fill a batch")

  def at(self, position: int) -> int:
    """Returns the element at a position, numbered as those of a Mixture."""
    j, place, _, _ = self._place(position)
    return self._starts[j] + self._orders[j].at(place)

  def spare(self, position: int, attempt: int) -> int | None:
    """Returns another element of the same source; see Order.spare."""
    j, *place = self._place(position)
    found = self._orders[j].spare(*place, attempt)
    return None if found is None else self._starts[j] + found
