"""Which of a batch's negative pairs does the sigmoid loss need?"""

from studies import common
from tools.grid.plan import Run, Study

EXAMPLES = 51_200
SHARES = (1 / 4, 1 / 16, 1 / 64)


def config(which: str, share: float) -> common.Config:
  """Returns the config of a run."""
  matched = which == "hardest, matched"
  # Trained longer, until as many pairs are seen as with all negatives.
  examples = round(EXAMPLES / share) if matched else EXAMPLES
  config = common.siglit(examples=examples)
  if share < 1:
    which = "hardest" if matched else which
    config.loss = dict(negatives=dict(share=share, which=which))
  return config


def get_study() -> Study:
  """Returns the study."""
  runs = [
    Run(dict(which=which, share=share), config(which, share))
    for which in ("random", "hardest", "easiest")
    for share in SHARES
  ]
  for which, share in (("hardest, matched", 1 / 4), ("all", 1)):
    runs.append(Run(dict(which=which, share=share), config(which, share)))
  return Study(
    question="A share of the negative pairs, SigLiT, batch 256",
    paper=(
      "random negatives hurt, the easiest fail, the hardest nearly keep the "
      "quality, and more so with as many pairs seen (section 4.8, figure 6)"
    ),
    runs=runs,
    metrics=dict(
      common.METRICS,
      **{"final b": "b", "positive logit": "pos_logit"},
      **{"negative logit": "neg_logit"},
    ),
    x="share",
    line="which",
  )
