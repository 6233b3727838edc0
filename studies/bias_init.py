"""How do temperature and bias have to start, and does b have to be there?"""

import math

from studies import common
from tools.grid.plan import Study, grid

# b and t' at the start. "calibrated" is logit(1 / B), right on average.
STARTS = {
  "no b": dict(bias="none"),
  "b -10, t' log 10": dict(bias_init=-10.0),
  "b -10, t' 0": dict(bias_init=-10.0, temperature_init=1.0),
  "b 0, t' log 10": dict(bias_init=0.0),
  "b 0, t' 0": dict(bias_init=0.0, temperature_init=1.0),
  "calibrated": dict(bias_init="auto"),
  "relative": dict(bias="relative", bias_init="auto"),
}


def config(start: str) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit(examples=51_200)
  with config.model.ignore_type():  # "auto" is no number
    config.model.update(STARTS[start])
  config.log_every_steps = 2
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question=(
      "Bias and temperature at the start, SigLiT, batch 256 (calibrated b "
      f"{-math.log(255):.1f})"
    ),
    paper=(
      "at batch 8k (calibrated b -9.0), ImageNet: no b 62.0; (b -10, t' log "
      "10) 63.0; (-10, 0) 61.0; (0, log 10) 61.7; (0, 0) 53.7 (table 4); the "
      "relative bias t (<x, y> - r) is of arXiv 2509.18552"
    ),
    runs=grid(config, start=tuple(STARTS)),
    metrics=dict(common.METRICS, **{"final t": "t", "final b": "b"}),
    x="start",
    curves=("loss", "grad_norm"),
    curve_steps=200,
  )
