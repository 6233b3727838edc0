"""What all programs share: flags, errors in one line, exit codes, the log.

A program defines its flags, then ends with program.run(main). The whole
package logs to logging.getLogger("sigjax"). Of what libraries log, only errors
and JAX's warnings are printed.
"""

from collections.abc import Callable, Sequence
import logging
import os
import re
import sys
from typing import Any
import warnings

from absl import app, flags
from absl import logging as absl_logging
import tqdm

from sigjax import errors
from sigjax.runtime import hosts


def run(
  main: Callable[[list[str]], Any],
  check: Callable[[list[str]], Any] | None = None,
) -> None:
  """Parses the command line, calls main(argv) and exits.

  A UserError, from main or from a mistake in the flags, is printed as one line
  "error: ..." on stderr; the exit code is then 1. Any other exception has its
  traceback. What the package logs is printed on stderr.

  Args:
    main: called with [program, *arguments that are not flags].
    check: see parse_flags.
  """

  def one_line(argv: list[str]) -> None:
    from sigjax.runtime import start  # training calls it by itself

    quiet_libraries()
    show_log()
    start.keep_memory()
    start.tell_libtpu()
    try:
      main(argv)
    except errors.UserError as e:
      sys.exit(f"error: {e}")

  app.run(one_line, flags_parser=lambda argv: parse_flags(argv, check))


def parse_flags(
  argv: Sequence[str], check: Callable[[list[str]], Any] | None = None
) -> list[str]:
  """Parses the flags; a mistake in them ends the program with one line.

  Args:
    argv: the whole command line.
    check: called with the result. A config file is loaded when its flag is
      first read: with a check that reads it, its mistakes end in one line too.
      None refuses arguments that are not flags.

  Returns:
    [program, *arguments that are not flags].
  """
  app.define_help_flags()
  try:
    rest = flags.FLAGS(argv)
    (check or flags_alone)(rest)
    return rest
  except (AttributeError, KeyError) as e:  # an override, --config.x=1
    sys.exit(f"error: {_no_key(str(e.args[0] if e.args else e))}")
  except FileNotFoundError as e:  # the file of --config
    sys.exit(
      f"error: there is no file {e.filename} in {os.getcwd()}; configs/ is in "
      "the root of the repository"
    )
  except (flags.Error, TypeError, ValueError, OSError) as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    lines = lines or [type(e).__name__]
    # ml_collections names the mistake last, absl first.
    last = isinstance(e, OSError) or "Traceback" in str(e)
    line = lines[-1 if last else 0].removeprefix("sigjax.errors.UserError: ")
    sys.exit(f"error: {line}")


def _no_key(text: str) -> str:
  """Returns ml_collections' words about a missing key as one of our lines."""
  key = re.search(r"""["'](\w+)\\?["']""", text)
  if key is None:
    return "the config has no key " + " ".join(text.split())
  near = re.search(r'[Dd]id you mean \\?"(\w+)', text)
  hint = f' (did you mean "{near[1]}"?)' if near else ""
  return f'the config has no key "{key[1]}"{hint}'


def flags_alone(rest: Sequence[str]) -> None:
  """Raises UserError if there are arguments that are not flags."""
  if len(rest) > 1:
    raise errors.UserError(f'"{rest[1]}" is not a flag: flags begin with --')


def config_given(rest: Sequence[str]) -> None:
  """Raises UserError unless --config is given and loads, and nothing else is.

  Arguments that are not flags are refused, too.
  """
  flags_alone(rest)
  if flags.FLAGS.config is None:
    raise errors.UserError(
      "give --config, such as --config configs/siglip_emoji.py"
    )
  flags.FLAGS.config.to_dict()


def show_log() -> None:
  """Prints the package's lines, from INFO up, on stderr."""
  _show(_Lines(to_stdout=False), logging.INFO)


def show_log_in_training() -> None:
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
