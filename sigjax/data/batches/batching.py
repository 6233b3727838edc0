"""Examples, loaded by many threads, written into the arrays of batches."""

import os
import threading
import weakref

import grain
import numpy as np

from sigjax import errors


class Batch:
  """The arrays of b examples; who loads one writes it to its row.

  So many threads share that work, and it is the only copy of an example that
  batching makes.
  """

  def __init__(self, b):
    self._b, self._lock = b, threading.Lock()
    self._kinds = self._columns = None

  def put(self, row, example, where):
    """Writes an example, {name: array or text}; `where` is what it is called.

    Raises:
      UserError: its features are not those of the other examples.
    """
    values = {key: np.asarray(value) for key, value in example.items()}
    # Texts may differ in length, which is in their dtype.
    kinds = {
      key: (v.dtype.kind if v.dtype.kind in "SU" else v.dtype, v.shape)
      for key, v in values.items()
    }
    with self._lock:
      if self._columns is None:
        self._kinds = kinds
        self._columns = {
          key: [None] * self._b
          if v.dtype.kind in "SU"
          else np.empty((self._b, *v.shape), v.dtype)
          for key, v in values.items()
        }
    for key in kinds | self._kinds:
      got, want = kinds.get(key), self._kinds.get(key)
      if got != want or got[0] == object:
        raise errors.UserError(
          f'feature "{key}" cannot be batched, being {_describe(got)} in '
          f"{where} and {_describe(want)} in others; make it the same in all "
          "examples, or leave it out with keep(...)"
        )
      self._columns[key][row] = values[key]

  def arrays(self):
    """Returns {name: (b, ...)}, once all rows are there."""
    return {
      key: np.stack(column) if isinstance(column, list) else column
      for key, column in self._columns.items()
    }


def _describe(kind):
  if kind is None:
    return "missing"
  if kind[0] == object:
    return "no array"
  return f"{'text' if isinstance(kind[0], str) else kind[0]} of shape {kind[1]}"


def dataset(load, length, b, num_threads, prefetch):
  """Returns a Grain dataset of batches, of load(s * b) ... load(s * b + b - 1).

  Args:
    load: the index of an example on this process -> (the example, its name).
    length: how many examples this process loads; None for no end.
    b: how many make a batch.
    num_threads: in which examples are loaded; None for as many as cores.
    prefetch: how many batches are held ready by one more thread.
  """
  if num_threads is None:
    num_threads = os.cpu_count()
  indices = grain.MapDataset.range(length or b)
  indices = indices if length else indices.repeat()
  # Batches in the making. Each is held by those of its rows that are loaded, so
  # that of one that is given up, as in set_state, nothing remains.
  begun, lock = weakref.WeakValueDictionary(), threading.Lock()

  def fill(i, _):
    step, row = divmod(i, b)
    with lock:
      batch = begun.get(step)
      if batch is None:
        batch = begun[step] = Batch(b)
    batch.put(row, *load(i))
    return batch

  rows = indices.map_with_index(fill).to_iter_dataset(
    grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=4 * num_threads
    )
  )
  return grain.experimental.ThreadPrefetchIterDataset(
    rows.batch(b, batch_fn=lambda batches: batches[0].arrays()),
    prefetch_buffer_size=prefetch,
  )
