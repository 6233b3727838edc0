"""Parquet files with images and captions, in the layout of Hugging Face.

Parquet is decoded by whole row groups: reading one example at random means
decoding all rows of its group. Decoded groups are kept in memory up to a limit,
but a shuffled run over a large dataset rarely needs the same group again soon.
So small row groups are fast to read: 16 rows are good, 100 bearable. For larger
ones a log line gives the command that rewrites a file.
"""

import collections
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
import logging
import threading
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards import index as index_lib

log = logging.getLogger("sigjax")

_LARGE = 8 << 20  # bytes of a row group; decoding takes about 10 ms
_ROW = np.dtype([("rows", "<i8"), ("bytes", "<i8")])  # of a row group
_REWRITE = (
  'python -c "import sys, pyarrow.parquet as p; f = p.ParquetFile('
  "sys.argv[1]); w = p.ParquetWriter(sys.argv[2], f.schema_arrow, "
  "compression='NONE', use_dictionary=False); [w.write_batch(b, "
  'row_group_size=16) for b in f.iter_batches(1024)]; w.close()" OLD NEW'
)


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


_INDEX = index_lib.Kind("groups", _ROW, _build)


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


class ParquetRecords:
  """Random access to the rows of Parquet files; see parquet()."""

  def __init__(
    self,
    shards: index_lib.Shards,
    image: str,
    captions: str,
    columns: Sequence[str],
    cache_mb: int,
  ):
    self._shards = shards
    self._image, self._captions, self._columns = image, captions, columns
    self._index = index = shards.index(_INDEX)
    self._starts = np.concatenate([[0], np.cumsum(index.rows["rows"])])
    self._tables = _Cache(cache_mb << 20)
    self._footers = _Cache(cache_mb << 18)
    number, _ = index.locate(0)
    schema = self._footer(number).meta.schema.to_arrow_schema()
    for name in (image, captions, *columns):
      errors.pick(
        dict.fromkeys(schema.names), name, f"column of {shards.paths[number]}"
      )
    kind = str(schema.field(image).type)
    # Of a struct of bytes and path only the bytes are read.
    self._read = f"{image}.bytes" if kind.startswith("struct") else image

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._row(i, with_image=True)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns an example without its image, which is not read."""
    return self._row(i, with_image=False)

  def warn_if_large(self) -> None:
    """Logs what large row groups cost, and how to rewrite the files."""
    groups = self._index.rows
    mean = groups["bytes"].mean()
    if mean > _LARGE:
      log.warning(
        "%s have row groups of %d rows, %d MiB: reading one example decodes "
        "that much; for faster reading rewrite each file: %s",
        self._shards.what,
        groups["rows"].mean(),
        int(mean) >> 20,
        _REWRITE,
      )

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

    def make() -> Any:
      names = [self._captions, *self._columns]
      names = [self._read, *names] if with_image else names
      path = self._shards.paths[number]
      with _opened(path, self._footer(number).meta) as found:
        return found.read_row_group(
          group - self._index.first(number), columns=names, use_threads=False
        )

    try:
      table = self._tables.get((group, with_image), make)
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
    texts = values.get(self._captions)
    texts = [texts] if isinstance(texts, (str, bytes)) else texts
    texts = [text for text in texts or [] if text is not None]
    if not texts:
      raise BadExample(f"{where} has no caption", kind="missing caption")
    example["captions"] = list(map(captions_lib.caption, texts))
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


class _Footer:
  """The metadata at the end of a file."""

  def __init__(self, path: str):
    with _opened(path) as found:
      self.meta = found.metadata
    self.nbytes = self.meta.serialized_size


def parquet(
  shards: str | Sequence[str],
  image: str = "image",
  captions: str = "caption",
  columns: Sequence[str] = (),
  cache_mb: int = 512,
) -> source_lib.Source:
  """Opens Parquet files with encoded images and captions.

  An example is {"image": bytes, "captions": [str, ...]} and the `columns`.

  Args:
    shards: paths, local or in a bucket, with globs and brace lists.
    image: the column of images: bytes, or structs of bytes and path as in
      Hugging Face's datasets.
    captions: the column of captions, each a text or a list of texts.
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
  records.warn_if_large()
  return source_lib.Source(
    source_lib.brief_name("parquet", shards),
    records,
    faults=faults.counts(found.faults),
  )
