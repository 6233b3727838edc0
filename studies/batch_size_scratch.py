"""Is sigmoid better than softmax at small batch sizes? (from scratch)"""

from studies import common
from tools.grid.plan import Study


def get_study() -> Study:
  """Returns the study."""
  return common.sigmoid_against_softmax(
    "Sigmoid against softmax over the batch size, from scratch",
    common.scratch,
    (64, 256, 1463),
  )
