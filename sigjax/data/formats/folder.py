"""A folder of images with captions, in any of the layouts people have.

The captions are in a table (.csv, .tsv, .jsonl), in a .json (COCO's captions or
a list of objects), or each in a .txt beside its image.
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards.index_files import Faults

log = logging.getLogger("sigjax")

_ENDINGS = (".csv", ".jsonl", ".tsv", ".json")
TABLES = (
  *(stem + ending for stem in ("captions", "metadata") for ending in _ENDINGS),
  "metadata.parquet",
)
# Usual names of the two columns: ours, Hugging Face's, open_clip's and others.
_FILE = ("file", "file_name", "image", "filepath", "filename", "image_path")
_CAPTION = ("caption", "captions", "text", "title")
_Row = dict[str, Any]


class _Tree:
  """The files in a folder, local or in a bucket."""

  def __init__(self, path: str):
    self.path = path
    self._listed: dict[str, int] | None = None
    if files.is_remote(path):
      system = files.file_system(path)
      try:
        found = system.find(path, detail=True)
      except FileNotFoundError:
        found = {}
      self._listed = {
        system.unstrip_protocol(name).removeprefix(f"{path}/"): info["size"]
        for name, info in found.items()
      }
    if self._listed == {} or not (self._listed or os.path.isdir(path)):
      raise errors.UserError(
        f"{path} is a file, not a folder; give its folder, and table="
        f"{os.path.basename(path)!r}"
        if os.path.isfile(path)
        else f"there is no folder {path}; check the path, which is taken from "
        "the working directory unless it is absolute"
      )

  def names(self) -> list[str]:
    """Returns the paths of all files, relative to the folder and sorted."""
    if self._listed is not None:
      return sorted(self._listed)
    return sorted(_walk(self.path, "", ()))

  def size(self, name: str) -> int | None:
    """Returns the size of a file in bytes, or None if there is no such file."""
    if self._listed is not None:
      return self._listed.get(name)
    try:
      found = os.stat(f"{self.path}/{name}")
    except (OSError, ValueError):  # the name may be too long, or hold a NUL
      return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None

  def sizes(self, names: Sequence[str]) -> list[int | None]:
    """Returns the sizes of many files."""
    parts = [names[i : i + 256] for i in range(0, len(names), 256)]
    with files.pool() as threads:  # each request may wait for a network
      sizes = threads.map(lambda part: list(map(self.size, part)), parts)
      return list(itertools.chain.from_iterable(sizes))

  def read(self, name: str) -> bytes:
    """Returns the content of a file."""
    return files.read_whole(os.path.join(self.path, name))


def _walk(
  path: str, within: str, above: tuple[tuple[int, int], ...]
) -> Iterator[str]:
  """Yields the files below a folder; follows links, but never in circles."""
  try:
    found = os.stat(path)
    entries = list(os.scandir(path))
  except OSError:
    return
  here = (found.st_dev, found.st_ino)
  if here in above:
    return
  for entry in entries:
    name = f"{within}{entry.name}"
    if entry.is_dir():
      yield from _walk(entry.path, f"{name}/", (*above, here))
    else:
      yield name


def _find_table(tree: _Tree) -> str | None:
  """Returns the name of the folder's table, None if there is none.

  Raises:
    UserError: there are several that it may be.
  """
  for name in TABLES:
    if tree.size(name) is not None:
      return name
  found = [
    name
    for name in tree.names()
    if os.path.basename(name) in TABLES
    or (name.endswith((".csv", ".tsv", ".jsonl")) and "/" not in name)
    or re.fullmatch(r"captions_.*\.json", os.path.basename(name))
  ]
  if len(found) > 1:
    raise errors.UserError(
      f"{tree.path} has several tables: {', '.join(found[:5])}"
      f"{', ...' if len(found) > 5 else ''}; choose one: table={found[0]!r}, "
      f"or of a program --data {tree.path}/{found[0]}"
    )
  return found[0] if found else None


def _decoded(data: bytes, place: str) -> str:
  """Returns the text of a table: UTF-8, or UTF-16 with its byte order mark."""
  encoding = "utf-8-sig"
  if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
    encoding = "utf-16"
  try:
    return data.decode(encoding)
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f"{place} is not {encoding.removesuffix('-sig').upper()} ({e.reason} at "
      f"byte {e.start}); save it as UTF-8"
    ) from e


# ---- Rows ----


def _delimiter(header: str, place: str) -> str:
  """Returns the delimiter of a table, judged by its header."""
  found = re.sub(r'"[^"]*"', "", header)
  best = max(",;\t|", key=found.count)  # the first of equals
  if best != ("\t" if place.endswith(".tsv") else ","):
    log.info("%s: its columns are separated by %r", place, best)
  return best


def _csv_records(
  text: str, delimiter: str
) -> Iterator[tuple[int, list[str] | None]]:
  """Yields the number of the first line, and the fields, of each record.

  A record that is no CSV, such as one whose quote is not closed, yields None;
  reading then goes on with the next line.
  """
  lines = list(io.StringIO(text, newline=""))
  start = 0
  while start < len(lines):
    rest = itertools.islice(lines, start, None)
    reader = csv.reader(rest, delimiter=delimiter, strict=True)
    first, done = start, 0
    try:
      for fields in reader:
        yield first + done + 1, fields
        done = reader.line_num
      return
    except csv.Error:
      yield first + done + 1, None
      start = first + done + 1


def _csv_rows(text: str, place: str, wrong: Faults) -> list[_Row]:
  """Returns the rows of a CSV; counts the malformed ones in `wrong`."""
  header = text.lstrip("\r\n").split("\n", 1)[0]
  names: list[str] = []
  rows, bad = [], 0
  for line, fields in _csv_records(text, _delimiter(header, place)):
    if fields == []:
      continue
    if fields is not None and not names:
      names = [name.strip() for name in fields]
    elif fields is not None and len(fields) <= len(names):
      rows.append(dict(zip(names, fields)))
    else:
      faults.merge(wrong, {"malformed row": (1, f"line {line}")})
      bad += 1
      if bad > 1000 and bad > len(rows):
        raise errors.UserError(
          f"{place} is no CSV: {bad} rows, such as line {line}, have more "
          "fields than the header, or a quote that is not closed"
        )
  return rows


_INTEGER = re.compile(r"-?(0|[1-9]\d{0,15})")
_DECIMAL = re.compile(r"[+-]?(0|[1-9]\d{0,14})?(\.\d*)?([eE][+-]?\d+)?")


def _numbers(rows: list[_Row], name: str) -> None:
  """Converts a column to numbers if all of its values are; "" becomes None.

  Numbers with leading zeros, or more digits than a float can hold, are taken
  for names, and stay texts.
  """
  values = [value for row in rows if (value := row.get(name))]
  convert: Any = str
  if all(_INTEGER.fullmatch(v) and abs(int(v)) <= 2**53 for v in values):
    convert = int
  elif all(_DECIMAL.fullmatch(v) and re.search(r"\d", v) for v in values):
    try:
      list(map(float, values))
      convert = float
    except ValueError:
      pass
  for row in rows:
    row[name] = convert(row[name]) if row.get(name) else None


def _json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f"{where} does not parse: {e}") from e


def _object(value: Any, where: str) -> _Row:
  if not isinstance(value, dict):
    raise errors.UserError(
      f'{where} has to be an object: {{"file": ..., "caption": ...}}'
    )
  return value


def _coco_rows(found: _Row, place: str) -> list[_Row]:
  """Returns a row per caption of COCO's captions_*.json, or of Karpathy's."""
  images, notes = found.get("images"), found.get("annotations")
  if isinstance(images, list) and notes is None:
    return _karpathy_rows(images, place)
  if not isinstance(images, list) or not isinstance(notes, list):
    raise errors.UserError(
      f'{place} has no lists "images" and "annotations", as COCO\'s captions '
      "have, and is no list of objects"
    )
  by_id = {}
  for image in images:
    image = _object(image, f'{place}: each of "images"')
    by_id[str(image.get("id"))] = image
  rows = []
  for note in notes:
    note = _object(note, f'{place}: each of "annotations"')
    image = by_id.get(str(note.get("image_id")), {})
    name = image.get("file_name", f"image {note.get('image_id')}")
    size = {key: image.get(key) for key in ("width", "height")}
    rows.append({"file": name, "caption": note.get("caption"), **size})
  return rows


def _karpathy_rows(images: list[Any], place: str) -> list[_Row]:
  """Returns a row per caption of Karpathy's dataset_coco.json and the like."""
  rows = []
  for image in images:
    image = _object(image, f'{place}: each of "images"')
    texts, file = image.get("sentences"), image.get("filename")
    if not isinstance(texts, list) or not isinstance(file, str):
      raise errors.UserError(
        f'{place}: an image has no "filename" or "sentences", as those of '
        "Karpathy's splits have; nor are there COCO's \"annotations\""
      )
    name = os.path.join(image.get("filepath") or "", file)
    for text in texts:
      text = _object(text, f'{place}: each of "sentences"').get("raw")
      rows.append({"file": name, "caption": text, "split": image.get("split")})
  return rows


def _parquet_rows(data: bytes, place: str) -> list[_Row]:
  try:
    import pyarrow.parquet
  except ImportError:
    raise errors.UserError(
      f"{place} is read by pyarrow, which is not installed; pip install pyarrow"
    ) from None
  try:
    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
  except Exception as e:  # pyarrow's errors have no common base
    raise errors.UserError(f"{place} is no Parquet: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__


def _rows(tree: _Tree, table: str, data: bytes, wrong: Faults) -> list[_Row]:
  """Returns the rows of a table of any kind."""
  place = os.path.join(tree.path, table)
  if table.endswith(".parquet"):
    return _parquet_rows(data, place)
  text = _decoded(data, place)
  if table.endswith((".csv", ".tsv")):
    return _csv_rows(text, place, wrong)
  if table.endswith(".jsonl"):
    return [
      _object(_json(line, f"{place}, line {n}"), f"{place}, line {n}")
      for n, line in enumerate(text.split("\n"), 1)
      if line.strip()
    ]
  found = _json(text, place)
  if isinstance(found, list):
    return [_object(x, f"{place}: each of its list") for x in found]
  return _coco_rows(_object(found, place), place)


def _rows_of_texts(tree: _Tree, wrong: Faults) -> list[_Row]:
  """Returns a row per image that has a .txt of the same name beside it."""
  names = tree.names()
  texts = {name for name in names if name.endswith(".txt")}
  pairs = [
    (name, os.path.splitext(name)[0] + ".txt")
    for name in names
    if name.lower().endswith(files.IMAGES)
  ]
  if not pairs:
    raise errors.UserError(
      f"{tree.path} has no pictures and no table of captions: there is no file "
      f"*{', *'.join(files.IMAGES)} in it or its folders"
    )
  if not any(text in texts for _, text in pairs):
    raise errors.UserError(
      f"there is no table of captions in {tree.path}, looked for "
      f"{', '.join(TABLES)} and a .txt beside each image; make a table with "
      "the columns file and caption, or name one: table="
    )

  def caption(pair: tuple[str, str]) -> str | bytes | None:
    try:
      return tree.read(pair[1]) if pair[1] in texts else None
    except OSError:
      return None

  with files.pool() as threads:
    found = list(threads.map(caption, pairs))
  log.info("%s: the captions are in .txt files beside the images", tree.path)
  rows = []
  for (name, _), data in zip(pairs, found):
    try:
      text = captions_lib.caption(data).strip() if data else None
    except BadExample as e:
      faults.merge(wrong, {e.kind: (1, name)})
      continue
    rows.append({"file": name, "caption": text})
  return rows


# ---- Columns and images ----


def _column(
  rows: list[_Row], usual: Sequence[str], given: str | None, place: str
) -> str:
  """Returns the name of a column: the given one, or the first usual one."""
  names = dict.fromkeys(key for row in rows for key in row)
  if given:
    errors.pick(names, given, f"column of {place}")
    return given
  found = next((name for name in usual if name in names), None)
  if found is None:
    raise errors.UserError(
      f"{place} has no column {' or '.join(usual)}; it has: "
      f"{', '.join(map(str, names))}; name it: image= or captions="
    )
  return found


def _cleaned(name: Any, path: str) -> str:
  """Returns an image's path relative to the folder."""
  if not isinstance(name, str):
    return str(name)
  if name.startswith("/") and name.startswith(f"{path}/"):
    name = name.removeprefix(f"{path}/")
  return os.path.normpath(name)


def _is_within(name: str) -> bool:
  """Returns whether a relative path stays in the folder."""
  return not os.path.isabs(name) and name != ".." and name[:3] != "../"


def _base(tree: _Tree, names: list[str], table: str) -> str:
  """Returns the subfolder, "" or "NAME/", to which names of images refer.

  It is the folder itself, the one of the table, or else the one in which most
  of the first hundred images are.
  """
  probe = [name for name in names[:100] if _is_within(name)]

  def hits(base: str) -> int:
    return sum(tree.size(base + name) is not None for name in probe)

  beside = os.path.dirname(table)
  for base in ("", f"{beside}/" if beside and _is_within(table) else ""):
    if hits(base):
      return base
  every = {os.path.dirname(name) for name in tree.names()} - {""}
  best = max(sorted(every), key=lambda x: hits(f"{x}/"), default="")
  return f"{best}/" if best and hits(f"{best}/") else ""


class FolderRecords:
  """Random access to the images of a folder; see folder().

  Args:
    path: of the folder.
    names: (n,), the images, relative to the folder.
    owners: (m,), the number of the image of each caption, in rising order.
    texts: (m,), the captions.
    columns: {name: (m,) values}.
    identity: a digest of the table, and of the images' names and sizes.

  Attributes:
    identity: the same.
  """

  def __init__(
    self,
    path: str,
    names: list[str],
    owners: np.ndarray,
    texts: list[str],
    columns: dict[str, list[Any]],
    identity: str,
  ):
    self.identity = identity
    self._path, self._names = path, names
    self._owners, self._texts, self._columns = owners, texts, columns
    self._starts = np.searchsorted(owners, np.arange(len(names) + 1))
    same = np.flatnonzero(owners[1:] == owners[:-1]).tolist()
    # Columns whose values differ between the captions of an image.
    self._differ = {
      key
      for key, values in columns.items()
      if any(values[i] != values[i + 1] for i in same)
    }

  def __len__(self) -> int:
    return len(self._names)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image, which is not read."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    first, end = self._starts[i : i + 2].tolist()
    if first == end:
      raise BadExample(
        f"{self._names[i]}: no caption is left", kind="missing caption"
      )
    return {
      "file": self._names[i],
      "captions": list(map(captions_lib.caption, self._texts[first:end])),
      **{
        key: values[first:end] if key in self._differ else values[first]
        for key, values in self._columns.items()
      },
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
    """Returns [all values of a column], or None if there is no such column.

    Raises:
      UserError: the captions of an image have different values.
    """
    if name == "file":
      values = self._names
    elif name not in self._columns:
      return None
    elif name in self._differ:
      raise errors.UserError(
        f'"{name}" differs between the captions of an image in {self._path}, '
        "so images cannot be grouped by it; only= can keep some captions"
      )
    else:
      column = self._columns[name]
      firsts = np.minimum(self._starts[:-1], len(column) - 1).tolist()
      values = [column[i] for i in firsts]
    return [source_lib.as_column(values, name, self._path)]

  def caption_column(self, name: str) -> np.ndarray | None:
    """Returns a column's value for each caption.

    Returns None unless the captions of an image have different values.
    """
    if name not in self._differ:
      return None
    return source_lib.as_column(self._columns[name], name, self._path)

  def with_captions(
    self, kept: np.ndarray
  ) -> tuple["FolderRecords", np.ndarray]:
    """Keeps some of the captions.

    Args:
      kept: (m,) bool.

    Returns:
      Records with the same numbers, and (n,) bool: which have a caption left.
    """
    numbers = np.flatnonzero(kept).tolist()
    digest = hashlib.sha256(self.identity.encode() + kept.tobytes())
    owners = self._owners[kept]
    records = FolderRecords(
      self._path,
      self._names,
      owners,
      [self._texts[i] for i in numbers],
      {k: [v[i] for i in numbers] for k, v in self._columns.items()},
      digest.hexdigest(),
    )
    return records, np.bincount(owners, minlength=len(self)) > 0


def _captions_of(
  row: _Row, caption: str | Mapping[str, str]
) -> Iterator[tuple[str, _Row]]:
  """Yields the captions in a row, each with the columns that belong to it.

  Args:
    row: of the table.
    caption: the column: a text, several, or {language: text or several}; or
      {language: its column}.
  """
  languages = row.get("language")
  if isinstance(caption, str):
    value = row.get(caption)
    texts = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
      texts, languages = captions_lib.of_languages(value)
  else:
    texts, languages = captions_lib.of_languages(
      {language: row.get(column) for language, column in caption.items()}
    )
  if not isinstance(languages, list) or len(languages) != len(texts):
    languages = [languages] * len(texts)
  for text, language in zip(texts, languages):
    if isinstance(text, str) and text.strip():
      more = {} if language is None else {"language": language}
      yield text, {**row, **more}


def _collect(
  tree: _Tree,
  rows: list[_Row],
  table: str,
  image: str,
  caption: str | Mapping[str, str],
  wrong: Faults,
) -> tuple[dict[str, int], list[list[tuple[str, _Row]]]]:
  """Returns {image: its size} and the captions of each with their rows.

  Images that are missing or have no caption are counted in `wrong`.
  """
  found: dict[str, list[tuple[str, _Row]]] = {}
  for row in rows:
    pairs = found.setdefault(_cleaned(row.get(image), tree.path), [])
    pairs += _captions_of(row, caption)
  base = _base(tree, list(found), table)
  if base:
    log.info("%s: the images are in %s", tree.path, base)
  names = list(found)
  sizes = tree.sizes([base + name for name in names])
  present, captions = {}, []
  for name, size in zip(names, sizes):
    if size is None or not _is_within(name):
      faults.merge(wrong, {"missing image": (1, name)})
    elif not found[name]:
      faults.merge(wrong, {"missing caption": (1, name)})
    else:
      present[base + name] = size
      captions.append(found[name])
  return present, captions


def folder(
  path: str,
  table: str | None = None,
  image: str | None = None,
  captions: str | Mapping[str, str] | None = None,
  split: str | None = None,
) -> source_lib.Source:
  """Opens a folder of images with captions.

  The captions are in a table with a row per caption: a .csv or .tsv with a
  header, a .jsonl, a .json with a list of objects, or a .parquet. One column
  has the paths of images, relative to the folder or to the table, another one
  the caption; in JSON it may be a list, or {"en": caption or list, ...}, which
  gives a column "language", too. COCO's captions_*.json and Karpathy's splits,
  dataset_coco.json, are read as well.
  Without any table, the caption of an image is the text in the .txt of the same
  name.

  All rows of an image are its captions. An example is {"image": bytes,
  "captions": [str, ...], "file": str} and the other columns. A column whose
  values differ between the captions of an image is a list, one value for each
  caption; a filter by it (`only`) keeps the captions that fit.

  Args:
    path: the folder, local or in a bucket.
    table: the table's path within the folder; None: captions.csv or one of the
      other TABLES, or else the only table there is, also in subfolders.
    image: the column with the paths of images; None: file, file_name, image,
      filepath, filename or image_path.
    captions: the column with the captions; or a column for each language,
      {"en": "caption_en", ...}; None: caption, captions, text or title.
    split: only the rows with this value in the column "split" count, such as
      "test" of Karpathy's; None: all.

  Returns:
    A Source. Its `faults` count images that are missing or have no caption, and
    malformed rows.

  Raises:
    UserError: there is no such folder, table or column, or no image with a
      caption.
  """
  if isinstance(captions, str) and captions.endswith(_ENDINGS):
    raise errors.UserError(
      f"captions={captions!r} is a table, but has to be one of its columns; "
      f"give table={captions!r}"
    )
  path = files.canonical(path).rstrip("/")
  tree = _Tree(path)
  wrong: Faults = {}
  name = table or _find_table(tree)
  if name is None:
    rows = _rows_of_texts(tree, wrong)
    name, place, digest = "", path, hashlib.sha256(json.dumps(rows).encode())
  else:
    place = os.path.join(path, name)
    if not name.endswith((*_ENDINGS, ".parquet")):
      raise errors.UserError(
        f"{place} is none of {', '.join(_ENDINGS)} and .parquet, the kinds of "
        "tables that are read"
      )
    try:
      data = tree.read(name)
    except OSError as e:
      raise errors.UserError(
        f"there is no table of captions in {path}, looked for {name} "
        f"({e.strerror or e}); check table="
      ) from e
    rows, digest = _rows(tree, name, data, wrong), hashlib.sha256(data)
  if split is not None:
    named = dict.fromkeys(str(row.get("split")) for row in rows)
    errors.pick(named, split, f"split of {place}")
    rows = [row for row in rows if str(row.get("split")) == split]
  present: dict[str, int] = {}
  pairs, others = [], []
  if rows:
    file = _column(rows, _FILE, image, place)
    if isinstance(captions, Mapping):
      text = {k: _column(rows, (), v, place) for k, v in captions.items()}
      texts = list(text.values())
    else:
      text = _column(rows, _CAPTION, captions, place)
      texts = [text]
    log.info(
      '%s: column "%s" has the images, %s the captions',
      place,
      file,
      ", ".join(f'"{x}"' for x in texts),
    )
    columns = dict.fromkeys(key for row in rows for key in row)
    ours = ("", file, *texts, "file", "captions", "image")
    others = [key for key in columns if key not in ours]
    if name.endswith((".csv", ".tsv")):
      for key in others:
        _numbers(rows, key)
    present, pairs = _collect(tree, rows, name, file, text, wrong)
    if any("language" in row for several in pairs for _, row in several):
      others = list(dict.fromkeys([*others, "language"]))
  faults.report(place, wrong)
  if not present:
    raise errors.UserError(
      f"{place} has {len(rows)} rows, none with an image in {path} and a "
      "caption"
      + (
        f"; it names, for instance, {next(iter(wrong.values()))[1]}"
        if wrong
        else ""
      )
    )
  digest.update(json.dumps(list(present.items())).encode())
  every = list(itertools.chain.from_iterable(pairs))
  records = FolderRecords(
    path,
    list(present),
    np.repeat(np.arange(len(pairs)), list(map(len, pairs))),
    [text for text, _ in every],
    {key: [row.get(key) for _, row in every] for key in others},
    digest.hexdigest(),
  )
  return source_lib.Source(
    source_lib.brief_name("folder", path),
    records,
    faults=faults.counts(wrong),
  )
