"""SigLiT L/16: a locked image tower, a text tower trained against it.

The paper's headline run: four TPUv4 chips, one day. There with a B/8 image
tower, here with the public AugReg ViT-L/16 (Table 1: 79.8 on ImageNet for B/8;
batch 32k, 65k steps, a text tower of L's width and 12 layers; Lion).

With the tower in the loop:

  python -m sigjax.train \
    --config configs/siglit_l16.py:dataset=coco_captions,microbatches=8

With its embeddings computed once; an image is then no more than 2 KiB:

  python -m tools.embed \
    --config configs/siglit_l16.py:dataset=coco_captions --out embeddings/coco
  python -m sigjax.train --config \
    configs/siglit_l16.py:embeddings=embeddings/coco,microbatches=4

Hardware: 4 TPUv4 chips of 30.75 GiB. What the TPU compiler plans per chip, by
python -m tools.aot_compile --config configs/siglit_l16.py:ARGUMENTS

  32,768    microbatches=8                                      8.8 GiB
  32,768    embeddings=x,microbatches=4                        11.3 GiB
  1,048,576 embeddings=x,microbatches=128,batch_size=1048576   12.7 GiB

Storage: 1024 numbers in float16 are 2 KiB an image: 0.24 GB for the 118k of
COCO, 205 GB for 100 million, captions not counted.

Arguments:
  weights: the image tower's: a released checkpoint's name, a URL or a file
    (augreg/L_16; docs/checkpoints.md).
  embeddings: the folder that tools.embed wrote with this config; "" for the
    tower in the loop.
  kind, path, dataset, split, captions, val, tokenizer, vocab: as in
    siglip_b16.py.
  batch_size, steps, microbatches: 32768, 65000, 1.
  loss: sigmoid or, for comparison, softmax.
  smoke: the same code with tiny towers (the locked one at random) on the emoji
    data, a minute on 2 cores.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH, WIDTH = 224, 16, 1024


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, **common.LARGE_ARGS, weights="augreg/L_16", embeddings="", steps=65_000
  )
  config = ConfigDict()
  common.large(config, arg, RES, LENGTH)
  config.total_steps = arg["steps"]

  # LiT (arXiv 2111.07991): the locked tower ends before its classifier; the
  # text tower's head maps to its width.
  config.model = dict(
    image=dict(variant="L/16", pool_type="tok", scan=True),
    text=dict(
      variant="L", depth=12, vocab_size=arg["vocab"], scan=True, remat="dots"
    ),
    out_dim=(None, WIDTH),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.init = dict(path=arg["weights"], into="img", dont_load=("head/.*",))
  config.lock = ("img",)
  config.optim = dict(
    name="lion",
    lr=1e-4,
    wd=1e-7,
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  if arg["smoke"]:
    common.shrink(config, arg)
    del config.init
  if arg["embeddings"]:
    common.precompute(config, arg["embeddings"])
  return config
