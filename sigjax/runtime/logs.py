"""What a program prints of the logs, and where.

The whole package logs to logging.getLogger("sigjax"). Of the libraries' logs
only errors and JAX's warnings are printed.
"""

import logging
import sys
import warnings

from absl import logging as absl_logging
import tqdm

from sigjax.runtime import hosts


def show() -> None:
  """Prints the package's lines, from INFO up, on stderr."""
  _show(_Lines(to_stdout=False), logging.INFO)


def show_in_training() -> None:
  """Prints the package's lines, from INFO up, on stdout, above a progress bar.

  Processes other than the primary one print those from WARNING up, on stderr.
  Has to be called after hosts.start.
  """
  if hosts.is_primary():
    _show(_Lines(to_stdout=True), logging.INFO)
  else:
    _show(_Lines(to_stdout=False), logging.WARNING)


def _show(handler: logging.Handler, level: int) -> None:
  log = logging.getLogger("sigjax")
  for old in [h for h in log.handlers if isinstance(h, _Lines)]:
    log.removeHandler(old)
  log.addHandler(handler)
  log.setLevel(level)
  log.propagate = False


class _Lines(logging.Handler):
  """Prints each record without breaking the progress bars of tqdm."""

  def __init__(self, to_stdout: bool):
    super().__init__()
    self._to_stdout = to_stdout

  def emit(self, record: logging.LogRecord) -> None:
    # Not kept in __init__: a stream may be redirected later.
    stream = sys.stdout if self._to_stdout else sys.stderr
    tqdm.tqdm.write(self.format(record), file=stream)


def quiet_libraries() -> None:
  """Hides what libraries log, errors and JAX's warnings excepted.

  Of orbax everything is hidden. When an array cannot be written, it prints
  tracebacks of what the package then says in one line, and closes an event
  loop in which other arrays have yet to report the same.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(
    lambda record: (
      record.levelno >= logging.ERROR and "orbax" not in record.pathname
    )
  )
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
  before = sys.unraisablehook
  sys.unraisablehook = lambda it: (
    None if str(it.exc_value) == "Event loop is closed" else before(it)
  )
