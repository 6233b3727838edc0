"""SigLIP B/16 from scratch: the paper's base run (Table 1: 72.1 / 73.4).

  python -m sigjax.train --config configs/siglip_b16.py:dataset=coco_captions
  python -m sigjax.train \
    --config configs/siglip_b16.py:kind=tar,path=data/{00000..00999}.tar

Hardware: the paper used 32 TPUv4 chips and WebLI, which is not public: 2 days
for 3B examples (ImageNet 72.1) or 5 days for 9B (73.4). There the step takes
23.3 of 30.75 GiB (docs/tpu.md). With fewer or smaller chips set microbatches:
gradients stay the same and memory falls.

The tokenizer is a SentencePiece model whose token 1 is end-of-sequence. The
paper's, c4_en, has 32,000 pieces. `python -m tools.train_tokenizer` trains one
on the captions of a dataset.

Arguments (defaults in brackets):
  kind: kind of the data: tfds, tar, parquet or folder (tfds).
  path: for tar and parquet the shards, with globs and braces; for folder the
    folder.
  dataset, split, captions: for tfds the dataset, prepared as ArrayRecord or
    TFRecord, the split to train on, and the feature with the texts
    (coco_captions, train, captions).
  val: for tfds the split for retrieval; for other kinds a hundredth of the
    images is used. "" turns retrieval off (val).
  tokenizer, vocab: name or file of a SentencePiece model, and its number of
    pieces (c4_en, 32000).
  batch_size, examples, microbatches: (32768, 3e9, 1).
  loss: sigmoid, or softmax for comparison (sigmoid).
  pretrained: weights to start the image tower from, such as augreg/B_16. The
    tower is fine-tuned at a tenth of the learning rate, without weight decay
    (Table 1: 71.0 after 2.4e9 examples in batches of 16384).
  smoke: the same code with tiny towers on the emoji data; takes a minute on two
    CPU cores.

Settings for other needs, as overrides on the command line:
  --config.optim.name=lion: a smaller optimizer state; divide lr by ten.
  --config.optim.name=muon: learns more in short runs.
  --config.optim.schedule.name=rsqrt: for runs that may be extended.
  --config.model.text.bottleneck=96: for vocabularies of 250,000 pieces.
  --config.model.image.posemb=sincos2d: fixed positions.
  --config.feed=host: for images that do not fit on the devices.
  --config.optim="{'name': 'adafactor', 'lr': 1e-3, 'grad_clip_norm': 1.0}":
    less than half the optimizer memory, for towers larger than L.
  flip_lr in --config.pp, after resize: mirrors half of the images; not for data
    whose images have writing or whose captions say left and right.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH = 224, 16


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg, **common.LARGE_ARGS, examples=3e9, pretrained=""
  )
  config = ConfigDict()
  common.large(config, args, RES, LENGTH)
  config.total_examples = args["examples"]

  # Public ViTs have a "cls" token and pool by it.
  pool_type = "tok" if args["pretrained"] else "map"
  # Without scan the step compiles longer, and no array that the backward pass
  # needs is copied to and from a stack of all layers: docs/tpu.md.
  config.model = dict(
    image=dict(variant="B/16", pool_type=pool_type, remat="attention"),
    text=dict(variant="B", vocab_size=args["vocab"], remat="attention"),
    out_dim=(None, 768),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.optim = common.adamw(warmup_examples=200e6)

  if args["pretrained"]:
    common.pretrained(config, "img", args["pretrained"])
  if args["smoke"]:
    common.shrink(config, args)
  return config
