"""The program as a user starts it, with a config file and real processes."""

from collections.abc import Sequence
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import cpu_devices
import jax

from sigjax import trees
from sigjax.checkpoints import restore

ROOT = pathlib.Path(__file__).parent.parent


def start(
  workdir: pathlib.Path,
  config: dict[str, Any],
  devices: int,
  flags: Sequence[str] = (),
  cwd: pathlib.Path | None = None,
) -> subprocess.Popen:
  """Starts a process that trains; the config file is beside the workdir."""
  path = workdir.parent / f"{workdir.name}_config.py"
  path.write_text(
    "from ml_collections import ConfigDict\n"
    f"def get_config(arg=None):\n  return ConfigDict({config!r})"
  )
  args = ["--config", str(path), "--workdir", str(workdir), *flags]
  return subprocess.Popen(
    [sys.executable, "-m", "sigjax.train", *args],
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": cpu_devices.xla_flags(devices),
    },
    cwd=cwd or workdir.parent,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl."""
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def params(path: pathlib.Path) -> dict[str, Any]:
  """Returns {name: array} of a workdir's or checkpoint's parameters."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return trees.flatten(jax.device_get(restore.read_params(path, here)))
