"""A run in phases: what config.phases changes on the way (SigLIP 2).

  config.phases = dict(
    late=dict(from_percent=80, pp="..", losses=dict(x=dict(type="distill"))),
    fine=dict(from_percent=95, pp="..", pp_image=".."),
  )

A phase takes over everything from the one before and changes what it names; a
loss that it sets to None ends. At its beginning the state is carried over, see
init.carry.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigjax import errors

# What a phase may change; keys of the config.
CHANGES = ("pp", "pp_image", "model", "losses", "microbatches", "lengths")


class Phase(NamedTuple):
  """A part of a run.

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


def split(
  phases: Mapping[str, Mapping[str, Any]],
  sections: Mapping[str, Any],
  total_steps: int,
) -> list[Phase]:
  """Returns the phases of a run, the beginning first.

  Args:
    phases: config.phases, durations in steps.
    sections: {key: value} of CHANGES, at the beginning.
    total_steps: the length of the training.

  Raises:
    UserError: a phase names what it cannot change, does not say when it begins,
      or begins with another or after the end.
  """
  firsts = {}
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
  since = dict.fromkeys(sections["losses"], 0)
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


def at(phases: Sequence[Phase], step: int) -> int:
  """Returns the number of the phase in which a step was done, the last one.

  Args:
    phases: from split.
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
