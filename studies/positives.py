"""Several drawings of one concept in a batch: what are they to each other?"""

from studies import common
from tools.grid.plan import Study, grid


def config(positives: str, batch_size: int) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit(batch_size)
  # Each drawing is an element: a batch holds several styles of a concept.
  config.data.group_by = None
  if positives != "none":
    config.loss = dict(positives=positives)
    config.pp = config.pp.replace(
      "keep('image','text')", "group('concept')|keep('image','text','group')"
    )
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question="Several drawings of a concept in a batch, SigLiT",
    paper="not in the paper",
    runs=grid(
      config, positives=("none", "mask", "all"), batch_size=(256, 1024)
    ),
    metrics=common.METRICS,
    x="batch_size",
    line="positives",
    versus=("all", "none"),
  )
