"""mSigLIP B/16: captions in a hundred languages (SigLIP, section 4.3).

  python -m sigjax.train \
    --config configs/msiglip_b16.py:kind=parquet,path='data/*.parquet'

Hardware: 32 TPUv4 chips, as siglip_b16; the step takes 27.7 of 30.75 GiB. Four
v4 chips hold a batch of 32768 with microbatches=32, 32 v5e chips with
microbatches=4 (docs/tpu.md). With fewer chips set microbatches: gradients stay
the same and memory falls.

The paper's batch of 32768 is the best for many languages, too, and its WebLI is
not public. The vocabulary of mC4 has 250,000 pieces. A table of that many rows
would be two thirds of the text tower, so it is factored through a bottleneck of
96: 24 million parameters instead of 192, which costs about half a percent on
ImageNet.

Arguments (defaults in brackets): those of siglip_b16.py, and
  tokenizer, vocab: (mc4, 250100: its 250,000 pieces, and 100 that T5 added).
  bottleneck: K of the token embedding; 0 for the full table (96).
  language: the feature with the language of each caption. An example then shows
    each of its languages equally often, and retrieval is told by language. ""
    draws from all captions alike ("").
  batch_size, examples, microbatches: (32768, 3e9, 1).
  smoke: the same code with tiny towers on the emoji data.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH = 224, 64


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  large = dict(common.LARGE_ARGS, tokenizer="mc4", vocab=250_100)
  args = config_lib.parse_arg(
    arg, **large, examples=3e9, bottleneck=96, language=""
  )
  config = ConfigDict()
  common.large(config, args, RES, LENGTH, args["language"])
  config.total_examples = args["examples"]

  config.model = dict(
    image=dict(variant="B/16", pool_type="map", remat="attention"),
    text=dict(
      variant="B",
      vocab_size=args["vocab"],
      bottleneck=args["bottleneck"],
      remat="attention",
    ),
    out_dim=(None, 768),
    temperature_init=10.0,
    bias_init=-10.0,
    dtype="bfloat16",
  )
  config.optim = common.adamw(warmup_examples=200e6)

  if args["smoke"]:
    common.shrink(config, args)
  return config
