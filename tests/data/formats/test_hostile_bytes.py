"""Every parser of foreign bytes, on bytes that were damaged at random.

Nothing but UserError and BadExample may come out, whatever is read.
"""

import io
import json
import pathlib
import shutil
import tarfile

from array_record.python import array_record_module
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.formats import embeddings

N = 12  # examples in each


def tar(path):
  with tarfile.open(path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
    for i in range(N):
      for ending, data in (
        ("jpg", b"image" * 20),
        ("txt", f"text {i}".encode()),
        ("json", json.dumps({"caption": "c", "width": i}).encode()),
      ):
        info = tarfile.TarInfo(f"{'é' * 60}{i}.{ending}")
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
  return dict(kind="tar", shards=str(path / "a.tar"), json=["width"])


def parquet(path):
  rows = {
    "image": [{"bytes": b"image" * 20, "path": "a"}] * N,
    "caption": [[f"a text {i}"] for i in range(N)],
    "width": list(range(N)),
  }
  pq.write_table(pa.table(rows), path / "a.parquet", row_group_size=5)
  return dict(kind="parquet", shards=str(path / "a.parquet"), columns=["width"])


def folder(path, table, text):
  for i in range(N):
    (path / f"{i}.jpg").write_bytes(b"image")
  (path / table).write_text(text)
  return dict(kind="folder", path=str(path))


def csv(path):
  rows = "".join(f'{i}.jpg,"a, ""text"" {i}",{i}\n' for i in range(N))
  return folder(path, "captions.csv", "file,caption,width\n" + rows)


def jsonl(path):
  rows = [dict(file=f"{i}.jpg", caption=["a"], width=i) for i in range(N)]
  return folder(path, "captions.jsonl", "\n".join(map(json.dumps, rows)))


def coco(path):
  images = [dict(id=i, file_name=f"{i}.jpg", width=i) for i in range(N)]
  notes = [dict(image_id=i, caption=f"text {i}") for i in range(N)]
  text = json.dumps(dict(images=images, annotations=notes))
  return folder(path, "captions_a.json", text)


def npy(path):
  np.save(path / "embeddings.npy", np.zeros((N, 4), np.float32))
  lines = [json.dumps({"captions": ["a"], "width": i}) for i in range(N)]
  (path / "captions.jsonl").write_text("\n".join(lines))
  (path / "info.json").write_text('{"tower": "t", "label_names": {"a": ["b"]}}')
  return dict(kind="embeddings", path=str(path))


def array_record(path):
  file = path / "embeddings-00000-of-00001.array_record"
  writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
  for i in range(N):
    record = embeddings.encode({"captions": ["a"], "width": i})
    writer.write(record + np.zeros(4, np.float16).tobytes())
  writer.close()
  shard = dict(file=file.name, count=N, bytes=file.stat().st_size)
  about = dict(count=N, width=4, dtype="float16", tower="t", shards=[shard])
  (path / "index.json").write_text(json.dumps(about))
  return dict(kind="embeddings", path=str(path))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """Cuts, flips, replaces, repeats or removes a few bytes."""
  data = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(data) + 1))
    n = int(rng.integers(1, 20))
    what = rng.integers(6)
    if what == 0:
      del data[at:]
    elif what == 1:
      data[at : at + n] = rng.bytes(n)
    elif what == 2:
      data[at:at] = data[at : at + 50 * n]
    elif what == 3:
      del data[at : at + n]
    elif what == 4:
      data[at : at + 1] = rng.choice([b"\0", b'"', b"\n", b"{", b"-", b"9"])
    elif at < len(data):
      data[at] ^= 1 << rng.integers(8)
  return bytes(data)


def use(section):
  """Reads all of a source; returns how many faults or errors there were."""
  bad = 0
  for more in ({}, {"only": {"width": (3, None)}}):
    try:
      source = kinds.open_source(**section, **more)
    except errors.UserError as e:
      assert "\n" not in str(e)[:40]
      bad += 1
      continue
    for i in range(len(source)):
      for read in (source.records.__getitem__, source.brief):
        try:
          read(i)
        except errors.UserError:  # of which BadExample is one
          bad += 1
  return bad


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
  "make, count",
  [
    *[(tar, 40), (parquet, 60), (csv, 60), (jsonl, 60), (coco, 60)],
    *[(npy, 60), (array_record, 60)],
  ],
)
def test_only_user_errors_come_out(make, count, tmp_path):
  path = tmp_path / "data"
  path.mkdir()
  section = make(path)
  assert not use(section)
  whole = {
    file: file.read_bytes()
    for file in path.iterdir()
    if file.suffix not in (".jpg", ".npz")
  }
  bad = 0
  for seed in range(count):
    rng = np.random.default_rng(seed)
    for file, data in whole.items():
      file.write_bytes(data)
    files = sorted(whole)
    file = files[rng.integers(len(files))]
    file.write_bytes(damaged(whole[file], rng))
    bad += bool(use(section))
  assert bad > count / 4  # not all damage is noticed, but much is


def test_damaged_indices_change_nothing(tmp_path):
  path = tmp_path / "data"
  path.mkdir()
  section = tar(path)
  assert not use(section)
  indices = [file for file in path.iterdir() if file.suffix == ".npz"]
  assert len(indices) == 2  # of samples, and of the values at "width"
  whole = {file: file.read_bytes() for file in indices}
  for seed in range(40):
    rng = np.random.default_rng(seed)
    for file, data in whole.items():
      file.write_bytes(damaged(data, rng))
    assert not use(section)


def test_damaged_tfrecords(shapes_dir, tmp_path):
  old = pathlib.Path(shapes_dir) / "shapes" / "1.0.0"
  path = tmp_path / "data" / "shapes" / "1.0.0"
  shutil.copytree(old, path)
  (file,) = path.glob("*test.array_record*")
  reader = array_record_module.ArrayRecordReader(str(file))
  records = [reader.read([i])[0] for i in range(4)]
  reader.close()
  info = json.loads((path / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split["shardLengths"] = ["4"]
  (path / "dataset_info.json").write_text(json.dumps(info))
  from tensorboard.summary.writer import record_writer

  file = path / "shapes-test.tfrecord-00000-of-00001"
  writer = record_writer.RecordWriter(file.open("wb"))
  for record in records:
    writer.write(record)
  writer.close()
  section = dict(
    kind="tfds", name="shapes", split="test", data_dir=str(tmp_path / "data")
  )

  def bad():
    try:
      source = kinds.open_source(**section)
    except errors.UserError:
      return 4
    missing = sum(source.faults.values())
    for i in range(len(source)):
      try:
        source.records[i]
      except errors.UserError:
        missing += 1
    return missing

  assert not bad()
  whole, noticed = file.read_bytes(), 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    file.write_bytes(damaged(whole, rng))
    noticed += bool(bad())
  assert noticed > 10
