"""Many languages: which batch size, and does the small embedding suffice?"""

from configs import msiglip_emoji
from studies import common
from tools.grid.plan import Study, grid

EXAMPLES = 51_200


def config(bottleneck: int, batch_size: int) -> common.Config:
  """Returns the config of a run; bottleneck 0 is the full table."""
  config: common.Config = msiglip_emoji.get_config(
    f"bottleneck={bottleneck},batch_size={batch_size},"
    f"steps={EXAMPLES // batch_size}"
  )
  config.model.text.update(width=64, mlp_dim=256)
  return common.short(config, "held_style", "held_style_held_language")


def get_study() -> Study:
  """Returns the study."""
  recall = "held_style/{} text->image recall@10"
  return Study(
    question="24 languages: batch size, and the bottleneck of the embedding",
    paper=(
      "batch 32k is enough; a bottleneck of 96 costs about half a percent of "
      "ImageNet accuracy (section 4.3 and appendix)"
    ),
    runs=grid(config, bottleneck=(96, 0), batch_size=(64, 256, 1463)),
    metrics={
      "mean of 24, T->I @10 %": recall.format("mean"),
      "English %": recall.format("en"),
      "Thai %": recall.format("th"),
      "untrained, mean %": (
        "held_style_held_language/mean text->image recall@10"
      ),
    },
    x="batch_size",
    line="bottleneck",
    versus=(96, 0),
  )
