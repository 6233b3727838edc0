"""SigLIP 2 B/16 from scratch, with all of its losses (arXiv 2502.14786).

  python -m sigjax.train \
    --config configs/siglip2_b16.py:kind=parquet,path='data/*.parquet'

and then, as small models end, on examples that a teacher chooses: the same with

  start=WORKDIR,teacher=siglip2/so400m16_256

From the beginning the sigmoid loss and a decoder that predicts captions; from
80 % of the steps also self-distillation and masked prediction, on views of
their own. docs/siglip2.md explains the losses and says what the papers leave
open, docs/tpu.md what a step takes.

Hardware: the paper used up to 2048 TPUv5e chips and WebLI, which is not public,
in a hundred languages. Parameters and the optimizer's state are split over
`fsdp` chips.

The tokenizer is Gemma's, of 256,000 pieces; texts are lower-cased.

Arguments (defaults in brackets): those of siglip_b16.py but pretrained, and
  tokenizer, vocab: (gemma, 256000).
  batch_size, microbatches: (32768, 1).
  examples: 40e9, or 4e9 with a teacher.
  patch: 16 or 32 pixels of a side (16).
  fsdp: over how many chips parameters are split (8).
  decoder, views, masks: 0 leaves this loss out. All are 1.
  finish: pixels of a side from 95 % of the steps on, such as 384; 0 stays at
    256 (0).
  naflex: from 90 % of the steps on, images of any aspect ratio in 128 to 1,024
    patches, without self-distillation. The released NaFlex models then trained
    on for 3.75 times as long: make `examples` larger accordingly (0).
  start, teacher: go on from the workdir `start` with the sigmoid loss alone, a
    learning rate of 1e-5 and no weight decay. The teacher, a released name or
    a workdir, chooses half of the examples (""). See sigjax/curate.py.
  smoke: the same code with tiny towers on the emoji data.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib
from sigjax import errors

LENGTH = 64


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  large = dict(common.LARGE_ARGS, tokenizer="gemma", vocab=256_000)
  args = config_lib.parse_arg(
    arg,
    **large,
    examples=0.0,
    patch=16,
    fsdp=8,
    decoder=True,
    views=True,
    masks=True,
    finish=0,
    naflex=False,
    start="",
    teacher="",
  )
  teacher = args["teacher"]
  if bool(teacher) != bool(args["start"]):
    raise errors.UserError(
      "start and teacher belong together: a run to go on from, and a model "
      "that chooses its examples"
    )
  if teacher:
    args.update(decoder=False, views=False, masks=False)
  if args["finish"] and args["naflex"]:
    raise errors.UserError("finish and naflex are two ways to end: choose one")
  if args["naflex"] and args["patch"] != 16:
    raise errors.UserError(
      f"naflex has patches of 16 pixels: patch={args['patch']} is not for it"
    )
  res = 64 if args["smoke"] else 256
  config: common.Config = ConfigDict()
  common.large(config, args, res, LENGTH)
  config.total_examples = args["examples"] or (4e9 if teacher else 40e9)
  for key in ("pp", "pp_text"):  # lower-cased, and padded with 0
    config[key] = config[key].replace(
      f"tokenize({LENGTH})", f"lower|tokenize({LENGTH},0)"
    )

  tower = dict(scan=True, remat="attention")
  config.model = dict(
    image=dict(variant=f"B/{args['patch']}", pool_type="map", **tower),
    text=dict(variant="B", vocab_size=args["vocab"], **tower),
    out_dim=(None, 768),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.optim = common.adamw(warmup_steps=20_000)
  if teacher:
    config.optim.update(lr=1e-5, wd=0.0, wd_mults=((".*", 0.0),))
    config.init = dict(path=args["start"], dont_load=("dec/.*", "distill/.*"))
    common.curate(config, teacher)
  config.mesh = dict(data=-1, fsdp=args["fsdp"])
  config.sharding = ((".*", "fsdp"),)

  if args["smoke"]:
    common.shrink(config, dict(args, captions="captions"))
    config.update(model=dict(image=dict(patch_size=args["patch"])))
    config.mesh = dict(data=-1, fsdp=1)
  if args["decoder"]:
    config.losses = dict(caption=dict(type="caption"))
  phases: dict[str, Any] = {}
  if args["views"] or args["masks"]:
    heads = dict(prototypes=256, patch_prototypes=256, hidden=64, bottleneck=32)
    phases["views"] = common.distilled(
      config,
      from_percent=80,
      sizes=(64, 32) if args["smoke"] else (256, 96),
      views=8 if args["views"] else 0,
      masks=args["masks"],
      weight=0.25,  # of B; .5 of L, 1 of So400m, .5 of g
      **(heads if args["smoke"] else {}),
    )
  last = list(phases.values())[-1]["pp"] if phases else config.pp
  if args["finish"]:
    new = lambda pp: pp.replace(f"|resize({res})", f"|resize({args['finish']})")
    phases["finish"] = dict(
      from_percent=95, pp=new(last), pp_image=new(config.pp_image)
    )
  if args["naflex"]:
    # The paper halves the batch for the longest. Microbatches leave it as it
    # is, and take the memory of 256 patches or less.
    lengths = ((128, 1), (256, 1), (576, 4), (784, 4), (1024, 4))
    phases["naflex"] = common.any_aspect(
      config,
      config.pp.replace(f"resize({res})", "resize_to_patches({length},16)"),
      patches=(res // 16) ** 2,
      lengths=((9, 1), (16, 1), (25, 2)) if args["smoke"] else lengths,
      end="views" if phases else "",
    )
  config.phases = phases
  return config
