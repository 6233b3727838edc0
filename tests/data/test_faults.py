"""Every fault there is, put into real data: skipped, counted, named."""

import io
import json
import os
import shutil
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet as pq
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import faults, kinds
from sigjax.data import filter as filter_lib
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.source import Source

NUM, BAD = 40, 17


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))


def picture(i):
  pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
  data = io.BytesIO()
  Image.fromarray(pixels).save(data, "JPEG")
  return data.getvalue()


def bomb(side=50_000):
  """A PNG of a few bytes that claims side x side pixels."""

  def chunk(kind, data):
    return (
      struct.pack(">I", len(data))
      + kind
      + data
      + struct.pack(">I", zlib.crc32(kind + data))
    )

  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(1000)))
    + chunk(b"IEND", b"")
  )


def write(path, numbers, **odd):
  """Writes a tar of samples "i.jpg" and "i.txt"; odd: members of sample BAD."""
  with tarfile.open(path, "w") as tar:
    for i in numbers:
      members = dict(jpg=picture(i), txt=f"{i}".encode())
      if i == BAD:
        members.update(odd)
      for ending, data in members.items():
        if data is not None:
          info = tarfile.TarInfo(f"{i:05d}.{ending}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))


PP = (
  "decode|central_crop(8)|value_range(-1,1)|choice('captions')"
  "|tokenize(1)|keep('image','text')"
)
PP_EMBEDDING = "choice('captions')|tokenize(1)|keep('image','text')"


def parsed(pp):
  tokenizer = lambda text, length, pad: np.array(text.split(), np.int32)
  return preprocess.parse(pp, tokenizer=tokenizer)


def batches(source, pp=PP, **kwargs):
  return pipeline.train_batches(
    source,
    parsed(pp),
    **{
      "batch_size": 8,
      "seed": 0,
      "num_threads": 2,
      "bad_fraction": 0.1,
      **kwargs,
    },
  )


def take(run, steps):
  """Returns the numbers of the examples in each batch."""
  return np.stack([next(run)["text"][:, 0] for _ in range(steps)])


def check(open_source, missing, **kwargs):
  """Whatever is wrong, batches hold what is not; the same for all."""
  run = batches(open_source(), **kwargs)
  got = take(run, 15)
  assert set(got.ravel()) == set(range(NUM)) - set(missing)
  assert all(len(set(batch)) == 8 for batch in got)
  parts = [
    take(
      batches(
        open_source(), process_index=p, process_count=2, num_threads=p, **kwargs
      ),
      15,
    )
    for p in range(2)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), got)
  again = batches(open_source(), **kwargs)
  again.set_state({**run.get_state(), "step": 6})
  np.testing.assert_array_equal(take(again, 9), got[6:])
  return run


# The table: each kind of source with each fault that it can hold.

IMAGES = {
  "damaged image": b"\xff\xd8\xff" + bytes(500),
  "truncated image": picture(BAD)[:600],
  "decompression bomb": bomb(),
}
CAPTIONS = {
  "missing caption": b" \n",
  "caption not UTF-8": b"caf\xe9",
  "caption with NUL": b"17\0",
  "caption too long": b"17 " * 30_000,
}


def examples(fault):
  """Returns the 40 (image, caption) of which one is faulty, both bytes."""
  found = [(picture(i), b"%d" % i) for i in range(NUM)]
  image, text = found[BAD]
  found[BAD] = IMAGES.get(fault, image), CAPTIONS.get(fault, text)
  return found


def as_tar(path, pairs):
  with tarfile.open(path / "a.tar", "w") as tar:
    for i, (image, text) in enumerate(pairs):
      for ending, data in (("jpg", image), ("txt", text)):
        info = tarfile.TarInfo(f"{i:05d}.{ending}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return dict(kind="tar", shards=str(path / "a.tar"))


def as_parquet(path, pairs):
  images, texts = zip(*pairs)
  rows = pa.table({"image": list(images), "caption": list(texts)})
  pq.write_table(rows, path / "a.parquet", row_group_size=8)
  return dict(kind="parquet", shards=str(path / "a.parquet"))


def as_folder(path, pairs):
  lines = []
  for i, (image, text) in enumerate(pairs):
    (path / f"{i}.jpg").write_bytes(image)
    lines.append(json.dumps({"file": f"{i}.jpg", "caption": text.decode()}))
  (path / "captions.jsonl").write_text("\n".join(lines))
  return dict(kind="folder", path=str(path))


def as_embeddings(path, pairs):
  z = np.stack([np.full(4, i, np.float32) for i in range(NUM)])
  np.save(path / "embeddings.npy", z)
  lines = [json.dumps(text.decode()) for _, text in pairs]
  (path / "captions.jsonl").write_text("\n".join(lines))
  return dict(kind="embeddings", path=str(path))


class FaultyPairs(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(), "captions": tfds.features.Text()}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    names = {**IMAGES, **CAPTIONS, "unreadable": None}
    return {
      name.replace(" ", "_").replace("-", "_"): self._generate_examples(name)
      for name in names
    }

  def _generate_examples(self, fault):
    for i, (image, text) in enumerate(examples(fault)):
      yield i, {"image": image, "captions": text}


@pytest.fixture(scope="module")
def faulty_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("faulty")
  tfds.disable_progress_bar()
  FaultyPairs(data_dir=path, file_format="array_record").download_and_prepare()
  return path


def as_tfds(path, split):
  split = split.replace(" ", "_").replace("-", "_")
  return dict(kind="tfds", name="faulty_pairs", split=split, data_dir=str(path))


WRITERS = [as_tar, as_parquet, as_folder, as_embeddings]
TABLE = [
  (write, fault)
  for write in [*WRITERS, as_tfds]
  for fault in [*IMAGES, *CAPTIONS]
  # These are text files of UTF-8 as a whole, or hold no images.
  if not (write in (as_folder, as_embeddings) and fault == "caption not UTF-8")
  if not (write is as_embeddings and fault in IMAGES)
]


@pytest.mark.parametrize("write, fault", TABLE)
def test_one_faulty_example(tmp_path, faulty_dir, write, fault, caplog):
  """It is skipped, counted and named, in training and in evaluation."""
  if write is as_tfds:
    section = as_tfds(faulty_dir, fault)
  else:
    section = write(tmp_path, examples(fault))
  source = kinds.open_source(**section)
  pp = PP_EMBEDDING if write is as_embeddings else PP
  check_one_faulty(source, fault, pp)
  if fault in CAPTIONS:  # the tokenizer is not trained on it, either
    texts = list(kinds.all_captions(source, "captions"))
    assert sorted(texts, key=int) == [str(i) for i in range(NUM) if i != BAD]


def check_one_faulty(source, fault, pp=PP, bad=BAD):
  run = batches(source, pp)
  seen = {*take(run, 10).ravel().tolist(), *take(run, 5).ravel().tolist()}
  run.close()
  assert seen == {*range(NUM)} - {bad}
  counted = {*source.faults} | {*run.faults()}
  assert counted == {fault}
  evaluation = pipeline.eval_batches(
    source, parsed(pp), batch_size=8, num_threads=2
  )
  mask, text = [
    np.concatenate(x)
    for x in zip(*((b["_mask"], b["text"][:, 0]) for b in evaluation))
  ]
  assert sorted(text[mask]) == [i for i in range(NUM) if i != bad]
  assert {**source.faults, **evaluation.faults()} == {fault: 1}
  if not source.faults:
    with pytest.raises(errors.UserError, match=f"1 of .* 1 x {fault}"):
      take(batches(source, pp, bad_fraction=0), 10)
  else:
    with pytest.raises(errors.UserError, match=f"1 of 40 .* 1 x {fault}"):
      batches(source, pp, bad_fraction=0)


def test_a_damaged_record_of_an_array_record_file(tmp_path, faulty_dir):
  shutil.copytree(faulty_dir / "faulty_pairs", tmp_path / "faulty_pairs")
  (file,) = tmp_path.rglob("*-unreadable.array_record*")
  whole = kinds.open_source(**as_tfds(faulty_dir, "unreadable"))
  data = bytearray(file.read_bytes())
  at = len(data) // 3  # within a record
  data[at : at + 50] = bytes(50)
  file.write_bytes(data)
  source = kinds.open_source(**as_tfds(tmp_path, "unreadable"))
  broken, kind = [], None
  for i in range(NUM):
    try:
      source.read(i)
    except faults.BadExample as e:
      broken.append(i)
      kind = e.kind
  (record,) = broken
  check_one_faulty(source, kind, bad=int(whole[record]["captions"]))


def test_an_example_is_named(tmp_path, caplog):
  section = as_tar(tmp_path, examples("truncated image"))
  path = section["shards"]
  run = check(lambda: kinds.open_source(**section), [BAD])
  assert run.faults()["truncated image"] >= 2
  lines = [r.getMessage() for r in caplog.records if "skipped" in r.msg]
  for line in lines:
    assert f"tar[{path}][{BAD}] ({BAD:05d}): " in line
    assert "truncated image" in line
  with pytest.raises(errors.UserError) as e:
    take(batches(kinds.open_source(**section), bad_fraction=0), 5)
  assert str(e.value).startswith("1 of ")
  assert f"allows: 1 x truncated image (tar[{path}][{BAD}]" in str(e.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 50_000])
def test_a_bomb_is_not_decoded(monkeypatch, side):
  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
  with pytest.raises(faults.BadExample, match="pixels") as e:
    preprocess.parse("decode")({"image": bomb(side)}, None)
  assert e.value.kind == "decompression bomb"


def test_an_image_smaller_than_the_crop(tmp_path):
  data = io.BytesIO()
  Image.new("RGB", (31, 40)).save(data, "PNG")
  write(tmp_path / "a.tar", range(NUM), jpg=data.getvalue())
  run = check(
    lambda: kinds.open_source("tar", shards=str(tmp_path / "a.tar")),
    [BAD],
    pp=PP.replace("(8)", "(32)"),
  )
  assert set(run.faults()) == {"image too small"}


@pytest.mark.parametrize(
  "member, kind", [("jpg", "missing image"), ("txt", "missing caption")]
)
def test_a_missing_member(tmp_path, member, kind):
  write(tmp_path / "a.tar", range(NUM), **{member: None})
  source = kinds.open_source("tar", shards=str(tmp_path / "a.tar"))
  assert source.faults == {kind: 1}
  run = check(lambda: source, [BAD])
  assert not run.faults()
  with pytest.raises(errors.UserError, match=f"1 of 40 .* 1 x {kind}"):
    batches(source, bad_fraction=0)


def test_a_truncated_tar(tmp_path):
  write(tmp_path / "a.tar", range(20))
  write(tmp_path / "b.tar", range(20, NUM))
  whole = (tmp_path / "b.tar").read_bytes()
  (tmp_path / "b.tar").write_bytes(whole[: whole.find(b"00030.txt") + 100])
  source = kinds.open_source("tar", shards=str(tmp_path / "?.tar"))
  assert source.faults["truncated shard"] == 10  # what it was to hold, likely
  run = check(lambda: source, range(30, NUM))
  assert not run.faults()


def test_a_shard_that_vanished_before(tmp_path):
  for name, numbers in zip("abc", (range(16), range(16, 32), range(32, NUM))):
    write(tmp_path / f"{name}.tar", numbers)
  os.unlink(tmp_path / "b.tar")
  source = kinds.open_source("tar", shards=str(tmp_path / "{a,b,c}.tar"))
  assert source.faults == {"vanished shard": 12}  # the mean of the others
  check(lambda: source, range(16, 32))


def test_a_shard_that_vanishes_later(tmp_path):
  for name, numbers in zip("ab", (range(36), range(36, NUM))):
    write(tmp_path / f"{name}.tar", numbers)
  path = str(tmp_path / "{a,b}.tar")
  kinds.open_source("tar", shards=path)  # indexes them; held by no one
  held = [kinds.open_source("tar", shards=path) for _ in range(4)]
  os.unlink(tmp_path / "b.tar")
  run = check(held.pop, range(36, NUM))
  assert set(run.faults()) == {"unreadable shard"}
  assert run.faults()["unreadable shard"] >= 8


@pytest.mark.parametrize(
  "error", [OSError("stale handle"), RuntimeError("corrupt"), KeyError("x")]
)
def test_a_library_that_fails(error):
  """Whatever reading raises is a fault of that record."""

  class Records(list):
    def __getitem__(self, i):
      if i == BAD:
        raise error
      return super().__getitem__(i)

  records = ({"image": picture(i), "captions": [f"{i}"]} for i in range(NUM))
  check_one_faulty(Source("test", Records(records)), "unreadable")


@pytest.fixture
def pictures(tmp_path):
  """A folder with its table."""
  path = tmp_path / "pictures"
  path.mkdir()
  for i in range(NUM):
    (path / f"{i}.jpg").write_bytes(picture(i))
  (path / "captions.csv").write_text(
    "file,caption\n" + "".join(f"{i}.jpg,{i}\n" for i in range(NUM))
  )
  return path


def test_an_image_that_vanishes_from_a_folder(pictures):
  source = kinds.open_source("folder", path=str(pictures))
  os.unlink(pictures / f"{BAD}.jpg")
  assert set(check(lambda: source, [BAD]).faults()) == {"missing image"}


def test_past_the_fraction_the_run_stops_with_a_summary(pictures, caplog):
  for i in range(12):
    kind = "damaged image" if i < 4 else "truncated image"
    (pictures / f"{i}.jpg").write_bytes(IMAGES[kind])
  source = kinds.open_source("folder", path=str(pictures))
  # 30 of the first thousand are fine.
  run = batches(source, bad_fraction=0.03, num_threads=0)
  with pytest.raises(errors.UserError) as e:
    take(run, 100)
  text = str(e.value)
  counts = run.faults()
  assert text.startswith("31 of ")
  assert "examples cannot be used, more than bad_fraction=0.03 allows" in text
  for kind, count in counts.items():
    assert f"{count} x {kind} (folder[{pictures}][" in text
  assert sum(counts.values()) == 31 and len(counts) == 2
  assert text.index("x truncated image") < text.index("x damaged image")
  assert text.endswith("; repair the data, or raise bad_fraction")
  assert "\n" not in text
  # Of each kind, the first three and then the tenth.
  for kind, count in counts.items():
    lines = [r for r in caplog.records if f"({kind}, no." in r.getMessage()]
    assert len(lines) == 3 + (count >= 10)


def test_the_fraction_is_of_all_that_was_loaded(pictures):
  (pictures / f"{BAD}.jpg").write_bytes(b"")
  source = kinds.open_source("folder", path=str(pictures))
  take(batches(source, bad_fraction=0.026), 400)  # one of 40 is bad
  with pytest.raises(errors.UserError, match="more than bad_fraction=0.024"):
    take(batches(source, bad_fraction=0.024), 400)
  for wrong in (-0.1, 1.1, "0.1", None, True):
    with pytest.raises(errors.UserError, match="bad_fraction is .* 0 to 1"):
      batches(source, bad_fraction=wrong)


def test_of_a_group_another_member_comes_first():
  def records(bad):
    return [
      {
        "image": b"" if i in bad else picture(i),
        "captions": [f"{i}"],
        "group": i // 5,
      }
      for i in range(NUM)
    ]

  source = filter_lib.grouped(Source("test", records({3, 17})), "group")
  for batch in take(batches(source), 50):  # each batch holds all groups
    assert sorted(batch // 5) == list(range(8))
    assert not {3, 17} & set(batch)
  source = filter_lib.grouped(
    Source("test", records({15, 16, 17, 18, 19})), "group"
  )
  with pytest.raises(errors.UserError, match="nothing can take its place"):
    take(batches(source), 1)
  for batch in take(batches(source, batch_size=4, bad_fraction=1), 20):
    assert len(set(batch // 5)) == 4 and 3 not in batch // 5


def test_where_all_is_bad_the_run_stops():
  source = Source("test", [{"image": b"", "captions": ["1"]}] * 1000)
  with pytest.raises(errors.UserError, match="8 others cannot be used, either"):
    take(batches(source, bad_fraction=1), 1)
  with pytest.raises(
    errors.UserError, match="none of the examples tried of test can"
  ):
    pipeline.first_example(source, preprocess.parse("decode"))


def test_the_first_example_need_not_be_good():
  source = Source("test", [{"image": b""}, {"image": picture(1)}])
  example = pipeline.first_example(source, preprocess.parse("decode"))
  np.testing.assert_array_equal(
    example["image"], np.asarray(Image.open(io.BytesIO(picture(1))))
  )
