"""Parquet files that pyarrow wrote, as Hugging Face's datasets have them."""

import concurrent.futures
import os
import shutil
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sigjax import errors
from sigjax.data import faults
from sigjax.data import kinds as kinds_lib

NUM = 50  # rows, in two files


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def image(i):
  return np.random.default_rng(i).bytes(200 + i)


def table(numbers, struct=True, texts=None):
  numbers = list(numbers)
  images = [image(i) for i in numbers]
  return pa.table(
    {
      "width": pa.array([None if i == 7 else 100 + i for i in numbers]),
      "image": [
        {"bytes": b, "path": f"{i}.jpg"} for i, b in zip(numbers, images)
      ]
      if struct
      else images,
      "caption": texts or [f"né {i}" for i in numbers],
      "several": [
        [f"{i}", None, f"c{k}"] if i else [] for k, i in enumerate(numbers)
      ],
      "language": ["de" if i % 2 else None for i in numbers],
    }
  )


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "data"
  path.mkdir()
  pq.write_table(table(range(30)), path / "a.parquet", row_group_size=7)
  pq.write_table(table(range(30, NUM)), path / "b.parquet", row_group_size=16)
  return path


def opened(path, **kwargs):
  return kinds_lib.open_source("parquet", shards=str(path), **kwargs)


def test_reads_what_was_written(folder):
  source = opened(folder / "*.parquet")
  assert len(source) == NUM and not source.faults
  for i in np.random.default_rng(0).permutation(NUM).tolist():
    assert source[i] == {"image": image(i), "captions": [f"né {i}"]}
    assert source.brief(i) == {"captions": [f"né {i}"]}
  for i in (NUM, -1):
    with pytest.raises(IndexError):
      source.records[i]


def test_captions_in_columns_by_language(tmp_path):
  rows = dict(image=[b"x", b"y"], en=[["a", "b"], []], th=["c", "d"])
  pq.write_table(pa.table(rows), tmp_path / "a.parquet")
  source = opened(
    tmp_path / "a.parquet", captions={"en": "en", "sw": "th", "th": "th"}
  )
  assert source[0]["captions"] == ["a", "b", "c", "c"]
  assert source[0]["language"] == ["en", "en", "sw", "th"]
  assert source[1]["language"] == ["sw", "th"]
  with pytest.raises(errors.UserError, match='"tha" is not .*mean "th"'):
    opened(tmp_path / "a.parquet", captions={"en": "en", "th": "tha"})


def test_a_row_for_each_caption(tmp_path):
  """A long table: a language is chosen by row, an image has several rows."""
  rows = dict(
    image=[b"x", b"x", b"y"],
    caption=["a", "b", "c"],
    language=["en", "th", "th"],
    key=[1, 1, 2],
  )
  pq.write_table(pa.table(rows), tmp_path / "a.parquet")
  path, columns = tmp_path / "a.parquet", ("language", "key")
  thai = opened(path, columns=columns, only=dict(language="th"))
  assert [x["captions"] for x in thai] == [["b"], ["c"]]
  assert thai[0]["language"] == "th"
  # Counted by image: a group is an image, and shows one of its rows.
  images = opened(path, columns=columns, group_by="key")
  assert [m.tolist() for m in images.members] == [[0, 1], [2]]


def test_other_columns(folder, tmp_path):
  source = opened(
    folder / "{a,b}.parquet", captions="several", columns=("width", "language")
  )
  assert source[33] == {
    "image": image(33),
    "captions": ["33", "c3"],
    "width": 133,
    "language": "de",
  }
  assert source[7]["width"] is None
  pq.write_table(
    table(range(9), struct=False).rename_columns(
      ["width", "png", "text", "several", "language"]
    ),
    tmp_path / "c.parquet",
  )
  source = opened(tmp_path / "c.parquet", image="png", captions="text")
  assert source[8] == {"image": image(8), "captions": ["né 8"]}
  with pytest.raises(errors.UserError, match='column of .*c.parquet "imag"'):
    opened(tmp_path / "c.parquet", image="imag")
  with pytest.raises(errors.UserError, match='"widht" .*mean "width"'):
    opened(folder / "*.parquet", columns=("widht",))


def test_filters_read_one_column(folder, monkeypatch):
  reads = []
  read = pq.ParquetFile.read
  monkeypatch.setattr(
    pq.ParquetFile,
    "read",
    lambda self, columns, **k: (
      reads.append(columns) or read(self, columns=columns, **k)
    ),
  )

  def kept(**only):
    return [
      int(source[i]["captions"][0][3:])
      for source in [opened(folder / "*.parquet", only=only)]
      for i in range(len(source))
    ]

  assert kept(width=(None, 109)) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
  assert kept(language="de") == list(range(1, NUM, 2))
  assert kept(width=(140, 145), language=["de"]) == [41, 43, 45]
  assert reads == [
    [c]
    for c in (
      "width",
      "width",
      "language",
      "language",
      "width",
      "width",
      "language",
      "language",
    )
  ]
  assert kept(caption_length=(None, 4)) == list(range(10))
  with pytest.raises(errors.UserError, match="more than one value"):
    kept(several="1")


def test_rows_that_cannot_be_used(tmp_path):
  path = tmp_path / "a.parquet"
  bad = pa.array([b"caf\xe9", b"ok", b"x" * 65537]).view(pa.string())
  pq.write_table(
    pa.table(
      {
        "image": [
          {"bytes": None, "path": "a"},
          None,
          {"bytes": b"", "path": ""},
          *[{"bytes": b"x", "path": None}] * 6,
        ],
        "caption": pa.concat_arrays(
          [pa.array(["0", "1", "2", None, "4", "5"]), bad]
        ),
      }
    ),
    path,
  )
  source = opened(path)
  kinds = {}
  for i in range(len(source)):
    try:
      source[i]
    except faults.BadExample as e:
      kinds[i] = e.kind
      assert f"{path}, row {i}" in str(e) or i == 8
  assert kinds == {
    0: "missing image",
    1: "missing image",
    2: "missing image",
    3: "missing caption",
    6: "caption not UTF-8",
    8: "caption too long",
  }
  source = opened(path, captions="caption", only=dict(caption_length=(1, 9)))
  assert source.members.ravel().tolist() == [0, 1, 2, 4, 5, 7]
  assert source.faults == {
    "missing caption": 1,
    "caption not UTF-8": 1,
    "caption too long": 1,
  }


def test_damaged_and_vanished_files(folder, caplog):
  (folder / "c.parquet").write_bytes(b"PAR1 and nothing else")
  source = opened(folder / "{a,b,c,d}.parquet")
  assert len(source) == NUM
  assert source.faults == {"vanished shard": 25, "damaged shard": 25}
  assert f"such as {folder}/c.parquet" in caplog.text
  with pytest.raises(errors.UserError, match="no example.*1 x damaged shard"):
    opened(folder / "c.parquet")


def test_a_file_that_vanishes_after_indexing(folder):
  source = opened(folder / "*.parquet")
  (folder / "b.parquet").unlink()
  with pytest.raises(faults.BadExample, match="b.parquet, row 19") as e:
    source[49]
  assert e.value.kind == "unreadable shard" and source[29]


def test_a_file_that_shrinks_after_indexing(folder):
  source = opened(folder / "*.parquet")
  path = folder / "b.parquet"
  path.write_bytes(path.read_bytes()[:1000])
  for _ in range(2):  # with and without the footer in memory
    with pytest.raises(faults.BadExample) as e:
      source[49]
    assert e.value.kind == "unreadable shard"


def test_a_file_without_the_columns(folder):
  pq.write_table(
    table(range(30, NUM)).select(["language"]), folder / "b.parquet"
  )
  source = opened(folder / "*.parquet", columns=("width",))
  assert source[29]["width"] == 129
  with pytest.raises(faults.BadExample, match="b.parquet, row 0") as e:
    source[30]
  assert e.value.kind == "missing image"
  with pytest.raises(errors.UserError, match='"width" of .*b.parquet cannot'):
    opened(folder / "*.parquet", only=dict(width=7))


def test_reads_no_more_than_it_needs(folder, monkeypatch):
  reads = []
  read = pq.ParquetFile.read_row_group
  monkeypatch.setattr(
    pq.ParquetFile,
    "read_row_group",
    lambda *a, **k: reads.append((a[1], *k["columns"])) or read(*a, **k),
  )
  source = opened(folder / "*.parquet")
  for i in (30, 31, 49):
    assert source[i]["image"] == image(i)
  assert source.brief(49)
  assert reads == [
    (0, "image.bytes", "caption"),
    (1, "image.bytes", "caption"),
    (1, "caption"),
  ]


def test_many_threads_read_at_once(folder):
  source = opened(folder / "*.parquet", cache_mb=0)
  order = np.random.default_rng(0).integers(NUM, size=1000).tolist()
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    for i, found in zip(order, threads.map(source.records.__getitem__, order)):
      assert found == {"image": image(i), "captions": [f"né {i}"]}


def test_structs_and_lists_of_captions(tmp_path):
  raw = [["a", "b"], ["c"], [], None]
  rows = [
    None if texts is None else [{"raw": t, "tokens": [t, "x"]} for t in texts]
    for texts in raw
  ]
  path = tmp_path / "a.parquet"
  pq.write_table(
    pa.table(
      {
        "image": [b"x"] * 4,
        "sentences": rows,
        "one": [r[0] if r else None for r in rows],
        "nested": [[["a"], None, ["b", None]], [[]], [["c"]], None],
        "id": pa.array([2**53, 2**53 + 1, None, 4]),
        "word": pa.array(["a", "b", "c", None]).dictionary_encode(),
        "a.b": ["dot", "dot", "dot", "dot"],
      }
    ),
    path,
  )

  def texts(captions):
    source, found = opened(path, captions=captions), []
    for i in range(4):
      try:
        found.append(source[i]["captions"])
      except faults.BadExample as e:
        assert e.kind == "missing caption"
        found.append(None)
    return found

  assert texts("sentences.raw") == [["a", "b"], ["c"], None, None]
  assert texts("sentences.tokens") == [
    ["a", "x", "b", "x"],
    ["c", "x"],
    None,
    None,
  ]
  assert texts("one.raw") == [["a"], ["c"], None, None]
  assert texts("nested") == [["a", "b"], None, ["c"], None]
  assert texts("word") == [["a"], ["b"], ["c"], None]
  assert texts("a.b") == [["dot"]] * 4
  for captions, message in (
    ("sentences", "list<.*struct<.*raw: string.*captions=.sentences.raw"),
    ("one", "struct<.*pick a field: captions=.one.raw"),
    ("one.row", 'has no field "row"; check captions=.one.row'),
    ("id", "is int64, but captions have to be texts.*name another column"),
    ("id.x", 'is int64, and has no field "x"'),
  ):
    with pytest.raises(errors.UserError, match=message) as e:
      opened(path, captions=captions)
    assert "\n" not in str(e.value)
  # 2**53 and 2**53 + 1 differ, also beside a missing value.
  assert len(opened(path, captions="word", group_by="id")) == 4
  with pytest.raises(errors.UserError, match="string, but images have to be"):
    opened(path, image="a.b", captions="a.b")


def test_usual_columns_are_found(tmp_path, caplog):
  caplog.set_level("INFO", "sigjax")
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": ["a"], "jpg": [b"x"], "title": ["b"]}), path)
  assert opened(path)[0] == {"image": b"x", "captions": ["a"]}
  assert 'column "jpg" has the images, "text" the captions' in caplog.text


@pytest.fixture
def large(tmp_path):
  """A file with groups of 16 rows, and one with groups of about 2 MB."""
  numbers = range(64)
  rows = pa.table(
    {
      "image": [np.random.default_rng(i).bytes(70_000) for i in numbers],
      "caption": [f"{i}" for i in numbers],
    }
  )
  pq.write_table(rows, tmp_path / "small.parquet", row_group_size=8)
  pq.write_table(rows, tmp_path / "large.parquet", row_group_size=32)
  return tmp_path


def test_large_row_groups_are_decoded_once(large, cache, caplog, monkeypatch):
  caplog.set_level("INFO", "sigjax")
  small = opened(large / "small.parquet")
  assert not list(cache.rglob("*.arrow")) and "large" not in caplog.text
  want = [small[i] for i in range(64)]
  source = opened(large / "large.parquet", cache_mb=0)
  assert "have large row groups; each is decoded once" in caplog.text
  assert source[3] == want[3] and len(list(cache.rglob("*.arrow"))) == 1
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    order = np.random.default_rng(0).integers(64, size=300).tolist()
    for i, found in zip(order, threads.map(source.records.__getitem__, order)):
      assert found == want[i]
  decoded = sorted(cache.rglob("*.arrow"))
  assert len(decoded) == 2
  with monkeypatch.context() as patch:  # another run needs no decoding
    patch.setattr(pq.ParquetFile, "read_row_group", None)
    source = opened(large / "large.parquet")
    assert [source[i] for i in range(64)] == want
  decoded[0].write_bytes(decoded[0].read_bytes()[:-20])  # made anew
  source = opened(large / "large.parquet")
  assert [source[i] for i in range(64)] == want
  os.utime(decoded[1], (0, 0))
  opened(large / "large.parquet")
  assert not decoded[1].exists() and decoded[0].exists()


def test_large_row_groups_without_room(large, cache, caplog, monkeypatch):
  usage = shutil.disk_usage("/")._replace(free=1000)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    source = opened(large / "large.parquet")
  assert "reading will be slow" in caplog.text
  assert source[5]["captions"] == ["5"] and not list(cache.rglob("*.arrow"))
  (cache / "parquet").rmdir()
  (cache / "parquet").write_bytes(b"")  # no folder can be there
  assert opened(large / "large.parquet")[5]["captions"] == ["5"]


def test_remote(folder):
  system = fsspec.filesystem("memory")
  for file in folder.glob("*.parquet"):
    system.pipe(f"/b/{file.name}", file.read_bytes())
  try:
    source = opened("memory://b/*.parquet", only=dict(width=(120, None)))
    assert len(source) == 30
    assert source[29] == {"image": image(49), "captions": ["né 49"]}
  finally:
    system.store.clear()


def test_without_pyarrow(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(errors.UserError, match="pip install pyarrow"):
    opened(folder / "*.parquet")
