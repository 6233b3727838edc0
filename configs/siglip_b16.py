"""SigLIP B/16 from scratch: the paper's base run (Table 1: 72.1 / 73.4).

  python -m sigjax.train --config configs/siglip_b16.py:dataset=coco_captions
  python -m sigjax.train \
    --config configs/siglip_b16.py:kind=tar,path=data/{00000..00999}.tar

Hardware: the paper used 32 TPUv4 chips for 2 days (3B examples, ImageNet 72.1)
or 5 days (9B, 73.4) on WebLI, which is not public. With fewer chips set
microbatches: the same gradients, less memory.

The tokenizer is a SentencePiece model with end-of-sequence as token 1: the
paper's, c4_en, has 32,000 pieces; `python -m tools.train_tokenizer` makes one
from a dataset's own captions.

Arguments:
  kind: of the data: tfds, tar, parquet or folder (tfds).
  path: of tar and parquet the shards, with globs and braces; of a folder it.
  dataset, split, captions: of TFDS what to train on, prepared as ArrayRecord or
    TFRecord, and its text feature (coco_captions, train, captions).
  val: the split for retrieval, of other kinds one example in a hundred; "" for
    none (val).
  tokenizer, vocab: a name, a SentencePiece file, and its size (c4_en, 32000).
  batch_size, examples, microbatches: 32768, 3e9, 1.
  loss: sigmoid or, for comparison, softmax.
  pretrained: weights for the image tower to start from, such as augreg/B_16;
    it is trained on, at a tenth of the learning rate and without weight decay
    (Table 1: 71.0 after 2.4e9 examples in batches of 16384).
  smoke: the same code with tiny towers on the emoji data, a minute on 2 cores.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH = 224, 16


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, **common.LARGE_ARGS, examples=3e9, pretrained=""
  )
  config = ConfigDict()
  common.large(config, arg, RES, LENGTH)
  config.total_examples = arg["examples"]

  config.model = dict(
    image=dict(variant="B/16", pool_type="map", scan=True, remat="dots"),
    text=dict(variant="B", vocab_size=arg["vocab"], scan=True, remat="dots"),
    out_dim=(None, 768),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.optim = dict(
    name="adamw",
    lr=1e-3,
    wd=1e-4,
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_examples=200e6),
  )

  if arg["pretrained"]:
    # Public ViTs pool by a token "cls" of their own.
    config.model.image.pool_type = "tok"
    common.pretrained(config, "img", arg["pretrained"])
  if arg["smoke"]:
    common.shrink(config, arg)
  return config
