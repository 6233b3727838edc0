"""Batches of one process, whose examples are loaded by several threads.

B is the global batch size. Position s * B + r is row r of batch s. Process p of
P loads the rows p * b to (p + 1) * b of each batch, where b = B / P.
"""

from collections.abc import Callable, Iterator
import os
import threading
from typing import Any
import weakref

import grain
import numpy as np

from sigjax import errors
from sigjax.data.source import Example

# {name: (b, ...)}, the rows of one batch that one process loads.
Arrays = dict[str, np.ndarray]


class Batch:
  """The arrays of b examples. Each thread writes its example to its row.

  So the threads share the work of copying, and each example is copied once.
  """

  def __init__(self, b: int):
    self._b, self._lock = b, threading.Lock()
    self._kinds: dict[str, Any] = {}
    self._columns: dict[str, Any] | None = None

  def put(self, row: int, example: Example, where: str) -> None:
    """Writes an example to a row.

    Args:
      row: 0 to b - 1.
      example: {name: array or text}.
      where: The example's name, for messages.

    Raises:
      UserError: Its features differ from those of the other examples.
    """
    values = {key: np.asarray(value) for key, value in example.items()}
    # Texts may differ in length, which is part of their dtype.
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
      if got is None or got != want or got[0] == np.dtype(object):
        raise errors.UserError(
          f'feature "{key}" cannot be batched, being {_describe(got)} in '
          f"{where} and {_describe(want)} in others; make it the same in all "
          "examples, or leave it out with keep(...)"
        )
      self._columns[key][row] = values[key]

  def arrays(self) -> Arrays:
    """Returns {name: (b, ...)}; all rows have to be written."""
    return {
      key: np.stack(column) if isinstance(column, list) else column
      for key, column in (self._columns or {}).items()
    }


def _describe(kind) -> str:
  if kind is None:
    return "missing"
  if kind[0] == np.dtype(object):
    return "no array"
  return f"{'text' if isinstance(kind[0], str) else kind[0]} of shape {kind[1]}"


class Loader:
  """An iterable over the rows of batches that one process loads.

  Each iterator over it loads anew, in threads of its own.

  Args:
    load: fn(position) -> (example, its name). Called by several threads.
    batch_size: B.
    process_index: p.
    process_count: P.
    steps: The number of batches; None for no end.
    num_threads: How many threads load examples; 0 for the caller's, None for
      one per core.
    prefetch: How many batches are held ready.

  Raises:
    UserError: P does not divide B.
  """

  def __init__(
    self,
    load: Callable[[int], tuple[Example, str]],
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    steps: int | None,
    num_threads: int | None,
    prefetch: int,
  ):
    if batch_size < 1 or batch_size % process_count:
      raise errors.UserError(
        f"a batch of {batch_size} cannot be split over {process_count} "
        "processes: batch_size has to be a multiple of their number"
      )
    self._load, self._steps = load, steps
    self._batch_size = batch_size
    self._b = batch_size // process_count
    self._first_row = process_index * self._b
    if num_threads is None:
      num_threads = os.cpu_count() or 1
    self._num_threads = num_threads
    self._prefetch = prefetch

  def __iter__(self) -> Iterator[Arrays]:
    return iter(self._dataset())

  def _dataset(self):
    """Returns a Grain dataset of batches."""
    b = self._b
    # Several rows at a time: to hand over one takes as long as a small image.
    several = min(max(b // (8 * max(self._num_threads, 1)), 1), 16)
    parts = -(-b // several)
    # Unfinished batches. Each is kept alive by its parts that are loaded, so
    # nothing remains of a batch that is given up, as in set_state.
    begun, lock = weakref.WeakValueDictionary(), threading.Lock()

    def fill(i, _):
      step, part = divmod(i, parts)
      with lock:
        batch = begun.get(step)
        if batch is None:
          batch = begun[step] = Batch(b)
      first = step * self._batch_size + self._first_row
      for row in range(part * several, min((part + 1) * several, b)):
        batch.put(row, *self._load(first + row))
      return batch

    if self._steps is None:
      indices = grain.MapDataset.range(parts).repeat()
    else:
      indices = grain.MapDataset.range(self._steps * parts)
    filled = indices.map_with_index(fill).to_iter_dataset(
      grain.ReadOptions(
        num_threads=self._num_threads,
        prefetch_buffer_size=4 * self._num_threads,
      )
    )
    return grain.experimental.ThreadPrefetchIterDataset(
      filled.batch(parts, batch_fn=lambda batches: batches[0].arrays()),
      prefetch_buffer_size=self._prefetch,
    )
