"""Files that are written whole or not at all, here or in a bucket."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast
import uuid

from etils import epath

if TYPE_CHECKING:
  from sigjax.runtime import bucket

Path = pathlib.Path | epath.Path  # on a disk, or in a bucket
AnyPath = TypeVar("AnyPath", pathlib.Path, epath.Path)


def path(name: str | os.PathLike[str]) -> Path:
  """Returns a path: of gs:// and s3:// a bucket.Path, else a pathlib.Path."""
  if re.match("(gs|s3)://", os.fspath(name)):
    from sigjax.runtime import bucket  # most runs are on a disk

    return bucket.Path(name)
  return pathlib.Path(name)


def in_bucket(path: Path) -> "TypeGuard[bucket.Path]":
  """Returns whether what path() returned is in a bucket, not on a disk."""
  return not isinstance(path, pathlib.Path) and "://" in str(path)


def cache_dir() -> pathlib.Path:
  """Returns $SIGJAX_CACHE, or ~/.cache/sigjax. It need not exist."""
  named = os.environ.get("SIGJAX_CACHE")
  return pathlib.Path(named or "~/.cache/sigjax").expanduser()


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[AnyPath]:
  """Yields a temporary path beside `path`, which replaces it at the end.

  The body writes a file or makes a folder there. If the body raises, whatever
  is there is deleted and `path` stays as it was. A killed process leaves the
  temporary path behind, but never half of `path`.

  Args:
    path: a file, or a folder that does not exist yet.
  """
  aside = path.parent / f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
  try:
    yield aside
    aside.replace(path)
  except BaseException:
    remove(aside)
    raise


def write(path: Path, data: bytes | str) -> None:
  """Writes a file, all of it or nothing; str is written as UTF-8."""
  data = data.encode() if isinstance(data, str) else data
  if in_bucket(path):  # as an object is written
    path.write_bytes(data)
    return
  with replacing(cast(pathlib.Path, path)) as aside:
    aside.write_bytes(data)


def remove(path: Path) -> None:
  """Deletes a file or a folder with all that is in it, if it is there.

  What cannot be deleted from a folder is left.
  """
  if not isinstance(path, pathlib.Path):  # perhaps a remote one
    if path.is_dir():
      path.rmtree()
    else:
      path.unlink(missing_ok=True)
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
