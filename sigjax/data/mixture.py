"""Several sources as one, mixed by weight."""

import bisect
import itertools
import math

import numpy as np

from sigjax import errors
from sigjax.data import source as source_lib


class _Joined:
  """The records of several sources, numbered on."""

  def __init__(self, parts):
    self._parts = parts
    self._starts = [0, *itertools.accumulate(len(p.records) for p in parts)]

  def __len__(self):
    return self._starts[-1]

  def locate(self, record):
    """Returns (part, the record's number within it)."""
    j = bisect.bisect_right(self._starts, record) - 1
    return self._parts[j], record - self._starts[j]

  def first(self, j):
    """Returns the number of part j's first record."""
    return self._starts[j]

  def __getitem__(self, record):
    part, record = self.locate(record)
    return part.records[record]

  def brief(self, record):
    """Returns a record without its image, if that saves reading it."""
    part, record = self.locate(record)
    return part.brief(record)

  def column(self, name):
    raise _each(f'"{name}"')


def _each(what):
  return errors.UserError(
    f"{what} of a mix is not known as a whole: give only, group_by, part and "
    "shuffle to each of its sources instead"
  )


class Mixture(source_lib.Source):
  """Sources of which each batch holds shares by weight, see order.Sequence.

  Its elements are those of its parts, numbered on. An epoch of it is as many
  examples as they have together; in it, a part of twice the weight that its
  size would give it is seen twice. Each part has epochs of its own, and shows
  each of its elements once in each.

  Attributes:
    parts: the sources.
    weights: of each, positive, of any sum.
    others: as of a Source; label_names where all agree.
  """

  def __init__(self, parts, weights):
    super().__init__(
      name=f"mix of {', '.join(part.name for part in parts)}",
      records=_Joined(parts),
      tower=parts[0].tower,
      label_names={
        k: v
        for k, v in parts[0].label_names.items()
        if all(part.label_names.get(k) == v for part in parts)
      },
    )
    self.parts, self.weights = parts, weights
    self._starts = [0, *itertools.accumulate(map(len, parts))]
    for part in parts:
      for kind, count in part.faults.items():
        self.faults[kind] = self.faults.get(kind, 0) + count

  def replaced(self, **attributes):
    raise _each(" and ".join(attributes))

  def __len__(self):
    return self._starts[-1]

  def numbers(self):
    """As of a Source: the numbers of all records, in rising order."""
    return np.concatenate(
      [
        self.records.first(j) + part.numbers()
        for j, part in enumerate(self.parts)
      ]
    )

  def pick(self, i, rng=None):
    """As of a Source: the number of the record that element i stands for."""
    part, start, i = self.part_of(i)
    return start + part.pick(i, rng)

  def part_of(self, i):
    """Returns (part, number of its first record, element i's number in it)."""
    j = bisect.bisect_right(self._starts, i) - 1
    return self.parts[j], self.records.first(j), i - self._starts[j]


def name_of(source, record):
  """Returns what a record is called: "coco[train][17]"."""
  if isinstance(source, Mixture):
    return name_of(*source.records.locate(record))
  return f"{source.name}[{record}]"


def members_of(source, i):
  """Returns the numbers of all records that element i stands for, an array."""
  if isinstance(source, Mixture):
    part, start, i = source.part_of(i)
    return start + members_of(part, i)
  return np.array([i]) if source.members is None else source.members[i]


def parts_of(source):
  """Returns (sources, weights): a source that is no mix is its only part."""
  if isinstance(source, Mixture):
    return source.parts, source.weights
  return [source], [1.0]


def mix(open_source, sources, weights):
  """Opens several sources as one, mixed by weight.

  Args:
    open_source: opens one.
    sources: its arguments for each, dicts.
    weights: a positive number for each, of any sum.

  Returns:
    A Mixture.

  Raises:
    UserError: no sources, not as many weights, a weight that is not positive,
      the same source twice, a mix of a mix, or embeddings of different towers.
  """
  if not sources or len(sources) != len(weights):
    raise errors.UserError(
      f"a mix has {len(sources)} sources and {len(weights)} weights; give "
      "each source one"
    )
  numbers = [
    w
    for w in weights
    if isinstance(w, (int, float)) and math.isfinite(w) and w > 0
  ]
  for weight in weights:
    if weight not in numbers or weight < max(numbers) * 1e-9:
      raise errors.UserError(
        f"{weight!r} is no weight of a mix: each is a positive number, and "
        "more than a billionth of the largest; leave out what shall not be"
      )
  parts = []
  for i, section in enumerate(sources):
    if section.get("kind") == "mix":
      raise errors.UserError(
        "a source of a mix is itself a mix; list all sources in one"
      )
    if section in sources[:i]:
      raise errors.UserError(
        f"source {i} of the mix is there already, so that a batch could hold "
        "an example twice; give it once, with a larger weight"
      )
    parts.append(errors.call(open_source, section, f"source {i} of the mix"))
  for part in parts[1:]:
    if part.tower != parts[0].tower:
      raise errors.UserError(
        f"{part.name} has embeddings of tower {part.tower}, {parts[0].name} "
        f"of {parts[0].tower}: all of a mix have to be of the same one"
      )
  return Mixture(parts, [float(w) for w in weights])
