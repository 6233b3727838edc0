"""What a run writes and shows."""

import json

import pytest
from tensorboardX.proto import event_pb2

from sigjax import metrics


def test_jsonl_and_events(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write(1, {"loss": 2.5, "held/top-1": 0.25})
    writer.write(2, {"loss": float("nan")})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
      {"step": 1, "loss": 2.5, "held/top-1": 0.25}, {"step": 2, "loss": None}]
  path, = tmp_path.glob("events.*")
  assert events(path.read_bytes())[:2] == [(1, "loss", 2.5),
                                           (1, "held/top-1", 0.25)]


def events(data):
  """Reads a TFRecord of events: length 8, crc 4, the event, crc 4 bytes."""
  found = []
  while data:
    length = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12:12 + length])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + length:]
  return found


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
  with metrics.Writer(tmp_path) as writer:
    writer.write(2, {"loss": 1.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e6)
  clock = metrics.Clock(batch_size=32, flops_per_example=1000.0)
  for _ in range(5):
    clock.tick()
  now[0] += 4
  rates = clock.read()
  assert rates["examples_per_second"] == pytest.approx(40)
  assert rates["examples_per_second_per_device"] == pytest.approx(5)
  assert rates["mfu_percent"] == pytest.approx(100 * 40 * 1000 / 8e6)
  now[0] += 1
  clock.tick()
  now[0] += 1
  assert clock.read()["examples_per_second"] == pytest.approx(16)


def test_progress_shows_what_is_asked_for(capsys):
  with metrics.Progress(2, 10) as progress:
    progress.update(3, dict(loss=1.25, t=10.5, b=-9.75),
                    examples_per_second=1234.5)
    progress.write("a line")
  shown = capsys.readouterr()
  for part in ("step 3/10", "1234 ex/s", "loss 1.250", "t 10.50", "b -9.75",
               "left"):
    assert part in shown.err
  assert "a line" in shown.out


def test_table():
  assert metrics.table([("a", "10.0%"), ("bcd", "1%")], ("x", "value")) == [
      "x    value", "----------", "a    10.0%", "bcd     1%"]


@pytest.mark.parametrize("loss, norm, ok", [
    (1.0, 2.0, True), (float("nan"), 1.0, False), (1.0, float("inf"), False)])
def test_finite(loss, norm, ok):
  assert metrics.finite(dict(loss=loss, grad_norm=norm)) is ok
