"""Configs: the argument after the colon, config.json, and durations."""

from collections.abc import Mapping
import json
import logging
import math
import pathlib
import re
from typing import Any

from sigjax import errors
from sigjax.runtime import files

log = logging.getLogger("sigjax")


def default_workdir(config: str) -> str:
  """Returns workdirs/x_a=1 for configs/x.py:a=1."""
  file, colon, arg = config.partition(":")
  arg = re.sub(r"[^\w.=,-]+", "_", arg)
  return f"workdirs/{pathlib.Path(file).stem}{'_' if colon else ''}{arg}"


def write_config(config: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes config.json; logs what differs from the one that was there."""
  text = json.dumps(config, indent=2, default=str) + "\n"
  new, old = json.loads(text), {}
  try:
    old = dict(json.loads(path.read_text())) if path.exists() else new
  except (ValueError, TypeError):
    log.warning("%s was damaged; it is written anew", path)
  for key in sorted({**old, **new}) if old else ():
    if old.get(key) != new.get(key):
      log.info(
        "this run is resumed with another config.%s: it was %s, now it is %s",
        key,
        old.get(key),
        new.get(key),
      )
  files.write(path, text)


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
  """Parses "key=value,flag" into a dict; types follow the defaults'.

  Args:
    arg: what stands after the colon of --config FILE:ARG, or None. A comma
      within braces, as in path=data/{a,b}.tar, or after a backslash belongs to
      the value.
    **defaults: the keys there are. A key without "=value" means True.

  Raises:
    UserError: an unknown key, or a value of another type than its default.
  """
  found = dict(defaults)
  for part in _split(arg or ""):
    key, given, value = part.partition("=")
    errors.pick(defaults, key, "the config argument")
    default = defaults[key]
    if isinstance(default, bool):
      words = {"1": True, "true": True, "0": False, "false": False}
      what = f"the value of the config argument {key},"
      found[key] = errors.pick(words, value.lower(), what) if given else True
      continue
    try:
      found[key] = type(default)(value)
    except ValueError:
      given = ""
    if not given:
      raise errors.UserError(
        f"the config argument {key} takes a {type(default).__name__}, such "
        f'as {key}={default}, not "{part}"'
      )
  return found


def _split(arg: str) -> list[str]:
  """Splits at commas, but not within braces or after a backslash."""
  parts, depth, escaped = [""], 0, False
  for letter in arg:
    if escaped or letter not in "\\,":
      depth += 0 if escaped else {"{": 1, "}": -1}.get(letter, 0)
      parts[-1] += letter
      escaped = False
    elif letter == "\\":
      escaped = True
    elif depth > 0:
      parts[-1] += letter
    else:
      parts.append("")
  return [part for part in parts if part]


class Durations:
  """Converts the durations of a config to steps.

  Args:
    batch_size: B.
    num_examples: of one epoch.
    **total: total_steps, total_epochs, total_examples; one is not None.

  Raises:
    UserError: none or several of them are given.
  """

  def __init__(self, batch_size: int, num_examples: int, **total: float | None):
    self._per_unit = dict(
      steps=1, epochs=num_examples / batch_size, examples=1 / batch_size
    )
    given = {k: v for k, v in total.items() if v is not None}
    if len(given) != 1:
      raise errors.UserError(
        "config needs one of total_steps, total_epochs and total_examples, "
        f"not {' and '.join(given) or 'none'}"
      )
    ((name, value),) = given.items()
    self.total_steps = self._steps(name, name.rpartition("_")[2], value)
    self._per_unit["percent"] = self.total_steps / 100

  def _steps(self, where: str, unit: str, value: float) -> int:
    exact = value * self._per_unit[unit]
    if not math.isfinite(exact) or exact < 0:
      raise errors.UserError(f"{where} cannot be {value}")
    return max(round(exact), 1) if exact else 0

  def resolve(self, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a section with each NAME_{epochs,examples,percent} as NAME_steps.

    At any depth; rounded to the nearest step, but at least 1 unless it is 0.

    Args:
      section: of the config.
      where: its name in errors, such as "config.optim".

    Raises:
      UserError: a duration is given twice, is negative or not finite.
    """
    resolved = {}
    for key, value in section.items():
      name, _, unit = key.rpartition("_")
      if isinstance(value, dict):
        value = self.resolve(value, f"{where}.{key}")
      elif name and unit in self._per_unit and value is not None:
        value = self._steps(f"{where}.{key}", unit, value)
        key = f"{name}_steps"
      if key in resolved:
        raise errors.UserError(f"{where} gives {name}_* in two units")
      resolved[key] = value
    return resolved
