"""TFDS datasets in real TFRecord files, beside ArrayRecord copies of them."""

import concurrent.futures
import io
import json
import shutil
import struct

from array_record.python import array_record_module
import numpy as np
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import faults, kinds
from sigjax.data.formats import tfds as tfds_lib


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))


def crc(data):
  """Masked CRC-32C, bit by bit."""
  value = 0xFFFFFFFF
  for byte in data:
    value ^= byte
    for _ in range(8):
      value = value >> 1 ^ 0x82F63B78 * (value & 1)
  value ^= 0xFFFFFFFF
  return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write(path, records):
  with open(path, "wb") as f:
    for data in records:
      length = struct.pack("<Q", len(data))
      f.write(
        length
        + struct.pack("<I", crc(length))
        + data
        + struct.pack("<I", crc(data))
      )


@pytest.fixture(scope="module")
def copy(shapes_dir, tmp_path_factory):
  """The data_dir of "shapes" as TFRecord: train in three files, test in one."""
  old = shapes_dir / "shapes" / "1.0.0"
  path = tmp_path_factory.mktemp("tfrecord")
  new = path / "shapes" / "1.0.0"
  new.mkdir(parents=True)
  for file in old.glob("*.[tj]*"):
    if "array_record" not in file.name:
      shutil.copy(file, new)
  info = json.loads((new / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    name = split["name"]
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    records = []
    for file in sorted(old.glob(f"shapes-{name}.array_record*")):
      reader = array_record_module.ArrayRecordReader(str(file))
      records += [reader.read([i])[0] for i in range(reader.num_records())]
      reader.close()
    cuts = [0, 50, 120, len(records)] if name == "train" else [0, len(records)]
    split["shardLengths"] = [str(b - a) for a, b in zip(cuts, cuts[1:])]
    for n, (a, b) in enumerate(zip(cuts, cuts[1:])):
      write(
        new / f"shapes-{name}.tfrecord-{n:05d}-of-{len(cuts) - 1:05d}",
        records[a:b],
      )
  (new / "dataset_info.json").write_text(json.dumps(info))
  return path


def assert_same(a, b):
  assert list(a) == list(b)
  for key, value in a.items():
    assert type(value) is type(b[key]), key
    np.testing.assert_array_equal(value, b[key])


@pytest.mark.parametrize(
  "split",
  [
    "train",
    "test",
    "train[:60]",
    "train[49:51]",
    "train[-10%:]",
    "test+train[100:]",
    "train[:5]+train[2:3]",
  ],
)
def test_equals_the_array_record_copy(shapes_dir, copy, split):
  a = tfds_lib.tfds("shapes", split, shapes_dir)
  b = tfds_lib.tfds("shapes", split, copy)
  assert len(a) == len(b) and a.name == b.name and not b.faults
  assert a.label_names == b.label_names and len(b.label_names["label"]) == 24
  for i in range(len(a)):
    assert_same(a[i], b[i])
    for source in a, b:  # a brief is the example, but for its image
      brief = source.brief(i)
      assert_same(brief, {k: v for k, v in a[i].items() if k in brief})
      assert set(a[i]) - set(brief) == {"image"}
  for i in (-1, len(b)):
    with pytest.raises(IndexError):
      b.records[i]


def test_a_brief_that_cannot_be_read(shapes_dir, monkeypatch):
  source = tfds_lib.tfds("shapes", "test", shapes_dir)
  monkeypatch.delattr(source.records, "_source")
  with pytest.raises(faults.BadExample):
    source.brief(4)


def test_a_brief_of_every_kind_of_feature():
  lib = tfds.features
  features = lib.FeaturesDict(
    {
      "image": lib.Image(),
      "label": lib.ClassLabel(num_classes=3),
      "labels": lib.Sequence(lib.ClassLabel(num_classes=3)),
      "captions": lib.Sequence(lib.Text()),
      "empty": lib.Sequence(lib.Text()),
      "sure": lib.Scalar(np.bool_),
      "score": lib.Scalar(np.float32),
      "scores": lib.Sequence(np.float32),
      "box": lib.BBoxFeature(),
      "objects": lib.Sequence({"name": lib.Text(), "id": np.int64}),
      "about": {"source": lib.Text(), "year": np.int32, "map": lib.Image()},
    }
  )
  example = dict(
    image=io.BytesIO(b"encoded"),
    label=2,
    labels=[2, 0],
    captions=["a", "\u3042"],
    empty=[],
    sure=True,
    score=0.1,
    scores=[0.1, 3],
    box=lib.BBox(0.0, 0.25, 0.5, 1.0),
    objects=[dict(name="x", id=1), dict(name="y", id=2)],
    about=dict(source="web", year=2026, map=io.BytesIO(b"encoded, too")),
  )
  data = features.serialize_example(features.encode_example(example))
  skip = tfds.decode.SkipDecoding()
  decoders = {"image": skip, "about": {"map": skip}}
  whole = features.deserialize_example_np(data, decoders=decoders)
  brief = tfds_lib.brief_parser(features, decoders)(data)
  whole.pop("image")
  assert set(brief) == set(whole)
  for key, value in whole.items():
    assert type(brief[key]) is type(value), key
    if isinstance(value, dict):
      assert_same(brief[key], value)
    else:
      np.testing.assert_array_equal(brief[key], value)


def test_images_stay_encoded(copy):
  example = tfds_lib.tfds("shapes", "train", copy)[3]
  assert example["image"].startswith(b"\x89PNG")
  assert isinstance(example["concept"], bytes)


@pytest.mark.parametrize("split", ["val", "train[", "train[5:5]"])
def test_missing_split(copy, split):
  with pytest.raises(errors.UserError, match="it has: ") as e:
    tfds_lib.tfds("shapes", split, copy)
  assert f'split "{split}"' in str(e.value)


def test_filters_and_groups(shapes_dir, copy):
  only = dict(concept=["red disc", "blue bar"])
  a, b = (
    kinds.open_source(
      "tfds",
      name="shapes",
      split="train",
      data_dir=d,
      only=only,
      group_by="concept",
    )
    for d in (shapes_dir, copy)
  )
  assert len(b) == 2
  assert [m.tolist() for m in a.members] == [m.tolist() for m in b.members]


def test_many_threads_read_at_once(shapes_dir, copy):
  a = tfds_lib.tfds("shapes", "train", shapes_dir)
  b = tfds_lib.tfds("shapes", "train", copy)
  order = np.random.default_rng(0).integers(len(a), size=1000).tolist()
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    for i, example in zip(order, threads.map(b.records.__getitem__, order)):
      assert_same(example, a[i])


@pytest.fixture
def damaged(copy, tmp_path):
  """A copy to be damaged, and its three files."""
  shutil.copytree(
    copy, tmp_path / "copy", ignore=shutil.ignore_patterns("*.npz")
  )
  folder = tmp_path / "copy" / "shapes" / "1.0.0"
  return tmp_path / "copy", sorted(folder.glob("*train.tfrecord*"))


def names(source):
  return [bytes(source[i]["image"]) for i in range(len(source))]


def test_a_cut_file_is_used_as_far_as_it_goes(copy, damaged):
  want = names(tfds_lib.tfds("shapes", "train", copy))
  path, (_, second, _) = damaged
  second.write_bytes(second.read_bytes()[:-3])
  source = tfds_lib.tfds("shapes", "train", path)
  assert source.faults == {"truncated shard": 1}
  assert names(source) == want[:119] + want[120:]
  assert len(tfds_lib.tfds("shapes", "train[100:130]", path)) == 29


def test_a_damaged_length_ends_a_file(copy, damaged):
  want = names(tfds_lib.tfds("shapes", "train", copy))
  path, (first, *_) = damaged
  data = bytearray(first.read_bytes())
  (length,) = struct.unpack("<Q", data[:8])
  data[12 + length + 4] ^= 1  # the length of the second record
  first.write_bytes(data)
  source = tfds_lib.tfds("shapes", "train", path)
  assert source.faults == {"damaged shard": 49}  # of its 50 records
  assert names(source) == want[:1] + want[50:]


def test_a_file_that_is_gone(copy, damaged):
  want = names(tfds_lib.tfds("shapes", "train", copy))
  path, (first, *others) = damaged
  first.unlink()
  source = tfds_lib.tfds("shapes", "train", path)
  assert source.faults == {"vanished shard": 50}
  assert names(source) == want[50:]
  source = tfds_lib.tfds("shapes", "train[40:60]", path)
  assert len(source) == 10 and source.faults == {"vanished shard": 10}
  for file in others:
    file.unlink()
  with pytest.raises(errors.UserError, match="none of 3 TFRecord files"):
    tfds_lib.tfds("shapes", "train", path)


def test_a_record_that_does_not_parse(damaged):
  path, (first, *_) = damaged
  data = bytearray(first.read_bytes())
  data[12:60] = b"\xff" * 48
  first.write_bytes(data)
  source = tfds_lib.tfds("shapes", "train", path)
  with pytest.raises(faults.BadExample, match="at byte 12 cannot") as e:
    source.records[0]
  assert e.value.kind == "damaged record"
  assert source.records[1]


def test_identity_is_that_of_the_files(shapes_dir, copy, damaged):
  def identity(path, split="train"):
    return tfds_lib.tfds("shapes", split, path).records.identity

  path, (first, *_) = damaged
  assert identity(path) == identity(copy) != identity(copy, "test")
  assert identity(shapes_dir) not in (
    identity(copy),
    identity(shapes_dir, "test"),
  )
  first.write_bytes(first.read_bytes()[:-1])
  assert identity(path) != identity(copy)


def test_damaged_and_missing_array_records(shapes_dir, tmp_path):
  shutil.copytree(shapes_dir, tmp_path / "copy")
  path = tmp_path / "copy"
  (file,) = (path / "shapes" / "1.0.0").glob("*train.array_record*")
  data = bytearray(file.read_bytes())
  data[len(data) // 4] ^= 255
  file.write_bytes(data)
  source, good = tfds_lib.tfds("shapes", "train", path), 0
  for i in range(len(source)):
    try:
      good += bool(source.records[i])
    except faults.BadExample as e:
      assert e.kind == "damaged record" and f"record {i} " in str(e)
  assert 0 < good < len(source)
  file.unlink()
  with pytest.raises(errors.UserError, match="none of 1 files of shapes"):
    tfds_lib.tfds("shapes", "train", path)
