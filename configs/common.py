"""What several configs share."""

# Arguments of the large configs, with their defaults.
LARGE_ARGS = dict(
  kind="tfds",
  path="",
  dataset="coco_captions",
  split="train",
  val="val",
  captions="captions",
  tokenizer="c4_en",
  vocab=32_000,
  batch_size=32_768,
  microbatches=1,
  loss="sigmoid",
  smoke=False,
)


def own_data(kind, path, part):
  """A data section over files of one's own.

  Args:
    kind: folder, tar or parquet.
    path: the folder, or the shards with globs and braces.
    part: (from, to), the share of the examples, such as (0, 0.9).
  """
  return {
    "kind": kind,
    "part": part,
    "path" if kind == "folder" else "shards": path,
  }


def large(config, arg, res, length):
  """Fills in data, preprocessing, loss, checkpoints and evaluation.

  Args:
    config: ConfigDict.
    arg: values of LARGE_ARGS.
    res: H and W of the image.
    length: L, tokens.
  """
  config.batch_size = arg["batch_size"]
  config.microbatches, config.feed = arg["microbatches"], "device"
  if arg["kind"] == "tfds":
    data = lambda split: dict(kind="tfds", name=arg["dataset"], split=split)
  else:  # one in a hundred for retrieval
    data = lambda split: own_data(
      arg["kind"],
      arg["path"],
      (0.99, 1) if split == arg["val"] else (0, 0.99 if arg["val"] else 1),
    )
  config.data = data(arg["split"])
  config.tokenizer = dict(path=arg["tokenizer"])
  # The model maps the bytes of images to [-1, 1], on the device.
  image = f"decode|resize({res})"
  config.pp = (
    f"{image}|choice('{arg['captions']}')|tokenize({length})"
    "|keep('image','text')"
  )
  config.pp_image = f"{image}|keep('image')"
  config.pp_text = f"tokenize({length})|keep('text')"
  config.loss = dict(
    name=arg["loss"], dtype="bfloat16", tile=2048, direction="forward"
  )
  config.checkpoints = dict(every_steps=1000, keep_every_steps=10_000)
  config.evals = dict(
    retrieval=dict(
      type="retrieval",
      captions=arg["captions"],
      every_steps=5000,
      data=data(arg["val"]),
    )
  )
  if not arg["val"]:
    del config.evals


def precompute(config, folder):
  """Puts what tools.embed made with this config in the image tower's place.

  Args:
    config: ConfigDict with a locked image tower without a head.
    folder: what --out was.
  """

  def of(section, pp_image):
    choosing = {
      k: section[k]
      for k in ("part", "only", "group_by", "shuffle")
      if k in section
    }
    name = section.get("split", section["kind"])
    return dict(
      kind="embeddings", path=f"{folder}/{name}", pp_image=pp_image, **choosing
    )

  config.data = of(config.data, config.pp_image)
  for section in config.get("evals", {}).values():
    section.data = of(section.data, config.pp_image)
  ops = config.pp.split("|")
  config.pp = "|".join(
    op for op in ops if not op.startswith(("decode", "resize"))
  )
  config.pp_image = "keep('image')"
  config.model.image = dict(kind="precomputed", width=config.model.out_dim[1])
  del config.lock
  if "init" in config:
    del config.init


def pretrained(config, tower, weights):
  """Starts a tower from weights, to be trained on (section 4.5, figure 4).

  What is pretrained has a tenth of the learning rate and no weight decay.

  Args:
    config: ConfigDict, its model and optim set.
    tower: "img" or "txt".
    weights: a released checkpoint's name, its URL or a file, see
      docs/checkpoints.md; its classifier is left out.
  """
  config.init = dict(path=weights, into=tower, dont_load=("head/.*",))
  config.optim.lr_mults = ((f"{tower}/.*", 0.1), (".*", 1.0))
  config.optim.wd_mults = (
    (f"{tower}/.*", 0.0),
    (".*/kernel", 1.0),
    (".*", 0.0),
  )


def drawings(split):
  """The drawings of a split, less the flags, which look alike in any style."""
  return dict(kind="emoji", split=split, only=dict(is_flag=0))


def emoji_evals(data=drawings):
  """Evaluations on what was held out of the emoji dataset.

  held_style: an unseen drawing style of seen concepts; held_family: unseen
  families of concepts in seen styles; held_both: unseen in both ways.

  Args:
    data: fn(split) -> arguments of sources.open_source.
  """
  evals = {}
  for name in ("held_style", "held_family", "held_both", "train"):
    evals[f"{name}_zeroshot"] = dict(
      type="zeroshot", data=data(name), label="concept", classes="captions"
    )
    if name != "train":
      evals[f"{name}_retrieval"] = dict(
        type="retrieval", data=data(name), group="concept"
      )
  evals["held_style_zeroshot"]["every_percent"] = 25
  if data is drawings:
    evals["picture"] = dict(
      type="picture", data=data("held_style"), group="concept", captions="name"
    )
  return evals


def shrink(config, arg):
  """Makes a config a smoke test: tiny towers, the emoji data, few steps.

  Everything else, such as pooling, scan, dtype, loss, optimizer and what is
  frozen, stays as it is.
  """
  config.batch_size, config.microbatches = 64, 2
  config.total_steps, config.total_examples = 100, None
  config.data = dict(kind="emoji", split="train", group_by="concept")
  config.tokenizer = dict(vocab_size=1024, captions="captions")
  for key in ("pp", "pp_image", "pp_text"):
    config[key] = (
      config[key]
      .replace("(224)", "(64)")
      .replace(f"'{arg['captions']}'", "'captions'")
    )
  for tower in (config.model.image, config.model.text):
    tower.update(variant=None, width=64, depth=2, num_heads=2)
  config.model.image.patch_size = 16
  config.model.text.vocab_size = 1024
  config.model.out_dim = (None, 64)
  config.optim.schedule = dict(name="cosine", warmup_percent=10)
  config.checkpoints = dict(every_percent=50)
  config.evals = {k: v for k, v in emoji_evals().items() if "held_style" in k}
