"""Files that are written whole or not at all, and the cache folder."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
from typing import TypeVar
import uuid

from etils import epath

AnyPath = TypeVar("AnyPath", pathlib.Path, epath.Path)


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
    if aside.is_dir():
      shutil.rmtree(aside, ignore_errors=True)
    else:
      aside.unlink(missing_ok=True)
    raise


def write(path: pathlib.Path | epath.Path, data: bytes | str) -> None:
  """Writes a file, all of it or nothing; str is written as UTF-8."""
  with replacing(path) as aside:
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
