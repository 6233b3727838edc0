"""Batches from a source: shuffled, split over processes, resumable.

What is in step s of a run is a function of (source, preprocessing, batch_size,
seed, s) alone: neither the number of processes or threads nor a restart changes
it. So the random numbers of an example are seeded by its position in the global
sequence of examples, and the position to resume from is one number, the step.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
import logging
import threading
import time
from typing import Any
import weakref

import grain
import numpy as np

from sigjax import errors
from sigjax.data.batches import order
from sigjax.data.batches.loader import Arrays, Batch, Loader
from sigjax.data.faults import BAD_FRACTION, BadExample, Tally
from sigjax.data.source import Example, Source, spread

log = logging.getLogger("sigjax")

# fn(example, rng) -> example
Preprocess = Callable[[Example, np.random.Generator], Example]

_MEMBERS = 3  # other members of its group that may replace a bad example
_SPARES = 8  # other elements that are tried after these


class TrainBatches:
  """An endless iterator whose position can be saved; see train_batches.

  close() stops its threads; then there are no further batches.

  Attributes:
    waited: Seconds that next() has taken so far.
  """

  waited: float

  def __init__(
    self,
    make_loader: Callable[[int], Loader],
    identity: dict[str, Any],
    tally: Tally,
  ):
    """See train_batches. make_loader takes the order's version."""
    self._make_loader, self._order = make_loader, order.VERSION
    self._live: list[Any] = [iter(make_loader(self._order))]
    self._identity, self._tally = identity, tally
    self._step = 0
    self.waited = 0.0
    # Called at Python's exit if not before: Grain's own destructor would come
    # too late then, and print an error.
    self.close = weakref.finalize(self, _close, self._live)

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Arrays:
    if not self._live:
      raise StopIteration
    start = time.perf_counter()
    batch = next(self._live[0])
    self.waited += time.perf_counter() - start
    self._step += 1
    return batch

  def faults(self) -> dict[str, int]:
    """Returns {kind: number of examples that this process could not use}."""
    return self._tally.faults()

  def get_state(self) -> dict[str, Any]:
    """Returns a small JSON-able dict; "step" is how many batches were taken."""
    return {"step": self._step, "order": self._order, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position from get_state(), in constant time.

    The data is not compared here: the identity in the checkpoint covers it.
    Positions saved by older versions of sigjax are read, too: such a run goes
    on with the order that it began with.

    Raises:
      UserError: The position is of another sequence of batches.
    """
    state = {"order": 1, "mismatch": 0.0, **state}
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise errors.UserError(
          f"the data position was saved with {key}={state.get(key)}, "
          f"but now {key}={value}: the batches would be other ones"
        )
    if state["order"] not in order.ROUNDS:
      raise errors.UserError(
        f"the data position was saved with order {state['order']}, but this "
        f"version of sigjax knows {', '.join(map(str, order.ROUNDS))}; "
        "update sigjax"
      )
    if state["order"] != self._order:
      log.info("going on with the older order %d of this run", state["order"])
      self._order = state["order"]
      self._live.pop().close()
      self._live.append(iter(self._make_loader(self._order)))
    grain.experimental.set_next_index(self._live[0], state["step"])
    self._step = state["step"]

  def change(self, other: "TrainBatches") -> None:
    """Goes on at the same position with what another iterator loads.

    Args:
      other: of the same sequence of examples, with another preprocessing. It is
        used up.
    """
    other.set_state(self.get_state())
    self._make_loader, self._tally = other._make_loader, other._tally
    _close(self._live)
    self._live.append(other._live.pop())


def _close(live):
  while live:
    live.pop().close()


class EvalBatches:
  """A sized iterable over batches; see eval_batches."""

  def __init__(
    self,
    make_loader: Callable[[Tally], Loader],
    make_tally: Callable[[], Tally],
    steps: int,
  ):
    self._make_loader, self._make_tally = make_loader, make_tally
    self._tally, self._steps = make_tally(), steps

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[Arrays]:
    self._tally = self._make_tally()
    return iter(self._make_loader(self._tally))

  def faults(self) -> dict[str, int]:
    """Returns {kind: examples left out by this process} in the latest pass."""
    return self._tally.faults()


def train_batches(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
  bad_fraction: float = BAD_FRACTION,
  num_threads: int | None = None,
  prefetch: int = 2,
  vary: Callable[[int], Preprocess] | None = None,
) -> TrainBatches:
  """Returns an endless iterator over batches for training.

  An epoch is each element once. A batch may hold the end of one epoch and the
  beginning of the next, but no element twice; see order.py.

  An example that cannot be used is counted, and some of each kind are logged.
  Another member of its group takes its place; if there is none, an element that
  is not in the batch, which that epoch then shows twice. The choice depends on
  the position alone.

  If the source has a share `mismatch`, each row of a batch is chosen with that
  probability (noise of SigLIP, section 4.10). The chosen rows are put in a
  random ring, and each takes the features of its neighbour, all but "image".
  The choice depends on the seed and the step alone. A single chosen row keeps
  its own.

  Args:
    source: A Source or a Mixture. Of a group, a random member is shown.
    preprocess: fn(example, rng) -> dict of arrays of the same shapes.
    batch_size: B.
    seed: Of the order and of all random preprocessing; 0 or more.
    process_index: Which part of each batch this process loads.
    process_count: Into how many parts batches are split.
    shuffle: Whether each epoch is shuffled globally; otherwise examples come in
      the source's order.
    bad_fraction: The largest fraction of unusable examples, see faults.Tally.
    num_threads: How many threads load examples; 0 for none, None for one per
      core.
    prefetch: How many batches are held ready.
    vary: fn(step) -> the preprocessing of a batch, the first of which is 0, in
      place of `preprocess`: batches may then differ in their shapes.

  Raises:
    UserError: process_count does not divide B; the source is too small for B,
      see order.Sequence; bad_fraction is no fraction. Also from next(): too
      many examples cannot be used; the message lists kinds and examples.
  """
  parts, weights = source.parts()
  sizes = [len(part) for part in parts]
  tally = Tally(bad_fraction, source)

  def make_loader(version: int) -> Loader:
    sequence = order.Sequence(
      [(part.name, n) for part, n in zip(parts, sizes)],
      weights,
      batch_size,
      seed,
      shuffle,
      version,
    )

    def load(position: int) -> tuple[Example, str]:
      fn = vary(position // batch_size) if vary else preprocess
      return _load_good(source, sequence, fn, seed, tally, position)

    if source.mismatch:
      load = _Mismatched(load, source.mismatch, batch_size, seed)
    return Loader(
      load,
      batch_size=batch_size,
      process_index=process_index,
      process_count=process_count,
      steps=None,
      num_threads=num_threads,
      prefetch=prefetch,
    )

  identity = {
    "seed": seed,
    "batch_size": batch_size,
    "elements": sizes,
    "weights": weights,
    "shuffle": shuffle,
    "mismatch": source.mismatch,
  }
  return TrainBatches(make_loader, identity, tally)


def eval_batches(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  bad_fraction: float = BAD_FRACTION,
  num_threads: int | None = None,
  prefetch: int = 2,
) -> EvalBatches:
  """Returns batches of all elements once, in order, over all processes.

  Every process gets ceil(len(source) / B) batches. Of a group, the first member
  is shown. Random preprocessing depends on the number of the element alone.

  An example that cannot be used is left out: its row is zeros, its _mask False.
  It is counted, so that results can tell how many were left out.

  Args:
    source: A Source that is no Mixture.
    preprocess: As in train_batches, as are the other arguments.
    batch_size: B.
    process_index: Which part of each batch this process loads.
    process_count: Into how many parts batches are split.
    bad_fraction: The largest fraction of unusable examples, see faults.Tally.
    num_threads: How many threads load examples.
    prefetch: How many batches are held ready.

  Returns:
    A sized iterable that can be used several times, of {name: (b, ...),
    "_mask": (b,) bool}. Rows of element i have _mask True if it can be used;
    rows past the end have False.

  Raises:
    UserError: process_count does not divide B; the source is empty or a
      Mixture. Also from next(): too many examples cannot be used.
  """
  source.check_evaluable()
  n, steps = len(source), -(-len(source) // batch_size)
  blank = _Blank(source, preprocess)

  def load(tally, position):
    if position >= n:
      return blank(), "a row past the end"
    rng = np.random.default_rng(position)
    try:
      example, where = _load(source, source.pick(position), preprocess, rng)
    except BadExample as e:
      tally.bad(e)
      return blank(), source.name_of(source.pick(position))
    tally.good()
    return {**example, "_mask": np.bool_(True)}, where

  def make_loader(tally: Tally) -> Loader:
    return Loader(
      functools.partial(load, tally),
      batch_size=batch_size,
      process_index=process_index,
      process_count=process_count,
      steps=steps,
      num_threads=num_threads,
      prefetch=prefetch,
    )

  make_loader(Tally(bad_fraction, source))  # raises now, not later
  make_tally = functools.partial(Tally, bad_fraction, source)
  return EvalBatches(make_loader, make_tally, steps)


class _Blank:
  """Makes rows of zeros, shaped like the first example that can be used."""

  def __init__(self, source: Source, preprocess: Preprocess):
    self._source, self._preprocess = source, preprocess
    self._lock, self._example = threading.Lock(), None

  def __call__(self) -> Example:
    with self._lock:
      if self._example is None:
        found = first_example(self._source, self._preprocess)
        self._example = {key: np.zeros_like(v) for key, v in found.items()}
    return {**self._example, "_mask": np.bool_(False)}


def first_example(source: Source, preprocess: Preprocess) -> Arrays:
  """Returns one example as it will stand in batches, for its shapes.

  Of a mixture, one example of each part is read, and these have to be alike.

  Raises:
    UserError: None of a hundred examples from all over a part can be used, or
      examples of the parts are not alike.
  """
  parts, _ = source.parts()
  found = Batch(len(parts))
  for j, part in enumerate(parts):
    fault = None
    for i in spread(len(part)):
      rng = np.random.default_rng(0)
      try:
        found.put(j, *_load(part, part.pick(i), preprocess, rng))
        break
      except BadExample as e:
        fault = fault or e
    else:
      raise errors.UserError(
        f"none of the examples tried of {part.name} can be used: {fault}"
      )
  return {key: value[0] for key, value in found.arrays().items()}


def _load(
  source: Source,
  record: int,
  preprocess: Preprocess,
  rng: np.random.Generator,
) -> tuple[Example, str]:
  """Reads and preprocesses one record.

  Returns:
    The example, and its name.

  Raises:
    BadExample: It cannot be used. All errors name the example.
  """
  where = source.name_of(record)
  try:
    example = source.read(record)
    key = example.get("key", example.get("file"))
    if isinstance(key, str):
      where = f"{where} ({key})"
    return preprocess(example, rng), where
  except BadExample as e:
    raise BadExample(f"{where}: {e}", kind=e.kind) from e
  except errors.UserError as e:
    raise errors.UserError(f"{where}: {e}") from e
  except Exception as e:
    e.add_note(f"in {where}")
    raise


def _load_good(
  source: Source,
  sequence: order.Sequence,
  preprocess: Preprocess,
  seed: int,
  tally: Tally,
  position: int,
) -> tuple[Example, str]:
  """Loads the example of a position, or one that takes its place.

  Raises:
    UserError: None of the candidates can be used, or the tally's limit is
      exceeded.
  """
  fault, tried = None, 0
  for record, rng in _candidates(source, sequence, seed, position):
    try:
      loaded = _load(source, record, preprocess, rng)
    except BadExample as e:
      fault = e
      tally.bad(e)
      tried += 1
    else:
      tally.good()
      return loaded
  raise errors.UserError(
    f"{fault}; nothing can take its place in the batch: "
    + (
      f"{tried - 1} others cannot be used, either"
      if tried > 1
      else "the batch holds all there are; lower batch_size"
    )
  )


class _Mismatched:
  """Loads the example of a position with the text of another, if chosen.

  Args:
    load: fn(position) -> (example, its name).
    share: The probability that a row is chosen.
    batch_size: B.
    seed: Of the run.
  """

  def __init__(
    self,
    load: Callable[[int], tuple[Example, str]],
    share: float,
    batch_size: int,
    seed: int,
  ):
    self._load, self._share = load, share
    self._batch_size, self._seed = batch_size, seed
    # Threads work on few batches at a time.
    self._others = functools.lru_cache(16)(self._make_others)

  def _make_others(self, step: int) -> dict[int, int]:
    """Returns {row: the row whose text it gets} of the chosen rows."""
    # Four numbers, because an example's are seeded with three.
    rng = np.random.default_rng([self._seed, 1, step, 1])
    chosen = np.flatnonzero(rng.random(self._batch_size) < self._share)
    chosen = rng.permutation(chosen)
    return dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist()))

  def __call__(self, position: int) -> tuple[Example, str]:
    example, where = self._load(position)
    step, row = divmod(position, self._batch_size)
    other = self._others(step).get(row, row)
    if other == row:
      return example, where
    given, _ = self._load(step * self._batch_size + other)
    return {**given, "image": errors.pick(example, "image", "feature")}, where


def _candidates(
  source: Source, sequence: order.Sequence, seed: int, position: int
) -> Iterator[tuple[int, np.random.Generator]]:
  """Yields (record, rng) of a position, then those that may take its place."""
  rngs = (
    np.random.default_rng([seed, position, attempt])
    for attempt in itertools.count()
  )
  own, rng = sequence.at(position), next(rngs)
  record = source.pick(own, rng)
  yield record, rng
  group = source.members_of(own)
  others = np.roll(group, -list(group).index(record))[1:]
  for other in others[:_MEMBERS].tolist():
    yield other, next(rngs)
  for attempt in range(_SPARES):
    spare = sequence.spare(position, attempt)
    if spare is not None:
      rng = next(rngs)
      yield source.pick(spare, rng), rng
