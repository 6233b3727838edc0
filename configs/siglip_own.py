"""SigLIP from scratch on your own pictures: small towers, any machine.

  python -m sigjax.train --config configs/siglip_own.py:path=pictures

`pictures` is a folder with a table captions.csv (or .jsonl). Its header is
`file,caption`; it has one row for each caption of a picture. Nine tenths of the
pictures are for training, the rest for evaluation (retrieval).

Hardware: two CPU cores are enough for these towers, at about 500 pictures a
second. From scratch, a few thousand pictures teach colours and common words, no
more. With few pictures, lock a pretrained image tower (siglit_l16.py). With
many pictures and a GPU, use siglip_b16.py. Both read the same folders.

Arguments (defaults in brackets):
  path: the folder, or shards: data/{00000..00099}.tar, data/*.parquet
    (pictures).
  kind: folder, tar or parquet (folder).
  epochs, batch_size: (30, 64). The data must have at least three batches of
    pictures, or a whole number of batches.
  res: height and width of the model's images, in pixels (64).
  init: the workdir of a run to start from; its model, tokenizer and length of
    texts come along. "" starts from scratch ("").
  embeddings: the --out folder of tools.embed for the same pictures. The image
    tower is then the one that embedded them, locked: the best choice for up to
    a few thousand pictures. "" trains one ("").

  python -m tools.embed --weights siglip2/b16_256 --data pictures \
    --out embeddings/pictures
  python -m sigjax.train \
    --config configs/siglip_own.py:path=pictures,embeddings=embeddings/pictures
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib

LENGTH, VOCAB = 24, 4096


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg,
    path="pictures",
    kind="folder",
    epochs=30.0,
    batch_size=64,
    res=64,
    init="",
    embeddings="",
  )
  config: common.Config = ConfigDict()
  config.batch_size = args["batch_size"]
  config.total_epochs = args["epochs"]

  def data(part, raw=False):
    if args["embeddings"] and not raw:
      folder = f"{args['embeddings']}/{args['kind']}"
      return dict(kind="embeddings", path=folder, part=part)
    return common.own_data(args["kind"], args["path"], part)

  config.data = data((0, 0.9))
  config.tokenizer = dict(vocab_size=VOCAB)
  config.pp_text = f"lower|tokenize({LENGTH})|keep('text')"
  config.model = dict(
    image=dict(width=128, depth=4, num_heads=4, patch_size=16, pool_type="gap"),
    text=dict(
      width=128, depth=2, num_heads=4, pool_type="gap", vocab_size=VOCAB
    ),
    out_dim=(128, 128),
    temperature_init=10.0,
    bias_init=-4.0,
  )
  if args["init"]:
    old = common.config_of_run(args["init"])
    config.init = dict(path=args["init"])
    config.model, config.pp_text = old["model"], old["pp_text"]
    # A token embedding belongs to a piece of the tokenizer.
    config.tokenizer = dict(path=f"{args['init']}/tokenizer.model")
  elif args["embeddings"]:
    width = common.width_of_embeddings(data(None)["path"])
    config.model["image"] = dict(kind="precomputed", width=width)

  res = args["res"]
  image = f"decode_small({res * 9 // 8})|random_crop({res})|"
  config.pp_image = (
    f"decode|resize_small({res})|central_crop({res})|keep('image')"
  )
  if args["embeddings"]:
    image, config.pp_image = "", "keep('image')"
  text = config.pp_text.removesuffix("|keep('text')")
  config.pp = f"{image}choice('captions')|{text}|keep('image','text')"

  config.optim = dict(
    name="adamw",
    lr=2e-3,
    wd=1e-4,
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  config.log_every_steps = 20
  config.checkpoints = dict(every_percent=10)
  config.evals = dict(
    retrieval=dict(type="retrieval", every_percent=25, data=data((0.9, 1))),
    picture=dict(type="picture", data=data((0.9, 1))),
  )
  if args["embeddings"]:
    config.evals["picture"]["shown"] = data((0.9, 1), raw=True)
  return config
