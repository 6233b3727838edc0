"""A mistake by the user: one line that names the thing and the remedy."""

import difflib
import functools
import inspect

import numpy as np


class UserError(ValueError):
  """Printed as one line, without a traceback, by the programs."""


def closest(name, names):
  """Returns ' (did you mean "x"?)' for the nearest of names, or ''."""
  names = tuple(str(n) for n in names)
  near = difflib.get_close_matches(
    str(name), _candidates(str(name), names), 1, 0.5
  )
  return f' (did you mean "{near[0]}"?)' if near else ""


def _candidates(name, names, count=8):
  """Returns the few of names that share the most letter pairs with name.

  difflib takes a tenth of a millisecond for two names. Two checkpoints that
  have nothing in common have a thousand each.
  """
  if len(names) <= count:
    return names
  pairs = _pairs((name,))
  shared = np.minimum(_pairs(names), pairs).sum(1, dtype=np.int32)
  sizes = np.array([len(n) for n in names]) + len(name)
  order = np.argsort(-shared / sizes, kind="stable")
  return [names[i] for i in order[:count]]


@functools.lru_cache(maxsize=4)
def _pairs(names):
  """Counts the letter pairs of names: (n, 509) uint8, hashed."""
  counts = np.zeros((len(names), 509), np.uint8)
  for row, name in zip(counts, names):
    letters = np.frombuffer(f"^{name}$".encode(), np.uint8).astype(np.int32)
    np.add.at(row, (letters[:-1] * 31 + letters[1:]) % 509, 1)
  return counts


def pick(choices, name, what):
  """Returns choices[name]; a UserError lists the choices if it is not one."""
  if name in choices:
    return choices[name]
  raise UserError(
    f'{what} "{name}" is not known{closest(name, choices)}; '
    f"choose from: {', '.join(sorted(map(str, choices)))}"
  )


def call(fn, kwargs, what, *args, **extra):
  """fn(*args, **extra, **kwargs), kwargs being the config section `what`.

  A key that fn does not take, or one it needs and does not get, is a UserError
  that names the section and the closest key. Nothing of fn runs before that.
  """
  params = inspect.signature(fn).parameters
  own = [
    n
    for i, (n, p) in enumerate(params.items())
    if i >= len(args)
    and n not in extra
    and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
  ]
  open_ended = any(p.kind == p.VAR_KEYWORD for p in params.values())
  for key in kwargs:
    if key not in own and not open_ended:
      raise UserError(
        f'{what} has no key "{key}"{closest(key, own)}; '
        f"it takes: {', '.join(own)}"
      )
  needed = [n for n in own if params[n].default is inspect.Parameter.empty]
  missing = [n for n in needed if n not in kwargs]
  if missing:
    raise UserError(f"{what} needs: {', '.join(missing)}")
  return fn(*args, **extra, **kwargs)
