"""A folder of images with a table of captions, CSV or JSONL."""

from collections.abc import Sequence
import csv
import io
import json
import os
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_FILE = ("file", "file_name", "image")  # accepted names of the two columns
_CAPTION = ("caption", "captions", "text")


def _find(path: str) -> set[str]:
  """Returns the paths of all files in a folder, relative to it."""
  if files.is_remote(path):
    system = files.file_system(path)
    return {
      system.unstrip_protocol(name).removeprefix(f"{path}/")
      for name in system.find(path)
    }
  return {
    os.path.relpath(os.path.join(place, name), path)
    for place, _, names in os.walk(path)
    for name in names
  }


def _table(path: str, captions: str | None) -> tuple[list[dict[str, Any]], str]:
  """Returns the rows of the table, and its path."""
  names = [captions] if captions else TABLES
  for name in names:
    place = f"{path}/{name}"
    try:
      text = files.read_whole(place).decode("utf-8-sig")
    except FileNotFoundError:
      continue
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f"{place} is not UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8"
      ) from e
    if not name.endswith((".csv", ".jsonl")):
      raise errors.UserError(
        f"{place} is neither .csv nor .jsonl, the two kinds of tables that "
        "are read"
      )
    if name.endswith(".csv"):
      return list(csv.DictReader(io.StringIO(text, newline=""))), place
    return [
      _json(line, f"{place}, line {n}")
      for n, line in enumerate(text.split("\n"), 1)
      if line.strip()
    ], place
  raise errors.UserError(
    f"there is no table of captions in {path}, looked for "
    f"{', '.join(names)}; make one with the columns file and caption, or "
    "name it: captions="
  )


def _json(line: str, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f"{where} does not parse: {e}") from e
  if not isinstance(row, dict):
    raise errors.UserError(
      f'{where} has to be an object: {{"file": ..., "caption": ...}}'
    )
  return row


def _column(row: dict[str, Any], names: Sequence[str], place: str) -> str:
  """Returns the first of `names` that is a column of the table."""
  found = next((name for name in names if name in row), None)
  if found is None:
    raise errors.UserError(
      f"{place} has no column {' or '.join(names)}; it has: "
      f"{', '.join(map(str, row))}"
    )
  return found


def _numbers(values: list[Any]) -> list[float | str | None]:
  """Converts a column of a CSV to numbers if all are; empty becomes None."""
  try:
    return [float(v) if v else None for v in values]
  except (ValueError, TypeError):
    return [v or None for v in values]


class FolderRecords:
  """Random access to the images of a folder; see folder()."""

  def __init__(
    self,
    path: str,
    names: list[str],
    captions: list[list[str]],
    columns: dict[str, list[Any]],
  ):
    self._path = path
    self._names, self._captions, self._columns = names, captions, columns

  def __len__(self) -> int:
    return len(self._names)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image, which is not read."""
    return {
      "file": self._names[i],
      "captions": list(map(captions_lib.caption, self._captions[i])),
      **{key: values[i] for key, values in self._columns.items()},
    }

  def __getitem__(self, i: int) -> dict[str, Any]:
    example = self.brief(i)
    place = f"{self._path}/{self._names[i]}"
    try:
      example["image"] = files.read_whole(place)
    except Exception as e:  # each store has its own errors
      raise BadExample(
        f"{place} cannot be read: {e}", kind="missing image"
      ) from e
    return example

  def column(self, name: str) -> list[np.ndarray] | None:
    """Returns [all values of a column], or None if there is no such column."""
    if name not in self._columns and name != "file":
      return None
    values = self._names if name == "file" else self._columns[name]
    return [source_lib.as_column(values, name, self._path)]


def _collect(
  rows: list[dict[str, Any]],
  place: str,
  present: set[str],
  wrong: dict[str, tuple[int, str]],
) -> tuple[list[str], list[list[str]], dict[str, list[Any]]]:
  """Returns (files, their captions, {column: values}), each file once.

  Args:
    rows: of the table.
    place: the table's path.
    present: the files in the folder.
    wrong: rows that are left out are added here as {kind: (count, a name)}.
  """
  file = _column(rows[0], _FILE, place)
  text = _column(rows[0], _CAPTION, place)
  kept: dict[str, tuple[dict[str, Any], list[str]]] = {}
  for row in rows:
    name, texts = row.get(file), row.get(text)
    texts = texts if isinstance(texts, list) else [texts]
    texts = [t for t in texts if isinstance(t, str) and t]
    name = os.path.normpath(name) if isinstance(name, str) else str(name)
    if name not in present:
      faults.merge(wrong, {"missing image": (1, name)})
    elif not texts:
      faults.merge(wrong, {"missing caption": (1, name)})
    elif name in kept:
      kept[name][1].extend(texts)
    else:
      kept[name] = row, texts
  others = [key for key in rows[0] if key not in (file, text, None)]
  columns = {key: [row.get(key) for row, _ in kept.values()] for key in others}
  if place.endswith(".csv"):
    columns = {key: _numbers(values) for key, values in columns.items()}
  return list(kept), [texts for _, texts in kept.values()], columns


def folder(path: str, captions: str | None = None) -> source_lib.Source:
  """Opens a folder of images and a table with a row per caption.

  The table is a .csv with a header, or a .jsonl. Its column file (or file_name,
  image) has paths within the folder, its column caption (or captions, text) a
  caption; in JSONL it may be a list. All rows of a file are captions of that
  image. Further columns become features, with the value of the file's first
  row. An example is {"image": bytes, "captions": [str, ...], "file": str, ...}.

  Args:
    path: the folder, local or in a bucket.
    captions: the table's name within the folder; None: the first that exists of
      captions.csv, captions.jsonl, metadata.csv, metadata.jsonl.

  Returns:
    A Source. Its `faults` count rows without a caption or whose image is not
    in the folder.

  Raises:
    UserError: there is no such table, or no such columns in it, or no row with
      an image.
  """
  path = files.canonical(path).rstrip("/")
  rows, place = _table(path, captions)
  wrong: dict[str, tuple[int, str]] = {}
  names, texts, columns = [], [], {}
  if rows:
    names, texts, columns = _collect(rows, place, _find(path), wrong)
  faults.report(place, wrong)
  if not names:
    raise errors.UserError(
      f"{place} has {len(rows)} rows, none with an image in {path} and a "
      "caption"
      + (
        f"; it names, for instance, {next(iter(wrong.values()))[1]}"
        if wrong
        else ""
      )
    )
  return source_lib.Source(
    source_lib.brief_name("folder", path),
    FolderRecords(path, names, texts, columns),
    faults=faults.counts(wrong),
  )
