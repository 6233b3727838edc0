"""What can be wrong with an example or a shard, and when a run stops for it.

Large datasets always have damaged examples. The pipeline skips them, counts
them by kind, and stops when they are too many.
"""

from collections.abc import Mapping
import logging
import threading
from typing import Any, Protocol

from sigjax import errors

log = logging.getLogger("sigjax")

BAD_FRACTION = 0.01  # the default limit of unusable examples
MIN_SEEN = 1000  # a fraction of fewer examples is too noisy to stop a run
_NAMED = 3  # faults of a kind that are logged; then only each tenfold count

# {kind: (count, the name of one example)}
Found = dict[str, tuple[int, str]]


class BadExample(errors.UserError):
  """One example cannot be used; others may be fine.

  Attributes:
    kind: What is wrong, in a few fixed words. Faults are counted by kind.
  """

  kind: str

  def __init__(self, message: str, kind: str = "bad example"):
    super().__init__(message)
    self.kind = kind


def merge(total: Found, found: Mapping[str, tuple[int, str]]) -> None:
  """Adds the counts of `found` to `total`."""
  for kind, (count, name) in found.items():
    before, first = total.get(kind, (0, name))
    total[kind] = before + count, first


def counts(found: Mapping[str, tuple[int, str]]) -> dict[str, int]:
  """Returns {kind: count}."""
  return {kind: count for kind, (count, _) in found.items()}


def report(where: str, found: Mapping[str, tuple[int, str]]) -> None:
  """Logs one line for each kind."""
  for kind, (count, name) in found.items():
    log.warning("%s: %d x %s, such as %s", where, count, kind, name)


class Counted(Protocol):
  """What a Tally has to know of a source; see source.Source."""

  name: str
  records: Any  # with a length
  faults: dict[str, int]


class Tally:
  """Counts usable and unusable examples, and raises when too many are bad.

  Args:
    limit: The largest fraction of examples that may be bad. It is a fraction of
      all examples loaded so far, or of MIN_SEEN while they are fewer.
    source: The source of the examples. What it left out when it was opened has
      to be within the limit, too: as a fraction of that and its records.

  Attributes:
    loaded: How many examples could be used.

  Raises:
    UserError: The limit is no fraction, or the source left out more than that.
  """

  loaded: int

  def __init__(self, limit: float, source: Counted):
    if (
      isinstance(limit, bool)
      or not isinstance(limit, (int, float))
      or not (0 <= limit <= 1)
    ):
      raise errors.UserError(
        f"bad_fraction is {limit!r}, but has to be a number from 0 to 1"
      )
    self._limit, self._lock = limit, threading.Lock()
    self._found: Found = {}
    self.loaded = 0
    self._stop_if(
      {kind: (n, source.name) for kind, n in source.faults.items()},
      len(source.records) + sum(source.faults.values()),
    )

  def faults(self) -> dict[str, int]:
    """Returns {kind: number of examples that could not be used}."""
    with self._lock:
      return counts(self._found)

  def good(self) -> None:
    """Counts an example that could be used."""
    with self._lock:
      self.loaded += 1

  def bad(self, fault: BadExample) -> None:
    """Counts an example that could not be used; logs some of them.

    Args:
      fault: What is wrong; its message names the example.

    Raises:
      UserError: There are too many by now. The message sums them up.
    """
    with self._lock:
      count, first = self._found.get(fault.kind, (0, str(fault)))
      self._found[fault.kind] = count + 1, first
      if count < _NAMED or str(count + 1).strip("0") == "1":
        log.warning("skipped: %s (%s, no. %d)", fault, fault.kind, count + 1)
      self._stop_if(
        self._found, self.loaded + sum(n for n, _ in self._found.values())
      )

  def _stop_if(self, found: Found, seen: int) -> None:
    bad = sum(count for count, _ in found.values())
    if bad > self._limit * max(seen, MIN_SEEN):
      listed = sorted(found.items(), key=lambda item: -item[1][0])
      raise errors.UserError(
        f"{bad} of {seen} examples cannot be used, more than "
        f"bad_fraction={self._limit} allows: "
        + "; ".join(
          f"{count} x {kind} ({first})" for kind, (count, first) in listed
        )
        + "; repair the data, or raise bad_fraction"
      )
