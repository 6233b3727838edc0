"""The order of a run: each element once an epoch, none twice in a batch."""

import collections
import fractions
import functools
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from sigjax import errors
from sigjax.data.batches import order


def one(n, size, seed=0, **kwargs):
  return order.Sequence([("test", n)], [1.0], size, seed, **kwargs)


def take(sequence, count, start=0):
  return [sequence.at(p) for p in range(start, start + count)]


def split(values, size):
  return [values[i : i + size] for i in range(0, len(values), size)]


CASES = [
  (n, size)
  for size in (1, 2, 3, 7, 8, 20)
  for n in {
    size,
    2 * size - 1,
    2 * size,
    2 * size + 1,
    3 * size - 1,
    5 * size + 2,
    10 * size - 3,
  }
  if n >= 2 * size - math.gcd(n, size)
]


@pytest.mark.parametrize("n, size", CASES)
def test_each_element_once_an_epoch_and_none_twice_in_a_batch(n, size):
  for seed in range(3):
    got = take(one(n, size, seed), 12 * n * size)
    for epoch in split(got, n):
      assert sorted(epoch) == list(range(n))
    for batch in split(got, size):
      assert len(set(batch)) == size


@pytest.mark.parametrize("n, size", [(100_003, 1000), (70_000, 30_000)])
def test_the_same_where_the_permutation_is_computed(n, size):
  sequence = one(n, size)
  assert sorted(take(sequence, n, 7 * n)) == list(range(n))
  for epoch in (1, 3):
    first = epoch * n // size * size
    assert len(set(take(sequence, size, first))) == size


def test_without_shuffling_the_order_is_the_sources():
  assert take(one(10, 4, shuffle=False), 25) == [
    *range(10),
    *range(10),
    *range(5),
  ]
  assert take(one(5, 4, shuffle=False), 7) == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("n", [7, 70_000])
def test_another_order_in_each_epoch_and_for_each_seed(n):
  orders = {
    tuple(take(one(n, 7, seed), 7, epoch * n))
    for seed in range(5)
    for epoch in range(5)
  }
  assert len(orders) == 25


@pytest.mark.parametrize("n, size", [(6, 3), (9, 4)])
def test_every_place_shows_every_element_as_often(n, size):
  epochs = 4000
  got = np.array(split(take(one(n, size), epochs * n), n))
  counts = np.stack([np.bincount(got[:, i], minlength=n) for i in range(n)])
  # Of 4000 * 1/n, the standard deviation is under 26 for n=6.
  np.testing.assert_allclose(counts, epochs / n, atol=140)
  pairs = collections.Counter(zip(got[:, 0].tolist(), got[:, 1].tolist()))
  assert len(pairs) == n * (n - 1)
  assert max(pairs.values()) < 2 * min(pairs.values())


def test_starting_far_away_costs_no_more(monkeypatch):
  calls = [0]
  draw = order.experimental.index_shuffle

  def counted(*args, **kwargs):
    calls[0] += 1
    return draw(*args, **kwargs)

  monkeypatch.setattr(order.experimental, "index_shuffle", counted)
  for start in (10**4, 10**8, 10**12):
    sequence, calls[0] = one(10**6 + 1, 100), 0
    take(sequence, 100, start * 100)
    assert 100 <= calls[0] <= 300 + 5  # at most what swaps look at, too


def test_what_is_too_small_is_refused():
  with pytest.raises(
    errors.UserError,
    match="3 elements, too few for a batch of 4; lower batch_size",
  ):
    one(3, 4)
  with pytest.raises(errors.UserError, match="divisor of 6, or 3 at most"):
    one(6, 4, 0) and one(6, 5, 0)
  with pytest.raises(errors.UserError, match="mixed by weight"):
    one(2**32 + 1, 4)
  with pytest.raises(
    errors.UserError,
    match="b has 9 elements, so that its 10 "
    "|b has 9 elements, too few for its 10 .* or its weight",
  ):
    order.Sequence([("a", 100), ("b", 9)], [1, 1], 20, 0)


def test_spares_are_of_no_use_elsewhere_in_the_batch():
  for n, size in ((24, 6), (25, 6), (100, 7), (20, 8)):
    sequence = one(n, size)
    across = 0
    for step in range(40):
      rows = range(step * size, (step + 1) * size)
      batch = {sequence.at(p) for p in rows}
      across += rows[0] // n != rows[-1] // n
      own = [sequence.spare(p, a) for p in rows for a in range(n // size - 1)]
      assert len(set(own)) == len(own) == size * (n // size - 1)
      assert not batch & set(own)
      for p in rows:  # and there are more, each another one
        every = [sequence.spare(p, a) for a in range(n - size)]
        assert sorted([*every, *batch]) == list(range(n))
        assert sequence.spare(p, n - size) is None
    assert across or n % size == 0
    again = one(n, size)
    assert [again.spare(p, 1) for p in range(150, 60, -1)] == [
      sequence.spare(p, 1) for p in range(150, 60, -1)
    ]
  assert one(6, 6).spare(3, 0) is None


# Several sources.


def test_floor_sum():
  rng = np.random.default_rng(0)
  for n, m, a, b in rng.integers(1, 50, (200, 4)).tolist():
    assert order.floor_sum(n, m, a, b) == sum(
      (a * i + b) // m for i in range(n)
    )
  assert order.floor_sum(0, 3, 1, 5) == 0


WEIGHTS = [
  ([7, 3], 32),
  ([0.7, 0.3], 10),
  ([1, 1, 1], 32),
  ([5], 8),
  ([1 / 3] * 3, 33),
  ([0.1, 0.2, 0.7], 20),
  ([0.9, 0.05, 0.03, 0.015, 0.005], 64),
  ([0.999, 0.001], 8),
]


@pytest.mark.parametrize("weights, size", WEIGHTS)
def test_shares_of_every_batch_and_of_the_run(weights, size):
  shares = order.Shares(weights, size)
  exact = np.array(weights) / sum(weights) * size
  before = np.array([shares.before(s) for s in range(3001)])
  each = np.diff(before, axis=0)
  assert (each.sum(1) == size).all()
  assert (abs(each - exact) < 1).all()
  rounds = np.isclose(exact, np.round(exact), rtol=0, atol=1e-9)
  assert (each == np.round(exact))[:, rounds].all()
  assert (abs(before - exact * np.arange(3001)[:, None]) < 5).all()
  for step in (10**6 + 1, 10**9, 10**12):
    far = np.array(shares.before(step), float)
    np.testing.assert_allclose(far, exact * step, rtol=1e-12, atol=8)
  for j, _ in enumerate(weights):
    most, always = shares.most(j)
    assert each[:, j].max() == most
    assert always == (each[:, j].min() == most)
    for place in (0, 1, before[-1, j] // 2, before[-1, j] - 1):
      low, high = shares.batch_of(j, int(place))
      step = np.flatnonzero(before[:, j] <= place)[-1]
      assert (low, high) == tuple(before[step : step + 2, j])


SIZES = [("a", 50), ("b", 17), ("c", 101)]


def mixed(seed=0, size=24):
  return order.Sequence(SIZES, [0.5, 0.2, 0.3], size, seed)


def test_each_source_has_its_epochs():
  counts = np.zeros(168, int)
  for batch in split(take(mixed(), 24 * 400), 24):
    assert len(set(batch)) == 24
    counts[batch] += 1
    for part in np.split(counts, [50, 67]):
      assert part.max() - part.min() <= 1
  totals = [part.sum() for part in np.split(counts, [50, 67])]
  np.testing.assert_allclose(totals, [4800, 1920, 2880], atol=5)


def test_sources_of_one_size_have_orders_of_their_own():
  sequence = order.Sequence([("a", 30), ("b", 30)], [1, 1], 20, 0)
  batch = take(sequence, 20)
  assert {i for i in batch if i < 30} != {i - 30 for i in batch if i >= 30}


def test_rows_of_a_mix_alternate():
  batch = take(mixed(size=40), 40)
  for part in split(batch, 10):  # what each of four processes loads
    ids = np.digitize(part, [50, 67])
    np.testing.assert_allclose(np.bincount(ids, minlength=3), [5, 2, 3], atol=1)


def test_a_mix_starts_anywhere():
  start = 24 * 10**12
  assert take(mixed(), 100, start + 50) == take(mixed(), 150, start)[50:]
  far = split(take(mixed(), 24 * 40, 24 * 10**12), 24)
  assert all(len(set(batch)) == 24 for batch in far)


def test_spares_of_a_mix_are_of_the_same_source():
  sequence = mixed()
  for position in itertools.chain(range(24 * 20), range(10**9, 10**9 + 48)):
    step = position // 24
    batch = {sequence.at(p) for p in range(step * 24, step * 24 + 24)}
    own, spare = sequence.at(position), sequence.spare(position, 0)
    assert spare not in batch
    assert np.digitize(own, [50, 67]) == np.digitize(spare, [50, 67])


# The quality of the shuffle. Neighbours of a shard are often near-duplicates,
# and in one batch they are each other's negatives.

LAGS = (1, 2, 4, 64, 256, 2048, 4096)


def our_order(n, seed, version=order.VERSION):
  """Returns fn(epoch, i) -> the element at place i of an epoch."""
  whole = lambda place: (place // n * n, place // n * n + 1)  # nothing swapped
  sequence = order.Order(n, (seed,), whole, version=version)
  return lambda epoch, i: sequence.at(epoch * n + i)


def rotation(n, seed):
  """A shuffle that is none: another beginning in each epoch."""
  return lambda epoch, i: (i + (seed * 7 + epoch + 1) * 0x9E3779B1) % n


def deviations(make, n, size, epochs, seeds):
  """Yields (what, by how many standard deviations it is off) of first batches.

  What is counted is nearly Poisson for random batches: pairs (x, x + lag) in
  one batch, and with x in one epoch's and x + lag in the next epoch's batch.
  Elements that are drawn `lag` places apart are not correlated, either.
  """
  products = dict.fromkeys(LAGS, 0.0)
  met, after = dict.fromkeys(LAGS, 0), dict.fromkeys((0, *LAGS), 0)
  shards = np.zeros((seeds * epochs, 1000))
  for seed in range(seeds):
    draw, before = make(n, seed), None
    for epoch in range(epochs):
      batch = np.array([draw(epoch, i) for i in range(size)])
      shards[seed * epochs + epoch] = np.bincount(
        batch * 1000 // n, minlength=1000
      )
      for lag in LAGS:
        x = batch / (n - 1) - 0.5
        products[lag] += (x[lag:] * x[:-lag]).sum()
        met[lag] += np.isin(batch + lag, batch, assume_unique=True).sum()
      for lag in after if before is not None else ():
        after[lag] += np.isin(before + lag, batch, assume_unique=True).sum()
      before = batch
  for lag in LAGS:
    if lag < n:
      mean = seeds * epochs * (n - lag) * size * (size - 1) / n / (n - 1)
      yield f"lag {lag}", (met[lag] - mean) / np.sqrt(mean)
  for lag in after:
    if lag < n:
      mean = seeds * (epochs - 1) * (n - lag) * size * size / n / n
      yield f"lag {lag}, next epoch", (after[lag] - mean) / np.sqrt(mean)
  for lag in LAGS:
    if lag < size / 4:
      spread = np.sqrt(seeds * epochs * (size - lag)) / 12
      yield f"correlation at {lag}", products[lag] / spread
  if size >= 1000:
    for i, row in enumerate([*shards, shards.sum(0)]):
      mean = row.sum() / 1000
      chi2 = ((row - mean) ** 2).sum() / mean / (1 - size / n)
      yield f"chi-square, batch {i}", (chi2 - 999) / np.sqrt(2 * 999)


@pytest.mark.parametrize(
  "n, size, epochs, seeds",
  [
    (10, 2, 20, 100),
    (1000, 50, 20, 10),
    (65_536, 4096, 4, 4),
    (65_537, 4096, 4, 2),
    (1_000_000, 8192, 2, 3),
    (1 << 20, 8192, 2, 4),
    (10_000_000, 32_768, 2, 1),
    (1_000_000_000, 65_536, 2, 1),
  ],
)
def test_a_batch_is_as_random_as_it_should_be(n, size, epochs, seeds):
  found = dict(deviations(our_order, n, size, epochs, seeds))
  assert not {k: v for k, v in found.items() if abs(v) > 4.5}


@pytest.mark.parametrize(
  "make", [functools.partial(our_order, version=1), rotation]
)
@pytest.mark.parametrize("n, size", [(1_000_000, 8192), (10_000_000, 32_768)])
def test_what_is_no_good_shuffle_is_noticed(make, n, size):
  found = dict(deviations(make, n, size, 2, 1))
  assert max(map(abs, found.values())) > 10


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
  weights=st.lists(
    st.floats(0.01, 100, allow_subnormal=False), min_size=4, max_size=4
  ),
  size=st.integers(1, 24),
  seed=st.integers(0, 2**32),
  step=st.integers(0, 10**12),
)
def test_any_mix_shows_each_element_once_an_epoch(
  sizes, weights, size, seed, step
):
  sources = [(str(j), n) for j, n in enumerate(sizes)]
  try:
    sequence = order.Sequence(sources, weights[: len(sizes)], size, seed)
  except errors.UserError:
    return  # too few elements for a batch
  starts = np.cumsum([0, *sizes])
  seen = np.zeros(starts[-1], int)
  for batch in split(take(sequence, size * 40), size):
    assert len(set(batch)) == size
    seen[batch] += 1
    for low, high in itertools.pairwise(starts):
      assert seen[low:high].max() - seen[low:high].min() <= 1
  far = take(sequence, size, step * size)
  assert len(set(far)) == size and min(far) >= 0 and max(far) < starts[-1]
  spares = [sequence.spare(step * size + r, 0) for r in range(size)]
  assert not set(far) & set(spares)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  weights=st.lists(
    st.floats(1e-6, 1e6, allow_subnormal=False), min_size=1, max_size=6
  ),
  size=st.integers(1, 5000),
  step=st.integers(0, 10**9),
)
def test_any_weights_are_kept(weights, size, step):
  shares = order.Shares(weights, size)
  total = sum(fractions.Fraction(repr(w)) for w in weights)
  exact = [fractions.Fraction(repr(w)) / total * size for w in weights]
  before, after = shares.before(step), shares.before(step + 1)
  assert sum(before) == step * size and sum(after) == (step + 1) * size
  for j, (low, high, want) in enumerate(zip(before, after, exact)):
    assert want // 1 <= high - low <= -(-want // 1) <= shares.most(j)[0] + 1
    assert abs(low - want * step) < 64
    if low < high:
      assert shares.batch_of(j, low) == shares.batch_of(j, high - 1)
      assert shares.batch_of(j, low) == (low, high)
