"""Precomputed image embeddings, with their captions.

Folders of two layouts are read. The layout that tools.embed writes:

  embeddings-00000-of-00004.array_record ..  a record consists of the other
      features as JSON in UTF-8, and the embedding's width * itemsize bytes
  index.json  count, width, dtype, the tower's checksum, its preprocessing, and
      the shards' names, counts and sizes; it is written last, so a folder
      that has it is complete

A layout that is easy to write for other programs:

  embeddings.npy  (N, W) float16 or float32 (or bfloat16, as ml_dtypes saves it)
  captions.jsonl  N lines, each a JSON string (the caption), a list of strings
      or an object of features, such as {"captions": ["a cat"], "label": 3}
  info.json       optional: {"tower": any text that names the tower, "pp_image":
      its preprocessing, "label_names": {feature: [names of its classes]}}

In both, an example has these features, and "image", the embedding (W,).
"""

import json
import math
import mmap
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from sigjax import errors

DTYPES = {
  "float16": np.dtype(np.float16),
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "index.json"


def encode(features: dict[str, Any]) -> bytes:
  """Returns the first part of a record; the embedding's bytes follow it."""
  return json.dumps(
    plain(features), ensure_ascii=False, separators=(",", ":")
  ).encode()


def plain(value: Any) -> Any:
  """Converts a feature's value for JSON; bytes have to be text in UTF-8."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {key: plain(x) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(x) for x in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return plain(value.tolist())
  return value


class ArrayRecordEmbeddings:
  """Random access to the embeddings that tools.embed wrote.

  Args:
    path: the folder.
    index: its index.json.

  Raises:
    UserError: a shard is missing or has another size than it was written with.
  """

  def __init__(self, path: pathlib.Path, index: dict[str, Any]):
    from array_record.python import array_record_data_source

    for shard in index["shards"]:
      file = path / shard["file"]
      size = file.stat().st_size if file.exists() else None
      if size != shard["bytes"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise errors.UserError(
          f"{file} {found}, but {shard['bytes']} were written: copy it "
          "again, or delete it and index.json and run tools.embed again"
        )
    self._records = array_record_data_source.ArrayRecordDataSource(
      [str(path / shard["file"]) for shard in index["shards"]]
    )
    if len(self._records) != index["count"]:
      raise errors.UserError(
        f"{path} has {len(self._records)} records, but its {INDEX} says "
        f"{index['count']}; run tools.embed again, into another folder"
      )
    self._dtype = DTYPES[index["dtype"]]
    self._bytes = index["width"] * self._dtype.itemsize

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self._records[i]
    return {
      **json.loads(record[: -self._bytes]),
      "image": np.frombuffer(record[-self._bytes :], self._dtype),
    }


class NpyEmbeddings:
  """Random access to embeddings.npy and captions.jsonl, both memory-mapped.

  Args:
    path: the folder.

  Raises:
    UserError: a file is missing or damaged, or their lengths differ.
  """

  def __init__(self, path: pathlib.Path):
    try:
      self._z = np.load(
        path / "embeddings.npy", mmap_mode="r", allow_pickle=False
      )
      with open(path / "captions.jsonl", "rb") as f:
        self._lines = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as e:
      raise errors.UserError(
        f"{path} has neither {INDEX} nor embeddings.npy and captions.jsonl; "
        "is it still being written by tools.embed?"
      ) from e
    except (ValueError, EOFError, OSError) as e:  # truncated, empty, no .npy
      raise errors.UserError(
        f"{path}: embeddings.npy or captions.jsonl cannot be read: {e}"
      ) from e
    if self._z.dtype == "V2":  # as NumPy reads bfloat16
      self._z = self._z.view(ml_dtypes.bfloat16)
    if self._z.ndim != 2 or self._z.dtype not in DTYPES.values():
      raise errors.UserError(
        f"{path}/embeddings.npy is {self._z.dtype} {self._z.shape}; it has "
        f"to be (N, W) of {', '.join(DTYPES)}"
      )
    text = np.frombuffer(self._lines, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    if text[-1] != ord("\n"):
      ends = np.append(ends, len(text))
    self._ends = ends
    if len(ends) != len(self._z):
      raise errors.UserError(
        f"{path}: embeddings.npy has {len(self._z)} rows, captions.jsonl "
        f"{len(ends)} lines; both need one per example"
      )

  def __len__(self) -> int:
    return len(self._z)

  def __getitem__(self, i: int) -> dict[str, Any]:
    start = int(self._ends[i - 1]) + 1 if i else 0
    try:
      value = json.loads(self._lines[start : int(self._ends[i])])
    except ValueError as e:
      raise errors.UserError(
        f"line {i + 1} of captions.jsonl is not JSON: {e}"
      ) from e
    if isinstance(value, str):
      value = [value]
    if isinstance(value, list):
      value = {"captions": value}
    return {**value, "image": np.array(self._z[i])}


def read_index(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the index.json of a folder, or None if there is none."""
  file = pathlib.Path(path) / INDEX
  try:
    return json.loads(file.read_text()) if file.exists() else None
  except ValueError as e:
    raise errors.UserError(f"{file} is damaged: {e}") from e


def open_folder(
  path: str | os.PathLike[str],
  tower: str | None = None,
  pp_image: str | None = None,
) -> tuple[Any, str | None, dict[str, list[str]]]:
  """Opens a folder of either layout.

  Args:
    path: the folder.
    tower: what its "tower" has to be or begin with; None: anything.
    pp_image: what its "pp_image" has to be; None: anything.

  Returns:
    (records, tower or None, label_names).

  Raises:
    UserError: there is no such folder, it is incomplete or damaged, or it has
      another tower or preprocessing.
  """
  path = pathlib.Path(path)
  index = read_index(path)
  if index is None:
    info = path / "info.json"
    about = json.loads(info.read_text()) if info.exists() else {}
    records = NpyEmbeddings(path)
  else:
    about, records = index, ArrayRecordEmbeddings(path, index)
  found = about.get("tower")
  for key, want, same in (
    ("tower", tower, (found or "").startswith(tower or "")),
    ("pp_image", pp_image, about.get("pp_image") == pp_image),
  ):
    if want and not same:
      raise errors.UserError(
        f"the embeddings in {path} have {key} {about.get(key)}, but the "
        f"config wants {want}: compute them again, or change the config"
      )
  return records, found, about.get("label_names", {})


def storage(count: int, width: int, dtype: str) -> int:
  """Returns the bytes that `count` embeddings take, without captions."""
  return math.prod((count, width, DTYPES[dtype].itemsize))
