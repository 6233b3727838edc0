"""Parquet files with images and captions, as Hugging Face's datasets have them.

Parquet is read by whole row groups: one example drawn at random costs the
decoding of all the rows of its group, however few bytes it has itself. Groups
that were decoded are kept, up to a number of bytes, but a shuffled run over a
large dataset seldom meets one again. So small row groups are what makes reading
quick: 16 rows are good, 100 bearable. Where they are large, a log line gives
the one line that rewrites a file.
"""

import collections
from concurrent import futures
import logging
import threading

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards import index as index_lib

log = logging.getLogger("sigjax")

_LARGE = 8 << 20  # bytes of a row group, about ten milliseconds of decoding
_ROW = np.dtype([("rows", "<i8"), ("bytes", "<i8")])  # of a row group
_REWRITE = (
  'python -c "import sys, pyarrow.parquet as p; f = p.ParquetFile('
  "sys.argv[1]); w = p.ParquetWriter(sys.argv[2], f.schema_arrow, "
  "compression='NONE', use_dictionary=False); [w.write_batch(b, "
  'row_group_size=16) for b in f.iter_batches(1024)]; w.close()" OLD NEW'
)


def _library():
  try:
    import pyarrow.parquet  # pylint: disable=import-outside-toplevel

    return pyarrow.parquet
  except ImportError:
    raise errors.UserError(
      "Parquet files are read by pyarrow, which is not installed; "
      "pip install pyarrow"
    ) from None


def _opened(path, metadata=None):
  """Opens a file; ParquetFile may not be shared by threads, metadata may."""
  if not files.is_remote(path):
    return _library().ParquetFile(path, memory_map=True, metadata=metadata)
  return _library().ParquetFile(
    files.file_system(path).open(path), metadata=metadata, pre_buffer=True
  )


def _build(opened, number, size):
  """Builds the index of a file, a row for each row group; see shards.Kind."""
  del size
  path = opened.paths[number]
  try:
    with _opened(path) as found:
      meta = found.metadata
      groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
      rows = [(group.num_rows, group.total_byte_size) for group in groups]
  except Exception as e:  # pyarrow's errors have no common base
    raise BadExample(
      f"{path} cannot be read as Parquet: {e}", kind="damaged shard"
    ) from e
  return np.array(rows, _ROW), {}


_INDEX = index_lib.Kind("groups", _ROW, _build)


class _Cache:
  """What was made of keys, up to `limit` bytes, for many threads.

  Who asks for what another thread is making waits for that.
  """

  def __init__(self, limit):
    self._limit, self._bytes = limit, 0
    self._made = collections.OrderedDict()  # key -> Future
    self._lock = threading.Lock()

  def get(self, key, make):
    """Returns make(), which has `nbytes`, or what it gave before."""
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


class Records:
  """Rows of Parquet files; see parquet()."""

  def __init__(self, shards, image, captions, columns, cache_mb):
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
    # Of a struct only the bytes are read.
    self._read = f"{image}.bytes" if kind.startswith("struct") else image

  def __len__(self):
    return int(self._starts[-1])

  def __getitem__(self, i):
    return self._row(i, with_image=True)

  def brief(self, i):
    """Returns the example without its image, and without reading that."""
    return self._row(i, with_image=False)

  def warn_if_large(self):
    """Logs what large row groups cost, and what to do about it."""
    groups = self._index.rows
    mean = groups["bytes"].mean()
    if mean > _LARGE:
      log.warning(
        "%s have row groups of %d rows, %d MiB: as much is decoded for each "
        "example that is drawn; for quick reading rewrite each: %s",
        self._shards.what,
        groups["rows"].mean(),
        int(mean) >> 20,
        _REWRITE,
      )

  def _footer(self, number):
    return self._footers.get(
      number, lambda: _Footer(self._shards.paths[number])
    )

  def _row(self, i, with_image):
    if not 0 <= i < len(self):
      raise IndexError(i)
    group = int(np.searchsorted(self._starts, i, side="right")) - 1
    number, _ = self._index.locate(group)
    row = int(i - self._starts[group])
    where = f"{self._shards.paths[number]}, row {i - self._first(number)}"

    def make():
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
    except (OSError, ValueError, LookupError) as e:  # of which pyarrow's are
      raise BadExample(
        f"{where} cannot be read: {e}", kind="unreadable shard"
      ) from e
    return self._example(values, where, with_image)

  def _first(self, number):
    """The number of a file's first row."""
    return int(self._starts[self._index.first(number)])

  def _example(self, values, where, with_image):
    # A file that lacks a column has None there, as one that has it may.
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

  def column(self, name):
    """Yields arrays of what all rows have in a column, in order.

    None if there is no such column.
    """
    number, _ = self._index.locate(0)
    names = self._footer(number).meta.schema.to_arrow_schema().names
    if name not in names or name == self._image:
      return None

    def read(number):
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
  """What a file says of itself at its end."""

  def __init__(self, path):
    with _opened(path) as found:
      self.meta = found.metadata
    self.nbytes = self.meta.serialized_size


def parquet(
  shards, image="image", captions="caption", columns=(), cache_mb=512
):
  """Parquet files with encoded images and captions.

  An example is {"image": bytes, "captions": [str, ...]} and the `columns`.

  Args:
    shards: paths, local or in a bucket, with globs and brace lists.
    image: the column of images: bytes, or the struct of bytes and path that
      Hugging Face's datasets have.
    captions: the column of captions, each a text or a list of texts.
    columns: further columns that become features. A filter (`only`) needs none
      of them here.
    cache_mb: MiB of decoded row groups that are kept.

  Returns:
    A Source. Rows without an image or a caption are noticed when they are read.

  Raises:
    UserError: nothing is there, or no such column.
  """
  _library()
  found = index_lib.Shards(
    files.expand(shards, "Parquet files"), "Parquet files"
  )
  records = Records(found, image, captions, tuple(columns), cache_mb)
  records.warn_if_large()
  return source_lib.Source(
    source_lib.brief_name("parquet", shards),
    records,
    faults=faults.counts(found.faults),
  )
