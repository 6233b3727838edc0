"""Which way of fine-tuning a run learns new concepts, and what is forgotten?"""

from configs import siglit_emoji
from studies import common
from tools.grid.plan import Study, grid

BATCH = 64
# The learning rates of configs/finetune.py, of a run with 2e-3; and "all" with
# that rate itself, as it is when one trains from scratch.
RATES = {
  "not trained": 0.0,
  "scratch": 2e-3,
  "all": 2e-4,
  "all, lr x 10": 2e-3,
  "txt, LoRA 8": 2e-3,
  "head": 1e-3,
  "calibrate": 1e-2,
}


def config(way: str, steps: int) -> common.Config:
  """Returns the config of a run on 167 concepts that the start never saw."""
  config: common.Config = siglit_emoji.get_config(
    f"steps={steps},batch_size={BATCH}"
  )
  config.model.text.update(width=64, mlp_dim=256)
  config = common.short(config, "held_both_zeroshot", "held_style_zeroshot")
  config.data.path = config.data.path.replace("train", "held_family")
  if way == "scratch":
    return config
  config.init = dict(path="{start}")
  config.tokenizer = dict(path="{start}/tokenizer.model")
  config.optim.lr = RATES[way]
  config.optim.wd = 0.0
  if way == "txt, LoRA 8":
    config.lora = dict(rank=8, towers=("txt",))
    config.optim.wd_mults = ((".*", 0.0),)
  elif way == "head":
    config.lock = ("txt/Encoder_0", "txt/Embed_0", "txt/pos_embedding")
  elif way == "calibrate":
    config.lock = ("img", "txt")
    config.optim.wd_mults = ((".*", 0.0),)
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question="Fine-tuning a SigLiT run on new families of emoji",
    paper="not in the paper",
    runs=grid(config, way=tuple(RATES), steps=(30, 150)),
    metrics={
      "new concepts, top-1 %": "held_both_zeroshot/*top-1",
      "new concepts, top-10 %": "held_both_zeroshot/*top-10",
      "old concepts, top-10 %": "held_style_zeroshot/*top-10",
    },
    x="way",
    line="steps",
    prepare=dict(start=common.siglit()),
  )
