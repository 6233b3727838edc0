"""Kept programs and memory, in processes of their own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import resource
import numpy as np
import jax
from sigjax.runtime import start
start.keep_memory()
start.keep_compiled()
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
"""


@pytest.mark.parametrize(
  "given, kept",
  [
    ({}, True),
    ({"JAX_COMPILATION_CACHE_DIR": "", "MALLOC_ARENA_MAX": "4"}, False),
  ],
)
def test_what_is_kept(tmp_path, given, kept):
  env = {k: v for k, v in os.environ.items() if "COMPILATION" not in k}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env={**env, "SIGJAX_CACHE": str(tmp_path), "XLA_FLAGS": "", **given},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  folder, faults = done.stdout.split("\n")[:2]
  assert (folder == str(tmp_path / "compiled")) == kept
  assert any((tmp_path / "compiled").glob("*")) == kept
  if sys.platform == "linux":  # pages that had to be cleared
    assert (int(faults) < 8) == kept
