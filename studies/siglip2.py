"""What does each of SigLIP 2's losses bring?"""

from configs import siglip2_emoji
from configs.common import Config, drawings
from studies import common
from tools.grid.plan import Study, grid

PARTS = {
  "sigmoid": "decoder=0,views=0,masks=0",
  "+ decoder": "views=0,masks=0",
  "+ distillation": "decoder=0,masks=0",
  "+ masks": "decoder=0,views=0",
  "all": "",
}
METRICS = {
  "zero-shot top-10 %": "held_style_zeroshot/*top-10",
  "text->image recall@10 %": "held_style_retrieval/text->image recall@10",
  "1-shot %": "fewshot/1-shot*",
  "patches %": "foreground/foreground",
  "caption tokens %": "captions/token accuracy",
}


def config(losses: str, steps: int = 300, batch_size: int = 128) -> Config:
  """Returns the config of a run: towers from scratch, on 64 pixels."""
  given = f"naflex=0,steps={steps},batch_size={batch_size}"
  if PARTS[losses]:
    given += f",{PARTS[losses]}"
  config: Config = siglip2_emoji.get_config(given)
  config = common.short(config, "held_style_zeroshot", "held_style_retrieval")
  unseen = drawings("held_style")
  train = drawings("train")
  config.evals.fewshot = dict(
    type="fewshot", data=train, data_test=unseen, label="concept", shots=(1,)
  )
  config.evals.foreground = dict(
    type="foreground", data=train, data_test=unseen
  )
  if "caption" in config.get("losses", {}):
    text = config.pp[config.pp.index("|choice") :]
    config.evals.captions = dict(
      type="captions", data=unseen, pp=f"decode|resize(64){text}"
    )
  return config


def get_study() -> Study:
  """Returns the study."""
  return Study(
    question="Losses beside the pairs: what does each bring?",
    paper=(
      "the decoder, self-distillation and masked prediction together improve "
      "localisation and dense features most, zero-shot and retrieval a little "
      "(SigLIP 2, sections 2 and 3)"
    ),
    runs=grid(config, losses=tuple(PARTS)),
    metrics=METRICS,
    x="losses",
  )
