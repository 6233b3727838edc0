"""Parquet files that pyarrow wrote, as Hugging Face's datasets have them."""

import concurrent.futures
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
  assert kept(width=(140, 145), language=["de", "en"]) == [41, 43, 45]
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
  assert source.faults == {"vanished shard": 1, "damaged shard": 1}
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
