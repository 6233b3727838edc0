"""Is sigmoid better than softmax at small batch sizes? (SigLiT)"""

from studies import common
from tools.grid.plan import Study, grid


def config(loss: str, batch_size: int) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit(batch_size)
  config.loss = dict(name=loss)
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question="Sigmoid against softmax over the batch size, SigLiT",
    paper=(
      "sigmoid is better below 16k and about equal at 32k, with a locked image "
      "tower and from scratch (section 4.2, figure 2)"
    ),
    runs=grid(
      config,
      loss=("sigmoid", "softmax"),
      batch_size=(16, 32, 64, 128, 256, 512, 1463),
    ),
    metrics=common.METRICS,
    x="batch_size",
    line="loss",
    versus=("sigmoid", "softmax"),
  )
