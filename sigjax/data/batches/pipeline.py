"""Batches from a source, on Grain: shuffled, split over processes, resumable.

What is in step s of a run is a function of (source, preprocessing, batch_size,
seed, s) alone: neither the number of processes or threads nor a restart changes
it. So the random numbers of an example are seeded by its place in the global
sequence of examples, and the position to resume from is one number, the step.

B is the global batch, b = B / process_count what one process loads of it:
process p holds the rows p*b to (p+1)*b.
"""

import time
import weakref

import grain
import numpy as np

from sigjax import errors
from sigjax.data import mixture
from sigjax.data.batches import batching, loading, order
from sigjax.data.faults import BadExample


def _local_size(batch_size, process_count):
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
      f"a batch of {batch_size} cannot be split over {process_count} "
      "processes: batch_size has to be a multiple of their number"
    )
  return batch_size // process_count


def _stop(live):
  while live:
    live.pop().close()


class TrainBatches:
  """An endless iterator whose position can be saved; see train_batches.

  close() stops its threads; then there are no further batches.

  Attributes:
    waited: seconds that next() has taken so far.
  """

  def __init__(self, dataset, identity, tally):
    self._live = [iter(dataset)]
    self._identity, self._tally = identity, tally
    self._step = 0
    self.waited = 0.0
    # Called at Python's exit if not before: Grain's own destructor is then too
    # late, and loud.
    self.close = weakref.finalize(self, _stop, self._live)

  def __iter__(self):
    return self

  def __next__(self):
    if not self._live:
      raise StopIteration
    start = time.perf_counter()
    batch = next(self._live[0])
    self.waited += time.perf_counter() - start
    self._step += 1
    return batch

  @property
  def loaded(self):
    """How many examples this process has loaded, those read ahead included."""
    return self._tally.loaded

  def faults(self):
    """Returns {kind: how many could not be used}, of the same process."""
    return self._tally.faults()

  def get_state(self):
    """Returns a small JSON-able dict; "step" is how many batches were taken."""
    return {"step": self._step, **self._identity}

  def set_state(self, state):
    """Moves to the position of get_state(), in a time independent of it.

    Raises:
      UserError: the state is of another sequence of batches.
    """
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise errors.UserError(
          f"the data position was saved with {key}={state.get(key)}, "
          f"but now {key}={value}: the batches would be other ones"
        )
    grain.experimental.set_next_index(self._live[0], state["step"])
    self._step = state["step"]


class EvalBatches:
  """An iterable over a fixed number of batches; see eval_batches."""

  def __init__(self, dataset, steps):
    self._dataset = dataset
    self._steps = steps

  def __len__(self):
    return self._steps

  def __iter__(self):
    return iter(self._dataset)


def train_batches(
  source,
  preprocess,
  *,
  batch_size,
  seed,
  process_index=0,
  process_count=1,
  shuffle=True,
  bad_fraction=0.01,
  num_threads=None,
  prefetch=2,
):
  """Returns an endless iterator over batches for training.

  An epoch is each element once, and a batch may hold the end of one and the
  beginning of the next, but no element twice; see order.py.

  An example that cannot be used is counted, and logged if there were few of its
  kind. Its place is taken by another member of its group; else by an element
  that is not in the batch, always the same one, which that epoch then shows
  twice. What takes the place of two may be the same, though only if both and
  all of the first one's n // B - 1 or more own substitutes cannot be used.

  Args:
    source: a Source, or a mixture.Mixture. Of a grouped one, a random member
      is shown.
    preprocess: fn(example, rng) -> dict of arrays of the same shapes.
    batch_size: B.
    seed: of the order and of all random preprocessing; 0 or more.
    process_index, process_count: which part of each batch this process loads.
    shuffle: whether each epoch is shuffled globally; otherwise its order is
      the source's.
    bad_fraction: the most of what this process loads, or of the first 1000,
      that may be unusable; also the most that a source may have left out.
    num_threads: in which examples are loaded; 0 for none, None for one a core.
    prefetch: how many batches are held ready.

  Returns:
    An iterator of {name: (b, ...)}, a TrainBatches.

  Raises:
    UserError: B is not a multiple of process_count, or the source too small
      for it, see order.Sequence; bad_fraction is no fraction; and, also from
      next(), more is unusable than that, by kind, each with a name.
  """
  B, b = batch_size, _local_size(batch_size, process_count)
  parts, weights = mixture.parts_of(source)
  sizes = [len(part) for part in parts]
  sequence = order.Sequence(
    [(part.name, n) for part, n in zip(parts, sizes)], weights, B, seed, shuffle
  )
  tally = loading.Tally(bad_fraction, source)

  def load(i):
    step, row = divmod(i, b)
    position = step * B + process_index * b + row  # since the run began
    return loading.load_good(
      source, sequence, position, preprocess, seed, tally
    )

  identity = {
    "seed": seed,
    "batch_size": B,
    "elements": sizes,
    "weights": weights,
    "shuffle": shuffle,
  }
  return TrainBatches(
    batching.dataset(load, None, b, num_threads, prefetch), identity, tally
  )


def first_example(source, preprocess):
  """Returns an example as batches hold them, for its shapes.

  Of a mixture, one of each part is read, and they have to be alike.

  Raises:
    UserError: none of the first hundred can be used, or they are not alike.
  """
  parts, _ = mixture.parts_of(source)
  found = batching.Batch(len(parts))
  for j, part in enumerate(parts):
    fault = None
    for i in range(min(len(part), 100)):
      try:
        found.put(
          j,
          *loading.load(
            part, part.pick(i), preprocess, np.random.default_rng(0)
          ),
        )
        break
      except BadExample as e:
        fault = fault or e
    else:
      raise errors.UserError(
        f"none of the first examples of {part.name} can be used: {fault}"
      )
  return {key: value[0] for key, value in found.arrays().items()}


def eval_batches(
  source,
  preprocess,
  *,
  batch_size,
  process_index=0,
  process_count=1,
  num_threads=None,
  prefetch=2,
):
  """Returns batches of all elements once, in order, over all processes.

  Every process gets ceil(len(source) / B) batches. Rows past the end are zeros.
  Of a grouped source, the first members are shown. Random preprocessing depends
  on an element's index alone. Nothing is skipped: a figure is comparable only
  if it is of the whole dataset.

  Args:
    source: a Source that is no Mixture.
    preprocess, batch_size, process_index, process_count, num_threads, prefetch:
      as in train_batches.

  Returns:
    A sized iterable, to be used as often as one likes, of {name: (b, ...),
    "_mask": (b,) bool}, _mask being False for rows past the end.

  Raises:
    UserError: B is not a multiple of process_count, the source is empty or a
      mixture; and, from next(), an example that cannot be used, by its name.
  """
  B, b = batch_size, _local_size(batch_size, process_count)
  n = len(source)
  if not n:
    raise errors.UserError(f"{source.name} has no elements")
  if isinstance(source, mixture.Mixture):
    raise errors.UserError(
      f"a {source.name} cannot be evaluated on: weights mean nothing there; "
      "give an evaluation for each"
    )

  def load(i):
    step, row = divmod(i, b)
    index = step * B + process_index * b + row
    real = index < n
    index = min(index, n - 1)  # past the end: some element, for its shapes
    try:
      example, where = loading.load(
        source, source.pick(index), preprocess, np.random.default_rng(index)
      )
    except BadExample as e:
      raise errors.UserError(
        f"{e}; evaluation skips nothing: repair it or leave it out"
      ) from e
    if not real:
      example = {key: np.zeros_like(value) for key, value in example.items()}
    return {**example, "_mask": np.bool_(real)}, where

  steps = -(-n // B)
  return EvalBatches(
    batching.dataset(load, steps * b, b, num_threads, prefetch), steps
  )
