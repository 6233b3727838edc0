"""Files here or in a bucket: lists of them, what they are now, byte ranges.

A path with "://" in it is read through fsspec: gs://, s3://, https://, ...
"""

import collections
import concurrent.futures
import contextlib
import glob
import os
import re
import threading
import time

from sigjax import errors
from sigjax.data.faults import BadExample

INDEX_ENDING = ".index.npz"  # what shards.py keeps beside a file
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
_MAX_GAP = 64 * 1024  # bytes read for nothing rather than in a second read
_ATTEMPTS = 3  # of a remote read


def is_remote(path):
  return "://" in path


def file_system(path):
  """Returns the fsspec file system of a remote path.

  Raises:
    UserError: the package that it needs is not installed, or there is none.
  """
  scheme = path.split("://")[0]
  try:
    import fsspec  # pylint: disable=import-outside-toplevel

    return fsspec.core.url_to_fs(path)[0]
  except ImportError as e:
    driver = _DRIVERS.get(scheme, "")
    raise errors.UserError(
      f"{path} is read through fsspec, and something that it needs for "
      f"{scheme}:// is not installed; pip install fsspec {driver}"
    ) from e
  except ValueError as e:
    raise errors.UserError(
      f"{path}: {scheme}:// is not known to fsspec; "
      f"known are {', '.join(_DRIVERS)}, ..."
    ) from e


@contextlib.contextmanager
def _remote_errors(path):
  """Makes one line of what a store answers; each has errors of its own."""
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as e:  # pylint: disable=broad-except
    raise errors.UserError(
      f"{path} cannot be listed: {str(e) or type(e).__name__}; check the "
      "path and your credentials"
    ) from e


def canonical(path):
  """Returns a path as listings have it: absolute, or with a plain scheme."""
  if not is_remote(path):
    return os.path.abspath(path)
  import fsspec  # pylint: disable=import-outside-toplevel

  system = file_system(path)
  return system.unstrip_protocol(fsspec.core.url_to_fs(path)[1])


def braces(pattern):
  """Returns what {a,b} and {000..123} in a pattern stand for, as in bash."""
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
    # An inner list is resolved first, so that the outer one may repeat.
    return list(
      dict.fromkeys(name for o in options for name in braces(head + o + tail))
    )
  return [pattern]


def expand(patterns, what):
  """Returns the paths that a pattern, or several, stand for.

  Args:
    patterns: str or a list of them: paths with globs (*, ?, [ab]) and brace
      lists ({00000..00099}, {a,b}). What a glob finds is sorted; what a brace
      list names is kept, though it may not be there.
    what: "tar shards" and the like, for messages.

  Raises:
    UserError: nothing is there, or a bucket's package is not installed.
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


def pool():
  """Returns an executor for work that mostly waits for files."""
  return concurrent.futures.ThreadPoolExecutor(
    min(32, 4 * (os.cpu_count() or 1))
  )


def _mark(info):
  """What changes when a remote file does, as far as its store tells."""
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


def stamps(paths):
  """Returns (size in bytes, mark) of each path, None where there is none.

  A file of the same size and mark (its time of change, or its hash in a
  bucket) is taken for the same file. A bucket's folders are listed whole, so
  that thousands of shards do not take thousands of requests.

  Args:
    paths: as expand() returns them.

  Raises:
    UserError: a bucket cannot be listed.
  """
  known, web = {}, None
  for folder in {p.rsplit("/", 1)[0] for p in paths if is_remote(p)}:
    system = file_system(folder)
    if folder.startswith("http"):
      web = system
      continue
    with _remote_errors(folder):
      try:
        known.update(
          {
            system.unstrip_protocol(info["name"]): info
            for info in system.ls(folder, detail=True)
          }
        )
      except FileNotFoundError:
        pass

  def stamp(path):
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


class _Open:
  """An open descriptor, closed when the last who holds this lets go."""

  def __init__(self, path):
    self.fd = os.open(path, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, "fd"):
      os.close(self.fd)


class Files:
  """Byte ranges of many files, for many threads.

  At most `limit` local files are open at a time, those last used.
  """

  def __init__(self, paths, limit=256):
    self.paths = paths
    self._limit = limit
    self._open = collections.OrderedDict()
    self._lock = threading.Lock()
    self._systems = {}
    for path in filter(is_remote, paths):
      scheme = path.split("://")[0]
      if scheme not in self._systems:
        self._systems[scheme] = file_system(path)

  def _descriptor(self, number):
    with self._lock:
      found = self._open.get(number)
      if found is not None:
        self._open.move_to_end(number)
        return found
    found = _Open(self.paths[number])
    with self._lock:
      self._open[number] = found
      dropped = [
        self._open.popitem(last=False)[1]
        for _ in range(len(self._open) - self._limit)
      ]
    del dropped  # closed here, or by a thread that still reads it
    return found

  def _read_remote(self, path, start, size):
    system = self._systems[path.split("://")[0]]
    for attempt in range(_ATTEMPTS):
      try:
        return system.cat_file(path, start=start, end=start + size)
      except FileNotFoundError:
        raise
      except Exception:  # pylint: disable=broad-except
        # Each store has errors of its own; any may be the network's.
        if attempt == _ATTEMPTS - 1:
          raise
        time.sleep(2**attempt)

  def read(self, number, start, size):
    """Returns `size` bytes of file `number` from `start`.

    Raises:
      BadExample: it is not there or cannot be read, or is shorter than that.
    """
    path = self.paths[number]
    try:
      if is_remote(path):
        data = self._read_remote(path, start, size) if size else b""
      else:
        held = self._descriptor(number)  # else it may be closed meanwhile
        data = os.pread(held.fd, size, start)
    except Exception as e:  # pylint: disable=broad-except
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

  def spans(self, number, spans):
    """Returns the bytes of several (start, size), in one read if they are near.

    Raises:
      BadExample: as read().
    """
    first = min(start for start, _ in spans)
    extent = max(start + size for start, size in spans) - first
    if len(spans) > 1 and extent - sum(s for _, s in spans) > _MAX_GAP:
      return [self.read(number, start, size) for start, size in spans]
    data = self.read(number, first, extent)
    return [data[start - first : start - first + size] for start, size in spans]


class Window:
  """One file read forwards, in blocks: many small reads are slow.

  What lies beyond a block's end is not read before it is asked for, so that
  large members are passed over.
  """

  def __init__(self, files, number, size):
    self.size = size
    self._read = lambda start, n: files.read(number, start, n)
    self._block = 8 << 20 if is_remote(files.paths[number]) else 256 << 10
    self._start, self._data = 0, b""

  def __call__(self, start, n):
    """Returns n bytes from `start`, or fewer if the file ends before."""
    n = max(0, min(n, self.size - start))
    at = start - self._start
    if n and (at < 0 or at + n > len(self._data)):
      self._start, at = start, 0
      self._data = self._read(
        start, min(max(n, self._block), self.size - start)
      )
    return self._data[at : at + n] if n else b""
