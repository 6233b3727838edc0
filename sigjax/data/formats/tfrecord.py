"""TFDS datasets that are stored as TFRecord files, with random access.

A record consists of its length (8 bytes), a checksum of the length (4), the
data and a checksum of the data (4). The index of a file is made by reading the
lengths once.
"""

import bisect
from collections.abc import Callable, Sequence
import struct
from typing import Any

import numpy as np
from tensorboard.summary.writer import record_writer

from sigjax.data import faults
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards import index as index_lib

_HEAD, _TAIL = 12, 4  # bytes before and after the data
_ROW = np.dtype([("at", "<u8"), ("size", "<u4")])  # of the data, in bytes


def _build(
  opened: files.Files, number: int, size: int
) -> tuple[np.ndarray, index_lib.Faults]:
  """Builds the index of a TFRecord file; see index.Kind.

  The records before the first damage are used. The checksums of the lengths are
  verified, those of the data never: in Python this would take longer than
  decoding the image, and decoding a damaged image fails anyway.
  """
  window, at, rows, wrong = files.Window(opened, number, size), 0, [], {}
  while at < size:
    head = window(at, _HEAD)
    length, fault = 0, None
    if len(head) < _HEAD:
      fault = "truncated shard"
    else:
      length, checksum = struct.unpack("<QI", head)
      if record_writer.masked_crc32c(head[:8]) != checksum or length >= 2**32:
        fault = "damaged shard"
      elif at + _HEAD + length + _TAIL > size:
        fault = "truncated shard"
    if fault:
      wrong[fault] = 1, opened.paths[number]
      break
    rows.append((at + _HEAD, length))
    at += _HEAD + length + _TAIL
  return np.array(rows, _ROW), wrong


_INDEX = index_lib.Kind("records", _ROW, _build)


class TFRecordRecords:
  """Random access to the examples of a TFDS dataset's TFRecord files.

  Args:
    shards: the files.
    ranges: [(number of the shard, its first record, how many)]. Records past
      the end of a truncated shard are left out.
    parse: fn(bytes) -> dict of features.
    parse_brief: the same without images.

  Attributes:
    identity: of the shards.
  """

  def __init__(
    self,
    shards: index_lib.Shards,
    ranges: Sequence[tuple[int, int, int]],
    parse: Callable[[bytes], dict[str, Any]],
    parse_brief: Callable[[bytes], dict[str, Any]],
  ):
    self._files, self._parse = shards.files, parse
    self._parse_brief = parse_brief
    self.identity = shards.identity

    def there(index: index_lib.Index, number: int, skip: int, take: int) -> int:
      return max(0, min(take, len(index.of_shard(number)) - skip))

    def missing(index: index_lib.Index) -> dict[int, int]:
      counts: dict[int, int] = {}
      for number, skip, take in ranges:
        lacks = take - there(index, number, skip, take)
        if lacks:
          counts[number] = counts.get(number, 0) + lacks
      return counts

    self._index = index = shards.index(_INDEX, missing)
    self._firsts, self._starts = [], [0]
    for number, skip, take in ranges:
      take = there(index, number, skip, take)
      if take > 0:
        self._firsts.append(index.first(number) + skip)
        self._starts.append(self._starts[-1] + take)

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._read(i, self._parse)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns example i without its images, which saves their parsing."""
    return self._read(i, self._parse_brief)

  def _read(self, i, parse):
    if not 0 <= i < len(self):
      raise IndexError(i)
    part = bisect.bisect_right(self._starts, i) - 1
    number, (at, size) = self._index.locate(
      self._firsts[part] + int(i) - self._starts[part]
    )
    data = self._files.read(number, at, size)
    try:
      return parse(data)
    except Exception as e:  # protobuf's and TFDS's have no common base class
      raise BadExample(
        f"{self._files.paths[number]}: the record at byte {at} cannot be "
        f"parsed: {e}",
        kind="damaged record",
      ) from e


def of_builder(
  builder: Any,
  split: str,
  decoders: dict[str, Any],
  parse_brief: Callable[[bytes], dict[str, Any]],
) -> tuple[TFRecordRecords, dict[str, int]]:
  """Opens a split of a TFDS dataset that is stored as TFRecord.

  Args:
    builder: a TFDS builder.
    split: "train[:90%]" and the like.
    decoders: of the features that are to stay encoded.
    parse_brief: as of TFRecordRecords.

  Returns:
    The records, and {kind: count} of what is wrong with the files.

  Raises:
    ValueError: there is no such split.
    UserError: all of its files are missing.
  """
  from tensorflow_datasets.core import splits
  from tensorflow_datasets.core.data_sources import base

  wanted = base.file_instructions(builder.info, splits.Split(split))
  if not wanted:
    raise ValueError("an empty split")
  paths = list(dict.fromkeys(str(part.filename) for part in wanted))
  number = {path: n for n, path in enumerate(paths)}
  shards = index_lib.Shards(
    list(map(files.canonical, paths)), f"TFRecord files of {builder.info.name}"
  )
  records = TFRecordRecords(
    shards,
    [(number[str(part.filename)], part.skip, part.take) for part in wanted],
    lambda data: builder.info.features.deserialize_example_np(
      data, decoders=decoders
    ),
    parse_brief,
  )
  return records, faults.counts(shards.faults)
