"""A trace of some training steps, for TensorBoard and XProf.

train.py names each step on its timeline.
"""

from collections.abc import Sequence
import pathlib
import tempfile

import jax

from sigjax import errors
from sigjax.runtime import files, hosts


def check(steps: Sequence[str] | None) -> tuple[int, int] | None:
  """Returns (first, last) of --profile_steps 10,15; both are traced.

  Raises:
    UserError: these are not two steps in order.
  """
  if steps is None:
    return None
  numbers = [int(x) for x in steps if x.strip().isdecimal()]
  if len(numbers) != len(steps) or len(numbers) != 2 or numbers[1] < numbers[0]:
    raise errors.UserError(
      f"--profile_steps {','.join(steps)} has to be the first and the last "
      "step of the trace, such as 10,15"
    )
  return numbers[0], numbers[1]


class Trace:
  """Traces some steps on the primary process; a file below `folder` holds it.

  Args:
    folder: such as WORKDIR/profile.
    steps: the first and the last step to trace; None traces nothing.
  """

  def __init__(self, folder: files.Path, steps: tuple[int, int] | None):
    self._folder, self._steps = folder, steps if hosts.is_primary() else None
    self._here = folder
    self._runs = False

  def before(self, step: int) -> None:
    """Begins the trace if it is due."""
    due = self._steps and self._steps[0] <= step <= self._steps[1]
    if due and not self._runs:
      if files.in_bucket(self._folder):
        self._here = pathlib.Path(tempfile.mkdtemp())
      jax.profiler.start_trace(self._here)
      self._runs = True

  def after(self, step: int, results: object) -> files.Path | None:
    """Ends the trace if it is due, when `results` are computed.

    Returns:
      The folder, if a trace was written.
    """
    if not self._runs or (self._steps and step < self._steps[1]):
      return None
    jax.block_until_ready(results)
    jax.profiler.stop_trace()
    if files.in_bucket(self._folder):
      for path in self._here.rglob("*"):
        if path.is_file():
          to = self._folder / path.relative_to(self._here)
          to.write_bytes(path.read_bytes())
      files.remove(self._here)
    self._runs, self._steps = False, None
    return self._folder
