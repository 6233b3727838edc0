"""The small runs that the studies are made of.

All need the embedded drawings, which one command makes once:

  python examples/efficientnet_lite0.py --out embeddings/emoji
"""

from collections.abc import Callable, Sequence

from configs import siglip_emoji, siglit_emoji
from configs.common import Config
from tools.grid.plan import Study, grid

# Of the accuracy on OpenMoji drawings, a style that is in no training image.
METRICS = {
  "top-1 %": "held_style_zeroshot/*top-1",
  "top-10 %": "held_style_zeroshot/*top-10",
}


def siglit(batch_size: int = 256, examples: int = 102_400) -> Config:
  """Returns a SigLiT run: a small text tower against locked embeddings.

  Args:
    batch_size: B. It is at most 1,463: a batch has no concept twice, and there
      are no more.
    examples: the length of the training; the learning rate is the same for all
      batch sizes, as in the paper.
  """
  steps = examples // batch_size
  config: Config = siglit_emoji.get_config(
    f"steps={steps},batch_size={batch_size}"
  )
  config.model.text.update(width=64, mlp_dim=256)
  return short(config, "held_style_zeroshot")


def scratch(batch_size: int = 256, examples: int = 30_720) -> Config:
  """Returns a SigLIP run: both towers from scratch, on 64 pixels.

  The optimizer is the paper's, with b2 = .95.
  """
  steps = examples // batch_size
  config: Config = siglip_emoji.get_config(
    f"steps={steps},batch_size={batch_size}"
  )
  config.model.text.update(width=64, mlp_dim=256)
  config.optim.update(name="adamw", options=dict(b2=0.95))
  return short(config, "held_style_zeroshot")


def short(config: Config, *evals: str) -> Config:
  """Returns the config with these evaluations and one checkpoint, at the end.

  b starts at logit(1 / B), where the model is right on average.
  """
  config.evals = {name: config.evals[name] for name in evals}
  for section in config.evals.values():
    if "every_percent" in section:
      del section["every_percent"]
  config.checkpoints = dict(every_percent=100)
  config.log_every_steps = max(config.total_steps // 50, 1)
  with config.model.ignore_type():
    config.model.bias_init = "auto"
  return config


def sigmoid_against_softmax(
  question: str, make: Callable[[int], Config], batch_sizes: Sequence[int]
) -> Study:
  """Returns the study of both losses at several batch sizes.

  Args:
    question: see Study.
    make: fn(batch_size) -> the config of a run.
    batch_sizes: of the runs.
  """

  def config(loss: str, batch_size: int) -> Config:
    config = make(batch_size)
    config.loss = dict(name=loss)
    return config

  return Study(
    question=question,
    paper=(
      "sigmoid is better below 16k and about equal at 32k, with a locked image "
      "tower and from scratch (section 4.2, figure 2)"
    ),
    runs=grid(config, loss=("sigmoid", "softmax"), batch_size=batch_sizes),
    metrics=METRICS,
    x="batch_size",
    line="loss",
    versus=("sigmoid", "softmax"),
  )
