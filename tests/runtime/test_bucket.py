"""Paths in buckets, against an emulator of GCS and S3."""

import threading
import time

from etils import epath
import pytest

from sigjax.runtime import bucket, files


@pytest.fixture(params=["gs", "s3"])
def run(request, server):
  """Returns a folder in a bucket."""
  del server
  return bucket.Path(f"{request.param}://bucket/run")


def test_a_path_is_what_pathlib_would_make_of_it(run):
  assert files.path(str(run)) == run == epath.Path(str(run))
  assert files.in_bucket(run) and not files.in_bucket(files.path("run"))
  root = f"{run.scheme}://bucket"
  assert f"{run}" == f"{root}/run" and str(run.parent) == root
  assert (run.scheme, run.bucket, run.key, run.name) == (
    *(run.scheme, "bucket"),
    *("run", "run"),
  )
  assert str((run / "a.model").with_suffix(".json")) == f"{root}/run/a.json"
  assert str((run / "3").with_name("3.damaged")) == f"{root}/run/3.damaged"
  assert str((run / "a" / "b").relative_to(run)) == "a/b"
  assert run.absolute() is run and hash(run / "a/b") == hash(run / "a" / "b")


def test_files_and_folders(run, server):
  """Names that begin alike are apart, and listings have several pages."""
  assert not run.exists()
  with pytest.raises(FileNotFoundError):
    run.read_bytes()
  (run / "a/b.txt").write_text("Grüße")
  with (run / "c").open("w") as f:
    f.write("hello")
  with (run / "c").open("rb") as f:
    assert f.read() == b"hello"
  (run.parent / "run0").write_bytes(b"")
  (run.parent / "run.txt").write_bytes(b"")
  server.put("bucket/run/a/", b"")  # what a console makes for a folder
  assert (run / "a/b.txt").read_text() == "Grüße"
  assert run.is_dir() and (run / "a").is_dir() and not run.is_file()
  assert (run / "c").is_file() and not (run / "c").is_dir()
  assert [path.name for path in run.iterdir()] == ["a", "c"]
  assert run.below() == ["a/b.txt", "c"]
  many = [f"many/{i:02}/x" for i in range(30)]
  for name in many:
    (run / name).write_bytes(b"x")
  assert run.below() == ["a/b.txt", "c", *many]
  assert [str(path) for path in run.glob("many/0?")] == [
    str(run / f"many/0{i}") for i in range(10)
  ]
  (run / "a").rename(run / "z")
  (run / "many").rmtree()
  assert run.below() == ["c", "z/b.txt"]
  files.remove(run)
  files.remove(run)
  assert not run.exists()
  assert server.names() == ["bucket/run.txt", "bucket/run0"]


def test_what_fails_in_the_middle_is_not_written(run):
  with pytest.raises(ZeroDivisionError), (run / "a").open("wb") as f:
    f.write(bytes(1 // 0))
  assert not run.exists()


def test_of_several_that_create_an_object_one_does(run):
  path = run / "lock"
  none, won = path.read()[1], []

  def create(i):
    if path.write(b"%d" % i, none):
      won.append(b"%d" % i)

  threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert won == [path.read()[0]]
  generation = path.read()[1]
  assert path.write(b"new", generation)
  assert path.write(b"newer", generation) is None
  assert path.write(None, generation) is None
  assert path.read_bytes() == b"new"


def test_two_that_append_lose_nothing(run):
  (run / "log").write_bytes(b"0\n")
  files_ = [bucket.Appended(run / "log") for _ in range(2)]
  for i in range(1, 40):
    files_[i % 2].write(b"%d\n" % i)
    time.sleep(0.005)
  for file in files_:
    file.close()
  lines = (run / "log").read_bytes().splitlines()
  assert sorted(map(int, lines)) == list(range(40))


def test_what_is_appended_waits_for_the_bucket(run, server, caplog):
  file = bucket.Appended(run / "log")
  server.fail = lambda method, name: 403 if method in ("PUT", "POST") else None
  file.write(b"a")
  for _ in range(3):
    file.flush()
  assert server.get("bucket/run/log") is None
  (said,) = [r.getMessage() for r in caplog.records]
  assert said.startswith(f"{run}/log: access is denied (403); ")
  assert said.endswith("; the run continues")
  server.fail = lambda method, name: None
  file.write(b"b")
  file.close()
  assert server.get("bucket/run/log") == b"ab"


def test_an_answer_that_is_lost_does_not_append_twice(run, server):
  file = bucket.Appended(run / "log")
  puts = []

  def fail(method, name):
    if method in ("PUT", "POST"):
      puts.append(name)
      return -503 if len(puts) == 1 else None
    return None

  server.fail = fail
  file.write(b"a")
  file.flush()
  file.write(b"b")
  file.close()
  assert len(puts) >= 2 and server.get("bucket/run/log") == b"ab"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_without_credentials(scheme, server, monkeypatch):
  monkeypatch.delenv("AWS_ACCESS_KEY_ID")
  monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
  monkeypatch.setenv("HOME", "/nowhere")
  server.anonymous = False
  path = bucket.Path(f"{scheme}://bucket/run/lock")
  code, remedy = dict(
    gs=(
      401,
      "log in with `gcloud auth application-default login`, or name a "
      "key in GOOGLE_APPLICATION_CREDENTIALS",
    ),
    s3=(403, "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
  )[scheme]
  for call in (path.read, path.exists, lambda: path.write(b""), path.below):
    with pytest.raises(bucket.BucketError) as e:
      call()
    assert str(e.value) == f"{path}: access is denied ({code}); {remedy}"


def test_a_listing_that_is_refused_is_not_empty(run, server):
  """Tensorstore takes it for an empty one."""
  (run / "checkpoints/3/x").write_bytes(b"x")
  # So answers a bucket that may be read, but not be listed.
  server.fail = lambda method, name: (
    403 if name == "bucket/" or server.get(name) is None else None
  )
  with pytest.raises(bucket.BucketError, match="access is denied .403."):
    (run / "checkpoints").below()


def test_other_mistakes(run, server, monkeypatch):
  with pytest.raises(bucket.BucketError, match="ucket name: .x.$"):
    bucket.Path(f"{run.scheme}://x/run").exists()
  with pytest.raises(bucket.errors.UserError, match="names no bucket"):
    bucket.Path(f"{run.scheme}://").exists()
  server.fail = lambda method, name: 404
  with pytest.raises(bucket.BucketError, match="there is no such bucket$"):
    run.write_bytes(b"")
  server.fail = lambda method, name: 503
  with pytest.raises(bucket.BucketError, match="All 2 retry.* .503.$"):
    run.write_bytes(b"")
  url = "http://localhost:1"
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
  monkeypatch.setenv("AWS_ENDPOINT_URL", url)
  with pytest.raises(bucket.BucketError, match="Could not connect to server"):
    bucket.Path(f"{run.scheme}://another/run").exists()
