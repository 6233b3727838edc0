"""Is sigmoid better than softmax at small batch sizes? (SigLiT)"""

from studies import common
from tools.grid.plan import Study


def get_study() -> Study:
  """Returns the study."""
  return common.sigmoid_against_softmax(
    "Sigmoid against softmax over the batch size, SigLiT",
    common.siglit,
    (16, 32, 64, 128, 256, 512, 1463),
  )
