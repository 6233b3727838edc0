"""SigLiT L/16: a locked image tower, a text tower trained against it.

  python -m sigjax.train --config configs/siglit_l16.py:\
weights=L_16.npz,dataset=coco_captions,tokenizer=c4_en.model

Hardware: made for 4 TPUv4 chips, where the paper's SigLiT (B/8 image tower, L
text tower, batch 32k, 65k steps) takes a day and reaches 79.8 on ImageNet.

The weights are a public AugReg ViT-L/16 (pool "tok"):
  gsutil cp gs://vit_models/augreg/\
L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0.npz L_16.npz

Arguments:
  weights: the image tower's file (L_16.npz).
  dataset, split, captions, val, tokenizer, vocab: as in siglip_b16.py.
  batch_size, steps, microbatches: 32768, 65000, 1.
  loss: sigmoid or, for comparison, softmax.
  smoke: the same code with tiny towers (the locked one at random) on the emoji
    data, a minute on 2 cores.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH = 224, 16
WEIGHTS = ("gs://vit_models/augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1"
           "-do_0.0-sd_0.0.npz")


def get_config(arg=None):
  arg = config_lib.parse_arg(
      arg, **common.TFDS_ARGS, weights="L_16.npz", steps=65_000)
  config = ConfigDict()
  common.from_tfds(config, arg, RES, LENGTH)
  config.total_steps = arg["steps"]

  # LiT (arXiv 2111.07991): the locked tower ends before its classifier; the
  # text tower's head maps to its width.
  config.model = dict(
      image=dict(variant="L/16", pool_type="tok", scan=True),
      text=dict(variant="L", depth=12, vocab_size=arg["vocab"], scan=True,
                remat="dots"),
      out_dim=(None, 1024), temperature_init=10.0, bias_init=-10.0,
      dtype="bfloat16")
  config.init = dict(
      path=arg["weights"], into="img", dont_load=("head/.*",), url=WEIGHTS)
  config.optim = dict(
      name="lion", lr=1e-4, wd=1e-7, grad_clip_norm=1.0,
      schedule=dict(name="cosine", warmup_percent=10),
      frozen=(("img/.*", True), (".*", False)))

  if arg["smoke"]:
    common.shrink(config, arg)
    del config.init
  return config
