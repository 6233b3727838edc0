"""Files on disk or in a bucket: patterns, sizes and byte ranges.

A path that contains "://" is read through fsspec: gs://, s3://, https://, ...
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import glob
import hashlib
import json
import os
import re
import threading
import time
from typing import Any

from sigjax import errors
from sigjax.data.faults import BadExample

# Endings of files that are taken for images, in lower case.
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
INDEX_ENDING = ".index.npz"  # of the index files that index_files.py writes
Stamp = tuple[int, str]  # size in bytes, and a mark that changes with the file

_DRIVERS = {
  "gs": "gcsfs",
  "gcs": "gcsfs",
  "s3": "s3fs",
  "s3a": "s3fs",
  "http": "aiohttp",
  "https": "aiohttp",
  "hf": "huggingface_hub",
  "az": "adlfs",
  "abfs": "adlfs",
}
_MAX_GAP = 64 * 1024  # bytes; a second request costs more than reading these
_ATTEMPTS = 3  # of a remote read


def is_remote(path: str) -> bool:
  """Returns whether a path is read through fsspec."""
  return "://" in path


def file_system(path: str) -> Any:
  """Returns the fsspec file system of a remote path.

  Raises:
    UserError: the package for this scheme is not installed, or fsspec does not
      know the scheme.
  """
  scheme = path.split("://")[0]
  try:
    import fsspec

    return fsspec.core.url_to_fs(path)[0]
  except ImportError as e:
    driver = _DRIVERS.get(scheme, "")
    raise errors.UserError(
      f"{path} is read through fsspec, and a package that fsspec needs for "
      f"{scheme}:// is not installed; pip install fsspec {driver}"
    ) from e
  except ValueError as e:
    raise errors.UserError(
      f"{path}: {scheme}:// is not known to fsspec; "
      f"known are {', '.join(_DRIVERS)}, ..."
    ) from e


@contextlib.contextmanager
def _remote_errors(path: str) -> Iterator[None]:
  """Turns any error of a store into a UserError; each store has its own."""
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as e:
    raise errors.UserError(
      f"{path} cannot be listed: {str(e) or type(e).__name__}; check the "
      "path and your credentials"
    ) from e


def canonical(path: str) -> str:
  """Returns an absolute path, or a URL as fsspec's listings write it."""
  if not is_remote(path):
    return os.path.abspath(path)
  import fsspec

  system = file_system(path)
  return system.unstrip_protocol(fsspec.core.url_to_fs(path)[1])


def read_whole(path: str) -> bytes:
  """Returns the content of a file, local or remote."""
  if is_remote(path):
    return file_system(path).cat_file(path)
  with open(path, "rb") as f:
    return f.read()


def braces(pattern: str) -> list[str]:
  """Expands {a,b} and {000..123} in a pattern, as bash does."""
  for found in re.finditer(r"\{([^{}]*)\}", pattern):
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
      first, last = int(ends[1]), int(ends[2])
      width = len(ends[1]) if ends[1][0] == "0" else 0
      step = 1 if last >= first else -1
      options = [f"{i:0{width}d}" for i in range(first, last + step, step)]
    elif "," in found[1]:
      options = found[1].split(",")
    else:
      continue
    head, tail = pattern[: found.start()], pattern[found.end() :]
    # The regex finds inner lists first, so one name may be found twice.
    return list(
      dict.fromkeys(name for o in options for name in braces(head + o + tail))
    )
  return [pattern]


def expand(patterns: str | Sequence[str], what: str) -> list[str]:
  """Returns the paths that match one pattern or several.

  Args:
    patterns: paths with globs (*, ?, [ab]) and brace lists ({00000..00099},
      {a,b}). Matches of a glob are sorted. A path from a brace list is returned
      even if the file is missing.
    what: names the files in messages, such as "tar shards".

  Raises:
    UserError: nothing matches, or the package for a bucket is not installed.
  """
  patterns = [patterns] if isinstance(patterns, str) else list(patterns)
  paths = []
  for name in (n for pattern in patterns for n in braces(pattern)):
    name = name.removeprefix("file://")
    if not re.search(r"[*?[]", name):
      paths.append(canonical(name))
    elif is_remote(name):
      system = file_system(name)
      with _remote_errors(name):
        paths += sorted(map(system.unstrip_protocol, system.glob(name)))
    else:
      paths += sorted(map(os.path.abspath, glob.glob(name, recursive=True)))
  paths = [p for p in dict.fromkeys(paths) if not p.endswith(INDEX_ENDING)]
  if not paths:
    raise errors.UserError(
      f"no {what} at {', '.join(patterns)}; check the path, which is taken "
      "from the working directory unless it is absolute"
    )
  return paths


def pool() -> concurrent.futures.ThreadPoolExecutor:
  """Returns an executor for tasks that mostly wait for files."""
  return concurrent.futures.ThreadPoolExecutor(
    min(32, 4 * (os.cpu_count() or 1))
  )


def _mark(info: dict[str, Any]) -> str:
  """Returns the hash or the time of change that a store reports, or ""."""
  keys = (
    "etag",
    "ETag",
    "md5Hash",
    "mtime",
    "updated",
    "LastModified",
    "last_modified",
    "created",
  )
  return next((str(info[key]) for key in keys if info.get(key)), "")


def stamps(paths: Sequence[str]) -> list[Stamp | None]:
  """Returns the size and mark of each file, None for a missing file.

  The mark is the time of change, or the hash in a bucket. A file with an
  unchanged size and mark is taken to be unchanged. In buckets whole folders are
  listed: thousands of shards would take thousands of requests.

  Args:
    paths: as expand() returns them.

  Raises:
    UserError: a bucket cannot be listed.
  """
  known: dict[str, dict[str, Any]] = {}
  web: Any = None
  for folder in {p.rsplit("/", 1)[0] for p in paths if is_remote(p)}:
    system = file_system(folder)
    if folder.startswith("http"):
      web = system
      continue
    with _remote_errors(folder), contextlib.suppress(FileNotFoundError):
      known.update(
        {
          system.unstrip_protocol(info["name"]): info
          for info in system.ls(folder, detail=True)
        }
      )

  def stamp(path: str) -> Stamp | None:
    try:
      if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, str(stat.st_mtime_ns)
      info = web.info(path) if path.startswith("http") else known[path]
      return int(info["size"]), _mark(info)
    except (OSError, KeyError):
      return None

  with pool() as threads:
    return list(threads.map(stamp, paths))


def identity(paths: Sequence[str], stamps: Sequence[Stamp | None]) -> str:
  """Returns a digest of the names and sizes of files.

  The names are relative to the deepest common folder of all files, so moving a
  dataset does not change its identity.
  """
  split = [path.split("/") for path in paths]
  first, last = min(split), max(split)
  common = 0
  while common < min(len(first), len(last)) - 1 and (
    first[common] == last[common]
  ):
    common += 1
  told = [
    ["/".join(parts[common:]), stamp and stamp[0]]
    for parts, stamp in zip(split, stamps)
  ]
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Descriptor:
  """An open file descriptor, closed when its last reference is dropped."""

  def __init__(self, path: str):
    self.fd = os.open(path, os.O_RDONLY)

  def __del__(self, close: Callable[[int], None] = os.close):
    # A default, because at exit the module is emptied before this runs.
    if hasattr(self, "fd"):
      close(self.fd)


class Files:
  """Reads byte ranges of many files, from many threads.

  Args:
    paths: as expand() returns them.
    limit: how many local files are open at a time; the least recently used
      ones are closed.

  Attributes:
    paths: the same.
  """

  def __init__(self, paths: Sequence[str], limit: int = 256):
    self.paths = paths
    self._limit = limit
    self._open: collections.OrderedDict[int, _Descriptor] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()
    self._systems: dict[str, Any] = {}
    for path in filter(is_remote, paths):
      scheme = path.split("://")[0]
      if scheme not in self._systems:
        self._systems[scheme] = file_system(path)

  def _descriptor(self, number: int) -> _Descriptor:
    with self._lock:
      found = self._open.get(number)
      if found is not None:
        self._open.move_to_end(number)
        return found
    found = _Descriptor(self.paths[number])
    with self._lock:
      self._open[number] = found
      dropped = [
        self._open.popitem(last=False)[1]
        for _ in range(len(self._open) - self._limit)
      ]
    # Closed here, or by the last thread that is still reading from it.
    del dropped
    return found

  def _read_remote(self, path: str, start: int, size: int) -> bytes:
    system = self._systems[path.split("://")[0]]
    for attempt in range(_ATTEMPTS):
      try:
        return system.cat_file(path, start=start, end=start + size)
      except FileNotFoundError:
        raise
      except Exception:
        # Each store has its own errors; any of them may be a network error.
        if attempt == _ATTEMPTS - 1:
          raise
        time.sleep(2**attempt)
    raise AssertionError("unreachable")

  def read(self, number: int, start: int, size: int) -> bytes:
    """Returns `size` bytes of file `number`, from byte `start` on.

    Raises:
      BadExample: the file is missing, cannot be read or is too short.
    """
    path = self.paths[number]
    try:
      if is_remote(path):
        data = self._read_remote(path, start, size) if size else b""
      else:
        # The reference keeps other threads from closing the descriptor.
        held = self._descriptor(number)
        data = os.pread(held.fd, size, start)
    except Exception as e:
      raise BadExample(
        f"{path} cannot be read: {e}", kind="unreadable shard"
      ) from e
    if len(data) != size:
      reason = (
        f"ends before byte {start + size}"
        if len(data) < size
        else "is on a server that sends whole files, not ranges of bytes"
      )
      raise BadExample(f"{path} {reason}", kind="unreadable shard")
    return data

  def spans(
    self, number: int, spans: Sequence[tuple[int, int]]
  ) -> Sequence[bytes]:
    """Returns the bytes of several (start, size), in one read if they are near.

    Raises:
      BadExample: see read().
    """
    first = min(start for start, _ in spans)
    extent = max(start + size for start, size in spans) - first
    if len(spans) > 1 and extent - sum(s for _, s in spans) > _MAX_GAP:
      return [self.read(number, start, size) for start, size in spans]
    data = self.read(number, first, extent)
    return [data[start - first : start - first + size] for start, size in spans]


class Window:
  """Reads one file forwards, a block at a time.

  Many small reads would be slow. Blocks that are not asked for, such as the
  data of large members, are never read.

  Args:
    files: reads the file.
    number: of the file in `files`.
    size: of the file, in bytes.

  Attributes:
    size: the same.
  """

  def __init__(self, files: Files, number: int, size: int):
    self.size = size
    self._read: Callable[[int, int], bytes] = lambda start, n: files.read(
      number, start, n
    )
    self._block = 8 << 20 if is_remote(files.paths[number]) else 256 << 10
    self._start, self._data = 0, b""

  def __call__(self, start: int, n: int) -> bytes:
    """Returns n bytes from `start`, or fewer at the end of the file."""
    n = max(0, min(n, self.size - start))
    at = start - self._start
    if n and (at < 0 or at + n > len(self._data)):
      self._start, at = start, 0
      self._data = self._read(
        start, min(max(n, self._block), self.size - start)
      )
    return self._data[at : at + n] if n else b""
