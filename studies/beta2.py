"""Does Adam's beta2 = .95 train more steadily than .999?"""

from studies import common
from tools.grid.plan import Study, grid


def config(beta2: float, clip: str) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit()
  config.optim.options.b2 = beta2
  if clip == "none":
    config.optim.grad_clip_norm = None
  config.log_every_steps = 1
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question="beta2 of Adam, with gradients clipped at norm 1 or not",
    paper=(
      "with .999 gradient and update norms spike, with .95 they do not "
      "(figure 5)"
    ),
    runs=grid(config, beta2=(0.95, 0.999), clip=("1", "none")),
    metrics=dict(common.METRICS, **{"final loss": "loss"}),
    x="beta2",
    line="clip",
    curves=("loss", "grad_norm", "update_norm"),
  )
