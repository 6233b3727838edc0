"""The progress of training on a terminal: a bar, or a line now and then."""

import sys
import time
from typing import Any

import tqdm

from sigjax.runtime import hosts

LINE_EVERY_S = 30.0  # where there is no terminal to draw a bar on


class Progress:
  """Shows step, examples per second, loss, t, b and the time left, on stderr.

  A terminal has a bar. A file or a pipe gets a line every LINE_EVERY_S seconds
  and one at the end. Processes other than the primary one show nothing.

  Args:
    first_step: the step from which training starts or resumes.
    total_steps: the last step.
  """

  def __init__(self, first_step: int, total_steps: int):
    self._first, self._total = first_step, total_steps
    self._numbers = ""
    self._bar = self._line_due = None
    self._start = time.monotonic()
    if not hosts.is_primary():
      return
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=first_step,
        smoothing=0.1,
        mininterval=0.5,
        dynamic_ncols=True,
        bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left{postfix}]",
      )
    else:
      self._line_due = self._start + LINE_EVERY_S

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def update(
    self,
    step: int,
    metrics: dict[str, float],
    examples_per_second: float | None = None,
    **_: Any,
  ) -> None:
    """Moves to a step.

    Args:
      step: the step that is done.
      metrics: of this step: "loss", "t" and "b" are shown.
      examples_per_second: with None, the numbers shown before stay.
      **_: other rates, which are not shown.
    """
    if examples_per_second is not None:
      self._numbers = (
        f"{examples_per_second:.0f} ex/s, loss {metrics['loss']:.3f}, "
        f"t {metrics['t']:.2f}, b {metrics['b']:.2f}"
      )
    if self._bar is not None:
      self._bar.set_postfix_str(self._numbers, refresh=False)
      self._bar.update(step - self._bar.n)
    elif self._line_due is not None:
      now = time.monotonic()
      if now >= self._line_due or step == self._total:
        self._line_due = now + LINE_EVERY_S
        print(self._line(step, now - self._start), file=sys.stderr, flush=True)

  def _line(self, step: int, seconds: float) -> str:
    left = seconds * (self._total - step) / max(step - self._first, 1)
    numbers = f", {self._numbers}" if self._numbers else ""
    return (
      f"step {step}/{self._total} [{tqdm.tqdm.format_interval(seconds)}, "
      f"{tqdm.tqdm.format_interval(left)} left{numbers}]"
    )

  def write(self, line: str) -> None:
    """Prints a line on stdout, above the bar."""
    if hosts.is_primary():
      tqdm.tqdm.write(line, file=sys.stdout)
