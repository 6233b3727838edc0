"""Index files: arrays that were built from a shard once, and are kept.

The index of a shard lies beside it ("00000.tar.samples.index.npz") or, where
that folder is read-only, in the cache folder. It is valid as long as the
shard's size and mark are unchanged and the file passes its own checksum.
"""

import hashlib
import io
import json
import logging
import pathlib
import re

import numpy as np

from sigjax import errors
from sigjax.data.shards import files
from sigjax.runtime import files as local_files

log = logging.getLogger("sigjax")

VERSION = 2  # of the format of index files
Faults = dict[str, tuple[int, str]]  # {kind: (count, an example's name)}

# Stores in which an index may be written beside a shard. Writing to hf:// makes
# a commit, and writing to https:// sends a PUT to somebody's server.
_STORES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "memory")


def cache_path(text: str, ending: str) -> pathlib.Path:
  """Returns the path in the cache folder of the file that `text` identifies."""
  digest = hashlib.sha256(text.encode()).hexdigest()[:32]
  return local_files.cache_dir() / (digest + ending)


def _write(path: str | pathlib.Path, data: bytes) -> None:
  """Writes a whole file or nothing."""
  if isinstance(path, str) and files.is_remote(path):
    # A bucket shows an object only when it is complete.
    files.file_system(path).pipe_file(path, data)
  else:
    local_files.write(pathlib.Path(path), data)


def save_index(
  path: str, kind: str, stamp: files.Stamp, rows: np.ndarray, faults: Faults
) -> None:
  """Keeps the index of a shard, beside it or else in the cache folder.

  Args:
    path: of the shard.
    kind: the name of this kind of index.
    stamp: of the shard when it was read, see files.stamps().
    rows: the index.
    faults: what is wrong with the shard.

  Raises:
    UserError: neither place can be written to.
  """
  packed = io.BytesIO()
  meta = {"of": [VERSION, kind, *stamp], "faults": faults}
  np.savez(packed, rows=rows, meta=np.array(json.dumps(meta)))
  beside = _beside(path, kind)
  if beside:
    try:
      return _write(beside, packed.getvalue())
    except Exception:
      pass  # the folder is read-only; each store has its own error for that
  try:
    local_files.cache_dir().mkdir(parents=True, exist_ok=True)
    return _write(_in_cache(path, kind), packed.getvalue())
  except OSError as e:
    raise errors.UserError(
      f"the index of {path} can be kept neither beside it nor in "
      f"{local_files.cache_dir()} ({e.strerror}); set SIGJAX_CACHE to a folder "
      "that can be written"
    ) from e


def _beside(path: str, kind: str) -> str | None:
  """Returns the index's path beside a shard, None where that is not allowed."""
  if files.is_remote(path) and path.split("://")[0] not in _STORES:
    return None
  return f"{path}.{re.sub('[^a-zA-Z0-9_-]', '-', kind)}{files.INDEX_ENDING}"


def _in_cache(path: str, kind: str) -> pathlib.Path:
  return cache_path(f"{path} {kind}", ".npz")


def load_index(
  path: str, kind: str, stamp: files.Stamp
) -> tuple[np.ndarray, Faults] | None:
  """Returns the rows and faults of a shard's index, None if none is valid."""
  for place in (_beside(path, kind), str(_in_cache(path, kind))):
    if place is None:
      continue
    try:
      data = files.read_whole(place)
    except Exception:
      continue  # it does not exist; each store has its own error for that
    try:
      with np.load(io.BytesIO(data)) as index:
        rows, meta = index["rows"], json.loads(str(index["meta"]))
      faults = {k: (int(n), str(x)) for k, (n, x) in meta["faults"].items()}
      valid = meta["of"] == [VERSION, kind, *stamp]
    except Exception:
      # zipfile, NumPy and json raise whatever the damage leads to.
      log.warning("the index %s is damaged; it is built anew", place)
      continue
    if valid:
      return rows, faults
  return None
