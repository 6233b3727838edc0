"""Parquet files with images and captions, in the layout of Hugging Face.

Parquet is decoded by whole row groups: reading one example at random means
decoding all rows of its group, and a shuffled run rarely needs the same group
again soon. Small groups, of 16 rows or so, are decoded each time. A large group
is decoded once, when its first example is read, into a file in the cache folder
from which the others are then taken.
"""

import collections
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent import futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards import index as index_lib
from sigjax.runtime import files as local_files

log = logging.getLogger("sigjax")

_LARGE = 1 << 20  # bytes of a row group that is decoded into a file
_MAPPED = 64 << 10  # bytes that a mapped file counts in memory
_UNUSED_DAYS = 30  # after which decoded files are deleted
_ROW = np.dtype([("rows", "<i8"), ("bytes", "<i8")])  # of a row group
# Usual names of the two columns.
_IMAGE = ("image", "jpg", "img", "picture")
_CAPTION = ("caption", "captions", "text", "sentences", "title")


def _library() -> Any:
  """Returns pyarrow.parquet."""
  try:
    import pyarrow.parquet

    return pyarrow.parquet
  except ImportError:
    raise errors.UserError(
      "Parquet files are read by pyarrow, which is not installed; "
      "pip install pyarrow"
    ) from None


def _opened(path: str, metadata: Any = None) -> Any:
  """Returns a ParquetFile. Threads may share its metadata, but not the file."""
  if not files.is_remote(path):
    return _library().ParquetFile(path, memory_map=True, metadata=metadata)
  return _library().ParquetFile(
    files.file_system(path).open(path), metadata=metadata, pre_buffer=True
  )


def _build(
  opened: files.Files, number: int, size: int
) -> tuple[np.ndarray, index_lib.Faults]:
  """Builds the index of a file, a row per row group; see index.Kind."""
  del size
  path = opened.paths[number]
  try:
    with _opened(path) as found:
      meta = found.metadata
      groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
      rows = [(group.num_rows, group.total_byte_size) for group in groups]
  except Exception as e:  # pyarrow's errors have no common base class
    raise BadExample(
      f"{path} cannot be read as Parquet: {e}", kind="damaged shard"
    ) from e
  return np.array(rows, _ROW), {}


_INDEX = index_lib.Kind(
  "groups", _ROW, _build, lambda rows: int(rows["rows"].sum())
)


class _Cache:
  """Computed values with `nbytes`, the most recently used up to `limit` bytes.

  It is shared by threads: a value is computed by one thread, and the others
  wait for it.
  """

  def __init__(self, limit: int):
    self._limit, self._bytes = limit, 0
    self._made: collections.OrderedDict[Hashable, futures.Future[Any]] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns the value of `key`, computed by make() if it is not kept."""
    with self._lock:
      future, mine = self._made.get(key), False
      if future is None:
        future, mine = futures.Future(), True
        self._made[key] = future
      self._made.move_to_end(key)
    if not mine:
      return future.result()
    try:
      value = make()
    except BaseException as e:
      with self._lock:
        del self._made[key]
      future.set_exception(e)
      raise
    future.set_result(value)
    with self._lock:
      self._bytes += value.nbytes
      while self._bytes > self._limit:
        oldest = next(k for k, f in self._made.items() if f.done())
        self._bytes -= self._made.pop(oldest).result().nbytes
    return value


class _Table(NamedTuple):
  """The rows of a row group, and the bytes that they take in memory."""

  rows: Any
  nbytes: int


class _Decoded:
  """Row groups that were decoded into files of the cache folder.

  The files may take up half of the disk's free space. Files that no run has
  used for a month are deleted.

  Args:
    needed: the bytes of all row groups that may be decoded.
    what: names the Parquet files in messages.
  """

  def __init__(self, needed: int, what: str):
    self._folder = local_files.cache_dir() / "parquet"
    self._usable = False
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      for file in self._folder.iterdir():
        if time.time() - file.stat().st_mtime > _UNUSED_DAYS * 86400:
          file.unlink(missing_ok=True)
      used = sum(file.stat().st_size for file in self._folder.iterdir())
      free = shutil.disk_usage(self._folder).free
    except OSError as e:
      used, free = 0, 0
      log.warning("%s cannot be used: %s", self._folder, e.strerror)
    self._usable = needed <= used + free // 2
    if self._usable:
      log.info(
        "%s have large row groups; each is decoded once, into %s (up to %.1f "
        "GiB)",
        what,
        self._folder,
        needed / 2**30,
      )
    else:
      log.warning(
        "%s have large row groups, and their %.1f GiB do not fit into half of "
        "the free space at %s: reading will be slow; write the files with row "
        "groups of 16 rows, or set SIGJAX_CACHE to a folder with room",
        what,
        needed / 2**30,
        self._folder,
      )

  def table(self, key: Sequence[Any], decode: Callable[[], Any]) -> _Table:
    """Returns decode(), from a file if it was decoded before.

    Args:
      key: what identifies the rows: the file, its size, the group, the columns.
      decode: fn() -> a pyarrow.Table.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    place = self._folder / f"{digest}.arrow"
    if not self._usable:
      table = decode()
      return _Table(table, table.nbytes)
    found = self._map(place)
    if found is None:
      table = decode()
      try:
        with local_files.replacing(place) as aside:
          self._write(aside, table)
      except OSError as e:
        self._usable = False
        log.warning(
          "no more row groups are decoded into %s: %s", self._folder, e.strerror
        )
        return _Table(table, table.nbytes)
      found = self._map(place)
    if found is None:  # deleted meanwhile
      table = decode()
      found = _Table(table, table.nbytes)
    return found

  def _write(self, path: pathlib.Path, table: Any) -> None:
    import pyarrow as pa

    with (
      pa.OSFile(str(path), "wb") as file,
      pa.ipc.new_file(file, table.schema) as writer,
    ):
      writer.write_table(table)

  def _map(self, path: pathlib.Path) -> _Table | None:
    """Returns the rows in a file, None if there is none or it is damaged."""
    import pyarrow as pa

    try:
      with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
      table.validate(full=True)
      os.utime(path)  # it is in use
    except (OSError, ValueError, LookupError):  # pyarrow's are these
      return None
    return _Table(table, _MAPPED)


def _leaf(
  schema: Any, name: str, path: str, what: str
) -> tuple[str, list[str], Any]:
  """Finds a column, or a field within structs, such as "sentences.raw".

  Args:
    schema: of the file.
    name: of the column, with the names of fields after dots.
    path: of the file.
    what: "image=" or "captions=", for messages.

  Returns:
    (column, names of fields, their type without the lists around it).
  """
  import pyarrow as pa

  column, *fields = [name] if name in schema.names else name.split(".")
  errors.pick(dict.fromkeys(schema.names), column, f"column of {path}")
  kind = whole = schema.field(column).type
  for field in [*fields, None]:
    while (
      pa.types.is_list(kind)
      or pa.types.is_large_list(kind)
      or pa.types.is_fixed_size_list(kind)
    ):
      kind = kind.value_type
    if field is not None:
      inner = {}
      if pa.types.is_struct(kind):
        inner = {inner.name: inner for inner in kind}
      if field not in inner:
        raise errors.UserError(
          f'column "{column}" of {path} is {whole}, and has no field '
          f'"{field}"; check {what}{name!r}'
        )
      kind = inner[field].type
  return column, fields, kind


def _texts(value: Any, fields: Sequence[str]) -> list[str | bytes]:
  """Returns all texts in a value, those at a field of the structs in it."""
  if isinstance(value, list):
    return [text for inner in value for text in _texts(inner, fields)]
  if isinstance(value, dict):
    return _texts(value.get(fields[0]), fields[1:]) if fields else []
  return [value] if isinstance(value, (str, bytes)) and not fields else []


def _usual(schema: Any, names: Sequence[str], given: str | None) -> str:
  """Returns the column that is given, or the first usual one in the schema."""
  return given or next((n for n in names if n in schema.names), names[0])


def _label_names(schema: Any) -> dict[str, list[str]]:
  """Returns the names of classes that Hugging Face's datasets wrote, or {}."""
  try:
    about = json.loads((schema.metadata or {})[b"huggingface"])
    return {
      column: list(map(str, feature["names"]))
      for column, feature in about["info"]["features"].items()
      if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    return {}


class ParquetRecords:
  """Random access to the rows of Parquet files; see parquet().

  Attributes:
    identity: of the files.
    label_names: {column: names of its classes}, as Hugging Face notes them.
  """

  def __init__(
    self,
    shards: index_lib.Shards,
    image: str | None,
    captions: str | Mapping[str, str] | None,
    columns: Sequence[str],
    cache_mb: int,
  ):
    self._shards, self._columns = shards, columns
    self.identity = shards.identity
    self._index = index = shards.index(_INDEX)
    self._starts = np.concatenate([[0], np.cumsum(index.rows["rows"])])
    self._tables = _Cache(cache_mb << 20)
    self._footers = _Cache(cache_mb << 18)
    sizes = index.rows["bytes"]
    large = int(sizes[sizes > _LARGE].sum())
    self._decoded = _Decoded(large, shards.what) if large else None
    number, _ = index.locate(0)
    path = shards.paths[number]
    schema = self._footer(number).meta.schema.to_arrow_schema()
    for name in columns:
      errors.pick(dict.fromkeys(schema.names), name, f"column of {path}")
    self._image = _usual(schema, _IMAGE, image)
    self.label_names = _label_names(schema)
    if not isinstance(captions, Mapping):
      captions = {"": _usual(schema, _CAPTION, captions)}
    self._read = self._image_column(schema, path)
    # {language: (column, fields)}; language "" if there is one column for all.
    self._captions = {
      language: self._caption_column(schema, name, path)
      for language, name in captions.items()
    }
    log.info(
      '%s: column "%s" has the images, %s the captions',
      shards.what,
      self._image,
      ", ".join(f'"{name}"' for name in captions.values()) or "none",
    )

  def _image_column(self, schema: Any, path: str) -> str:
    """Returns what to read for an image: of a struct only the bytes."""
    import pyarrow as pa

    errors.pick(dict.fromkeys(schema.names), self._image, f"column of {path}")
    kind = schema.field(self._image).type
    bytes_of = kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
      bytes_of = kind.field("bytes").type
    if not _is_text(bytes_of, text=False):
      raise errors.UserError(
        f'column "{self._image}" of {path} is {kind}, but images have to be '
        "binary, or structs with a binary field bytes; name another: image="
      )
    return self._image if bytes_of is kind else f"{self._image}.bytes"

  def _caption_column(
    self, schema: Any, captions: str, path: str
  ) -> tuple[str, list[str]]:
    """Returns the column of captions, and the fields in it."""
    import pyarrow as pa

    column, fields, kind = _leaf(schema, captions, path, "captions=")
    if not _is_text(kind):
      whole = schema.field(column).type
      inner = list(kind) if pa.types.is_struct(kind) else []
      found = next((f.name for f in inner if _is_text(f.type)), None)
      raise errors.UserError(
        f'column "{column}" of {path} is {whole}, but captions have to be '
        "texts or lists of texts; "
        + (
          f'pick a field: captions="{captions}.{found}"'
          if found
          else "name another column: captions="
        )
      )
    return column, fields

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._row(i, with_image=True)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image, which is not read."""
    return self._row(i, with_image=False)

  def _footer(self, number: int) -> "_Footer":
    return self._footers.get(
      number, lambda: _Footer(self._shards.paths[number])
    )

  def _row(self, i: int, with_image: bool) -> dict[str, Any]:
    if not 0 <= i < len(self):
      raise IndexError(i)
    group = int(np.searchsorted(self._starts, i, side="right")) - 1
    number, _ = self._index.locate(group)
    row = int(i - self._starts[group])
    where = f"{self._shards.paths[number]}, row {i - self._first(number)}"

    def decode() -> Any:
      path = self._shards.paths[number]
      with _opened(path, self._footer(number).meta) as found:
        return found.read_row_group(at, columns=names, use_threads=False)

    def make() -> _Table:
      large = self._index.rows["bytes"][group] > _LARGE
      if large and with_image and self._decoded:
        stamp = self._shards.stamps[number]
        key = [self._shards.paths[number], stamp, at, names]
        return self._decoded.table(key, decode)
      table = decode()
      return _Table(table, table.nbytes)

    texts = [column for column, _ in self._captions.values()]
    names = list(dict.fromkeys([*texts, *self._columns]))
    names = [self._read, *names] if with_image else names
    at = group - self._index.first(number)
    try:
      table = self._tables.get((group, with_image), make).rows
      values = {
        name: table.column(name)[row].as_py() for name in table.column_names
      }
    except UnicodeDecodeError as e:
      raise BadExample(
        f"{where}: a text is not UTF-8", kind="caption not UTF-8"
      ) from e
    except (OSError, ValueError, LookupError) as e:  # pyarrow's are these
      raise BadExample(
        f"{where} cannot be read: {e}", kind="unreadable shard"
      ) from e
    return self._example(values, where, with_image)

  def _first(self, number: int) -> int:
    """Returns the number of a file's first row."""
    return int(self._starts[self._index.first(number)])

  def _example(
    self, values: dict[str, Any], where: str, with_image: bool
  ) -> dict[str, Any]:
    # A column may be missing in one of the files: its values are then None.
    example = {name: values.get(name) for name in self._columns}
    if with_image:
      image = values.get(self._image)
      image = image.get("bytes") if isinstance(image, dict) else image
      if not isinstance(image, bytes) or not image:
        raise BadExample(
          f"{where} has no bytes of an image", kind="missing image"
        )
      example["image"] = image
    if not self._captions:
      return example
    texts, languages = captions_lib.of_languages(
      {
        language: _texts(values.get(column), fields)
        for language, (column, fields) in self._captions.items()
      }
    )
    if not texts:
      raise BadExample(f"{where} has no caption", kind="missing caption")
    example["captions"] = list(map(captions_lib.caption, texts))
    if "" not in self._captions:
      example["language"] = languages
    return example

  def column(self, name: str) -> Iterator[np.ndarray] | None:
    """Yields the values of all rows in a column, in order.

    Returns None if there is no such column.
    """
    number, _ = self._index.locate(0)
    names = self._footer(number).meta.schema.to_arrow_schema().names
    if name not in names or name == self._image:
      return None

    def read(number: int) -> np.ndarray:
      try:
        with _opened(self._shards.paths[number]) as found:
          values = found.read(columns=[name], use_threads=False).column(0)
      except (OSError, ValueError, LookupError) as e:
        raise errors.UserError(
          f'column "{name}" of {self._shards.paths[number]} cannot be read: {e}'
        ) from e
      return source_lib.as_column(values.to_pylist(), name, self._shards.what)

    present = [
      n for n in range(len(self._shards.paths)) if len(self._index.of_shard(n))
    ]
    return map(read, present)


def _is_text(kind: Any, text: bool = True) -> bool:
  """Returns whether a column's type is binary or, if `text`, also string."""
  import pyarrow as pa

  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  names = ["binary", "large_binary", "binary_view"]
  if text:
    names += ["string", "large_string", "string_view", "null"]
  return str(kind) in names or pa.types.is_fixed_size_binary(kind)


class _Footer:
  """The metadata at the end of a file."""

  def __init__(self, path: str):
    with _opened(path) as found:
      self.meta = found.metadata
    self.nbytes = self.meta.serialized_size


def parquet(
  shards: str | Sequence[str],
  image: str | None = None,
  captions: str | Mapping[str, str] | None = None,
  columns: Sequence[str] = (),
  cache_mb: int = 512,
) -> source_lib.Source:
  """Opens Parquet files with encoded images and captions.

  An example is {"image": bytes, "captions": [str, ...]} and the `columns`.

  Args:
    shards: paths, local or in a bucket, with globs and brace lists.
    image: the column of images: bytes, or structs of bytes and path as in
      Hugging Face's datasets; None: image, jpg, img or picture.
    captions: the column of captions, each a text or a list of texts; of
      structs, or lists of structs, the field is named, too: "sentences.raw".
      Or a column for each language, {"en": "caption_en", ...}, which gives the
      feature "language", too. None: caption, captions, text, sentences or
      title. {}: examples have no captions, but their `columns`.
    columns: further columns that become features. Filters (`only`) may also use
      columns that are not listed here.
    cache_mb: MiB of decoded row groups that are kept in memory.

  Returns:
    A Source. Rows without an image or a caption are found when they are read.

  Raises:
    UserError: there is no example, or no such column.
  """
  _library()
  found = index_lib.Shards(
    files.expand(shards, "Parquet files"), "Parquet files"
  )
  records = ParquetRecords(found, image, captions, tuple(columns), cache_mb)
  return source_lib.Source(
    source_lib.brief_name("parquet", shards),
    records,
    faults=faults.counts(found.faults),
    label_names=records.label_names,
  )
