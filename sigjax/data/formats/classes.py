"""A folder with a folder of images for each class, as ImageNet is unpacked."""

import hashlib
import json
import os
import re
from typing import Any

from jaxtyping import Int
import numpy as np

from sigjax import errors
from sigjax.data import source as source_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files

NAMES = "classes.txt"  # beside the folders: lines of a folder and its name


def classes(path: str, labels: str | None = None) -> source_lib.Source:
  """Opens a folder of class folders.

  An example is {"image": bytes, "file": "CLASS/NAME.jpg", "label": int}. The
  classes are numbered in the order of the folders' names; names that are all
  numbers are in the order of these. What the classes are called,
  label_names["label"], are the names of the folders. Where a file classes.txt
  lies beside the folders, it says so: lines of a folder and a name, such as
  "n01440764 tench, Tinca tinca".

  Args:
    path: the folder, on a disk. Files that are no images are passed over.
    labels: a JSON file with a list of class numbers for each image, in the
      order of the images' names, as real.json of ReaL (arXiv 2006.07159). Then
      "label" is that list, which may be empty.

  Raises:
    UserError: there is no such folder, it has no class folders or no images; or
      the file of labels is none, or has not a list for each image.
  """
  path = files.canonical(path).rstrip("/")
  if not os.path.isdir(path):
    raise errors.UserError(f"there is no folder {path}")
  folders = sorted(e.name for e in os.scandir(path) if e.is_dir())
  if all(name.isdecimal() for name in folders):
    folders.sort(key=int)
  found = [
    (f"{folder}/{name}", number)
    for number, folder in enumerate(folders)
    for name in sorted(os.listdir(f"{path}/{folder}"))
    if name.lower().endswith(files.IMAGES)
  ]
  if not found:
    raise errors.UserError(
      f"{path} has {len(folders)} folders, none with an image in it; it has to "
      "hold a folder of images for each class"
    )
  label: list[Any] = [number for _, number in found]
  if labels is not None:
    by_name = sorted(range(len(found)), key=lambda i: _base(found[i][0]))
    for i, numbers in zip(by_name, _labels(labels, len(found)), strict=True):
      label[i] = numbers
  names = _names(path, folders)
  digest = hashlib.sha256(json.dumps([found, label, names]).encode())
  records = _Records(
    path, [name for name, _ in found], label, digest.hexdigest()
  )
  return source_lib.Source(
    source_lib.brief_name("classes", path),
    records,
    label_names={"label": names},
  )


def _base(file: str) -> str:
  return file.rpartition("/")[2]


def _labels(file: str, count: int) -> list[list[int]]:
  """Returns the class numbers of each image, from a JSON file."""
  try:
    found = json.loads(files.read_whole(file))
  except (OSError, ValueError) as e:
    raise errors.UserError(f"{file} cannot be read as JSON: {e}") from e
  if (
    not isinstance(found, list)
    or len(found) != count
    or not all(
      isinstance(x, list) and all(type(n) is int for n in x) for x in found
    )
  ):
    raise errors.UserError(
      f"{file} has to be a list of {count} lists of class numbers, one for "
      "each image"
      + (f"; it has {len(found)}" if isinstance(found, list) else "")
    )
  return found


def _names(path: str, folders: list[str]) -> list[str]:
  """Returns the name of each class."""
  file = f"{path}/{NAMES}"
  if not os.path.exists(file):
    return folders
  text = files.read_whole(file).decode(errors="replace")
  named = dict(
    re.split(r"[\s:]+", line.strip(), maxsplit=1)
    for line in text.splitlines()
    if len(line.split()) > 1
  )
  missing = [folder for folder in folders if folder not in named]
  if missing:
    raise errors.UserError(
      f'{file} has no line "{missing[0]} NAME", though there is that folder'
    )
  return [named[folder] for folder in folders]


class _Records:
  """Random access to the images; `brief` does not read them."""

  def __init__(self, path: str, names: list[str], label: list[Any], identity):
    self._path, self._names, self._label = path, names, label
    self.identity: str = identity

  def __len__(self) -> int:
    return len(self._names)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    return {"file": self._names[i], "label": self._label[i]}

  def __getitem__(self, i: int) -> dict[str, Any]:
    example = self.brief(i)
    place = f"{self._path}/{self._names[i]}"
    try:
      return {**example, "image": files.read_whole(place)}
    except OSError as e:
      raise BadExample(
        f"{place} cannot be read: {e.strerror or e}", kind="missing image"
      ) from e

  def column(self, name: str) -> list[Int[np.ndarray, " n"]] | None:
    """Returns the labels, if they are one for each image."""
    if name == "label" and isinstance(self._label[0], int):
      return [np.array(self._label)]
    return None
