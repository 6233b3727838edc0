"""Files of arrays that are built from shards once, and kept.

What is made of a shard is kept beside it ("00000.tar.samples.index.npz") or, if
that is read-only, in $SIGJAX_CACHE or ~/.cache/sigjax. It counts as long as the
shard's size and mark are the same and it passes its own checksum. Every file is
written aside and renamed: what a killed process leaves is never trusted.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import uuid

import numpy as np

from sigjax import errors
from sigjax.data.shards import files

log = logging.getLogger("sigjax")

VERSION = 1  # of what is in the files
# Stores in which an index may be put beside a shard. Not the others: a "write"
# to hf:// is a commit, and one to https:// a PUT to somebody's server.
_STORES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "memory")


def cache_dir():
  """Returns $SIGJAX_CACHE, or else a folder of the user's."""
  default = os.path.join(os.path.expanduser("~"), ".cache", "sigjax")
  return os.environ.get("SIGJAX_CACHE") or default


def cached(text, ending):
  """The name in the cache of what is told by a text."""
  digest = hashlib.sha256(text.encode()).hexdigest()[:32]
  return os.path.join(cache_dir(), digest + ending)


@contextlib.contextmanager
def aside(path):
  """Gives a name to write to, which becomes `path` if all goes well."""
  other = f"{path}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
  try:
    yield other
    os.replace(other, path)
  finally:
    if os.path.exists(other):
      os.remove(other)


def write(path, data):
  """Writes a whole file or none."""
  if files.is_remote(path):
    # A bucket shows an object when all of it is there.
    files.file_system(path).pipe_file(path, data)
    return
  with aside(path) as other, open(other, "wb") as f:
    f.write(data)


def save(path, kind, stamp, rows, faults):
  """Keeps what was made of a shard.

  Args:
    path: the shard's.
    kind: names what was made.
    stamp: the shard's size and mark when it was read; see files.stamps.
    rows: an array.
    faults: {kind: (count, the name of one)}.

  Raises:
    UserError: it can be written in neither place.
  """
  packed = io.BytesIO()
  meta = {"of": [VERSION, kind, *stamp], "faults": faults}
  np.savez(packed, rows=rows, meta=np.array(json.dumps(meta)))
  place = _beside(path, kind)
  if place:
    try:
      return write(place, packed.getvalue())
    except Exception:  # pylint: disable=broad-except
      pass  # read-only: stores have errors of their own, so any counts
  try:
    os.makedirs(cache_dir(), exist_ok=True)
    return write(_in_cache(path, kind), packed.getvalue())
  except OSError as e:
    raise errors.UserError(
      f"the index of {path} can be kept neither beside it nor in "
      f"{cache_dir()} ({e.strerror}); set SIGJAX_CACHE to a folder that can "
      "be written"
    ) from e


def _beside(path, kind):
  """The name beside a shard, None if nothing may be written there."""
  if files.is_remote(path) and path.split("://")[0] not in _STORES:
    return None
  return f"{path}.{re.sub('[^a-zA-Z0-9_-]', '-', kind)}{files.INDEX_ENDING}"


def _in_cache(path, kind):
  return cached(f"{path} {kind}", ".npz")


def load(path, kind, stamp):
  """Returns (rows, faults) as they were saved, None if they do not count."""
  for place in filter(None, (_beside(path, kind), _in_cache(path, kind))):
    try:
      if files.is_remote(place):
        data = files.file_system(place).cat_file(place)
      else:
        with open(place, "rb") as f:
          data = f.read()
    except Exception:  # pylint: disable=broad-except
      continue  # not there; stores have errors of their own
    try:
      with np.load(io.BytesIO(data)) as index:
        rows, meta = index["rows"], json.loads(str(index["meta"]))
    except Exception:  # pylint: disable=broad-except
      # Of zipfile, numpy and json, whatever the damage is.
      log.warning("the index %s is damaged; it is built anew", place)
      continue
    if meta["of"] == [VERSION, kind, *stamp]:
      return rows, {k: tuple(v) for k, v in meta["faults"].items()}
  return None
