"""A list of a folder's files with their sizes and SHA-256, to notice damage."""

import hashlib
import json
import os

NAME = "manifest.json"

# Orbax writes these after us. They hold no data, and nothing depends on them.
_OTHERS = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder):
  """Writes FOLDER/manifest.json, and sees to it that all files are on disk.

  Args:
    folder: a pathlib.Path, whose files nothing changes any more.
  """
  files = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name not in _OTHERS:
      with path.open("rb") as f:
        files[name] = [_digest(f), os.fstat(f.fileno()).st_size]
        # A power cut must not find the one before deleted, this one unwritten.
        os.fsync(f.fileno())
  with (folder / NAME).open("w") as f:
    json.dump({"sha256_and_size": files}, f, indent=1)
    f.flush()
    os.fsync(f.fileno())


def fault(folder, part=0, parts=1):
  """Returns what is wrong with a folder that has a manifest, or "".

  Args:
    folder: a pathlib.Path.
    part, parts: only every parts-th file is read, beginning with this one.

  Returns:
    A few words that name the first file that is missing, cut or altered.
  """
  try:
    files = json.loads((folder / NAME).read_text())["sha256_and_size"]
    items = [(name, *of_file) for name, of_file in sorted(files.items())]
    items = [(name, digest, size) for name, digest, size in items]
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


def _digest(file):
  return hashlib.file_digest(file, "sha256").hexdigest()
