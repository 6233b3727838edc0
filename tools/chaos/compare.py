"""Compares a disturbed run with an undisturbed one."""

import pathlib
from typing import Any

import jax
import numpy as np

from sigjax import errors, trees
from sigjax.checkpoints import restore
from sigjax.runtime import metrics as metrics_lib
from tools.chaos import run

# The largest difference between parameters whose sums were rounded differently,
# relative to their norm.
ROUNDING = 1e-4


def each_once_per_epoch(path: pathlib.Path) -> str:
  """Checks that every example was given once in every epoch.

  Args:
    path: the log of an undisturbed run.

  Returns:
    A line that says so.

  Raises:
    UserError: an epoch lacks examples or repeats them.
  """
  log = run.read_log(path)
  steps = run.EXAMPLES // run.BATCH
  for i in range(0, len(log) - steps + 1, steps):
    seen = sorted(n for _, _, numbers in log[i : i + steps] for n in numbers)
    if seen != list(range(run.EXAMPLES)):
      raise errors.UserError(
        f"steps {i + 1} to {i + steps} did not get each example once"
      )
  return f"{len(log) // steps} epochs of each of {run.EXAMPLES} examples"


def with_whole(
  config: pathlib.Path,
  whole: pathlib.Path,
  workdir: pathlib.Path,
  bitwise: bool,
) -> str:
  """Compares parameters, examples and metrics with those of an undisturbed run.

  Args:
    config: the config file; the logs of the runs are beside it.
    whole: the workdir of the undisturbed run.
    workdir: that of the disturbed run.
    bitwise: whether the parameters have to be equal bit for bit.

  Returns:
    A line about what was equal.

  Raises:
    UserError: something differs.
  """
  name = workdir.name
  a, b = _params(whole), _params(workdir)
  far = max(
    float(np.linalg.norm(a[k] - b[k]) / max(np.linalg.norm(a[k]), 1)) for k in a
  )
  same = all(np.array_equal(a[k], b[k]) for k in a)
  if not (same if bitwise else far < ROUNDING):
    raise errors.UserError(f"{name}: parameters differ by {far:.1e}")
  order = {
    step: numbers
    for step, _, numbers in run.read_log(config.parent / f"{whole.name}.jsonl")
  }
  given = run.read_log(config.parent / f"{name}.jsonl")
  rows: dict[int, set[int]] = {step: set() for step in order}
  for step, row, numbers in given:
    if numbers != order[step][row : row + len(numbers)]:
      raise errors.UserError(f"{name}: step {step} had other examples")
    rows[step].update(range(row, row + len(numbers)))
  if any(len(seen) != run.BATCH for seen in rows.values()):
    raise errors.UserError(f"{name}: a step lacks examples")
  if _steps(whole) != _steps(workdir):
    raise errors.UserError(f"{name}: metrics.jsonl has other steps")
  return (
    f"{name}: {len(a)} arrays "
    + ("equal bit for bit" if same else f"equal to {far:.0e}")
    + f"; {len(order)} steps with the same examples, "
    f"{len(given) * len(given[0][2]) // run.BATCH - len(order)} "
    "given again; each step's metrics once"
  )


def _params(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns {name: array} of the newest checkpoint."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return trees.flatten(jax.device_get(restore.read_params(str(workdir), here)))


def _steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of metrics.jsonl, in order."""
  return [row["step"] for row in metrics_lib.read(workdir)]
