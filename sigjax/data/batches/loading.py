"""Loading an example: faults are named, counted, and others take the place."""

import itertools
import logging
import threading

import numpy as np

from sigjax import errors
from sigjax.data import mixture
from sigjax.data.faults import BadExample

log = logging.getLogger("sigjax")

_MEMBERS = 3  # others of its group that are tried where one cannot be used
_SPARES = 8  # and then other elements
MIN_SEEN = 1000  # a share of fewer examples says little
_NAMED = 3  # of each kind, then only each tenfold count


class Tally:
  """Counts examples that could be used and such that could not, by kind.

  Args:
    limit: the run stops when more than this fraction is bad: of all that were
      loaded, or of MIN_SEEN as long as they are fewer.
    source: whose examples they are; what it left out when it was opened has to
      be within the limit, too, of that and the records it has.

  Raises:
    UserError: limit is no fraction, or more than that was left out before.
  """

  def __init__(self, limit, source):
    if (
      isinstance(limit, bool)
      or not isinstance(limit, (int, float))
      or not (0 <= limit <= 1)
    ):
      raise errors.UserError(
        f"bad_fraction is {limit!r}, but has to be a number from 0 to 1"
      )
    self._limit, self._lock = limit, threading.Lock()
    self.loaded, self._kinds = 0, {}  # kind: (count, the first one's message)
    self._stop_if(
      {kind: (n, source.name) for kind, n in source.faults.items()},
      len(source.records) + sum(source.faults.values()),
    )

  def faults(self):
    """Returns {kind: how many examples could not be used}."""
    with self._lock:
      return {kind: count for kind, (count, _) in self._kinds.items()}

  def good(self):
    """One more example could be used."""
    with self._lock:
      self.loaded += 1

  def bad(self, fault):
    """One more could not; logs its message at times.

    Args:
      fault: a BadExample whose message names it.

    Raises:
      UserError: now there are too many; it sums them up.
    """
    with self._lock:
      count, first = self._kinds.get(fault.kind, (0, str(fault)))
      self._kinds[fault.kind] = count + 1, first
      if count < _NAMED or str(count + 1).strip("0") == "1":
        log.warning("skipped: %s (%s, no. %d)", fault, fault.kind, count + 1)
      self._stop_if(
        self._kinds, self.loaded + sum(n for n, _ in self._kinds.values())
      )

  def _stop_if(self, kinds, seen):
    bad = sum(count for count, _ in kinds.values())
    if bad > self._limit * max(seen, MIN_SEEN):
      listed = sorted(kinds.items(), key=lambda item: -item[1][0])
      raise errors.UserError(
        f"{bad} of {seen} examples cannot be used, more than "
        f"bad_fraction={self._limit} allows: "
        + "; ".join(
          f"{count} x {kind} ({first})" for kind, (count, first) in listed
        )
        + "; repair the data, or raise bad_fraction"
      )


def read(source, record):
  """Returns a record of a source as it is.

  Raises:
    BadExample: it cannot be read.
  """
  try:
    return source.records[record]
  except OSError as e:
    raise BadExample(f"it cannot be read: {e}", kind="unreadable") from e


def load(source, record, preprocess, rng):
  """Reads and preprocesses one record.

  Returns:
    The example, and what to call it.

  Raises:
    BadExample: it cannot be used; named, as all that is raised.
  """
  where = mixture.name_of(source, record)
  try:
    example = read(source, record)
    key = example.get("key", example.get("file"))
    if isinstance(key, str):
      where = f"{where} ({key})"
    return preprocess(example, rng), where
  except BadExample as e:
    raise BadExample(f"{where}: {e}", kind=e.kind) from e
  except errors.UserError as e:
    raise errors.UserError(f"{where}: {e}") from e
  except Exception as e:
    e.add_note(f"in {where}")
    raise


def _candidates(source, sequence, position, seed):
  """Yields (record, rng) for a position, then what may take its place."""
  rngs = (
    np.random.default_rng([seed, position, attempt])
    for attempt in itertools.count()
  )
  own, rng = sequence.at(position), next(rngs)
  record = source.pick(own, rng)
  yield record, rng
  group = mixture.members_of(source, own)
  others = np.roll(group, -list(group).index(record))[1:]
  for other in others[:_MEMBERS].tolist():
    yield other, next(rngs)
  for attempt in range(_SPARES):
    spare = sequence.spare(position, attempt)
    if spare is not None:
      rng = next(rngs)
      yield source.pick(spare, rng), rng


def load_good(source, sequence, position, preprocess, seed, tally):
  """Returns what load does for a position, or for what takes its place.

  Raises:
    UserError: nothing could, or there are more faults than the tally allows.
  """
  fault = None
  for count, (record, rng) in enumerate(
    _candidates(source, sequence, position, seed)
  ):
    try:
      loaded = load(source, record, preprocess, rng)
    except BadExample as e:
      fault = e
      tally.bad(e)
    else:
      tally.good()
      return loaded
  raise errors.UserError(
    f"{fault}; nothing can take its place in the batch: "
    + (
      f"neither could {count} others be used"
      if count
      else "the batch holds all there are; lower batch_size"
    )
  )
