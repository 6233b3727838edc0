"""Which log lines a program prints."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# What nobody has to see, and what everybody has to.
PROGRAM = """
import logging
import sys
from absl import app, logging as absl_logging
import tqdm
from sigjax.runtime import hosts, program
log = logging.getLogger("sigjax")
def main(argv):
  program.quiet_libraries()
  {shown}
  absl_logging.info("an absl info")
  absl_logging.warning("an absl warning")
  logging.getLogger("some.library").info("a library's info")
  logging.getLogger("jax._src.xla_bridge").warning("of JAX")
  log.debug("ours, debug")
  for _ in tqdm.tqdm(range(1), file=sys.stderr):
    log.info("ours, info")
  log.warning("ours, warning")
program.run(main)
"""


@pytest.mark.parametrize("where", ["stderr", "stdout", "other host"])
def test_what_the_package_logs_is_seen(where):
  shown = {
    "stderr": "pass",
    "stdout": "program.show_log_in_training()",
    "other host": "hosts.is_primary = bool; program.show_log_in_training()",
  }[where]
  run = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(shown=shown)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  lines = [line.strip() for line in (run.stdout + run.stderr).splitlines()]
  ours = run.stdout if where == "stdout" else run.stderr
  assert ("ours, info" in lines) == (where != "other host")
  assert "ours, warning" in ours.splitlines()
  assert "of JAX" in run.stderr
  assert "absl" not in "".join(lines) and "library" not in "".join(lines)
  assert "debug" not in "".join(lines)
