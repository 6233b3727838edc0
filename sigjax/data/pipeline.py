"""Batches from a source, on Grain: shuffled, split over processes, resumable.

What is in step s of a run is a function of (source, preprocessing, batch_size,
seed, s) alone: neither the number of processes or threads nor a restart changes
it. So the random numbers of an example are seeded by its place in the global
sequence of examples, and the position to resume from is one number, the step.

B is the global batch, b = B / process_count what one process loads of it:
process p holds the rows p*b to (p+1)*b.
"""

import weakref

import os

import grain
import numpy as np

from sigjax import errors


def _local_size(batch_size, process_count):
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
        f"a batch of {batch_size} cannot be split over {process_count} "
        "processes: batch_size has to be a multiple of their number")
  return batch_size // process_count


def _load(source, record, preprocess, rng):
  """Reads and preprocesses one record; a fault names the source and record."""
  where = f"{source.name}[{record}]"
  try:
    return preprocess(source.records[record], rng)
  except errors.UserError as e:
    raise errors.UserError(f"{where}: {e}") from e
  except Exception as e:
    e.add_note(f"in {where}")
    raise


def _stack(examples):
  """Stacks b dicts of equal shapes into a dict of (b, ...) arrays."""
  batch = {}
  for key in examples[0]:
    values = [np.asarray(example[key]) for example in examples]
    shapes = sorted({value.shape for value in values})
    if len(shapes) > 1 or values[0].dtype == object:
      raise errors.UserError(
          f'feature "{key}" cannot be batched (shapes {shapes[:3]}); make its '
          "shape the same in all examples, or leave it out with keep(...)")
    batch[key] = np.stack(values)
  return batch


def _batches(load, length, b, num_threads, prefetch):
  """Returns a Grain dataset of _stack([load(s * b), ..., load(s * b + b - 1)]).

  Args:
    load: the index of an example on this process -> the example.
    length: how many examples this process loads; None for no end.
    b: how many make a batch.
    num_threads: in which examples are loaded; None for as many as cores.
    prefetch: how many batches are held ready by one more thread.
  """
  if num_threads is None:
    num_threads = os.cpu_count()
  indices = grain.MapDataset.range(length or b)
  indices = indices if length else indices.repeat()
  examples = indices.map_with_index(lambda i, _: load(i)).to_iter_dataset(
      grain.ReadOptions(num_threads=num_threads,
                        prefetch_buffer_size=4 * num_threads))
  return grain.experimental.ThreadPrefetchIterDataset(
      examples.batch(b, batch_fn=_stack), prefetch_buffer_size=prefetch)


def _stop(live):
  while live:
    live.pop().close()


class TrainBatches:
  """An endless iterator whose position can be saved; see train_batches.

  close() stops its threads; then there are no further batches.
  """

  def __init__(self, dataset, identity):
    self._live = [iter(dataset)]
    self._identity = identity
    self._step = 0
    # Called at Python's exit if not before: Grain's own destructor is then too
    # late, and loud.
    self.close = weakref.finalize(self, _stop, self._live)

  def __iter__(self):
    return self

  def __next__(self):
    if not self._live:
      raise StopIteration
    batch = next(self._live[0])
    self._step += 1
    return batch

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
            f"but now {key}={value}: the batches would be other ones")
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


def train_batches(source, preprocess, *, batch_size, seed, process_index=0,
                  process_count=1, shuffle=True, num_threads=None, prefetch=2):
  """Returns an endless iterator over batches for training.

  An epoch is len(source) // B batches. The rest, fewer than B elements, is left
  out (shuffled, it is another rest in each epoch): a batch across epochs could
  hold an element twice, which would be a wrong negative pair for the loss.

  Args:
    source: a sources.Source. Of a grouped one, a random member is shown.
    preprocess: fn(example, rng) -> dict of arrays of the same shapes.
    batch_size: B.
    seed: of the order and of all random preprocessing; 0 or more.
    process_index, process_count: which part of each batch this process loads.
    shuffle: whether each epoch is shuffled globally; otherwise its order is
      the source's.
    num_threads: in which examples are loaded; 0 for none, None for one a core.
    prefetch: how many batches are held ready.

  Returns:
    An iterator of {name: (b, ...)} with get_state(), set_state() and close().

  Raises:
    UserError: B is not a multiple of process_count or larger than the source;
      and, from next(), an example that cannot be used, by source and record.
  """
  B, b = batch_size, _local_size(batch_size, process_count)
  n = len(source)
  if n < B:
    raise errors.UserError(
        f"{source.name} has {n} elements, too few for a batch of {B}")
  order = grain.MapDataset.range(n)
  if shuffle:
    # Grain shuffles epoch e by seed + e, so that with the plain seed the runs
    # of seeds 0 and 1 would share all epochs but one.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = order.shuffle(seed=mixed)
  order = order[:n // B * B]

  def load(i):
    step, row = divmod(i, b)
    position = step * B + process_index * b + row  # since the run began
    rng = np.random.default_rng([seed, position])
    record = source.pick(int(order[position]), rng)
    return _load(source, record, preprocess, rng)

  dataset = _batches(load, None, b, num_threads, prefetch)
  identity = {"seed": seed, "batch_size": B, "elements": n}
  return TrainBatches(dataset, identity)


def eval_batches(source, preprocess, *, batch_size, process_index=0,
                 process_count=1, num_threads=None, prefetch=2):
  """Returns batches of all elements once, in order, over all processes.

  Every process gets ceil(len(source) / B) batches. Rows past the end are zeros.
  Of a grouped source, the first members are shown. Random preprocessing depends
  on an element's index alone.

  Args:
    source, preprocess, batch_size, process_index, process_count, num_threads,
      prefetch: as in train_batches.

  Returns:
    A sized iterable, to be used as often as one likes, of {name: (b, ...),
    "_mask": (b,) bool}, _mask being False for rows past the end.

  Raises:
    UserError: as train_batches, but the source may be smaller than B.
  """
  B, b = batch_size, _local_size(batch_size, process_count)
  n = len(source)
  if not n:
    raise errors.UserError(f"{source.name} has no elements")

  def load(i):
    step, row = divmod(i, b)
    index = step * B + process_index * b + row
    real = index < n
    index = min(index, n - 1)  # past the end: some element, for its shapes
    rng = np.random.default_rng(index)
    example = _load(source, source.pick(index), preprocess, rng)
    if not real:
      example = {key: np.zeros_like(value) for key, value in example.items()}
    return {**example, "_mask": np.bool_(real)}

  steps = -(-n // B)
  return EvalBatches(
      _batches(load, steps * b, b, num_threads, prefetch), steps)
