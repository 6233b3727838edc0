"""What a run writes and shows."""

import json
import resource
import time

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer import record_writer

from sigjax.runtime import bucket, metrics


def test_jsonl_and_events(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write(1, {"loss": 2.5, "held/top-1": 0.25})
    writer.write(2, {"loss": float("nan")})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"step": 1, "loss": 2.5, "held/top-1": 0.25},
    {"step": 2, "loss": None},
  ]
  (path,) = tmp_path.glob("events.*")
  assert events(path.read_bytes())[:2] == [
    (1, "loss", 2.5),
    (1, "held/top-1", 0.25),
  ]


def test_a_picture_in_the_events(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write_image(3, "picture", b"a PNG")
  (path,) = tmp_path.glob("events.*")
  *_, last = map(event_pb2.Event.FromString, records(path.read_bytes()))
  (value,) = last.summary.value
  assert (last.step, value.tag) == (3, "picture")
  assert value.image.encoded_image_string == b"a PNG"


def records(data):
  """Reads a TFRecord file: length 8, crc 4, the record, crc 4 bytes."""
  found = []
  while data:
    length = int.from_bytes(data[:8], "little")
    for part, crc in (
      (data[:8], data[8:12]),
      (data[12 : 12 + length], data[12 + length : 16 + length]),
    ):
      assert record_writer.masked_crc32c(part) == int.from_bytes(crc, "little")
    found.append(data[12 : 12 + length])
    data = data[16 + length :]
  return found


def events(data):
  """Returns [(step, tag, value)] of a file of events."""
  found = map(event_pb2.Event.FromString, records(data))
  return [
    (event.step, v.tag, v.simple_value)
    for event in found
    for v in event.summary.value
  ]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
  with metrics.Writer(tmp_path) as writer:
    writer.write(2, {"loss": 1.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_steps_that_are_done_again_are_written_once(tmp_path):
  """A run killed at step 5 goes on from its checkpoint of step 3."""
  for first, last in ((0, 5), (3, 6)):
    with metrics.Writer(tmp_path, first) as writer:
      for step in range(first + 1, last + 1):
        writer.write(step, {"loss": float(last)})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [(x["step"], x["loss"]) for x in map(json.loads, lines)] == [
    (1, 5),
    (2, 5),
    (3, 5),
    (4, 6),
    (5, 6),
    (6, 6),
  ]
  _, path = sorted(tmp_path.glob("events.*"))
  start = event_pb2.Event.FromString(records(path.read_bytes())[1])
  assert start.step == 4  # TensorBoard drops what it had from there on
  assert start.session_log.status == event_pb2.SessionLog.START
  with metrics.Writer(tmp_path) as writer:  # evaluation alone
    writer.write(2, {"x": 1})
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize(
  "line",
  [b"", b"{}", b"null", b"\0\0\0", b"\xff", b'{"step": "x"}', b"[" * 99999],
)
def test_a_damaged_line_does_not_block_a_restart(tmp_path, caplog, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
  with metrics.Writer(tmp_path, 2) as writer:
    writer.write(3, {"loss": 1.0})
  lines = path.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
  assert "metrics.jsonl: 1 lines are not metrics" in caplog.text


def test_evaluation_alone_needs_no_right_to_write(read_only_dir, caplog):
  with metrics.Writer(read_only_dir) as writer:
    writer.write(2, {"held/top-1": 0.5})
  assert "cannot be written (Permission denied): the results" in caplog.text
  with pytest.raises(PermissionError):
    metrics.Writer(read_only_dir, 2)


def test_a_full_disk_delays_what_is_written(tmp_path, caplog):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with metrics.Writer(tmp_path, 0) as writer:
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
      for step in range(1, 9):
        writer.write(step, {"loss": 0.5})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 100
    writer.write(9, {"loss": 0.5})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
  (path,) = tmp_path.glob("events.*")
  assert [step for step, _, _ in events(path.read_bytes())] == list(
    range(1, 10)
  )
  said = [r.getMessage() for r in caplog.records]
  assert len(said) == 2 and all("File too large" in x for x in said)


def test_clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e6)
  clock = metrics.Clock(batch_size=32, flops_per_example=1000.0)
  for _ in range(5):
    clock.tick()
  now[0] += 4
  rates = clock.read(waited=1.0)
  assert rates["examples_per_second"] == pytest.approx(40)
  assert rates["examples_per_second_per_device"] == pytest.approx(5)
  assert rates["mfu_percent"] == pytest.approx(100 * 40 * 1000 / 8e6)
  assert rates["data_wait_percent"] == pytest.approx(25)
  now[0] += 1
  clock.tick()
  now[0] += 1
  rates = clock.read(waited=1.5)
  assert rates["examples_per_second"] == pytest.approx(16)
  assert rates["data_wait_percent"] == pytest.approx(25)
  # An evaluation: neither its time nor what was waited before it counts.
  now[0] += 50
  clock.start(waited=9.5)
  now[0] += 2
  assert clock.read(waited=10.0)["data_wait_percent"] == pytest.approx(25)


def test_table():
  assert metrics.table([("a", "10.0%"), ("bcd", "1%")], ("x", "value")) == [
    "x    value",
    "----------",
    "a    10.0%",
    "bcd     1%",
  ]


@pytest.mark.parametrize(
  "loss, norm, ok",
  [(1.0, 2.0, True), (float("nan"), 1.0, False), (1.0, float("inf"), False)],
)
def test_finite(loss, norm, ok):
  assert metrics.finite(dict(loss=loss, grad_norm=norm)) is ok


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_in_a_bucket(scheme, server):
  """Put now and then, before a save, and at the end; resumed as on a disk."""
  workdir = bucket.Path(f"{scheme}://bucket/run")
  with metrics.Writer(workdir, 0) as writer:
    writer.write(1, {"loss": 2.5})
    writer.write_image(1, "picture", b"a PNG")
    writer.flush()
    assert server.get("bucket/run/metrics.jsonl").count(b"\n") == 1
    writer.write(2, {"loss": 2.0})
    end = time.monotonic() + 20  # it needs no flush
    while server.get("bucket/run/metrics.jsonl").count(b"\n") < 2:
      assert time.monotonic() < end
      time.sleep(0.01)
    writer.write(3, {"loss": 1.5})
  with metrics.Writer(workdir, 2) as writer:
    writer.write(3, {"loss": 1.0})
  lines = metrics.read(workdir)
  assert [(x["step"], x["loss"]) for x in lines] == [(1, 2.5), (2, 2), (3, 1)]
  paths = sorted(workdir.glob("events.*"))
  found = [events(path.read_bytes()) for path in paths]
  assert [step for step, _, _ in found[0]] == [1, 1, 2, 3]
  assert found[1] == [(3, "loss", 1.0)]
  server.fail = lambda method, name: 403 if method in ("PUT", "POST") else None
  with metrics.Writer(workdir) as writer:  # evaluation alone may not write
    writer.write(3, {"x": 1.0})
  assert metrics.read(workdir) == lines
