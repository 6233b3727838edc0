"""Which example is where in a run: a function of the seed and place alone.

A batch holds floor or ceil of weight * B examples of each source. What a source
gives, batch after batch, is its sequence: epoch after epoch, each all of its n
elements once, in an order of its own. Nothing of what came before is needed to
know what is at a place, so starting at step 10^6 takes no longer than at 0.

A batch may hold the end of one epoch and the beginning of the next. It would
hold an element twice if that came last in one and first in the other, which
would be a wrong negative pair for the loss. So at an epoch's beginning such
elements change places with the next ones that are not in that batch; an epoch's
end is never changed, so that no epoch depends on more than the one before.
"""

import bisect
import fractions
import functools
import itertools
import math
import threading

from grain import experimental
import numpy as np

from sigjax import errors

_IN_MEMORY = 1 << 16  # elements; the order of an epoch of more is computed


def golden_step(unit):
  """Returns about unit / the golden ratio, and without a common divisor.

  Its multiples modulo unit visit all numbers below it, and of any beginning of
  them as many are in one part of the range as in another as large.
  """
  step = (math.isqrt(5 * unit * unit) - unit) // 2
  while math.gcd(step, unit) > 1:
    step += 1
  return step


def floor_sum(n, m, a, b):
  """Returns the sum of (a * i + b) // m over i < n, in O(log m)."""
  total = 0
  while True:
    total += n * (n - 1) // 2 * (a // m) + n * (b // m)
    a, b = a % m, b % m
    top = a * n + b
    if top < m:
      return total
    # The points below the line, counted along the other axis.
    n, b = divmod(top, m)
    a, m = m, a


class Shares:
  """How many examples of each source a batch holds.

  Of source j that is w_j * B rounded down or up. Which of the two follows a
  golden-ratio sequence, so that after any number of batches each source has
  given what its weight says but for a few examples.

  Args:
    weights: positive numbers, of any sum.
    batch_size: B.
  """

  def __init__(self, weights, batch_size):
    exact = [fractions.Fraction(repr(w)) for w in weights]  # 0.7 is 7/10
    parts = [w / sum(exact) for w in exact]
    # Much more than needed for `parts` to be whole, for more even steps.
    self._unit = math.lcm(*(x.denominator for x in parts)) << 32
    self._step = golden_step(self._unit)
    # Examples in _unit batches.
    self._rate = [int(x * self._unit) * batch_size for x in parts]
    self._base = [x // self._unit for x in self._rate]
    # Of the rows left over, each goes to the source between whose edges its
    # number falls, after a shift by less than 1 that changes with the step.
    self._edges = [0, *itertools.accumulate(x % self._unit for x in self._rate)]

  def before(self, step):
    """Returns how many of each source all batches before `step` hold."""
    sums = [
      floor_sum(step, self._unit, self._step, edge) for edge in self._edges
    ]
    return tuple(
      step * base + b - a
      for base, (a, b) in zip(self._base, itertools.pairwise(sums))
    )

  def most(self, j):
    """Returns (the most a batch holds of source j, whether it always does)."""
    rest = self._rate[j] % self._unit
    return self._base[j] + bool(rest), not rest

  def batch_of(self, j, place):
    """Returns (low, high): the places in j's sequence of a whole batch.

    It is the batch that holds `place`.
    """
    # Off by less than 64 examples from what the weight alone says.
    guess = place * self._unit // self._rate[j]
    slack = 64 * self._unit // self._rate[j] + 2
    steps = range(max(guess - slack, 0), guess + slack)
    i = bisect.bisect_right(steps, place, key=lambda s: self.before(s)[j])
    return self.before(steps[i - 1])[j], self.before(steps[i - 1] + 1)[j]


class Order:
  """The sequence of one source: epochs without end, each element once in each.

  Args:
    n: how many elements, 2^32 at most.
    seed: of the order, a tuple of integers.
    batch_of: place -> (low, high), the places of the batch that holds it. A
      batch holds no element twice if n is what Sequence asks for.
    shuffle: else each epoch is 0, 1, ..., n - 1.
  """

  def __init__(self, n, seed, batch_of, shuffle=True):
    self._n, self._seed, self._batch_of = n, seed, batch_of
    self._shuffle = shuffle
    # Held while they are filled: else each of many threads would do it.
    self._lock = threading.RLock()
    self._permutation = functools.lru_cache(4)(self._permutation)
    self._swaps = functools.lru_cache(4)(self._swaps)
    self._pool = functools.lru_cache(4)(self._pool)

  def _permutation(self, epoch):
    """Returns i -> what is at place i of an epoch, before swaps."""
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
      rounds=4,
    )

  def _swaps(self, epoch):
    """Returns {place within the epoch: element} where they were made."""
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

  def at(self, place):
    """Returns the element at a place."""
    epoch, i = divmod(place, self._n)
    with self._lock:
      swaps, draw = self._swaps(epoch), self._permutation(epoch)
    return swaps[i] if i in swaps else draw(i)

  def spare(self, place, low, high, attempt):
    """Returns an element to put at a place whose own cannot be used.

    It is none of its batch, and no spare of another place of the batch while
    attempt < n // (high - low) - 1; beyond that, it is one of its neighbours'.

    Args:
      place: low <= place < high.
      low, high: the places of its batch.
      attempt: 0, 1, ...: another one each, n - (high - low) in all.

    Returns:
      None if the batch holds all elements.
    """
    size = high - low
    left = self._n - size
    if attempt >= left:
      return None
    # Steps of `size`, and one more where they would come back to the first.
    turn = left // math.gcd(left, size)
    x = (place - low + attempt * size + attempt // turn) % left
    epoch, i = divmod(high - 1, self._n)
    if low >= epoch * self._n:
      return self.at(epoch * self._n + (i + 1 + x) % self._n)
    with self._lock:  # the batch holds the end of the epoch before
      found, more = self._pool(low, high)
      found.extend(itertools.islice(more, max(x + 1 - len(found), 0)))
    return found[x]

  def _pool(self, low, high):
    """Returns a list to fill and an iterator: the elements not in a batch.

    The batch holds the end of one epoch; they are in that epoch's order.
    """
    first = low // self._n * self._n
    head = {self.at(place) for place in range(first + self._n, high)}
    return [], (x for x in map(self.at, range(first, low)) if x not in head)


class Sequence:
  """What is at each position of a run over one or several sources.

  Position s * B + r is row r of batch s. Rows of the sources alternate, so that
  each process reads of all of them.

  Args:
    sources: (name, number of elements) of each.
    weights: of each, positive.
    batch_size: B.
    seed: 0 or more.
    shuffle: as in Order.

  Raises:
    UserError: a source has too few elements for its share of a batch.
  """

  def __init__(self, sources, weights, batch_size, seed, shuffle=True):
    self._batch_size = batch_size
    self._shares = Shares(weights, batch_size)
    self._orders = []
    for j, (name, n) in enumerate(sources):
      self._check(name, n, j, len(sources), shuffle)
      self._orders.append(
        Order(
          n, (seed, j), functools.partial(self._shares.batch_of, j), shuffle
        )
      )
    sizes = [n for _, n in sources]
    self._starts = [0, *itertools.accumulate(sizes)]
    self._rows = range(batch_size)
    if len(sources) > 1:  # the ranks of the golden-ratio sequence
      spread = np.arange(batch_size) * golden_step(1 << 31) % (1 << 31)
      self._rows = np.argsort(np.argsort(spread)).tolist()
    self._bounds = functools.lru_cache(64)(self._bounds)

  def _check(self, name, n, j, count, shuffle):
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
    # A batch across two epochs holds up to `most` elements, and the end of the
    # later epoch has to be left as it is: what changes place needs more room.
    if shuffle and n < 2 * most - (math.gcd(n, most) if always else 1):
      remedy = (
        lower
        if count > 1
        else (f"make batch_size a divisor of {n}, or {n // 2} at most")
      )
      raise errors.UserError(
        f"{name} has {n} elements, so that {part} across two epochs could "
        f"not but hold some twice; {remedy}"
      )

  def _bounds(self, step):
    """Returns a batch's places in each source's sequence, (low, high) each."""
    return list(zip(self._shares.before(step), self._shares.before(step + 1)))

  def _place(self, position):
    """Returns (source, place in its sequence, low, high of the batch)."""
    step, row = divmod(position, self._batch_size)
    row = self._rows[row]
    for j, (low, high) in enumerate(self._bounds(step)):
      if row < high - low:
        return j, low + row, low, high
      row -= high - low
    raise AssertionError("shares do not fill a batch")

  def at(self, position):
    """Returns the element at a position, numbered on over all sources."""
    j, place, _, _ = self._place(position)
    return self._starts[j] + self._orders[j].at(place)

  def spare(self, position, attempt):
    """Returns one to take instead, of the same source; see Order.spare."""
    j, *place = self._place(position)
    found = self._orders[j].spare(*place, attempt)
    return None if found is None else self._starts[j] + found
