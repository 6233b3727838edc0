"""Kept programs and memory, in processes of their own."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sigjax.runtime import start

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import logging
import resource
import sys
import numpy as np
import jax
from sigjax.runtime import files, start
logging.basicConfig(level=logging.INFO, format="%(message)s")
hits = []
jax.monitoring.register_event_listener(
  lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
start.keep_memory()
start.keep_compiled(files.path(sys.argv[1]))
print(jax.config.jax_compilation_cache_dir)
if jax.config.jax_compilation_cache_dir:
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
faults = []
for i in range(9):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(1 << 26, np.uint8)
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
print(len(hits))
"""


def started(workdir, env):
  """Returns the lines that PROGRAM prints, then those that it logs."""
  inherited = {k: v for k, v in os.environ.items() if "COMPILATION" not in k}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(workdir)],
    env={**inherited, "XLA_FLAGS": "", **env},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.parametrize(
  "given, kept",
  [
    ({}, True),
    ({"JAX_COMPILATION_CACHE_DIR": "", "MALLOC_ARENA_MAX": "4"}, False),
  ],
)
def test_what_is_kept(tmp_path, given, kept):
  env = {"SIGJAX_CACHE": str(tmp_path), **given}
  folder, faults, _, said = started(tmp_path / "workdir", env)
  assert said == f"compiled programs are kept in {folder or 'no folder'}"
  assert (folder == str(tmp_path / "compiled")) == kept
  assert any((tmp_path / "compiled").glob("*")) == kept
  if sys.platform == "linux":  # pages that had to be cleared
    assert (int(faults) < 8) == kept


@pytest.mark.parametrize("named", [False, True])
def test_a_bucket_keeps_what_is_compiled(tmp_path, server, named):
  workdir, place = "gs://bucket/run", "gs://bucket/run/compiled"
  env = {**server.env, "SIGJAX_CACHE": str(tmp_path)}
  if named:
    place = workdir = "s3://bucket/programs"
    env["JAX_COMPILATION_CACHE_DIR"] = place
  for hits in ("0", "1"):  # the next start compiles nothing
    folder, _, found, *said = started(workdir, env)
    assert folder == place and found == hits
    assert f"compiled programs are kept in {place}" in said  # beside libraries
  ours = place.split("://")[1] + "/"
  (name,) = server.names()
  assert name.startswith(ours) and name.endswith("-cache")
  assert not list(tmp_path.iterdir())


def test_flags_of_libtpu(monkeypatch, caplog):
  caplog.set_level(logging.INFO, "sigjax")
  both = [f"--{name}={value}" for name, value in start.LIBTPU_FLAGS.items()]
  name = list(start.LIBTPU_FLAGS)[0]
  for given, want in (
    ("", " ".join(both)),
    ("--other=1", " ".join(["--other=1", *both])),
    (f"--{name}=7", f"--{name}=7 {both[1]}"),
  ):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    start.tell_libtpu()
    assert os.environ["LIBTPU_INIT_ARGS"] == want
    start.tell_libtpu()  # once is enough
    assert os.environ["LIBTPU_INIT_ARGS"] == want
  start.log_libtpu()
  assert not caplog.messages  # on a CPU
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  start.log_libtpu()
  assert caplog.messages == [f"LIBTPU_INIT_ARGS={want}"]
