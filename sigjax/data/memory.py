"""Small datasets whose images are decoded once, and then stay in memory."""

import numpy as np

from sigjax import errors
from sigjax.data.example import images
from sigjax.data.source import Example, Records, Source, Wrapped


class InMemory(Wrapped):
  """Records that stay in memory once they are read, with decoded images."""

  def __init__(self, records: Records):
    super().__init__(records)
    self._kept: dict[int, Example] = {}

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
