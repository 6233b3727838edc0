"""A short run with faults of most kinds: nothing is lost."""

import os
import pathlib
import re
import subprocess
import sys

import cpu_devices
import pytest

from tools.chaos import run

ROOT = pathlib.Path(__file__).parent.parent.parent


def can_mount(path):
  """Returns whether this process may mount a small disk."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
  if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
    return False
  subprocess.run(["umount", str(path)], check=True)
  return True


def test_chaos(tmp_path):
  if not can_mount(tmp_path):
    pytest.skip("mounting a disk to fill it up is not allowed here")
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "tools.chaos",
      "--faults=5",
      "--steps_per_fault=8",
      f"--out={tmp_path / 'out'}",
    ],
    text=True,
    capture_output=True,
    cwd=ROOT,
    timeout=550,
    check=False,
    env={**os.environ, "XLA_FLAGS": cpu_devices.xla_flags(1)},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  table = done.stdout[done.stdout.index("effect") :]
  for kind in ("save", "full disk", "damage", "term", "devices"):
    assert re.search(rf"^\d +{kind} ", table, re.M), done.stdout
  assert "disturbed: 60 arrays equal bit for bit; 52 steps with" in table
  assert "moved: 60 arrays equal" in table
  assert "17 epochs of each of 48 examples" in table
  assert not os.path.ismount(tmp_path / "out/disk")


def test_a_log_may_be_cut(tmp_path):
  path = tmp_path / "log"
  path.write_text("\n[1, 0, [5, 6]]\n[2, 0, [7\n[2, 0, [7, 8]]")
  assert run.read_log(path) == [(1, 0, [5, 6]), (2, 0, [7, 8])]
