"""How should a pretrained image tower be used?"""

from studies import common
from tools.grid.plan import Study, grid


def scratch(examples: int = 30_720) -> common.Config:
  """Returns a run from scratch by Muon, which learns more in a short one."""
  config = common.scratch(examples=examples)
  config.optim.name = "muon"
  return config


def config(tower: str) -> common.Config:
  """Returns the config of a run."""
  config = scratch()
  if tower == "scratch":
    return config
  config.init = dict(path="{tower}", dont_load=("txt/.*", "t", "b"))
  if tower == "locked":
    config.lock = ("img",)
  elif tower == "unlocked, lr x 0.1, wd 0":
    config.optim.lr_mults = (("img/.*", 0.1), (".*", 1.0))
    config.optim.wd_mults = (("img/.*", 0.0), (".*/kernel", 1.0), (".*", 0.0))
  return config


def get_study() -> Study:
  """Returns the study."""
  towers = ("scratch", "unlocked", "unlocked, lr x 0.1, wd 0", "locked")
  return Study(
    question="A pretrained image tower: locked, unlocked, or none",
    paper=(
      "locked, and unlocked without weight decay and with a tenth of the "
      "learning rate, win (sections 4.1 and 4.5, figure 4)"
    ),
    runs=grid(config, tower=towers),
    metrics=common.METRICS,
    x="tower",
    prepare=dict(tower=scratch(examples=102_400)),
  )
