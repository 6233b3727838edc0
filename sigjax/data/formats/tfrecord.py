"""TFRecord files with random access, and the TFDS datasets stored so.

A record is its length (8 bytes), a checksum of that (4), the data, a checksum
of the data (4). Reading the lengths once gives where each record is.
"""

import bisect
import struct

import numpy as np

from sigjax.data import faults
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.shards import index as index_lib

_HEAD, _TAIL = 12, 4  # bytes around the data
_ROW = np.dtype([("at", "<u8"), ("size", "<u4")])  # of the data, in bytes


def _table():
  """The table of CRC-32C (Castagnoli): the remainder of each byte."""
  table = []
  for value in range(256):
    for _ in range(8):
      value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    table.append(value)
  return table


_TABLE = _table()


def checksum(data):
  """Returns the masked CRC-32C of TFRecord, an int of 32 bits."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _build(opened, number, size):
  """Builds the index of a TFRecord file; see shards.Kind.

  What precedes the first damage is used. The checksums of the lengths are
  verified; those of the data are not, here or later: in Python it would take
  longer than decoding the image, which fails if that is damaged.
  """
  window, at, rows, wrong = files.Window(opened, number, size), 0, [], {}
  while at < size:
    head = window(at, _HEAD)
    fault = "truncated shard" if len(head) < _HEAD else None
    if not fault:
      length, told = struct.unpack("<QI", head)
      if checksum(head[:8]) != told or length >= 2**32:
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


class Records:
  """Examples of the TFRecord files of a TFDS dataset.

  Args:
    shards: a shards.Shards.
    ranges: [(number of the shard, its first record, how many)]; what is past
      the end of a shard, as one that was cut has, is left out.
    parse: fn(bytes) -> dict of features.
  """

  def __init__(self, shards, ranges, parse):
    self._files, self._parse = shards.files, parse
    self._index = index = shards.index(_INDEX)
    self._firsts, self._starts = [], [0]
    for number, skip, take in ranges:
      take = min(take, len(index.of_shard(number)) - skip)
      if take > 0:
        self._firsts.append(index.first(number) + skip)
        self._starts.append(self._starts[-1] + take)

  def __len__(self):
    return self._starts[-1]

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    part = bisect.bisect_right(self._starts, i) - 1
    number, (at, size) = self._index.locate(
      self._firsts[part] + int(i) - self._starts[part]
    )
    data = self._files.read(number, at, size)
    try:
      return self._parse(data)
    except Exception as e:  # protobuf's and TFDS's own have no common base
      raise BadExample(
        f"{self._files.paths[number]}: the record at byte {at} cannot be "
        f"parsed: {e}",
        kind="damaged record",
      ) from e


def of_builder(builder, split, decoders):
  """Opens a split of a TFDS dataset that is stored as TFRecord.

  Args:
    builder: a TFDS builder.
    split: "train[:90%]" and the like.
    decoders: of features that are to be left as they are.

  Returns:
    Records, and {kind: count} of what is wrong with the files.

  Raises:
    ValueError: no such split.
    UserError: none of its files is there.
  """
  from tensorflow_datasets.core.data_sources import base

  wanted = base.file_instructions(builder.info, split)
  if not wanted:
    raise ValueError("an empty split")
  paths = list(dict.fromkeys(str(part.filename) for part in wanted))
  number = {path: n for n, path in enumerate(paths)}
  found = index_lib.Shards(
    list(map(files.canonical, paths)), f"TFRecord files of {builder.info.name}"
  )
  records = Records(
    found,
    [(number[str(part.filename)], part.skip, part.take) for part in wanted],
    lambda data: builder.info.features.deserialize_example_np(
      data, decoders=decoders
    ),
  )
  return records, faults.counts(found.faults)
