"""What all programs share: flags, errors in one line, exit codes.

A program defines its flags, then ends with program.run(main).
"""

from collections.abc import Callable, Sequence
import sys
from typing import Any

from absl import app, flags

from sigjax import errors
from sigjax.runtime import logs


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
    logs.quiet_libraries()
    logs.show()
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
    words = str(e.args[0]).replace("\\n", " ").replace("\\", "").split()
    sys.exit("error: the config has no key " + " ".join(words))
  except (flags.Error, TypeError, ValueError, OSError) as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    lines = lines or [type(e).__name__]
    # ml_collections names the mistake last, absl first.
    last = isinstance(e, OSError) or "Traceback" in str(e)
    sys.exit(f"error: {lines[-1 if last else 0]}")


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
