"""Does Adam's beta2 = .95 train more steadily than .999?"""

from studies import common
from tools.grid.plan import Study, grid


def config(beta2: float) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit()
  config.optim.options.b2 = beta2
  config.log_every_steps = 1
  return config


def get_study() -> Study:
  """Returns the study."""
  metrics = dict(
    common.METRICS,
    **{"loss": "loss", "gradient norm": "grad_norm"},
  )
  return Study(
    question="beta2 of Adam: .95 against .999",
    paper=(
      "with .999 gradient and update norms spike, with .95 they do not "
      "(figure 5)"
    ),
    runs=grid(config, beta2=(0.95, 0.98, 0.99, 0.999)),
    metrics=metrics,
    x="beta2",
    curves=("loss", "grad_norm", "update_norm"),
  )
