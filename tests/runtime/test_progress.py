"""The progress of training: a bar on a terminal, lines elsewhere."""

import sys
import time

import pytest

from sigjax.runtime import progress as progress_lib

METRICS = dict(loss=1.25, t=10.5, b=-9.75)


def test_a_terminal_has_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  with progress_lib.Progress(2, 10) as progress:
    progress.update(3, METRICS, examples_per_second=1234.5)
    progress.write("a line")
  out, err = capsys.readouterr()
  for part in (
    "step 3/10",
    "1234 ex/s",
    "loss 1.250",
    "t 10.50",
    "b -9.75",
    "left",
  ):
    assert part in err
  assert "\r" in err and "a line" in out


def test_a_file_has_a_line_now_and_then(capsys, monkeypatch):
  """One at 30 s, one at 60 s, and one at the last step."""
  now = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  with progress_lib.Progress(2, 102) as progress:
    for step in range(3, 103):
      now[0] += 0.7
      rate = dict(examples_per_second=64.0) if step % 10 == 0 else {}
      progress.update(step, METRICS, **rate)
  out, err = capsys.readouterr()
  numbers = "64 ex/s, loss 1.250, t 10.50, b -9.75"
  assert out == "" and err.splitlines() == [
    f"step 45/102 [00:30, 00:39 left, {numbers}]",
    f"step 88/102 [01:00, 00:09 left, {numbers}]",
    f"step 102/102 [01:10, 00:00 left, {numbers}]",
  ]


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_primary_process_shows_it(capsys, monkeypatch, terminal):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
  monkeypatch.setattr(progress_lib.hosts, "is_primary", lambda: False)
  with progress_lib.Progress(0, 1) as progress:
    progress.update(1, METRICS, examples_per_second=1.0)
    progress.write("a line")
  assert capsys.readouterr() == ("", "")
