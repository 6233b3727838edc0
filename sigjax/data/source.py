"""A source of examples: random access to records, and which of them count.

An element of a source is one example: a dict of features, texts as bytes or str
and images still encoded. A source may be narrowed to some of its records, and
these may be put into groups of which each is one element: then no batch holds
two members of a group, and each epoch shows a random one.
"""

import copy

import numpy as np

from sigjax import errors
from sigjax.data import faults as faults_lib


class Source:
  """Elements 0..len-1, each standing for one record or for a group of them.

  Attributes:
    name: a short name for logs and faults, such as "coco_captions/2014[train]".
    records: what is read, by several threads: anything with len() and [int] ->
      dict of features. It may also have brief(int), the example without its
      image, and column(name), which yields arrays that hold feature `name` of
      all records in order, or is None if it has no quick way to that.
    members: None if element i is record i; or, for each element, an array of
      integers, the records it stands for in rising order. For elements of one
      record each that is one array, (n, 1).
    label_names: {feature: list of its classes' names}, where they are known.
    faults: {kind: count} of what was left out when the source was opened, such
      as "missing caption" or "truncated shard".
    tower: of embeddings, what they were computed with; else None.
  """

  def __init__(
    self, name, records, members=None, label_names=None, faults=None, tower=None
  ):
    self.name = name
    self.records = records
    self.members = members
    self.label_names = label_names or {}
    self.faults = dict(faults or {})
    self.tower = tower

  def narrowed(self, members):
    """Returns the same source with other members."""
    return self.replaced(members=members)

  def replaced(self, **attributes):
    """Returns the same source with other attributes."""
    new = copy.copy(self)
    vars(new).update(attributes)
    return new

  def check_tower(self, other, what):
    """A UserError unless `other`, the tower of `what`, is the same as ours."""
    if other != self.tower:
      raise errors.UserError(
        f"{what} has embeddings of tower {other}, the training data has "
        f"{self.tower}: all have to be of the same one"
      )

  def __len__(self):
    return len(self.records if self.members is None else self.members)

  def numbers(self):
    """Returns the numbers of all records it stands for, in rising order."""
    if self.members is None:
      return np.arange(len(self.records))
    return np.sort(
      np.concatenate(self.members)
      if isinstance(self.members, list)
      else np.ravel(self.members)
    )

  def pick(self, i, rng=None):
    """Returns the number of the record element i stands for.

    Of a group that is a random record, or the first one if rng is None.
    """
    if self.members is None:
      return i
    group = self.members[i]
    random = rng is not None and len(group) > 1
    return int(group[rng.integers(len(group)) if random else 0])

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"{self.name} has {len(self)} elements, none at {i}")
    return self.records[self.pick(i)]

  def brief(self, record):
    """Returns a record, without its image if that saves reading it."""
    read = getattr(self.records, "brief", None) or self.records.__getitem__
    return read(int(record))


def brief_name(kind, patterns):
  """Returns a short name: "tar[data/*.tar]", or the first of several."""
  patterns = [patterns] if isinstance(patterns, str) else list(patterns)
  return f"{kind}[{patterns[0]}{', ...' if len(patterns) > 1 else ''}]"


def captions(example, key):
  """Returns the texts of one example, a list of str.

  Args:
    example: dict of features.
    key: a feature with a text, several, or {"text": several, ...}.

  Raises:
    UserError: no such feature.
    BadExample: a text is not UTF-8, or too long.
  """
  value = errors.pick(example, key, "feature")
  if isinstance(value, dict):
    value = errors.pick(value, "text", f'feature of "{key}"')
  values = [value] if isinstance(value, (str, bytes)) else value
  return [
    faults_lib.caption(v if isinstance(v, (str, bytes)) else str(v))
    for v in values
  ]


def as_column(values, name, what):
  """Returns (n,) values of a feature, texts or numbers, as an array.

  Args:
    values: n numbers, or n texts (str, or bytes in UTF-8); None where there is
      none, which becomes nan or "".
    name: the feature.
    what: whose it is, for messages.

  Raises:
    UserError: texts and numbers, or more than one value in one example.
  """
  values = [
    v.decode(errors="replace") if isinstance(v, bytes) else v for v in values
  ]
  texts = sum(isinstance(v, str) for v in values)
  missing = sum(v is None for v in values)
  if any(isinstance(v, (dict, list)) or np.ndim(v) for v in values):
    raise errors.UserError(
      f'feature "{name}" of {what} holds more than one value, so examples '
      "cannot be chosen or grouped by it"
    )
  if texts and texts + missing < len(values):
    raise errors.UserError(
      f'feature "{name}" of {what} holds texts in some examples and numbers '
      "in others, so they cannot be chosen or grouped by it"
    )
  if missing:
    fill = "" if texts else np.nan
    values = [fill if v is None else v for v in values]
  # Empty arrays are of floats, as are those with nan.
  return np.array(values, str if texts else None)
