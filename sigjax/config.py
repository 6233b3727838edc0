"""Configs: the argument after the colon, config.json, durations and phases."""

from collections.abc import Mapping, Sequence
import json
import logging
import math
import pathlib
import re
from typing import Any, NamedTuple

from sigjax import errors
from sigjax.runtime import files

log = logging.getLogger("sigjax")


def default_workdir(config: str) -> str:
  """Returns workdirs/x_a=1 for configs/x.py:a=1."""
  file, colon, arg = config.partition(":")
  arg = re.sub(r"[^\w.=,-]+", "_", arg)
  return f"workdirs/{pathlib.Path(file).stem}{'_' if colon else ''}{arg}"


def write_config(config: Mapping[str, Any], path: files.Path) -> None:
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


TOTALS = ("total_steps", "total_epochs", "total_examples")

# What a phase may change; keys of the config.
CHANGES = ("pp", "pp_image", "model", "losses", "microbatches", "lengths")


class Phase(NamedTuple):
  """A part of a run (SigLIP 2), see phases_of.

  Attributes:
    name: its key in config.phases; "" of the beginning.
    first: how many steps are done when it begins.
    sections: {key: value} of CHANGES, as they are in this phase.
    since: {name of a loss in `losses`: how many steps were done when it began}.
  """

  name: str
  first: int
  sections: dict[str, Any]
  since: dict[str, int]


def phases_of(
  phases: Mapping[str, Mapping[str, Any]],
  sections: Mapping[str, Any],
  total_steps: int,
) -> list[Phase]:
  """Returns the phases of a run, the beginning first.

    config.phases = dict(
      late=dict(from_percent=80, pp="..", losses=dict(x=dict(type="distill"))),
      fine=dict(from_percent=95, pp="..", pp_image=".."),
    )

  A phase takes over everything from the one before and changes what it names; a
  loss that it sets to None ends. At its beginning the state is carried over,
  see init.carry.

  Args:
    phases: config.phases, durations in steps.
    sections: {key: value} of CHANGES, at the beginning.
    total_steps: the length of the training.

  Raises:
    UserError: a phase names what it cannot change, does not say when it begins,
      or begins with another or after the end.
  """
  firsts: dict[int, str] = {}
  for name, given in phases.items():
    what, first = f"config.phases.{name}", given.get("from_steps")
    if first is None:
      raise errors.UserError(
        f"{what} does not say when it begins: give from_percent, from_steps, "
        "from_epochs or from_examples"
      )
    if not 0 < first < total_steps:
      raise errors.UserError(
        f"{what} begins after {first} of {total_steps} steps; it has to be "
        "after the first step and before the end"
      )
    if first in firsts:
      raise errors.UserError(
        f"{what} and config.phases.{firsts[first]} both begin after {first} "
        "steps: make them one"
      )
    firsts[first] = name
  since: dict[str, int] = dict.fromkeys(sections["losses"], 0)
  found = [Phase("", 0, dict(sections), since)]
  for first, name in sorted(firsts.items()):  # a ConfigDict has no order
    changes = {k: v for k, v in phases[name].items() if k != "from_steps"}
    for key in changes:
      what = f"a key of config.phases.{name}"
      errors.pick(dict.fromkeys(CHANGES), key, what)
    before = found[-1]
    merged = {
      key: _merged(value, changes[key]) if key in changes else value
      for key, value in before.sections.items()
    }
    there = {k: v for k, v in merged["losses"].items() if v is not None}
    merged["losses"] = there
    since = {k: before.since.get(k, first) for k in there}
    found.append(Phase(name, first, merged, since))
  return found


def in_phase(config: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns a config as it is in one of its phases.

  Args:
    config: as plain dicts.
    name: of the phase.

  Raises:
    UserError: there is no such phase; see phases_of.
  """
  errors.pick(config.get("phases") or {}, name, "config.phases")
  times = Durations(
    config["batch_size"],
    1_000_000,  # an epoch's length does not matter
    **{k: config.get(k) for k in TOTALS},
  )
  sections = {k: config.get(k) for k in CHANGES}
  sections["losses"] = sections["losses"] or {}
  phases = times.resolve(config["phases"], "config.phases")
  for phase in phases_of(phases, sections, times.total_steps):
    if phase.name == name:
      return {**config, **phase.sections}
  raise AssertionError(name)


def phase_at(phases: Sequence[Phase], step: int) -> int:
  """Returns the number of the phase in which a step was done, the last one.

  Args:
    phases: from phases_of.
    step: how many steps are done.
  """
  return max(i for i, phase in enumerate(phases) if phase.first < max(step, 1))


def _merged(old: Any, new: Any) -> Any:
  """Returns old with what new names.

  A section that is of another type or kind, such as a tower, is replaced.
  """
  if not isinstance(old, Mapping) or not isinstance(new, Mapping):
    return new
  if any(key in new and new[key] != old.get(key) for key in ("type", "kind")):
    return dict(new)
  changed = {k: _merged(old.get(k), value) for k, value in new.items()}
  return {**old, **changed}
