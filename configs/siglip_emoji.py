"""SigLIP from scratch on emoji art: a newcomer's first run.

  pip install -e '.[emoji]'
  python -m sigjax.train --config configs/siglip_emoji.py

Hardware: two CPU cores. The first run fetches 19 MB of drawings from npm and
rasterises them.

Trained on five drawing styles; evaluated on a sixth, and on families of emoji
that were in no training image or caption.

Arguments, as in --config configs/siglip_emoji.py:shuffle_captions
  shuffle_captions: every drawing gets some other drawing's captions: a control,
    all evaluations have to fall to chance.
  steps, batch_size: other values than the ones below.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

RES, LENGTH, VOCAB = 64, 12, 2048


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, shuffle_captions=False, steps=1250, batch_size=256
  )
  config = ConfigDict()
  config.batch_size = arg["batch_size"]
  config.total_steps = arg["steps"]

  # One element is a concept, shown in a random one of the five styles: two
  # drawings of one concept in a batch would count as a negative pair.
  config.data = dict(
    kind="emoji", split="train", only=dict(is_flag=0), group_by="concept"
  )
  if arg["shuffle_captions"]:
    config.data.shuffle = "captions"
  config.tokenizer = dict(vocab_size=VOCAB, captions="captions")
  config.pp = (
    "decode|random_affine(scale=(0.85,1.15),shift=0.08)|color_gain(0.3)"
    "|random_grey(0.15)|random_invert(0.05)"
    f"|choice('captions')|lower|tokenize({LENGTH})|keep('image','text')"
  )
  config.pp_image = f"decode|resize({RES})|keep('image')"
  config.pp_text = f"lower|tokenize({LENGTH})|keep('text')"

  # Means, not the released models' probe and last token: in so short a training
  # these learn faster. b starts at about logit(1 / batch).
  config.model = dict(
    image=dict(
      width=128,
      depth=4,
      num_heads=4,
      mlp_dim=512,
      patch_size=16,
      pool_type="gap",
    ),
    text=dict(
      width=128,
      depth=2,
      num_heads=4,
      mlp_dim=512,
      pool_type="gap",
      vocab_size=VOCAB,
    ),
    out_dim=(128, 128),
    temperature_init=10.0,
    bias_init=-5.5,
  )
  config.optim = dict(
    name="adamw",
    lr=2e-3,
    wd=1e-4,
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  config.checkpoints = dict(every_percent=25)
  config.evals = common.emoji_evals()
  return config
