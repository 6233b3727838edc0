"""A list of a folder's files with their sizes and SHA-256, to notice damage."""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import hashlib
import json
import os
from typing import Any

from sigjax import errors
from sigjax.runtime import files

NAME = "manifest.json"

# Orbax writes these after the manifest. They hold no data that is needed.
_NOT_LISTED = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")


# Objects of a bucket that are read at a time; each is in memory as a whole.
_AT_A_TIME = 4


def write(folder: files.Path) -> None:
  """Writes FOLDER/manifest.json after forcing all listed files to disk.

  From a bucket, what was written is read back for it.

  Args:
    folder: a folder whose files do not change any more.
  """

  def digest_and_size(name: str) -> list[Any]:
    with (folder / name).open("rb") as f:
      found = [_digest(f), _size(f)]
      # Older checkpoints are deleted once this one is complete: after a power
      # cut its files must not turn out to be empty.
      _to_disk(folder, f)
    return found

  names = [name for name in _below(folder) if name not in _NOT_LISTED]
  with _map(folder) as each:
    listed = dict(zip(names, each(digest_and_size, names)))
  with (folder / NAME).open("w") as f:
    json.dump({"sha256_and_size": listed}, f, indent=1)
    f.flush()
    _to_disk(folder, f)


def fault(
  folder: files.Path, part: int = 0, parts: int = 1, within: str = ""
) -> str:
  """Returns what is wrong with a folder that has a manifest, or "".

  Args:
    folder: a folder for which write() was called.
    part: the number of the host, from 0, which checks only its share:
    parts: every parts-th file of the list, beginning with file number `part`.
    within: only names that begin so are checked, such as "about/".

  Returns:
    A few words that name the first file that is missing, cut or altered.

  Raises:
    BucketError: the bucket does not answer, which is no damage.
  """

  def check(item: tuple[str, str, int]) -> str:
    name, digest, size = item
    try:
      with (folder / name).open("rb") as f:
        if (found := _size(f)) != size:
          return f"{name} has {found} bytes, not {size}"
        return f"{name} was altered" if _digest(f) != digest else ""
    except errors.UserError:
      raise
    except OSError as e:
      return f"{name}: {e.strerror}"

  try:
    listed = json.loads((folder / NAME).read_text())["sha256_and_size"]
    items = [(name, *of_file) for name, of_file in sorted(listed.items())]
    items = [
      (name, digest, size)
      for name, digest, size in items
      if name.startswith(within)
    ]
  except errors.UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f"{NAME} cannot be read"
  with _map(folder) as each:
    return next(filter(None, each(check, items[part::parts])), "")


def _below(folder: files.Path) -> list[str]:
  """Returns the names of all files below a folder, in order."""
  if files.in_bucket(folder):
    return folder.below()
  paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  return [path.relative_to(folder).as_posix() for path in paths]


@contextlib.contextmanager
def _map(folder: files.Path) -> Iterator[Callable[..., Iterable[Any]]]:
  """Yields map(); of a bucket one that does several things at a time."""
  if files.in_bucket(folder):
    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as threads:
      yield threads.map
  else:
    yield map


def _to_disk(folder: files.Path, file: Any) -> None:
  if not files.in_bucket(folder):
    os.fsync(file.fileno())


def _size(file: Any) -> int:
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  return size


def _digest(file: Any) -> str:
  return hashlib.file_digest(file, "sha256").hexdigest()
