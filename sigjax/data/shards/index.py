"""Indices of shards, which tell where each example lies.

The index of a shard is an array with a row per example, kept in a file. The
indices of all shards of a dataset are joined. A large joined index is kept in
the cache folder as one more file, and mapped into memory: then an example costs
no Python object.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import io
import json
import logging
import pathlib
import random
from typing import Any, NamedTuple
import uuid

import numpy as np
import tqdm

from sigjax import errors
from sigjax.data import faults
from sigjax.data.shards import files, index_files
from sigjax.data.shards.index_files import Faults
from sigjax.runtime import files as local_files

log = logging.getLogger("sigjax")

IN_MEMORY = 1 << 20  # rows; a larger joined index is mapped from a file
# Faults of a shard by which all its examples, or those at its end, are lost.
LOST = (
  "vanished shard",
  "unreadable shard",
  "damaged shard",
  "truncated shard",
)


class Kind(NamedTuple):
  """A kind of index.

  Attributes:
    name: part of the names of its files.
    dtype: of its rows.
    build: fn(files, number of the shard, its size in bytes) -> the rows of one
      shard, and what is wrong with it: {kind: (count, an example's name)}. The
      count of a kind in LOST is ignored.
    examples: fn(rows of one shard) -> how many examples they stand for.
  """

  name: str
  dtype: np.dtype
  build: Callable[[files.Files, int, int], tuple[np.ndarray, Faults]]
  examples: Callable[[np.ndarray], int] = len


class Part(NamedTuple):
  """The index of one shard.

  Attributes:
    number: of the shard.
    rows: the index.
    faults: what is wrong with the shard.
    lasting: False if the shard could not be read; it may be readable next time.
  """

  number: int
  rows: np.ndarray
  faults: Faults
  lasting: bool


def _part(
  opened: files.Files, number: int, stamp: files.Stamp, kind: Kind
) -> Part:
  """Loads the index of one shard, or builds and keeps it."""
  path = opened.paths[number]
  found = index_files.load_index(path, kind.name, stamp)
  if found and (found[0].dtype != kind.dtype or found[0].ndim != 1):
    found = None
  if found is None:
    try:
      found = kind.build(opened, number, stamp[0])
    except faults.BadExample as e:
      log.warning("%s", e)
      empty = np.zeros(0, kind.dtype)
      return Part(number, empty, {e.kind: (1, path)}, lasting=False)
    rows, wrong = found
    faults.report(path, _of_examples(wrong))
    index_files.save_index(path, kind.name, stamp, rows, wrong)
  return Part(number, *found, lasting=True)


def _of_examples(wrong: Faults) -> Faults:
  """Returns the faults of examples, without those of whole shards."""
  return {kind: found for kind, found in wrong.items() if kind not in LOST}


def _estimated(
  counts: Sequence[int], lost: Mapping[int, str]
) -> dict[int, int]:
  """Estimates how many examples each lost shard lacks.

  It is assumed to have held as many as the other shards do on average or, if
  all are lost, as the longest of them. It lacks at least one.

  Args:
    counts: how many examples each shard has.
    lost: the numbers of the lost shards.
  """
  whole = [count for n, count in enumerate(counts) if n not in lost]
  expected = round(sum(whole) / len(whole)) if whole else max(counts)
  return {n: max(1, expected - counts[n]) for n in lost}


class Shards:
  """The shards of a dataset.

  Args:
    paths: as files.expand() returns them.
    what: names the shards in messages, such as "tar shards".

  Attributes:
    paths: the same.
    what: the same.
    stamps: of the shards, see files.stamps().
    files: reads the shards.
    identity: of the shards, see files.identity().
    lost: {number: kind} of the shards that are missing and, after index(), of
      those that are damaged.
    faults: after index(), {kind: (how many examples are left out, a name)}.

  Raises:
    UserError: all shards are missing.
  """

  def __init__(self, paths: Sequence[str], what: str):
    self.paths = paths
    self.what = what
    self.files = files.Files(paths)
    self.stamps = files.stamps(paths)
    gone = [p for p, stamp in zip(paths, self.stamps) if stamp is None]
    if len(gone) == len(paths):
      raise errors.UserError(
        f"none of {len(paths)} {what} is there, such as {gone[0]}; check "
        "the path, which is taken from the working directory unless it is "
        "absolute"
      )
    self.identity = files.identity(paths, self.stamps)
    self.lost = {
      n: "vanished shard" for n, stamp in enumerate(self.stamps) if not stamp
    }
    self.faults: Faults = {}

  def parts(self, kind: Kind) -> Iterator[Part]:
    """Yields the indices of all shards that exist, in the order of completion.

    Shards are indexed in random order: processes that start at the same time
    then find each other's index files instead of building the same ones.
    """
    todo = [(n, stamp) for n, stamp in enumerate(self.stamps) if stamp]
    random.Random(uuid.uuid4().int).shuffle(todo)
    with (
      files.pool() as threads,
      tqdm.tqdm(
        total=len(todo), unit="shard", desc=f"indexing {self.what}", delay=2
      ) as bar,
    ):
      waiting: set[concurrent.futures.Future[Part]] = set()
      try:
        while todo or waiting:
          while todo and len(waiting) < 64:  # their results are in memory
            waiting.add(threads.submit(_part, self.files, *todo.pop(), kind))
          done, waiting = concurrent.futures.wait(
            waiting, return_when=concurrent.futures.FIRST_COMPLETED
          )
          for future in done:
            yield future.result()
            bar.update()
      finally:
        for future in waiting:
          future.cancel()

  def column(self, kind: Kind) -> Iterator[np.ndarray]:
    """Yields the rows of each shard, in the order of the shards."""
    parts = {part.number: part.rows for part in self.parts(kind)}
    for n in sorted(parts):
      yield parts.pop(n)

  def index(
    self,
    kind: Kind,
    missing: Callable[["Index"], dict[int, int]] | None = None,
  ) -> "Index":
    """Returns the joined index, and sets `faults` and `lost`.

    Args:
      kind: of the index.
      missing: fn(index) -> {number of a shard: how many examples it lacks}, if
        the format tells; None: this is estimated from the other shards.

    Raises:
      UserError: there is no row at all, or no place to keep an index.
    """
    told = json.dumps([index_files.VERSION, kind.name, self.paths, self.stamps])
    place = index_files.cache_path(told, ".npy")
    found = self._load_joined(place)
    if found is None:
      found = self._join(place, kind)
    rows, starts, wrong, lost = found
    self.lost.update(lost)
    index = Index(rows, starts)
    if missing:
      counts = missing(index)
    else:
      shards = range(len(self.paths))
      counts = _estimated(
        [kind.examples(index.of_shard(n)) for n in shards], self.lost
      )
    self.faults = dict(wrong)
    for n, count in sorted(counts.items()):
      fault = self.lost.get(n, "truncated shard")
      faults.merge(self.faults, {fault: (count, self.paths[n])})
    faults.report(self.what, self.faults)
    if not len(rows):
      raise errors.UserError(
        f"there is no example in {len(self.paths)} {self.what}, such as "
        f"{self.paths[0]}: "
        + (
          ", ".join(f"{n} x {fault}" for fault, (n, _) in self.faults.items())
          or "they are empty"
        )
      )
    return index

  def _load_joined(self, place: pathlib.Path) -> "_Joined | None":
    """Returns what an earlier process has joined, None if it is not valid."""
    try:
      with open(f"{place}.npz", "rb") as f, np.load(f) as head:
        starts, told = head["starts"], json.loads(str(head["faults"]))
      rows = np.load(place, mmap_mode="r")
      wrong = {k: (int(n), str(x)) for k, (n, x) in told["faults"].items()}
      lost = {int(n): str(fault) for n, fault in told["lost"].items()}
      whole = len(rows) == starts[-1] and len(starts) == len(self.paths) + 1
    except Exception:  # zipfile, NumPy and json raise whatever damage leads to
      return None
    return _Joined(rows, starts, wrong, lost) if whole else None

  def _join(self, place: pathlib.Path, kind: Kind) -> "_Joined":
    """Joins the indices of all shards; many rows are written to `place`."""
    counts, wrong, lost = np.zeros(len(self.paths), np.int64), {}, {}
    kept, lasting = {}, True
    for part in self.parts(kind):
      counts[part.number] = len(part.rows)
      lasting = lasting and part.lasting
      faults.merge(wrong, _of_examples(part.faults))
      for fault in part.faults:
        if fault in LOST:
          lost[part.number] = fault
      if counts.sum() <= IN_MEMORY:
        kept[part.number] = part.rows
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] <= IN_MEMORY:
      joined = [kept[n] for n in sorted(kept)]
      return _Joined(np.concatenate(joined), starts, wrong, lost)
    try:
      self._write_joined(place, kind, starts)
      if lasting:  # the rows are only trusted if this file is there
        head: Any = io.BytesIO()
        told = json.dumps({"faults": wrong, "lost": lost})
        np.savez(head, starts=starts, faults=np.array(told))
        local_files.write(pathlib.Path(f"{place}.npz"), head.getvalue())
    except OSError as e:
      raise errors.UserError(
        f"the joined index of {len(self.paths)} {self.what} cannot be "
        f"written to {local_files.cache_dir()}: {e.strerror}; set "
        "SIGJAX_CACHE to a folder with room"
      ) from e
    return _Joined(np.load(place, mmap_mode="r"), starts, wrong, lost)

  def _write_joined(
    self, place: pathlib.Path, kind: Kind, starts: np.ndarray
  ) -> None:
    """Writes the rows of all shards to one .npy file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Not through a mapped file: a full disk would then kill the process.
    with local_files.replacing(place) as aside, open(aside, "wb") as f:
      np.lib.format.write_array_header_2_0(
        f,
        {
          "descr": np.lib.format.dtype_to_descr(kind.dtype),
          "fortran_order": False,
          "shape": (int(starts[-1]),),
        },
      )
      begin = f.tell()
      for n, rows, *_ in self.parts(kind):  # from the index files just written
        if len(rows) != starts[n + 1] - starts[n]:
          raise errors.UserError(
            f"{self.paths[n]} changed while it was indexed; start again"
          )
        f.seek(begin + int(starts[n]) * kind.dtype.itemsize)
        f.write(rows.tobytes())


class _Joined(NamedTuple):
  """The joined rows, where each shard's begin, and what is wrong."""

  rows: np.ndarray
  starts: np.ndarray
  faults: Faults
  lost: dict[int, str]


class Index:
  """The joined index of all shards.

  Args:
    rows: (n,), a row per record.
    starts: (shards + 1,), the first record of each shard, and n.

  Attributes:
    rows: the same.
  """

  def __init__(self, rows: np.ndarray, starts: np.ndarray):
    # A plain array on the mapped file: indexing an np.memmap is slow.
    self.rows = np.asarray(rows)
    self._starts: list[int] = starts.tolist()  # bisect is faster on a list

  def __len__(self) -> int:
    return len(self.rows)

  def locate(self, i: int) -> tuple[int, Any]:
    """Returns the number of record i's shard, and its row as Python ints."""
    if not 0 <= i < len(self.rows):
      raise IndexError(i)
    return bisect.bisect_right(self._starts, i) - 1, self.rows[i].item()

  def first(self, number: int) -> int:
    """Returns the number of a shard's first record."""
    return self._starts[number]

  def of_shard(self, number: int) -> np.ndarray:
    """Returns the rows of a shard."""
    return self.rows[self._starts[number] : self._starts[number + 1]]
