"""SigLiT L/16: a text tower trained against a locked image tower.

This is the paper's run of one day on four TPUv4 chips: batch 32k, 65k steps,
Lion, and a text tower of L's width with 12 layers. The paper locks a B/8 image
tower (Table 1: 79.8 on ImageNet). This config locks the public AugReg ViT-L/16.

With the image tower in the training step:

  python -m sigjax.train \
    --config configs/siglit_l16.py:dataset=coco_captions,microbatches=8

With its embeddings computed once, so that an image takes 2 KiB:

  python -m tools.embed \
    --config configs/siglit_l16.py:dataset=coco_captions --out embeddings/coco
  python -m sigjax.train --config \
    configs/siglit_l16.py:embeddings=embeddings/coco,microbatches=4

Hardware: 4 TPUv4 chips with 30.75 GiB each. The TPU compiler plans this memory
per chip (python -m tools.aot_compile --config configs/siglit_l16.py:ARGUMENTS):

  batch     ARGUMENTS                                          memory
  32,768    microbatches=8                             at most  8.8 GiB
  32,768    embeddings=x,microbatches=4                        10.1 GiB
  1,048,576 embeddings=x,microbatches=128,batch_size=1048576   12.7 GiB

Storage: an embedding of 1024 numbers in float16 takes 2 KiB. That is 0.24 GB
for the 118k images of COCO and 205 GB for 100 million images, without captions.

Arguments (defaults in brackets):
  weights: weights of the image tower: the name of a released checkpoint, a URL
    or a file (augreg/L_16; see docs/checkpoints.md).
  embeddings: the folder that tools.embed wrote with this config; "" keeps the
    image tower in the training step ("").
  kind, path, dataset, split, captions, val, tokenizer, vocab: as in
    siglip_b16.py.
  batch_size, steps, microbatches: (32768, 65000, 1).
  loss: sigmoid, or softmax for comparison (sigmoid).
  smoke: the same code with tiny towers on the emoji data, the locked one with
    random weights; takes a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH, WIDTH = 224, 16, 1024


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg, **common.LARGE_ARGS, weights="augreg/L_16", embeddings="", steps=65_000
  )
  config = ConfigDict()
  common.large(config, args, RES, LENGTH)
  config.total_steps = args["steps"]

  # As in LiT (arXiv 2111.07991), the locked tower has no classifier, and the
  # head of the text tower maps to the width of the image tower.
  config.model = dict(
    image=dict(variant="L/16", pool_type="tok", scan=True),
    # A scan copies what the backward pass needs; a locked tower has none.
    text=dict(variant="L", depth=12, vocab_size=args["vocab"], remat="dots"),
    out_dim=(None, WIDTH),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.init = dict(path=args["weights"], into="img", dont_load=("head/.*",))
  config["lock"] = ("img",)
  config.optim = dict(
    name="lion",
    lr=1e-4,
    wd=1e-7,
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  if args["smoke"]:
    common.shrink(config, args)
    del config.init
  if args["embeddings"]:
    common.precompute(config, args["embeddings"])
  return config
