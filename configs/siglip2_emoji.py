"""SigLIP 2's recipe on emoji drawings: all its losses, in phases.

  pip install -e '.[emoji]'
  python -m sigjax.train --config configs/siglip2_emoji.py

Hardware: two CPU cores. The model, the data and most of the settings are those
of siglip_emoji.py; docs/siglip2.md explains the losses.

- From the beginning: the sigmoid loss, and a decoder that predicts captions.
- From 60 % of the steps: self-distillation between views, and prediction of
  masked patches.
- From 90 %: images of any aspect ratio in 9, 16 or 25 patches, without
  self-distillation.

SigLIP 2 begins these at 80 % and 90 % of a run that is ten thousand times as
long.

Arguments, as in --config configs/siglip2_emoji.py:naflex=0
  decoder, views, masks, naflex: 0 leaves this part out. All are 1.
  steps, batch_size: values other than those below.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, siglip_emoji
from sigjax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg,
    decoder=True,
    views=True,
    masks=True,
    naflex=True,
    steps=800,
    batch_size=256,
  )
  config = siglip_emoji.get_config(
    f"steps={args['steps']},batch_size={args['batch_size']}"
  )
  if args["decoder"]:
    config.losses = dict(caption=dict(type="caption", chunk=1024))
  phases: dict[str, Any] = {}
  if args["views"] or args["masks"]:
    # Few steps and a small model: a teacher that follows faster, fewer
    # prototypes, narrower heads.
    phases["views"] = common.distilled(
      config,
      from_percent=60,
      sizes=(64, 32),
      views=4 if args["views"] else 0,
      masks=args["masks"],
      momentum=0.98,
      prototypes=1024,
      patch_prototypes=512,
      hidden=256,
      bottleneck=64,
    )
  if args["naflex"]:
    patches = "resize_to_patches({length},16)"
    phases["naflex"] = common.any_aspect(
      config,
      config.pp.replace("|choice", f"|{patches}|choice"),
      patches=16,
      lengths=((9, 1), (16, 1), (25, 1)),
      end="views" if phases else "",
    )
  config.phases = phases
  return config
