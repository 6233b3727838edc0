"""Sources of examples: random access to records, and which of them count.

A record is one example as it is stored: a dict of features, with texts as bytes
or str, and images still encoded. An element is what batches are made of: one
record, or a group of records. Of a group, each epoch shows one random member,
and no batch holds two members.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import hashlib
import itertools
import math
from typing import Any, Protocol

from jaxtyping import Bool, Int
import numpy as np

from sigjax import errors
from sigjax.data.faults import BadExample

Example = dict[str, Any]
# The records that each element stands for, in rising order: an array (n, 1) for
# elements of one record each, else a list with an array for each group.
Members = Int[np.ndarray, "n 1"] | list[Int[np.ndarray, " n"]]
FEW = 1 << 16  # see keep_briefs


class Records(Protocol):
  """What a source reads; several threads may read at once.

  Records may also have these methods:
    brief(i): The example without its image, if that is cheaper to read.
    column(name): An iterable of arrays made by as_column, which together hold
      feature `name` of all records in order; None if there is no cheap way to
      read it.
    image_ids(): A sequence with one value for each record; records that show
      the same image have equal values. Without this method, each record is
      taken to have an image of its own.
    caption_column(name): If the captions of one record may have different
      values of feature `name`, the values of all captions of all records in
      order, by as_column; otherwise None.
    with_captions(kept): (records with those captions alone, which of these have
      one left), for kept, a bool for each caption; called after caption_column.
  and this attribute:
    identity: A JSON-able value that differs if the data differ, such as a
      digest of the shards' names and sizes.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i: int, /) -> Example: ...


class Source:
  """Elements 0..len-1, each of which stands for one record or a group of them.

  Attributes:
    name: A short name for logs and faults, such as "coco_captions/2014[train]".
    records: What is read.
    members: The records of each element; None if element i is record i.
    label_names: {feature: names of its classes}, where they are known.
    faults: {kind: count} of what was left out when the source was opened, such
      as "missing caption" or "truncated shard".
    tower: Of embeddings, the image tower that computed them; otherwise None.
    mismatch: The share of a training batch's images that are given the text of
      another one; see pipeline.train_batches.
  """

  name: str
  records: Records
  members: Members | None
  label_names: dict[str, list[str]]
  faults: dict[str, int]
  tower: str | None
  mismatch: float = 0.0

  def __init__(
    self,
    name: str,
    records: Records,
    members: Members | None = None,
    label_names: Mapping[str, list[str]] | None = None,
    faults: Mapping[str, int] | None = None,
    tower: str | None = None,
  ):
    self.name = name
    self.records = records
    self.members = members
    self.label_names = dict(label_names or {})
    self.faults = dict(faults or {})
    self.tower = tower

  # ---- Elements ----

  def __len__(self) -> int:
    return len(self.records if self.members is None else self.members)

  def __getitem__(self, i: int) -> Example:
    """Returns the first record of element i."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.name} has {len(self)} elements, none at {i}")
    return self.records[self.pick(i)]

  def members_of(self, i: int) -> Int[np.ndarray, " n"]:
    """Returns the numbers of all records that element i stands for."""
    return np.array([i]) if self.members is None else self.members[i]

  def pick(self, i: int, rng: np.random.Generator | None = None) -> int:
    """Returns the number of a record that element i stands for.

    Of a group it is a random member, or the first one if rng is None.
    """
    if self.members is None:
      return i
    group = self.members[i]
    if rng is None or len(group) == 1:
      return int(group[0])
    return int(group[rng.integers(len(group))])

  def numbers(self) -> Int[np.ndarray, " n"]:
    """Returns the numbers of all records of all elements, in rising order."""
    if self.members is None:
      return np.arange(len(self.records))
    if isinstance(self.members, list):
      return np.sort(np.concatenate(self.members))
    return np.sort(np.ravel(self.members))

  # ---- Records ----

  def name_of(self, record: int) -> str:
    """Returns what a record is called in messages: "coco[train][17]"."""
    return f"{self.name}[{record}]"

  def read(self, record: int) -> Example:
    """Returns a record.

    Raises:
      BadExample: The record cannot be read.
    """
    return _readable(self.records.__getitem__, record)

  def brief(self, record: int) -> Example:
    """Returns a record, without its image if that is cheaper to read.

    Raises:
      BadExample: The record cannot be read.
    """
    return _readable(brief_of(self.records), int(record))

  def column(self, name: str) -> Iterable[np.ndarray] | None:
    """Returns arrays that hold feature `name` of all records in order.

    Returns None if the values can only be had by reading each record.
    """
    column = getattr(self.records, "column", None)
    return column(name) if column else None

  def image_ids(self) -> Sequence[Any] | None:
    """Returns values of which those of records with the same image are equal.

    Returns None if each record has an image of its own.
    """
    found = getattr(self.records, "image_ids", None)
    return found() if found else None

  def caption_column(self, name: str) -> np.ndarray | None:
    """Returns feature `name` of all captions if it belongs to captions."""
    column = getattr(self.records, "caption_column", None)
    return column(name) if column else None

  def with_captions(
    self, kept: Bool[np.ndarray, " m"]
  ) -> tuple[Records, Bool[np.ndarray, " n"]]:
    """Returns records that keep some captions, and which have one left."""
    records: Any = self.records  # has caption_column
    return records.with_captions(kept)

  # ---- The whole ----

  def identity(self) -> dict[str, Any]:
    """Returns what tells this source from others: JSON-able, and short.

    Sources of equal identity have the same elements with the same numbers.
    """
    return {
      "data": getattr(self.records, "identity", None) or self.name,
      "records": len(self.records),
      "members": _digest(self.members),
    }

  def parts(self) -> tuple[list["Source"], list[float]]:
    """Returns the sources this one consists of, and their weights."""
    return [self], [1.0]

  def check_evaluable(self) -> None:
    """Raises UserError unless it makes sense to evaluate on this source."""
    if self.mismatch:
      raise errors.UserError(
        f"{self.name} has mismatch={self.mismatch}, which is noise for "
        "training; leave it out of data of evaluations"
      )
    if not len(self):
      raise errors.UserError(f"{self.name} has no elements")

  def replaced(self, **attributes: Any) -> "Source":
    """Returns the same source with other attributes."""
    new = copy.copy(self)
    vars(new).update(attributes)
    return new

  def check_tower(self, other: str | None, what: str) -> None:
    """Raises UserError unless `other`, the tower of `what`, equals ours."""
    if other != self.tower:
      raise errors.UserError(
        f"{what} has embeddings of tower {other}, the training data has "
        f"{self.tower}: all have to be of the same one"
      )


def brief_of(records: Records) -> Callable[[int], Example]:
  """Returns the function that reads a record without its image.

  It is __getitem__ of records that have no cheaper way.
  """
  return getattr(records, "brief", records.__getitem__)


class Wrapped:
  """Passes everything on to other records; a subclass changes some of it."""

  def __init__(self, records: Any):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Example:
    return self._records[i]

  def __getattr__(self, name: str) -> Any:
    return getattr(self._records, name)  # what else records may have


class _Kept(Wrapped):
  """Records whose briefs stay in memory once they are read."""

  def __init__(self, records: Any):
    super().__init__(records)
    self._briefs: dict[int, Example] = {}

  def brief(self, i: int) -> Example:
    # Two threads may both read a record: that is as good.
    if i not in self._briefs:
      self._briefs[i] = self._records.brief(i)
    return dict(self._briefs[i])


def keep_briefs(source: Source) -> Source:
  """Returns the source with briefs that are read once, if its records are few.

  Filters, groups, the tokenizer and evaluations all read them.
  """
  records = source.records
  if len(records) > FEW or not hasattr(records, "brief"):
    return source
  return source.replaced(records=_Kept(records))


def identity_of(records: Records, **made: Any) -> dict[str, Any] | None:
  """Returns the identity of records that are made from others.

  Args:
    records: the others; without an identity of theirs the result is None.
    **made: what was made of them, JSON-able.
  """
  inner = getattr(records, "identity", None)
  return inner and {**made, "of": inner}


def _readable(read: Callable[[int], Example], record: int) -> Example:
  """Calls read; whatever fails there is a fault of this record."""
  try:
    return read(record)
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # the formats' libraries have no common base
    raise BadExample(f"it cannot be read: {e}", kind="unreadable") from e


def _digest(members: Members | None) -> str | None:
  """Returns a digest of the records' numbers and their grouping, if any."""
  if members is None:
    return None
  found = hashlib.blake2b(digest_size=8)
  if isinstance(members, list):
    lengths = np.array([len(group) for group in members], np.int64)
    found.update(lengths.tobytes())
    members = np.concatenate([np.ravel(group) for group in members])
  for start in range(0, len(members), 1 << 20):
    found.update(
      np.asarray(members[start : start + (1 << 20)], "<i8").tobytes()
    )
  return found.hexdigest()


def spread(n: int, count: int = 100) -> list[int]:
  """Returns up to `count` numbers below n, evenly spread, the first one 0."""
  return sorted({i * n // count for i in range(count)}) if n else []


class _Joined:
  """The records of several sources, numbered consecutively."""

  def __init__(self, parts: Sequence[Source]):
    self._parts = parts
    self._starts = [0, *itertools.accumulate(len(p.records) for p in parts)]

  def __len__(self):
    return self._starts[-1]

  def locate(self, record: int) -> tuple[Source, int]:
    """Returns the part that holds a record, and the record's number there."""
    j = bisect.bisect_right(self._starts, record) - 1
    return self._parts[j], record - self._starts[j]

  def first(self, j: int) -> int:
    """Returns the number of part j's first record."""
    return self._starts[j]

  def __getitem__(self, record):
    part, record = self.locate(record)
    return part.records[record]

  def brief(self, record):
    part, record = self.locate(record)
    return part.brief(record)


class Mixture(Source):
  """Several sources, of which each batch holds shares by weight.

  The elements are those of the parts, numbered consecutively. An epoch is as
  many examples as the parts have together: if a part's weight is twice its
  share of these, the part is seen twice in an epoch. Each part has epochs of
  its own and shows each of its elements once in each; see order.Sequence.

  Args:
    parts: The sources.
    weights: A positive number for each, of any sum.

  Raises:
    UserError: There are no sources, or not as many weights; a weight is not
      positive; or the parts are embeddings of different towers.
  """

  def __init__(self, parts: Sequence[Source], weights: Sequence[float]):
    _check_weights(len(parts), weights)
    for part in parts[1:]:
      if part.tower != parts[0].tower:
        raise errors.UserError(
          f"{part.name} has embeddings of tower {part.tower}, {parts[0].name} "
          f"of {parts[0].tower}: all of a mix have to be of the same one"
        )
    self._joined = _Joined(parts)
    super().__init__(
      name=f"mix of {', '.join(part.name for part in parts)}",
      records=self._joined,
      tower=parts[0].tower,
      label_names={
        k: v
        for k, v in parts[0].label_names.items()
        if all(part.label_names.get(k) == v for part in parts)
      },
    )
    self._parts = list(parts)
    self._weights = [float(w) for w in weights]
    self._starts = [0, *itertools.accumulate(map(len, parts))]
    for part in parts:
      for kind, count in part.faults.items():
        self.faults[kind] = self.faults.get(kind, 0) + count

  def __len__(self):
    return self._starts[-1]

  def _locate(self, i: int) -> tuple[Source, int, int]:
    """Returns the part of element i, its first record, and i within it."""
    j = bisect.bisect_right(self._starts, i) - 1
    return self._parts[j], self._joined.first(j), i - self._starts[j]

  def members_of(self, i: int) -> Int[np.ndarray, " n"]:
    part, start, i = self._locate(i)
    return start + part.members_of(i)

  def pick(self, i: int, rng: np.random.Generator | None = None) -> int:
    part, start, i = self._locate(i)
    return start + part.pick(i, rng)

  def numbers(self) -> Int[np.ndarray, " n"]:
    return np.concatenate(
      [self._joined.first(j) + p.numbers() for j, p in enumerate(self._parts)]
    )

  def name_of(self, record: int) -> str:
    part, record = self._joined.locate(record)
    return part.name_of(record)

  def column(self, name: str) -> Iterable[np.ndarray] | None:
    raise _each(f'"{name}"')

  def image_ids(self) -> Sequence[Any] | None:
    raise _each("part")

  def caption_column(self, name: str) -> np.ndarray | None:
    raise _each(f'"{name}"')

  def parts(self) -> tuple[list[Source], list[float]]:
    return self._parts, self._weights

  def identity(self) -> dict[str, Any]:
    return {"parts": [part.identity() for part in self._parts]}

  def check_evaluable(self) -> None:
    raise errors.UserError(
      f"a {self.name} cannot be evaluated on: weights mean nothing there; "
      "give an evaluation for each"
    )

  def replaced(self, **attributes: Any) -> Source:
    raise _each(" and ".join(attributes))


def _each(what: str) -> errors.UserError:
  return errors.UserError(
    f"{what} of a mix is not known as a whole: give only, element, group_by, "
    "part and shuffle to each of its sources instead"
  )


def _check_weights(count: int, weights: Sequence[float]) -> None:
  """Raises UserError unless weights can be those of `count` sources."""
  if not count or count != len(weights):
    raise errors.UserError(
      f"a mix has {count} sources and {len(weights)} weights; give "
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
        f"{weight!r} cannot be a weight of a mix: give a positive number, more "
        "than a billionth of the largest; leave out sources that are not wanted"
      )


def brief_name(kind: str, patterns: str | Iterable[str]) -> str:
  """Returns a short name: "tar[data/*.tar]", or the first of several."""
  patterns = [patterns] if isinstance(patterns, str) else list(patterns)
  return f"{kind}[{patterns[0]}{', ...' if len(patterns) > 1 else ''}]"


def as_column(values: Sequence[Any], name: str, what: str) -> np.ndarray:
  """Returns the values of a feature as a structured array (n,).

  Its fields are "value" (int64, uint64, float64, bool or str; numbers keep all
  their digits) and "missing" (bool). A value is missing if it is None, nan or a
  blank text.

  Args:
    values: n numbers, or n texts (str, or bytes in UTF-8), or None.
    name: The feature.
    what: Its source, for messages.

  Raises:
    UserError: There are both texts and numbers, more than one value in one
      example, or numbers that do not fit one dtype.
  """
  values = [
    v.decode(errors="replace")
    if isinstance(v, bytes)
    else v.item()
    if isinstance(v, np.generic)
    else v
    for v in values
  ]
  missing = np.array([_is_missing(v) for v in values], bool)
  present = [v for v, gone in zip(values, missing.tolist()) if not gone]
  if any(isinstance(v, (dict, list)) or np.ndim(v) for v in present):
    raise errors.UserError(
      f'feature "{name}" of {what} holds more than one value, so examples '
      "cannot be chosen or grouped by it"
    )
  texts = sum(isinstance(v, str) for v in present)
  if 0 < texts < len(present):
    raise errors.UserError(
      f'feature "{name}" of {what} holds texts in some examples and numbers '
      "in others, so they cannot be chosen or grouped by it"
    )
  known = np.array(present, str if texts else None)
  if known.dtype.kind not in "Ubiuf" or known.tolist() != present:
    raise errors.UserError(
      f'feature "{name}" of {what} holds values that cannot be compared '
      "exactly, such as dates or fractions beside very long numbers; store it "
      "as texts"
    )
  column = np.zeros(
    len(values), [("value", known.dtype), ("missing", missing.dtype)]
  )
  column["value"][~missing] = known
  column["missing"] = missing
  return column


def _is_missing(value: Any) -> bool:
  if isinstance(value, str):
    return not value.strip()
  return value is None or (isinstance(value, float) and math.isnan(value))
