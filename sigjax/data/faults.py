"""What can be wrong with an example or a shard.

Large datasets always have damaged examples. The pipeline skips them, counts
them by kind, and stops when they are too many; see batches/tally.py.
"""

from collections.abc import Mapping
import logging

from sigjax import errors

log = logging.getLogger("sigjax")

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
