"""Mistakes by the user: one line that names the thing and the remedy."""

from collections.abc import Callable, Iterable, Mapping
import difflib
import inspect
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
  """A mistake by the user. Programs print it as one line, no traceback."""


def closest(name: object, names: Iterable[object]) -> str:
  """Returns ' (did you mean "x"?)' for the nearest of names, or ""."""
  near = difflib.get_close_matches(str(name), list(map(str, names)), 1, 0.5)
  return f' (did you mean "{near[0]}"?)' if near else ""


def pick(choices: Mapping[Any, T], name: object, what: str) -> T:
  """Returns choices[name]; a UserError lists the choices if there is none."""
  if name in choices:
    return choices[name]
  raise UserError(
    f'{what} "{name}" is not known{closest(name, choices)}; '
    f"choose from: {', '.join(sorted(map(str, choices)))}"
  )


def check(
  fn: Callable[..., Any],
  kwargs: Mapping[str, Any],
  what: str,
  *args: Any,
  **extra: Any,
) -> None:
  """Raises UserError unless fn(*args, **extra, **kwargs) can be called.

  Args:
    fn: a function or class; only its signature is read.
    kwargs: a config section, whose keys may be wrong or missing.
    what: the section's name in the error, such as "config.optim".
    *args, **extra: arguments that do not come from the config.
  """
  params = inspect.signature(fn).parameters
  own = [
    name
    for i, (name, p) in enumerate(params.items())
    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    and i >= len(args)
    and name not in extra
  ]
  open_ended = any(p.kind == p.VAR_KEYWORD for p in params.values())
  for key in kwargs:
    if key not in own and not open_ended:
      raise UserError(
        f'{what} has no key "{key}"{closest(key, own)}; '
        f"it takes: {', '.join(own)}"
      )
  needed = [name for name in own if params[name].default is inspect._empty]
  if missing := [name for name in needed if name not in kwargs]:
    raise UserError(f"{what} needs: {', '.join(missing)}")


def call(
  fn: Callable[..., T],
  kwargs: Mapping[str, Any],
  what: str,
  *args: Any,
  **extra: Any,
) -> T:
  """Returns fn(*args, **extra, **kwargs) after check() of the same."""
  check(fn, kwargs, what, *args, **extra)
  return fn(*args, **extra, **kwargs)
