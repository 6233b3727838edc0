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
      or an object of features, such as {"captions": ["a cat"], "label": 3};
      captions by language, {"captions": {"en": "a cat", "de": ["eine Katze"]}},
      become two features, captions and the language of each
  info.json       optional: {"tower": any text that names the tower, "pp_image":
      its preprocessing, "label_names": {feature: [names of its classes]},
      "made_by": {"weights": what tools.predict opens the tower with}}

In both, an example has these features, and "image", the embedding (W,).
"""

import hashlib
import json
import math
import mmap
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from sigjax import errors
from sigjax.data.example import captions
from sigjax.data.faults import BadExample

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


def _features(data: bytes, where: str) -> dict[str, Any]:
  """Returns the features that a line or record of JSON holds.

  Raises:
    BadExample: the JSON is damaged, or is neither text, list nor object.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise BadExample(
      f"{where} is not JSON: {e}", kind="JSON does not parse"
    ) from e
  if isinstance(value, str):
    value = [value]
  if isinstance(value, list):
    value = {"captions": value}
  if not isinstance(value, dict):
    raise BadExample(
      f"{where} is neither a text, a list of texts nor an object",
      kind="JSON does not parse",
    )
  texts = value.get("captions")
  if isinstance(texts, dict) and "text" not in texts:
    value["captions"], value["language"] = captions.of_languages(texts)
  return value


class ArrayRecordEmbeddings:
  """Random access to the embeddings that tools.embed wrote.

  Args:
    path: the folder.
    index: its index.json.

  Attributes:
    identity: a digest of index.json.

  Raises:
    UserError: index.json lacks something, or a shard is missing or has another
      size than it was written with.
  """

  def __init__(self, path: pathlib.Path, index: dict[str, Any]):
    from array_record.python import array_record_data_source

    try:
      self._dtype = DTYPES[index["dtype"]]
      self._width, count = int(index["width"]), int(index["count"])
      shards = [(path / x["file"], int(x["bytes"])) for x in index["shards"]]
    except (LookupError, TypeError, ValueError) as e:
      raise errors.UserError(
        f"{path / INDEX} is damaged: {type(e).__name__} {e}; run tools.embed "
        "again"
      ) from e
    for file, written in shards:
      size = file.stat().st_size if file.exists() else None
      if size != written:
        found = "is missing" if size is None else f"has {size} bytes"
        raise errors.UserError(
          f"{file} {found}, but {written} were written: copy it again, or "
          "delete it and index.json and run tools.embed again"
        )
    try:
      self._records = array_record_data_source.ArrayRecordDataSource(
        [str(file) for file, _ in shards]
      )
      found = len(self._records)
    except Exception as e:  # array_record's have no common base class
      raise errors.UserError(
        f"the shards in {path} cannot be read: {e}; run tools.embed again"
      ) from e
    if found != count:
      raise errors.UserError(
        f"{path} has {found} records, but its {INDEX} says {count}; run "
        "tools.embed again, into another folder"
      )
    self._path = path
    text = json.dumps(index, sort_keys=True)
    self.identity = hashlib.sha256(text.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict[str, Any]:
    try:
      record = self._records[i]
    except IndexError:
      raise
    except Exception as e:  # array_record's have no common base class
      raise BadExample(
        f"record {i} cannot be read: {e}", kind="damaged record"
      ) from e
    size = self._width * self._dtype.itemsize
    if len(record) < size:
      raise BadExample(f"record {i} is too short", kind="damaged record")
    split = len(record) - size
    return {
      **_features(record[:split], f"record {i} of {self._path}"),
      "image": np.frombuffer(record[split:], self._dtype),
    }


class NpyEmbeddings:
  """Random access to embeddings.npy and captions.jsonl, both memory-mapped.

  Args:
    path: the folder.

  Attributes:
    identity: a digest of the sizes of the two files.

  Raises:
    UserError: a file is missing or damaged, or their lengths differ.
  """

  def __init__(self, path: pathlib.Path):
    try:
      z = np.load(path / "embeddings.npy", mmap_mode="r", allow_pickle=False)
      with open(path / "captions.jsonl", "rb") as f:
        self._lines = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as e:
      raise errors.UserError(
        f"{path} has neither {INDEX} nor embeddings.npy and captions.jsonl; "
        "is it still being written by tools.embed?"
      ) from e
    except Exception as e:  # truncated, empty, no .npy: NumPy raises anything
      raise errors.UserError(
        f"{path}: embeddings.npy or captions.jsonl cannot be read: {e}"
      ) from e
    if not isinstance(z, np.ndarray):
      raise errors.UserError(f"{path}/embeddings.npy is an .npz; save an array")
    if z.dtype == "V2":  # as NumPy reads bfloat16
      z = z.view(ml_dtypes.bfloat16)
    if z.ndim != 2 or z.dtype not in DTYPES.values():
      raise errors.UserError(
        f"{path}/embeddings.npy is {z.dtype} {z.shape}; it has to be (N, W) of "
        f"{', '.join(DTYPES)}"
      )
    text = np.frombuffer(self._lines, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    if text[-1] != ord("\n"):
      ends = np.append(ends, len(text))
    if len(ends) != len(z):
      raise errors.UserError(
        f"{path}: embeddings.npy has {len(z)} rows, captions.jsonl "
        f"{len(ends)} lines; both need one per example"
      )
    self._z, self._ends = z, ends
    sizes = [[*z.shape, str(z.dtype)], len(text)]
    self.identity = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._z)

  def __getitem__(self, i: int) -> dict[str, Any]:
    start = int(self._ends[i - 1]) + 1 if i else 0
    line = self._lines[start : int(self._ends[i])]
    return {
      **_features(line, f"line {i + 1} of captions.jsonl"),
      "image": np.array(self._z[i]),
    }


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    UserError: the file is damaged, or holds no object.
  """
  try:
    found = json.loads(file.read_bytes())
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f"{file} is damaged: {e}") from e
  if not isinstance(found, dict):
    raise errors.UserError(f"{file} is damaged: it holds no object")
  return found


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the index.json or info.json of a folder; {} if it has neither."""
  for name in (INDEX, "info.json"):
    file = pathlib.Path(path) / name
    if file.exists():
      return _read_json(file)
  return {}


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
  about = read_about(path)
  if (path / INDEX).exists():
    records = ArrayRecordEmbeddings(path, about)
  else:
    records = NpyEmbeddings(path)
  found, label_names = about.get("tower"), about.get("label_names", {})
  if not isinstance(found, str | None) or not isinstance(label_names, dict):
    raise errors.UserError(
      f'{path}: "tower" has to be a text, and "label_names" an object'
    )
  for key, want, same in (
    ("tower", tower, (found or "").startswith(tower or "")),
    ("pp_image", pp_image, about.get("pp_image") == pp_image),
  ):
    if want and not same:
      raise errors.UserError(
        f"the embeddings in {path} have {key} {about.get(key)}, but the "
        f"config wants {want}: compute them again, or change the config"
      )
  return records, found, label_names


def storage(count: int, width: int, dtype: str) -> int:
  """Returns the bytes that `count` embeddings take, without captions."""
  return math.prod((count, width, DTYPES[dtype].itemsize))
