"""Batches from a source: shuffled, split over processes, resumable.

What is in step s of a run is a function of (source, preprocessing, batch_size,
seed, s) alone: neither the number of processes or threads nor a restart changes
it. So the random numbers of an example are seeded by its position in the global
sequence of examples, and the position to resume from is one number, the step.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
import time
from typing import Any
import weakref

import grain
import numpy as np

from sigjax import errors
from sigjax.data.batches import order
from sigjax.data.batches import tally as tally_lib
from sigjax.data.batches.loader import Arrays, Batch, Loader
from sigjax.data.faults import BadExample
from sigjax.data.source import Example, Source

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
    self, loader: Loader, identity: dict[str, Any], tally: tally_lib.Tally
  ):
    self._live: list[Any] = [iter(loader)]
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
    return {"step": self._step, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position from get_state(), in constant time.

    Raises:
      UserError: The position is of another sequence of batches.
    """
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise errors.UserError(
          f"the data position was saved with {key}={state.get(key)}, "
          f"but now {key}={value}: the batches would be other ones"
        )
    grain.experimental.set_next_index(self._live[0], state["step"])
    self._step = state["step"]


def _close(live):
  while live:
    live.pop().close()


class EvalBatches:
  """A sized iterable over batches; see eval_batches."""

  def __init__(self, loader: Loader, steps: int):
    self._loader, self._steps = loader, steps

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[Arrays]:
    return iter(self._loader)


def train_batches(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
  bad_fraction: float = tally_lib.BAD_FRACTION,
  num_threads: int | None = None,
  prefetch: int = 2,
) -> TrainBatches:
  """Returns an endless iterator over batches for training.

  An epoch is each element once. A batch may hold the end of one epoch and the
  beginning of the next, but no element twice; see order.py.

  An example that cannot be used is counted, and some of each kind are logged.
  Another member of its group takes its place; if there is none, an element that
  is not in the batch, which that epoch then shows twice. The choice depends on
  the position alone.

  Args:
    source: A Source or a Mixture. Of a group, a random member is shown.
    preprocess: fn(example, rng) -> dict of arrays of the same shapes.
    batch_size: B.
    seed: Of the order and of all random preprocessing; 0 or more.
    process_index: Which part of each batch this process loads.
    process_count: Into how many parts batches are split.
    shuffle: Whether each epoch is shuffled globally; otherwise examples come in
      the source's order.
    bad_fraction: The largest fraction of unusable examples, see tally.Tally.
    num_threads: How many threads load examples; 0 for none, None for one per
      core.
    prefetch: How many batches are held ready.

  Raises:
    UserError: process_count does not divide B; the source is too small for B,
      see order.Sequence; bad_fraction is no fraction. Also from next(): too
      many examples cannot be used; the message lists kinds and examples.
  """
  parts, weights = source.parts()
  sizes = [len(part) for part in parts]
  sequence = order.Sequence(
    [(part.name, n) for part, n in zip(parts, sizes)],
    weights,
    batch_size,
    seed,
    shuffle,
  )
  tally = tally_lib.Tally(bad_fraction, source)
  loader = Loader(
    functools.partial(_load_good, source, sequence, preprocess, seed, tally),
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
  }
  return TrainBatches(loader, identity, tally)


def eval_batches(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int = 2,
) -> EvalBatches:
  """Returns batches of all elements once, in order, over all processes.

  Every process gets ceil(len(source) / B) batches. Rows past the end are zeros.
  Of a group, the first member is shown. Random preprocessing depends on the
  number of the element alone. Nothing is skipped: a figure is comparable only
  if it is of the whole dataset.

  Args:
    source: A Source that is no Mixture.
    preprocess: As in train_batches, as are the other arguments.
    batch_size: B.
    process_index: Which part of each batch this process loads.
    process_count: Into how many parts batches are split.
    num_threads: How many threads load examples.
    prefetch: How many batches are held ready.

  Returns:
    A sized iterable that can be used several times, of {name: (b, ...),
    "_mask": (b,) bool}. _mask is False for rows past the end.

  Raises:
    UserError: process_count does not divide B; the source is empty or a
      Mixture. Also from next(): an example cannot be used.
  """
  source.check_evaluable()
  n = len(source)

  def load(position):
    real = position < n
    index = min(position, n - 1)  # past the end: some element, for its shapes
    try:
      example, where = _load(
        source, source.pick(index), preprocess, np.random.default_rng(index)
      )
    except BadExample as e:
      raise errors.UserError(
        f"{e}; evaluation skips nothing: repair it or leave it out"
      ) from e
    if not real:
      example = {key: np.zeros_like(value) for key, value in example.items()}
    return {**example, "_mask": np.bool_(real)}, where

  steps = -(-n // batch_size)
  loader = Loader(
    load,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
    steps=steps,
    num_threads=num_threads,
    prefetch=prefetch,
  )
  return EvalBatches(loader, steps)


def first_example(source: Source, preprocess: Preprocess) -> Arrays:
  """Returns one example as it will stand in batches, for its shapes.

  Of a mixture, one example of each part is read, and these have to be alike.

  Raises:
    UserError: None of the first hundred examples can be used, or examples of
      the parts are not alike.
  """
  parts, _ = source.parts()
  found = Batch(len(parts))
  for j, part in enumerate(parts):
    fault = None
    for i in range(min(len(part), 100)):
      rng = np.random.default_rng(0)
      try:
        found.put(j, *_load(part, part.pick(i), preprocess, rng))
        break
      except BadExample as e:
        fault = fault or e
    else:
      raise errors.UserError(
        f"none of the first examples of {part.name} can be used: {fault}"
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
  tally: tally_lib.Tally,
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
