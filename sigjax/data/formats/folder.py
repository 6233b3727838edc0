"""A folder of images with a table of captions, CSV or JSONL."""

import csv
import io
import json
import os

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_FILE = ("file", "file_name", "image")  # what a table may call its columns
_CAPTION = ("caption", "captions", "text")


def _bytes(path):
  """Returns a whole file."""
  if files.is_remote(path):
    return files.file_system(path).cat_file(path)
  with open(path, "rb") as f:
    return f.read()


def _find(path):
  """Returns the names of all files in a folder, within it."""
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


def _table(path, captions):
  """Returns the rows of the table, dicts, and its path."""
  names = [captions] if captions else TABLES
  for name in names:
    place = f"{path}/{name}"
    try:
      text = _bytes(place).decode("utf-8-sig")
    except FileNotFoundError:
      continue
    except UnicodeDecodeError as e:
      raise errors.UserError(
        f"{place} is not UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8"
      ) from e
    if not name.endswith((".csv", ".jsonl")):
      raise errors.UserError(
        f"{place} is neither .csv nor .jsonl; a table of captions is one of "
        "these"
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


def _json(line, where):
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f"{where} does not parse: {e}") from e
  if not isinstance(row, dict):
    raise errors.UserError(
      f'{where} has to be an object: {{"file": ..., "caption": ...}}'
    )
  return row


def _column(row, names, place):
  found = next((name for name in names if name in row), None)
  if found is None:
    raise errors.UserError(
      f"{place} has no column {' or '.join(names)}; it has: "
      f"{', '.join(map(str, row))}"
    )
  return found


def _numbers(values):
  """Returns texts of a CSV as numbers if all are; None for empty ones."""
  try:
    return [float(v) if v else None for v in values]
  except (ValueError, TypeError):
    return [v or None for v in values]


class Records:
  """Images of a folder; see folder()."""

  def __init__(self, path, names, captions, columns):
    self._path = path
    self._names, self._captions, self._columns = names, captions, columns

  def __len__(self):
    return len(self._names)

  def brief(self, i):
    """Returns the example without its image, and without reading that."""
    return {
      "file": self._names[i],
      "captions": list(map(captions_lib.caption, self._captions[i])),
      **{key: values[i] for key, values in self._columns.items()},
    }

  def __getitem__(self, i):
    example = self.brief(i)
    place = f"{self._path}/{self._names[i]}"
    try:
      example["image"] = _bytes(place)
    except Exception as e:  # each store has errors of its own
      raise BadExample(
        f"{place} cannot be read: {e}", kind="missing image"
      ) from e
    return example

  def column(self, name):
    """Returns [an array of all values of a column], None if there is none."""
    if name not in self._columns and name != "file":
      return None
    values = self._names if name == "file" else self._columns[name]
    return [source_lib.as_column(values, name, self._path)]


def _collect(rows, place, present, wrong):
  """Returns (files, their captions, {column: values}), each file once.

  Args:
    rows: dicts.
    place: where they are from.
    present: the files that are there.
    wrong: gets {kind: (count, the name of one)} of rows left out.
  """
  file = _column(rows[0], _FILE, place)
  text = _column(rows[0], _CAPTION, place)
  kept = {}
  for row in rows:
    name, texts = row.get(file), row.get(text)
    texts = texts if isinstance(texts, list) else [texts]
    texts = [t for t in texts if isinstance(t, str) and t]
    name = os.path.normpath(name) if isinstance(name, str) else str(name)
    fault = (
      "missing image"
      if name not in present
      else None
      if texts
      else "missing caption"
    )
    if fault:
      faults.merge(wrong, {fault: (1, name)})
    elif name in kept:
      kept[name][1].extend(texts)
    else:
      kept[name] = row, texts
  others = [key for key in rows[0] if key not in (file, text, None)]
  columns = {key: [row.get(key) for row, _ in kept.values()] for key in others}
  if place.endswith(".csv"):
    columns = {key: _numbers(values) for key, values in columns.items()}
  return list(kept), [texts for _, texts in kept.values()], columns


def folder(path, captions=None):
  """A folder of images and a table with a row for each of their captions.

  The table is a .csv with a header or a .jsonl, with a column file (or
  file_name, image: paths within the folder) and a column caption (or captions,
  text; in JSONL it may be a list). Rows of the same file are its captions;
  further columns become features, of its first row. An example is {"image":
  bytes, "captions": [str, ...], "file": str, ...}.

  Args:
    path: the folder, local or in a bucket.
    captions: the table's name within it; None for the first there is of
      captions.csv, captions.jsonl, metadata.csv, metadata.jsonl.

  Returns:
    A Source; its `faults` count rows without an image there or a caption.

  Raises:
    UserError: no such table or columns in it, or no row with an image.
  """
  path = files.canonical(path).rstrip("/")
  rows, place = _table(path, captions)
  wrong, names = {}, []
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
    Records(path, names, texts, columns),
    faults=faults.counts(wrong),
  )
