"""What an evaluation has to know of each example, read without its image.

Nothing but the captions, the label or the group of an example is kept.
"""

from collections.abc import Callable
import math
from typing import Any, TypeVar

import numpy as np
import tqdm

from sigjax import errors
from sigjax.data.faults import BadExample, Tally
from sigjax.data.shards import files
from sigjax.data.source import Source

Kept = TypeVar("Kept")

_CHUNK = 1 << 7  # examples that a thread reads at once


def read(
  source: Source,
  keep: Callable[[dict[str, Any]], Kept],
  bad_fraction: float,
) -> list[Kept | None]:
  """Returns keep(example) for the first record of each element.

  Args:
    source: N elements.
    keep: is given an example, without its image if the source can read it so.
    bad_fraction: the largest fraction of examples that may be unusable.

  Returns:
    A list of N; None where the example cannot be used.

  Raises:
    UserError: too many examples cannot be used.
  """
  counted = Tally(bad_fraction, source)

  def read_one(i: int) -> Kept | None:
    record = source.pick(i)
    try:
      kept = keep(source.brief(record))
    except BadExample as e:
      name = source.name_of(record)
      counted.bad(BadExample(f"{name}: {e}", kind=e.kind))
      return None
    counted.good()
    return kept

  def read_some(start: int) -> list[Kept | None]:
    return [read_one(i) for i in range(start, min(start + _CHUNK, len(source)))]

  found: list[Kept | None] = []
  with (
    files.pool() as threads,
    tqdm.tqdm(
      total=len(source),
      unit="example",
      delay=2,
      desc=f"reading texts and labels of {source.name}",
    ) as bar,
  ):
    for chunk in threads.map(read_some, range(0, len(source), _CHUNK)):
      found += chunk
      bar.update(len(chunk))
  return found


def value(example: dict[str, Any], key: str, what: str) -> str | float | None:
  """Returns one number or text of an example; None if it is missing.

  Args:
    example: dict of features.
    key: the feature.
    what: what the feature is used as, for messages.

  Raises:
    UserError: there is no such feature, or it holds several values.
  """
  scalar = {
    k: _scalar(v) for k, v in example.items() if k != "image" and _is_scalar(v)
  }
  return errors.pick(scalar, key, f"{what}: feature")


def values(
  example: dict[str, Any], key: str, what: str
) -> list[str | float | None]:
  """Returns the numbers or texts of a feature that may hold several.

  Args:
    example, key, what: as of value().

  Raises:
    UserError: there is no such feature.
  """
  others = {k: v for k, v in example.items() if k != "image"}
  found = errors.pick(others, key, f"{what}: feature")
  if _is_scalar(found):
    return [] if found is None else [_scalar(found)]
  return [_scalar(v) for v in found]


def _is_scalar(value: Any) -> bool:
  return value is None or isinstance(value, (str, bytes)) or np.isscalar(value)


def _scalar(value: Any) -> str | float | None:
  value = value.item() if isinstance(value, np.generic) else value
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  if isinstance(value, float) and math.isnan(value):
    return None
  return value
