"""The lock on a workdir; see test_hosts.py for two runs."""

import threading
import time

import pytest

from sigjax import errors
from sigjax.runtime import bucket, lock


def test_a_workdir_that_cannot_be_written(read_only_dir):
  with (
    pytest.raises(
      errors.UserError, match="lock cannot be written .Permission denied."
    ),
    lock.hold(read_only_dir),
  ):
    pass


def test_it_is_free_again_after_the_body(tmp_path):
  for _ in range(2):
    with lock.hold(tmp_path):
      assert "process" in (tmp_path / "lock").read_text()


@pytest.fixture(params=["gs", "s3"])
def run(request, server, monkeypatch):
  """Returns a workdir in a bucket, where a lock is soon dead."""
  del server
  monkeypatch.setattr(lock, "BEAT_S", 0.05)
  monkeypatch.setattr(lock, "DEAD_S", 0.4)
  monkeypatch.setattr(bucket, "LISTED_S", 0.5)
  return bucket.Path(f"{request.param}://bucket/run")


def test_in_a_bucket_one_run_holds_the_lock(run, server):
  for _ in range(2):
    with lock.hold(run):
      first = (run / "lock").read_bytes()
      with (
        pytest.raises(errors.UserError, match="being written by process .* on"),
        lock.hold(run),
      ):
        pass
      assert (run / "lock").read_bytes() != first  # a sign of life
    assert server.names() == []


def test_in_a_bucket_the_lock_of_a_killed_run_is_taken(run, caplog):
  """Of several that wait for it, by one."""
  (run / "lock").write_text("process 1 on away, 123, 4")
  caplog.set_level("INFO")
  held, refused = [], []

  def hold():
    try:
      with lock.hold(run):
        held.append(1)
        time.sleep(1)
    except errors.UserError as e:
      refused.append(str(e))

  threads = [threading.Thread(target=hold) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(held) == 1 and len(refused) == 2
  assert "lock is there, of process 1 on away; waiting" in caplog.text


def test_in_a_bucket_a_run_ends_when_its_lock_is_taken(
  run, monkeypatch, capsys
):
  ended = threading.Event()
  monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
  with lock.hold(run):
    time.sleep(0.2)
    (run / "lock").write_text("process 1 on away, 123, 4")
    assert ended.wait(5)
  said = capsys.readouterr().err
  assert f"error: {run}/lock was taken by process 1 on away, because" in said
  assert (run / "lock").exists()  # it is not ours to remove


def test_in_a_bucket_a_lock_outlives_faults(run, server, monkeypatch):
  """A bucket out of reach for a while, an answer that is lost, a deletion."""
  monkeypatch.setattr(lock.os, "_exit", lambda code: pytest.fail("it ended"))
  with lock.hold(run):
    for fault in (503, -503, 403):
      server.fail = lambda method, name, fault=fault: (
        fault if method in ("PUT", "POST") else None
      )
      time.sleep(0.3)
      server.fail = lambda method, name: None
      before = (run / "lock").read_bytes()
      time.sleep(0.2)
      assert (run / "lock").read_bytes() != before
    (run / "lock").unlink()
    time.sleep(0.2)
    assert (run / "lock").exists()
  assert not run.exists()


def test_in_a_bucket_that_cannot_be_listed(run, server):
  server.lag_s = 0.2  # a listing may be late
  with lock.hold(run):
    pass
  server.lag_s = 60
  with (
    pytest.raises(errors.UserError, match="run: it cannot be listed, or"),
    lock.hold(run),
  ):
    pass
  assert server.names() == []
  server.fail = lambda method, name: 403 if method in ("PUT", "POST") else None
  with (
    pytest.raises(errors.UserError, match="run/lock: access is denied"),
    lock.hold(run),
  ):
    pass
