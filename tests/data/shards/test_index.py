"""Indices of shards: kept, found again, and never trusted when they should not.

The shards are files of bytes, of which each is a row.
"""

import os
import pathlib
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from sigjax import errors
from sigjax.data import faults
from sigjax.data.shards import files, index_files
from sigjax.data.shards import index as index_lib


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "data"
  path.mkdir()
  for i in range(5):
    (path / f"{i}.x").write_bytes(bytes(range(10 * i, 10 * i + i)))
  return path


class Builder:
  """Counts what is built; a shard that starts with 99 has a fault."""

  def __init__(self, name="rows"):
    self.built = []
    self.kind = index_lib.Kind(name, np.dtype(np.uint8), self.build)

  def build(self, opened, number, size):
    name = os.path.basename(opened.paths[number])
    self.built.append(name)
    data = opened.read(number, 0, size)
    wrong = {"odd": (1, name)} if data[:1] == b"c" else {}
    return np.frombuffer(data, np.uint8), wrong

  def index(self, pattern):
    """Returns what is in the index, whose shards were built, and the faults."""
    del self.built[:]
    found = index_lib.Shards(files.expand(str(pattern), "shards"), "shards")
    index = found.index(self.kind)
    return index.rows.tolist(), sorted(self.built), faults.counts(found.faults)


WANT = [10, 20, 21, 30, 31, 32, 40, 41, 42, 43]


def test_index(folder):
  found = index_lib.Shards(files.expand(str(folder / "{0..6}.x"), "s"), "s")
  index = found.index(Builder().kind)
  assert len(index) == 10 and index.rows.tolist() == WANT
  assert [index.locate(i) for i in range(10)] == [
    (value // 10, value) for value in WANT
  ]
  assert [index.first(n) for n in range(7)] == [0, 0, 1, 3, 6, 10, 10]
  assert index.of_shard(3).tolist() == [30, 31, 32]
  for i in (-1, 10):
    with pytest.raises(IndexError):
      index.locate(i)
  # The other five hold two on average.
  assert found.faults == {"vanished shard": (4, str(folder / "5.x"))}


def test_lost_shards_count_the_examples_that_they_lack(tmp_path):
  paths = [str(tmp_path / f"{i}.x") for i in range(6)]
  for path, size in zip(paths, (10, 12, 3, 0, 20)):
    (tmp_path / path).write_bytes(bytes(size))

  def build(opened, number, size):
    if size == 0:
      raise faults.BadExample("is empty", kind="damaged shard")
    wrong = {"truncated shard": (1, "x")} if size in (3, 20) else {}
    return np.zeros(size, np.uint8), wrong

  for _ in range(2):  # built, and from the index files
    found = index_lib.Shards(paths, "shards")
    found.index(index_lib.Kind("rows", np.dtype(np.uint8), build))
    assert found.faults == {
      "vanished shard": (11, paths[5]),
      "truncated shard": (8 + 1, paths[2]),  # the one of 20 lacks one at least
      "damaged shard": (11, paths[3]),
    }
  found = index_lib.Shards(paths, "shards")
  found.index(
    index_lib.Kind("rows", np.dtype(np.uint8), build), lambda index: {2: 7}
  )
  assert found.faults == {"truncated shard": (7, paths[2])}
  # Where all are lost, as many as the longest has.
  found = index_lib.Shards(paths[2:4], "shards")
  found.index(index_lib.Kind("rows", np.dtype(np.uint8), build))
  assert found.faults == {
    "truncated shard": (1, paths[2]),
    "damaged shard": (3, paths[3]),
  }


def test_identity_is_of_names_and_sizes(tmp_path):
  def identity(root, *names, size=3):
    for name in names:
      path = tmp_path / root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(bytes(size))
    paths = [str(tmp_path / root / name) for name in names]
    return index_lib.Shards(paths, "shards").identity

  found = identity("a", "0.x", "1.x")
  assert identity("elsewhere/b", "0.x", "1.x") == found
  assert identity("c", "0.x", "2.x") != found
  assert identity("d", "0.x", "1.x", size=4) != found
  assert identity("e", "x/0.x", "y/1.x") != found
  assert identity("f", "0.x") != identity("g", "1.x")
  (tmp_path / "a" / "1.x").unlink()
  paths = [str(tmp_path / "a" / name) for name in ("0.x", "1.x")]
  assert index_lib.Shards(paths, "shards").identity != found


def test_an_index_of_other_rows_is_rebuilt(folder):
  builder = Builder()
  builder.index(folder / "*.x")
  path = str(folder / "3.x")
  (stamp,) = files.stamps([path])
  for rows in (np.zeros(3), np.zeros((3, 1), np.uint8)):
    index_files.save_index(path, "rows", stamp, rows, {})
    assert builder.index(folder / "*.x") == (WANT, ["3.x"], {})


def test_is_built_once_and_kept_beside(folder, cache):
  everything = [f"{i}.x" for i in range(5)]
  builder = Builder()
  assert builder.index(folder / "*.x") == (WANT, everything, {})
  assert builder.index(folder / "*.x") == (WANT, [], {})
  assert builder.index(folder / "[12].x") == ([10, 20, 21], [], {})
  assert not cache.exists()
  left = sorted(p.name for p in folder.iterdir())
  assert left == sorted(
    everything + [f"{n}.rows.index.npz" for n in everything]
  )
  # What another reader made is not this one's.
  assert Builder("else").index(folder / "*.x") == (WANT, everything, {})


@pytest.mark.parametrize("change", ["size", "time"])
def test_is_rebuilt_when_the_shard_changes(folder, change):
  builder = Builder()
  builder.index(folder / "*.x")
  path = folder / "3.x"
  stat = path.stat()
  path.write_bytes(b"\x05\x06\x07" + b"\x08" * (change == "size"))
  os.utime(path, ns=(0, stat.st_mtime_ns + (change == "time")))
  rows, built, _ = builder.index(folder / "*.x")
  assert built == ["3.x"] and rows[3:6] == [5, 6, 7]


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: b"nonsense" * 50,
    lambda data: data.replace(bytes([40, 41, 42, 43]), bytes([40, 41, 42, 9])),
  ],
)
def test_a_damaged_index_is_rebuilt(folder, damage, caplog):
  builder = Builder()
  builder.index(folder / "*.x")
  place = folder / "4.x.rows.index.npz"
  data = place.read_bytes()
  assert damage(data) != data
  place.write_bytes(damage(data))
  assert builder.index(folder / "*.x") == (WANT, ["4.x"], {})
  assert f"{place} is damaged" in caplog.text
  assert builder.index(folder / "*.x") == (WANT, [], {})


def test_goes_to_the_cache_if_it_cannot_lie_beside(folder, cache):
  # A name that leaves no room for an ending: as sure as a read-only folder,
  # which the superuser would not notice.
  long = folder / ("n" * 248)
  long.write_bytes(b"abc")
  builder = Builder()
  assert builder.index(long) == ([97, 98, 99], [long.name], {})
  assert builder.index(long) == ([97, 98, 99], [], {})
  assert len(list(cache.iterdir())) == 1 and list(folder.glob("n*")) == [long]
  long.write_bytes(b"abcd")
  assert builder.index(long)[:2] == ([97, 98, 99, 100], [long.name])


def test_a_name_that_is_taken(folder, cache):
  (folder / "3.x.rows.index.npz").mkdir()
  everything = sorted(p.name for p in folder.glob("*.x"))
  assert Builder().index(folder / "*.x") == (WANT, everything, {})
  assert Builder().index(folder / "*.x") == (WANT, [], {})
  assert len(list(cache.iterdir())) == 1 and not list(folder.glob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(folder, cache):
  folder.chmod(0o500)
  try:
    assert Builder().index(folder / "*.x")[0] == WANT
    assert Builder().index(folder / "*.x")[1] == []
  finally:
    folder.chmod(0o700)
  assert len(list(cache.iterdir())) == 5


def test_no_place_for_an_index(folder, cache):
  cache.write_bytes(b"a file where the cache should be")
  long = folder / ("n" * 248)
  long.write_bytes(b"abc")
  with pytest.raises(errors.UserError, match="set SIGJAX_CACHE"):
    Builder().index(long)


def test_faults_are_kept_with_the_index(folder, caplog):
  for i in (1, 3):
    (folder / f"{i}.x").write_bytes(b"c")
  builder = Builder()
  for _ in range(2):
    assert builder.index(folder / "*.x")[2] == {"odd": 2}
  assert "3.x: 1 x odd, such as 3.x" in caplog.text
  assert "shards: 2 x odd" in caplog.text


@pytest.mark.parametrize("in_memory", [5, 1000])
def test_an_unreadable_shard_is_left_out_this_time(
  folder, monkeypatch, in_memory
):
  monkeypatch.setattr(index_lib, "IN_MEMORY", in_memory)
  read = files.Files.read

  def failing(self, number, *args):
    if self.paths[number].endswith("3.x"):
      raise faults.BadExample("cannot be read", kind="unreadable shard")
    return read(self, number, *args)

  with monkeypatch.context() as patch:
    patch.setattr(files.Files, "read", failing)
    rows, _, wrong = Builder().index(folder / "*.x")
  assert rows == WANT[:3] + WANT[6:] and wrong == {"unreadable shard": 2}
  assert Builder().index(folder / "*.x") == (WANT, ["3.x"], {})


def test_an_error_in_building_is_not_hidden(folder):
  def build(*_):
    raise ZeroDivisionError

  found = index_lib.Shards(files.expand(str(folder / "*.x"), "s"), "s")
  with pytest.raises(ZeroDivisionError):
    found.index(index_lib.Kind("rows", np.dtype(np.uint8), build))
  assert not list(folder.glob("*.npz"))


def test_no_rows_at_all(folder):
  with pytest.raises(errors.UserError, match="no example in 1 shards.*empty"):
    Builder().index(folder / "0.x")


def test_column(folder):
  found = index_lib.Shards(files.expand(str(folder / "*.x"), "s"), "s")
  rows = [part.tolist() for part in found.column(Builder().kind)]
  assert rows == [[], [10], [20, 21], [30, 31, 32], [40, 41, 42, 43]]


@pytest.fixture
def large(monkeypatch):
  monkeypatch.setattr(index_lib, "IN_MEMORY", 5)


def mapped(rows):
  while rows is not None and not isinstance(rows, np.memmap):
    rows = rows.base
  return rows is not None


def test_many_rows_are_mapped(folder, cache, large, monkeypatch):
  (folder / "3.x").write_bytes(b"cde")
  want = WANT[:3] + [99, 100, 101] + WANT[6:]
  for _ in range(2):
    found = index_lib.Shards(files.expand(str(folder / "*.x"), "s"), "s")
    index = found.index(Builder().kind)
    assert mapped(index.rows) and index.rows.tolist() == want
    assert index.locate(4) == (3, 100)
    assert faults.counts(found.faults) == {"odd": 1}
    monkeypatch.setattr(index_lib, "_part", None)  # not needed the second time
  assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("ending", [".npy", ".npy.npz"])
def test_a_damaged_joined_index_is_rebuilt(folder, cache, large, ending):
  builder = Builder()
  builder.index(folder / "*.x")
  (place,) = [p for p in cache.iterdir() if p.name.endswith(ending)]
  place.write_bytes(place.read_bytes()[:-2])
  assert builder.index(folder / "*.x") == (WANT, [], {})
  (folder / "1.x").write_bytes(b"\x0b")  # another list of stamps
  assert builder.index(folder / "*.x") == ([11] + WANT[1:], ["1.x"], {})


KILLED = """
import os, signal, sys
from sigjax.data.shards import index
from sigjax.runtime import files
sys.path.insert(0, {tests!r})
import test_index
step = {step!r}
if step == "index":  # it is written, but not under its name
  def replace(old, new):
    os.kill(os.getpid(), signal.SIGKILL)
  os.replace = replace
else:  # the joined rows are there, but not what says that they are whole
  index.IN_MEMORY = 5
  write = files.write
  def killed(path, data):
    if path.name.endswith(".npy.npz"):
      os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
  files.write = killed
test_index.Builder().index({pattern!r})
"""


@pytest.mark.parametrize("step", ["index", "joined"])
def test_a_killed_process_leaves_nothing_that_is_trusted(
  folder, cache, step, monkeypatch
):
  code = KILLED.format(
    tests=str(pathlib.Path(__file__).parent),
    step=step,
    pattern=str(folder / "*.x"),
  )
  done = subprocess.run(
    [sys.executable, "-c", code], check=False, capture_output=True, text=True
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  if step == "joined":
    monkeypatch.setattr(index_lib, "IN_MEMORY", 5)
    (place,) = cache.glob("*.npy")
    place.write_bytes(place.read_bytes()[:-3] + b"\0\0\0")  # never trusted
  else:
    assert list(folder.glob("*.tmp")) and not list(folder.glob("*.npz"))
  rows, built, _ = Builder().index(folder / "*.x")
  assert rows == WANT and len(built) == (5 if step == "index" else 0)


def test_a_joined_index_of_other_rows_is_rebuilt(folder, cache, large):
  Builder().index(folder / "*.x")
  (place,) = cache.glob("*.npy")
  np.save(place, np.zeros(9, np.uint8))
  assert Builder().index(folder / "*.x") == (WANT, [], {})


@pytest.mark.parametrize("scheme", ["https", "hf"])
def test_nothing_is_written_where_that_is_publishing(
  scheme, monkeypatch, cache
):
  asked = []
  monkeypatch.setattr(files, "file_system", asked.append)
  path, rows = f"{scheme}://a/b.x", np.arange(3)
  stamp = (1, "m")
  index_files.save_index(path, "rows", stamp, rows, {"odd": (1, "n")})
  found, wrong = index_files.load_index(path, "rows", stamp)
  assert not asked and len(list(cache.iterdir())) == 1
  assert found.tolist() == [0, 1, 2] and wrong == {"odd": (1, "n")}


def test_remote(monkeypatch):
  system = fsspec.filesystem("memory")
  system.pipe({f"/b/{i}.x": bytes([i]) * i for i in range(3)})
  try:
    builder = Builder()
    want = [1, 2, 2]
    pattern = "memory://b/*.x"
    assert builder.index(pattern) == (want, ["0.x", "1.x", "2.x"], {})
    assert builder.index(pattern) == (want, [], {})
    assert system.exists("/b/2.x.rows.index.npz")
    system.pipe("/b/2.x", b"\x07")
    assert builder.index("memory://b/{0..3}.x") == (
      [1, 7],
      ["2.x"],
      {"vanished shard": 1},
    )

    def refused(*_, **__):
      raise NotImplementedError

    monkeypatch.setattr(system, "pipe_file", refused)
    monkeypatch.setattr(type(system), "pipe_file", refused)
    assert Builder("new").index(pattern)[:2] == ([1, 7], ["0.x", "1.x", "2.x"])
    assert Builder("new").index(pattern)[:2] == ([1, 7], [])
  finally:
    monkeypatch.undo()
    system.store.clear()
