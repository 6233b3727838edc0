"""What is where in the shards of a dataset: indices, built once and kept.

The index of a shard is an array with a row for each example in it, kept in a
file. The rows of a large dataset are joined in one more file, in the cache,
which is mapped into memory: an example costs no Python object.
"""

import bisect
from collections.abc import Callable
import concurrent.futures
import io
import json
import logging
import os
import random
from typing import Any, NamedTuple
import uuid
import zipfile

import numpy as np
import tqdm

from sigjax import errors
from sigjax.data import faults
from sigjax.data.shards import files, index_files

log = logging.getLogger("sigjax")

IN_MEMORY = 1 << 20  # rows; more are mapped from a file


class Kind(NamedTuple):
  """A kind of index.

  Attributes:
    name: in the names of its files.
    dtype: of its rows, an np.dtype.
    build: fn(Files, number of the shard, its size) -> rows, an array, and
      what is wrong with the shard, {kind: (count, the name of one)}.
  """

  name: str
  dtype: Any
  build: Callable


def _part(opened, number, stamp, kind):
  """Returns (rows, faults, whether they last) of one shard.

  From its index, or by building that. They do not last if the shard could not
  be read: next time it may.
  """
  path = opened.paths[number]
  found = index_files.load(path, kind.name, stamp)
  if found is None:
    try:
      found = rows, wrong = kind.build(opened, number, stamp[0])
    except faults.BadExample as e:
      log.warning("%s", e)
      return np.zeros(0, kind.dtype), {e.kind: (1, path)}, False
    faults.report(path, wrong)
    index_files.save(path, kind.name, stamp, rows, wrong)
  return *found, True


class Shards:
  """The shards of a dataset, as they are now.

  Attributes:
    paths: list of str.
    files: reads them.
    faults: {kind: (count, the name of one)}; so far, the shards not there.

  Raises:
    UserError: none of them is there.
  """

  def __init__(self, paths, what):
    self.paths = paths
    self.what = what
    self.files = files.Files(paths)
    self._stamps = files.stamps(paths)
    gone = [p for p, stamp in zip(paths, self._stamps) if stamp is None]
    if len(gone) == len(paths):
      raise errors.UserError(
        f"none of {len(paths)} {what} is there, such as {gone[0]}; check "
        "the path, which is taken from the working directory unless it is "
        "absolute"
      )
    self.faults = {"vanished shard": (len(gone), gone[0])} if gone else {}
    faults.report(what, self.faults)

  def parts(self, kind):
    """Returns an iterator over (number, rows, faults, lasting) of all shards.

    See _part(). They come as they are done, those that are not there left out.
    The order is random, so that processes that start together find each other's
    work.
    """
    todo = [n for n, stamp in enumerate(self._stamps) if stamp]
    random.Random(uuid.uuid4().int).shuffle(todo)
    with (
      files.pool() as threads,
      tqdm.tqdm(
        total=len(todo), unit="shard", desc=f"indexing {self.what}", delay=2
      ) as bar,
    ):
      waiting = {}
      try:
        while todo or waiting:
          while todo and len(waiting) < 64:  # what is done is in memory
            n = todo.pop()
            waiting[
              threads.submit(_part, self.files, n, self._stamps[n], kind)
            ] = n
          done, _ = concurrent.futures.wait(
            waiting, return_when=concurrent.futures.FIRST_COMPLETED
          )
          for future in done:
            n = waiting.pop(future)
            yield n, *future.result()
            bar.update()
      finally:
        for future in waiting:
          future.cancel()

  def column(self, kind):
    """Yields the rows of each shard, in order."""
    parts = {n: rows for n, rows, *_ in self.parts(kind)}
    for n in sorted(parts):
      yield parts.pop(n)

  def index(self, kind):
    """Returns the Index of all shards, and adds to `faults` what is wrong.

    Raises:
      UserError: there is no row at all, or no place to keep an index.
    """
    told = json.dumps(
      [index_files.VERSION, kind.name, self.paths, self._stamps]
    )
    place = index_files.cached(told, ".npy")
    found = self._joined(place)
    if found is None:
      found = self._join(place, kind)
    rows, starts, wrong = found
    faults.merge(self.faults, wrong)
    faults.report(self.what, wrong)
    if not len(rows):
      raise errors.UserError(
        f"there is no example in {len(self.paths)} {self.what}, such as "
        f"{self.paths[0]}: "
        + (
          ", ".join(f"{n} x {fault}" for fault, (n, _) in wrong.items())
          or "they are empty"
        )
      )
    return Index(rows, starts)

  def _joined(self, place):
    """Returns (rows, starts, faults) if a former process joined them."""
    try:
      with open(place + ".npz", "rb") as f, np.load(f) as head:
        starts, wrong = head["starts"], json.loads(str(head["faults"]))
      rows = np.load(place, mmap_mode="r")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
      return None
    wrong = {k: tuple(v) for k, v in wrong.items()}
    return (rows, starts, wrong) if len(rows) == starts[-1] else None

  def _join(self, place, kind):
    """Returns (rows, starts, faults), many rows from a new file at `place`."""
    counts, wrong = np.zeros(len(self.paths), np.int64), {}
    kept, last = {}, True
    for n, rows, found, lasting in self.parts(kind):
      counts[n], last = len(rows), last and lasting
      faults.merge(wrong, found)
      if counts.sum() <= IN_MEMORY:
        kept[n] = rows
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] <= IN_MEMORY:
      joined = [kept[n] for n in sorted(kept)]
      return np.concatenate(joined), starts, wrong
    try:
      self._write_joined(place, kind, starts)
      if last:  # what makes it trusted
        head = io.BytesIO()
        np.savez(head, starts=starts, faults=np.array(json.dumps(wrong)))
        index_files.write(place + ".npz", head.getvalue())
    except OSError as e:
      raise errors.UserError(
        f"the joined index of {len(self.paths)} {self.what} cannot be "
        f"written to {index_files.cache_dir()}: {e.strerror}; set "
        "SIGJAX_CACHE to a folder with room"
      ) from e
    return np.load(place, mmap_mode="r"), starts, wrong

  def _write_joined(self, place, kind, starts):
    os.makedirs(index_files.cache_dir(), exist_ok=True)
    # Not through a mapped file: on a full disk that would kill the process.
    with index_files.aside(place) as aside, open(aside, "wb") as f:
      np.lib.format.write_array_header_2_0(
        f,
        {
          "descr": np.lib.format.dtype_to_descr(kind.dtype),
          "fortran_order": False,
          "shape": (int(starts[-1]),),
        },
      )
      begin = f.tell()
      for n, rows, *_ in self.parts(kind):  # from the files just made
        if len(rows) != starts[n + 1] - starts[n]:
          raise errors.UserError(
            f"{self.paths[n]} changed while it was indexed; start again"
          )
        f.seek(begin + int(starts[n]) * kind.dtype.itemsize)
        f.write(rows.tobytes())


class Index:
  """Which shard record i is in, and its row there."""

  def __init__(self, rows, starts):
    # A plain array on the mapped file: np.memmap is slow to take rows from.
    self.rows = np.asarray(rows)
    self._starts = starts.tolist()  # bisect on a list is quicker

  def __len__(self):
    return len(self.rows)

  def locate(self, i):
    """Returns (number of the shard, the row's fields as ints)."""
    if not 0 <= i < len(self.rows):
      raise IndexError(i)
    return bisect.bisect_right(self._starts, i) - 1, self.rows[i].item()

  def first(self, number):
    """Returns the number of a shard's first record."""
    return self._starts[number]

  def of_shard(self, number):
    """Returns the rows of a shard."""
    return self.rows[self._starts[number] : self._starts[number + 1]]
