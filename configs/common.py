"""What several configs share."""

# Arguments of the configs over TFDS datasets, with their defaults.
TFDS_ARGS = dict(
    dataset="coco_captions", split="train", val="val", captions="captions",
    tokenizer="c4_en.model", vocab=32_000, batch_size=32_768, microbatches=1,
    loss="sigmoid", smoke=False)


def from_tfds(config, arg, res, length):
  """Fills in data, preprocessing, loss, checkpoints and evaluation.

  Args:
    config: ConfigDict.
    arg: values of TFDS_ARGS.
    res: H and W of the image.
    length: L, tokens.
  """
  config.batch_size = arg["batch_size"]
  config.microbatches, config.feed = arg["microbatches"], "device"
  config.data = dict(kind="tfds", name=arg["dataset"], split=arg["split"])
  config.tokenizer = dict(path=arg["tokenizer"])
  image = f"decode|resize({res})|value_range(-1,1)"
  config.pp = (f"{image}|choice('{arg['captions']}')|tokenize({length})"
               "|keep('image','text')")
  config.pp_image = f"{image}|keep('image')"
  config.pp_text = f"tokenize({length})|keep('text')"
  config.loss = dict(name=arg["loss"], dtype="bfloat16", tile=2048,
                     direction="forward")
  config.checkpoints = dict(every_steps=1000, keep_every_steps=10_000)
  config.evals = dict(retrieval=dict(
      type="retrieval", captions=arg["captions"], every_steps=5000,
      data=dict(kind="tfds", name=arg["dataset"], split=arg["val"])))
  if not arg["val"]:
    del config.evals


def emoji_evals():
  """Evaluations on what was held out of the emoji dataset.

  held_style: an unseen drawing style of seen concepts; held_family: unseen
  families of concepts in seen styles; held_both: unseen in both ways. Flags,
  which look alike in every style, are in none of them.
  """
  def split(name):
    return dict(kind="emoji", split=name, only=dict(is_flag=0))

  evals = {}
  for name in ("held_style", "held_family", "held_both", "train"):
    evals[f"{name}_zeroshot"] = dict(
        type="zeroshot", data=split(name), label="concept", classes="captions")
    if name != "train":
      evals[f"{name}_retrieval"] = dict(
          type="retrieval", data=split(name), group="concept")
  evals["held_style_zeroshot"]["every_percent"] = 25
  evals["picture"] = dict(
      type="picture", data=split("held_style"), group="concept",
      captions="name")
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
    config[key] = config[key].replace("(224)", "(64)").replace(
        f"'{arg['captions']}'", "'captions'")
  for tower in (config.model.image, config.model.text):
    tower.update(variant=None, width=64, depth=2, num_heads=2)
  config.model.image.patch_size = 16
  config.model.text.vocab_size = 1024
  config.model.out_dim = (None, 64)
  config.optim.schedule = dict(name="cosine", warmup_percent=10)
  config.checkpoints = dict(every_percent=50)
  config.evals = {k: v for k, v in emoji_evals().items() if "held_style" in k}
