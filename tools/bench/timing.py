"""Measures in turns, for tools.benchmark."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import os
import platform
import time
from typing import Any, TypeVar

import jax
import numpy as np

MIB = 2**20
Row = dict[str, Any]  # {column: value}; None for what did not fit
Key = TypeVar("Key", bound=Hashable)


def timed(fn: Callable[..., Any], *args: Any) -> float:
  """Returns the seconds until fn(*args) has its results."""
  start = time.perf_counter()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - start


def interleave(
  runs: Mapping[Key, Callable[[], Any] | None], rounds: int
) -> dict[Key, np.ndarray | None]:
  """Runs all variants in turns: a first round to warm up, then `rounds` more.

  Each round has another random order, so that no variant always finds the
  caches as the same other one left them.

  Args:
    runs: {key: fn() -> seconds, or an array of them}; None instead of a
      function for what does not fit into memory.
    rounds: the number of rounds.

  Returns:
    {key: (rounds, ...) array, or None where memory ran out}.
  """
  times: dict[Key, list[Any]] = {key: [] for key in runs}
  fitting = {key: run for key, run in runs.items() if run}
  rng, keys = np.random.default_rng(0), list(runs)
  for i in range(rounds + 1):
    for key in (keys[j] for j in rng.permutation(len(keys))):
      if key not in fitting:
        continue
      try:
        seconds = fitting[key]()
      except (jax.errors.JaxRuntimeError, MemoryError) as e:
        check_memory_ran_out(e)
        del fitting[key]
      else:
        times[key] += [seconds] if i else []
  return {
    key: np.array(x) if key in fitting else None for key, x in times.items()
  }


def build(
  fn: Any, devices: Sequence[Any], *args: Any
) -> tuple[Callable[..., Any] | None, float | None]:
  """Compiles a jitted function.

  Args:
    fn: the jitted function.
    devices: the devices it runs on.
    *args: its arguments, possibly abstract.

  Returns:
    The executable, or None if it does not fit; and its temporary memory per
    device in MiB, or None if that is not known.
  """
  try:
    compiled = fn.lower(*args).compile()
  except jax.errors.JaxRuntimeError as e:
    check_memory_ran_out(e)
    return None, None
  memory = compiled.memory_analysis()
  if memory is None:
    return compiled, None
  temp = memory.temp_size_in_bytes
  # On a CPU nothing fails in time: the system kills the process instead.
  fits = devices[0].platform != "cpu" or temp * len(devices) < host_memory()
  return compiled if fits else None, temp / MIB


def check_memory_ran_out(error: Exception) -> None:
  """Raises the error again unless it says that memory ran out."""
  if not isinstance(error, MemoryError) and (
    "RESOURCE_EXHAUSTED" not in str(error)
  ):
    raise error


def host_memory() -> float:
  """Returns the free memory of the host in bytes, or inf if not known."""
  try:
    with open("/proc/meminfo", encoding="ascii") as f:
      fields = dict(line.split(":") for line in f)
    return int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError):
    return float("inf")


def spread(samples: np.ndarray | None, unit: str) -> Row:
  """Returns the median, quartiles and extremes of samples, as columns.

  Args:
    samples: seconds, or None for what did not fit.
    unit: "ms" or "us", of the columns.
  """
  names = ("", "_q1", "_q3", "_min", "_max")
  if samples is None:
    return {unit + name: None for name in names}
  scale = {"ms": 1e3, "us": 1e6}[unit]
  found = np.percentile(samples, (50, 25, 75, 0, 100)) * scale
  return {unit + name: float(x) for name, x in zip(names, found)}


def machine(devices: Sequence[Any]) -> Row:
  """Returns columns that describe the machine."""
  cores = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count()
  )
  return {
    "devices": len(devices),
    "device_kind": devices[0].device_kind,
    "jax": jax.__version__,
    "cores": cores,
    "machine": platform.machine(),
    # The load by other programs, before this one begins.
    "load": round(os.getloadavg()[0], 1),
  }
