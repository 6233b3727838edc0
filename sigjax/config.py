"""Configs: the command line, the argument after the colon, and durations."""

import json
import logging
import math
import os
import pathlib
import re

from sigjax import errors

log = logging.getLogger("sigjax")


def default_workdir(config):
  """configs/x.py:a=1 -> workdirs/x_a=1: another argument, another run."""
  file, colon, arg = config.partition(":")
  arg = re.sub(r"[^\w.=,-]+", "_", arg)
  return f"workdirs/{pathlib.Path(file).stem}{'_' if colon else ''}{arg}"


def check_same(config, first):
  """A UserError unless the config is that of process 0, given as JSON.

  Processes with other programs would wait for each other without end.
  """
  mine, first = json.loads(config.to_json_best_effort()), json.loads(first)
  for key in sorted({**mine, **first}):
    if mine.get(key) != first.get(key):
      raise errors.UserError(
        f"config.{key} is {mine.get(key)} here, but {first.get(key)} on "
        "process 0; start all processes with the same config"
      )


def keep_config(config, path):
  """Writes config.json; what differs from the one that was there is said."""
  text = config.to_json_best_effort(indent=2) + "\n"
  if path.exists():
    old, new = json.loads(path.read_text()), json.loads(text)
    for key in sorted({**old, **new}):
      if old.get(key) != new.get(key):
        log.info(
          "this workdir's run goes on with another config.%s: it was %s,"
          " now it is %s",
          key,
          old.get(key),
          new.get(key),
        )
  aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  aside.write_text(text)
  aside.replace(path)


def parse_arg(arg, **defaults):
  """Parses "key=value,flag" into a dict; types follow the defaults'.

  Args:
    arg: what stands after the colon of --config FILE:ARG, or None.
    **defaults: the keys there are. A key without "=value" means True.

  Raises:
    UserError: an unknown key, or a value of another type than its default.
  """
  found = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    key, given, value = part.partition("=")
    errors.pick(defaults, key, "the config argument")
    default = defaults[key]
    if isinstance(default, bool):
      words = {"1": True, "true": True, "0": False, "false": False}
      found[key] = (
        errors.pick(
          words, value.lower(), f"the value of the config argument {key},"
        )
        if given
        else True
      )
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


class Durations:
  """Durations in steps: those of a config may be in other units.

  Args:
    batch_size: B.
    num_examples: of one epoch.
    **total: total_steps, total_epochs and total_examples, one of them not None.

  Raises:
    UserError: none or several of them are given.
  """

  def __init__(self, batch_size, num_examples, **total):
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

  def _steps(self, where, unit, value):
    exact = value * self._per_unit[unit]
    if not math.isfinite(exact) or exact < 0:
      raise errors.UserError(f"{where} cannot be {value}")
    return max(round(exact), 1) if exact else 0

  def resolve(self, section, where):
    """Replaces each NAME_{epochs,examples,percent} by NAME_steps, at any depth.

    Rounded to the nearest step, but at least one unless it is 0.

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
