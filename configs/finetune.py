"""Fine-tunes both towers on your own pictures, from released weights or a run.

  python -m sigjax.train \\
    --config configs/finetune.py:weights=siglip2/b16_256,path=pictures
  python -m sigjax.train \\
    --config configs/finetune.py:weights=workdirs/OLD,path=pictures,lora=8

The model, its preprocessing, its tokenizer and the length of its texts are
those of the weights. What they have beside the towers, such as a captioning
decoder, is left out. All evaluations run before the first step, too, so that
one sees what the training brings. docs/finetune.md compares the ways.

Hardware: docs/finetune.md has what fits one accelerator of 16 GB.

Arguments (defaults in brackets):
  weights: the name of a released model, its .npz file, a workdir, or a folder
    that tools.convert_from_hf wrote (siglip2/b16_256).
  path: the folder, or shards: data/{00000..00099}.tar, data/*.parquet
    (pictures).
  kind: folder, tar, parquet; or embeddings, for a run on embeddings (folder).
  train: what learns (all): all, img or txt (one tower; the other is locked),
    head (what follows the last block: pooling and projections), or calibrate (t
    and b alone: the order of answers stays, their probabilities change).
  lora: r of low-rank adapters, see sigjax/lora.py; 0: whole kernels (0).
  lr: the learning rate; 0 takes one of those below (0).
  epochs, batch_size, microbatches: (10, 64, 1). The data must have at least
    three batches of pictures, or a whole number of batches.

Learning rates. With released weights: 1e-5 for whole towers, as in "Finetune
like you pretrain" (arXiv 2212.00638); 2e-4 for adapters, as in "Low-rank
few-shot adaptation of vision-language models" (arXiv 2405.18541). From a run:
a tenth of the run's own for whole towers, as SigLIP takes it for a pretrained
tower (section 4.5), the run's own for adapters. For a head 1e-3, for t and b
1e-2: they start from what fits other data. There is no weight decay (section
4.5), a tenth of the steps is warmup, and the decay is a cosine.
"""

from ml_collections import ConfigDict

from configs import common
from sigjax import config as config_lib
from sigjax import errors

# Parts of the towers that stay as they are, of "head".
_BODY = ("img/Transformer", "img/embedding", "img/pos_embedding", "img/cls")
_BODY += ("txt/Encoder_0", "txt/Embed_0", "txt/pos_embedding")
_TRAIN = dict(
  all=(), img=("txt",), txt=("img",), head=_BODY, calibrate=("img", "txt")
)


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg,
    weights="siglip2/b16_256",
    path="pictures",
    kind="folder",
    train="all",
    lora=0,
    lr=0.0,
    epochs=10.0,
    batch_size=64,
    microbatches=1,
  )
  train, rank = args["train"], args["lora"]
  lock = errors.pick(_TRAIN, train, "train=")
  if rank and train in ("head", "calibrate"):
    raise errors.UserError(
      f"lora={rank} adapts whole towers, but train={train} locks them; take "
      "train=all, img or txt"
    )
  config: common.Config = ConfigDict()
  config.batch_size = args["batch_size"]
  config.microbatches = args["microbatches"]
  config.total_epochs = args["epochs"]
  lr = _start(config, args["weights"], whole=not rank)
  on_embeddings = config.model.image.get("kind") == "precomputed"
  if on_embeddings and (train == "img" or rank and train == "all"):
    raise errors.UserError(
      f"weights={args['weights']} has no image tower that could learn: it is a "
      "run on embeddings; take train=txt"
    )
  if rank:
    config.lora = dict(
      rank=rank, towers=("img", "txt") if train == "all" else (train,)
    )
  config.lock = _without_absent(config.model, lock)
  lr = {"head": 1e-3, "calibrate": 1e-2}.get(train, lr)

  data = lambda part: (
    dict(kind="embeddings", path=args["path"], part=part)
    if args["kind"] == "embeddings"
    else common.own_data(args["kind"], args["path"], part)
  )
  config.data = data((0, 0.9))
  image = config.pp_image.removesuffix("keep('image')").rstrip("|")
  text = config.pp_text.removesuffix("|keep('text')")
  ops = [image] if image else []
  ops += ["choice('captions')", text, "keep('image','text')"]
  config.pp = "|".join(ops)
  config.optim = dict(
    name="adamw",
    lr=args["lr"] or lr,
    wd=0.0,
    wd_mults=((".*", 0.0),),
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  config.log_every_steps = 20
  config.checkpoints = dict(every_percent=25)
  config.eval_first = True
  config.evals = dict(
    retrieval=dict(type="retrieval", every_percent=50, data=data((0.9, 1)))
  )
  return config


def _start(config: common.Config, weights: str, whole: bool) -> float:
  """Sets what comes from the weights; returns the learning rate of towers."""
  found = common.of_weights(weights)
  config.init = dict(path=found["path"])
  for key in ("pp_image", "pp_text"):
    config[key] = found[key]
  config.tokenizer = dict(path=found["tokenizer"])
  _without_terms(config, found)
  model = found["model"]
  if "optim" in found:  # a run of ours goes on as it was
    config.model = model
    return found["optim"].get("lr", 1e-3) * (0.1 if whole else 1.0)
  # Stacked blocks compile faster; of their outputs nothing is kept.
  towers = {
    tower: dict(model[tower], scan=True, remat="full")
    for tower in ("image", "text")
  }
  config.model = dict(model, **towers, dtype="bfloat16")
  config.loss = dict(dtype="bfloat16")
  return 1e-5 if whole else 2e-4


def _without_terms(config: common.Config, about: common.Section) -> None:
  """Leaves parameters of losses beside the pair loss where they are."""
  if about.get("losses"):
    config.init.dont_load = (r"(?!(img|txt)/|(t|b|r)$).*",)


def _without_absent(
  model: common.Config, lock: tuple[str, ...]
) -> tuple[str, ...]:
  """Returns the parts of `lock` that the model has."""
  image = model.image
  absent = set()
  if image.get("pool_type") != "tok":
    absent.add("img/cls")
  if image.get("kind") == "precomputed":
    absent |= {"img/Transformer", "img/embedding", "img/pos_embedding"}
  return tuple(part for part in lock if part not in absent)
