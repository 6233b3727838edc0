"""Is the sigmoid loss more robust to noisy data than softmax?"""

from studies import common
from tools.grid.plan import Run, Study

KINDS = ("image", "text", "pairs", "image+text", "image+text+pairs")


def config(loss: str, kind: str, p: float) -> common.Config:
  """Returns the config of a run."""
  config = common.siglit(examples=51_200)
  config.loss = dict(name=loss)
  ops = config.pp.split("|")
  keep = ops.pop()
  if "image" in kind:
    ops.append(f"noise_image({p})")
  if "text" in kind:
    ops.append(f"noise_text({p})")
  if "pairs" in kind:
    config.data.mismatch = p
  config.pp = "|".join([*ops, keep])
  return config


def get_study() -> Study:
  """Returns the study."""
  places = [("none", 0.0)]
  for kind in KINDS:
    places += [(kind, p) for p in ((0.2,) if "+" in kind else (0.2, 0.4))]
  runs = [
    Run(dict(loss=loss, noise=f"{kind} {p}"), config(loss, kind, p))
    for kind, p in places
    for loss in ("sigmoid", "softmax")
  ]
  return Study(
    question="Noise in images, texts and pairs, SigLiT, batch 256",
    paper=(
      "sigmoid stays above softmax with each noise (section 4.10, figure 7)"
    ),
    runs=runs,
    metrics=common.METRICS,
    x="noise",
    line="loss",
    versus=("sigmoid", "softmax"),
  )
