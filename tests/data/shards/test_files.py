"""Lists of files and byte ranges, here and in fsspec's memory://."""

import concurrent.futures
import os
import sys

import fsspec
import numpy as np
import pytest

from sigjax import errors
from sigjax.data import faults
from sigjax.data.shards import files


@pytest.fixture
def memory():
  system = fsspec.filesystem("memory")
  system.pipe({f"/bucket/{i}.tar": bytes([i]) * 100 for i in range(3)})
  yield system
  system.store.clear()


@pytest.mark.parametrize(
  "pattern, want",
  [
    ("a", ["a"]),
    ("{a,b}c", ["ac", "bc"]),
    ("{08..11}", ["08", "09", "10", "11"]),
    ("{8..10}", ["8", "9", "10"]),
    ("{2..0}", ["2", "1", "0"]),
    ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ("{x,{1..2}}", ["x", "1", "2"]),
    ("{a}", ["{a}"]),
    ("{000..001}/{,v}", ["000/", "000/v", "001/", "001/v"]),
  ],
)
def test_braces(pattern, want):
  assert files.braces(pattern) == want


def test_expand(tmp_path, monkeypatch):
  for name in ("b.tar", "a.tar", "a.tar.samples.index.npz", "c.txt"):
    (tmp_path / name).write_bytes(b"x")
  monkeypatch.chdir(tmp_path)
  here = lambda *names: [str(tmp_path / name) for name in names]
  assert files.expand("*.tar", "shards") == here("a.tar", "b.tar")
  assert files.expand("*", "shards") == here("a.tar", "b.tar", "c.txt")
  assert files.expand("{b,z}.tar", "shards") == here("b.tar", "z.tar")
  assert files.expand(["b.tar", f"file://{tmp_path}/*.tar"], "shards") == here(
    "b.tar", "a.tar"
  )
  with pytest.raises(errors.UserError, match=r"no shards at q\*, r\*"):
    files.expand(["q*", "r*"], "shards")


def test_expand_remote(memory):
  want = [f"memory:///bucket/{i}.tar" for i in range(3)]
  assert files.expand("memory://bucket/*.tar", "shards") == want
  assert files.expand("memory://bucket/{0..2}.tar", "shards") == want
  with pytest.raises(errors.UserError, match="no shards"):
    files.expand("memory://bucket/*.zip", "shards")


def test_stamps_tell_changes(memory, tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"1")
  paths = [
    str(path),
    str(tmp_path / "none"),
    *files.expand("memory://bucket/{0,9}.tar", "shards"),
    *files.expand("memory://nowhere/1.tar", "shards"),
  ]
  first = files.stamps(paths)
  assert [s and s[0] for s in first] == [1, None, 100, None, None]
  assert files.stamps(paths) == first
  os.utime(path, ns=(0, 0))
  memory.pipe("/bucket/0.tar", b"2" * 100)
  again = files.stamps(paths)
  assert again[0] != first[0] and again[2] != first[2]


@pytest.mark.parametrize(
  "scheme, package", [("gs", "gcsfs"), ("s3", "s3fs"), ("https", "aiohttp")]
)
def test_missing_packages_are_named(scheme, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  for loaded in ("gcsfs", "s3", "http"):
    monkeypatch.delitem(
      sys.modules, f"fsspec.implementations.{loaded}", raising=False
    )
  monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
  with pytest.raises(errors.UserError) as e:
    files.expand(f"{scheme}://bucket/*.tar", "shards")
  message = str(e.value)
  assert f"pip install fsspec {package}" in message and "\n" not in message


def test_unknown_scheme():
  with pytest.raises(errors.UserError, match="nope:// is not known to fsspec"):
    files.expand("nope://bucket/a.tar", "shards")


def test_reads_ranges(memory, tmp_path):
  path = tmp_path / "a"
  data = np.random.default_rng(0).bytes(200_000)
  path.write_bytes(data)
  memory.pipe("/bucket/a", data)
  found = files.Files([str(path), "memory:///bucket/a", str(tmp_path / "b")])
  for number in (0, 1):
    assert found.read(number, 5, 10) == data[5:15]
    assert found.read(number, 5, 0) == b""
    assert found.spans(number, [(9, 2), (3, 4)]) == [data[9:11], data[3:7]]
    far = [(0, 3), (100_000, 5), (199_990, 10)]
    assert found.spans(number, far) == [data[a : a + n] for a, n in far]
    for start, size in ((199_999, 2), (300_000, 1)):
      with pytest.raises(faults.BadExample, match="ends before|cannot") as e:
        found.read(number, start, size)
      assert e.value.kind == "unreadable shard"
  with pytest.raises(faults.BadExample, match="No such file") as e:
    found.read(2, 0, 1)
  assert e.value.kind == "unreadable shard"


def test_near_spans_are_one_read(tmp_path, monkeypatch):
  path = tmp_path / "a"
  path.write_bytes(bytes(300_000))
  found, reads = files.Files([str(path)]), []
  read = found.read
  monkeypatch.setattr(found, "read", lambda *a: reads.append(a) or read(*a))
  found.spans(0, [(100, 20_000), (60_000, 5), (30_000, 7)])
  assert reads == [(0, 100, 59_905)]
  del reads[:]
  found.spans(0, [(100, 20_000), (200_000, 5)])
  assert len(reads) == 2


def test_remote_reads_are_tried_again(memory, monkeypatch):
  found, tries = files.Files(["memory:///bucket/1.tar"]), []

  def cat_file(path, start, end):
    tries.append(path)
    if len(tries) < 3:
      raise OSError("the network")
    return bytes(end - start)

  monkeypatch.setattr(found._systems["memory"], "cat_file", cat_file)
  monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
  assert found.read(0, 0, 4) == bytes(4) and len(tries) == 3
  with monkeypatch.context() as patch:
    patch.setattr(
      found._systems["memory"], "cat_file", lambda *_, **__: bytes(100)
    )
    with pytest.raises(faults.BadExample, match="sends whole files"):
      found.read(0, 0, 4)
  del tries[:]
  monkeypatch.setattr(files, "_ATTEMPTS", 2)
  with pytest.raises(faults.BadExample, match="the network"):
    found.read(0, 0, 4)


def test_few_files_are_open_whatever_threads_do(tmp_path):
  paths = [tmp_path / str(i) for i in range(40)]
  for i, path in enumerate(paths):
    path.write_bytes(bytes([i]) * 1000)
  count = lambda: sum(
    os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
    for fd in os.listdir("/proc/self/fd")
    if os.path.islink(f"/proc/self/fd/{fd}")
  )
  found = files.Files(list(map(str, paths)), limit=4)
  order = np.random.default_rng(0).integers(40, size=4000).tolist()

  def read(i, held=found):
    return held.read(i, i, 100)

  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    for i, data in zip(order, threads.map(read, order)):
      assert data == bytes([i]) * 100
  assert count() <= 4
  found._open.clear()
  assert count() == 0


def test_window_passes_over_what_is_not_asked_for(tmp_path, monkeypatch):
  data = np.random.default_rng(0).bytes(3 << 20)
  path = tmp_path / "a"
  path.write_bytes(data)
  found, reads = files.Files([str(path)]), []
  read = found.read
  monkeypatch.setattr(found, "read", lambda *a: reads.append(a[2]) or read(*a))
  window = files.Window(found, 0, len(data))
  for start, size in (
    (0, 512),
    (1000, 512),
    (2 << 20, 512),
    (100, 5),
    (len(data) - 10, 512),
    (len(data), 5),
    (10**9, 5),
  ):
    assert window(start, size) == data[start : start + size]
  assert sum(reads) < 1 << 20
  assert window(5, 1 << 20) == data[5 : 5 + (1 << 20)]
