"""A list of a folder's files with their sizes and SHA-256, to notice damage."""

import hashlib
import io
import json
import os
import pathlib

NAME = "manifest.json"

# Orbax writes these after the manifest. They hold no data that is needed.
_NOT_LISTED = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: pathlib.Path) -> None:
  """Writes FOLDER/manifest.json after forcing all listed files to disk.

  Args:
    folder: a folder whose files do not change any more.
  """
  listed = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name not in _NOT_LISTED:
      with path.open("rb") as f:
        listed[name] = [_digest(f), os.fstat(f.fileno()).st_size]
        # Older checkpoints are deleted once this one is complete: after a power
        # cut its files must not turn out to be empty.
        os.fsync(f.fileno())
  with (folder / NAME).open("w") as f:
    json.dump({"sha256_and_size": listed}, f, indent=1)
    f.flush()
    os.fsync(f.fileno())


def fault(
  folder: pathlib.Path, part: int = 0, parts: int = 1, within: str = ""
) -> str:
  """Returns what is wrong with a folder that has a manifest, or "".

  Args:
    folder: a folder for which write() was called.
    part: the number of the host, from 0, which checks only its share:
    parts: every parts-th file of the list, beginning with file number `part`.
    within: only names that begin so are checked, such as "about/".

  Returns:
    A few words that name the first file that is missing, cut or altered.
  """
  try:
    listed = json.loads((folder / NAME).read_text())["sha256_and_size"]
    items = [(name, *of_file) for name, of_file in sorted(listed.items())]
    items = [
      (name, digest, size)
      for name, digest, size in items
      if name.startswith(within)
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f"{NAME} cannot be read"
  for name, digest, size in items[part::parts]:
    try:
      with (folder / name).open("rb") as f:
        found = os.fstat(f.fileno()).st_size
        if found != size:
          return f"{name} has {found} bytes, not {size}"
        if _digest(f) != digest:
          return f"{name} was altered"
    except OSError as e:
      return f"{name}: {e.strerror}"
  return ""


def _digest(file: io.BufferedReader) -> str:
  return hashlib.file_digest(file, "sha256").hexdigest()
