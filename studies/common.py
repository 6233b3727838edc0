"""The small runs that the studies are made of.

All need the embedded drawings, which one command makes once:

  python examples/efficientnet_lite0.py --out embeddings/emoji
"""

from configs import siglip_emoji, siglit_emoji
from configs.common import Config

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
  return _short(config)


def scratch(batch_size: int = 256, examples: int = 30_720) -> Config:
  """Returns a SigLIP run: both towers from scratch, on 64 pixels."""
  steps = examples // batch_size
  config: Config = siglip_emoji.get_config(
    f"steps={steps},batch_size={batch_size}"
  )
  config.model.text.update(width=64, mlp_dim=256)
  return _short(config)


def _short(config: Config) -> Config:
  """Keeps one evaluation and one checkpoint, both at the end."""
  held = config.evals["held_style_zeroshot"]
  del held["every_percent"]
  config.evals = dict(held_style_zeroshot=held)
  config.checkpoints = dict(every_percent=100)
  config.log_every_steps = max(config.total_steps // 50, 1)
  with config.model.ignore_type():
    config.model.bias_init = "auto"  # right on average at the start
  return config
