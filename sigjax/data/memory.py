"""Small datasets whose images are decoded once, and then stay in memory."""

from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data.example import images
from sigjax.data.source import Example, Records, Source


class InMemory:
  """Records that stay in memory once they are read, with decoded images."""

  def __init__(self, records: Records):
    self._records = records
    self._kept: dict[int, Example] = {}

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Example:
    """Returns a record; its "image" is an images.Decoded.

    Raises:
      BadExample: the image cannot be decoded; it is tried anew the next time.
    """
    # Two threads may both decode a record: that is as good.
    example = self._kept.get(i)
    if example is None:
      example = dict(self._records[i])
      if "image" in example:
        image = np.ascontiguousarray(images.decode(example["image"]))
        example["image"] = images.Decoded(image)
      self._kept[i] = example
    return dict(example)

  def __getattr__(self, name: str) -> Any:
    # What records may have beside these, see source.Records.
    return getattr(self._records, name)


def in_memory(source: Source) -> Source:
  """Returns the source with records that stay in memory.

  Raises:
    UserError: it has embeddings, or is a mixture.
  """
  if source.tower is not None:
    raise errors.UserError(
      f"{source.name} has embeddings, which are mapped from disk: leave "
      "in_memory out"
    )
  return source.replaced(records=InMemory(source.records))
