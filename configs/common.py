"""Arguments and sections that several configs share."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

from sigjax import errors
from sigjax.data.formats import embeddings
from sigjax.weights import known

# A config section, before it is put into a ConfigDict.
Section = dict[str, Any]
# A ConfigDict. Its sections are attributes, which have no static types.
Config = Any

# The arguments of the large configs and their defaults.
LARGE_ARGS: Section = dict(
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


def own_data(kind: str, path: str, part: tuple[float, float]) -> Section:
  """Returns the data section for files of your own.

  Args:
    kind: "folder", "tar" or "parquet".
    path: the folder; for "tar" and "parquet" the shards, which may contain
      globs and braces.
    part: the share of the images to use, such as (0, 0.9) for nine tenths.
  """
  return {
    "kind": kind,
    "part": part,
    "path" if kind == "folder" else "shards": path,
  }


def config_of_run(workdir: str) -> Section:
  """Returns the config of a run, from WORKDIR/config.json.

  Raises:
    UserError: there is none.
  """
  try:
    found = json.loads(pathlib.Path(workdir, "config.json").read_text())
  except (OSError, ValueError) as e:
    raise errors.UserError(
      f"{workdir} is no workdir of sigjax.train: its config.json cannot be "
      f"read ({e})"
    ) from None
  if not isinstance(found, dict) or "optim" not in found:
    raise errors.UserError(
      f"{workdir} is no workdir of sigjax.train: its config.json is something "
      "else; tools.convert_from_hf converts a folder of Hugging Face"
    )
  return found


def config_of_file(weights: str) -> tuple[str, Section]:
  """Returns a .npz file of weights, and the config.json beside it.

  Args:
    weights: the file, or the folder that tools.convert_from_hf wrote.

  Raises:
    UserError: what tools.convert_from_hf writes beside the file is not there.
  """
  file = weights if weights.endswith(".npz") else f"{weights}/params.npz"
  folder = pathlib.Path(file).parent
  if not pathlib.Path(file).is_file():
    raise errors.UserError(known.no_file(file))
  try:
    about = json.loads((folder / "config.json").read_text())
  except (OSError, ValueError):
    about = None
  about = about if isinstance(about, dict) else {}
  missing = [k for k in ("model", "pp_image", "pp_text") if k not in about]
  if missing or not (folder / "tokenizer.model").is_file():
    what = f'config.json with "{missing[0]}"' if missing else "tokenizer.model"
    raise errors.UserError(
      f"weights={weights}: there is no {what} in {folder}; beside the file "
      'have to be config.json, with "model", "pp_image" and "pp_text", and '
      "tokenizer.model, as tools.convert_from_hf writes them; a released file "
      "is known by its own name, such as "
      f"{known.get('siglip2/b16_256').url.rpartition('/')[2]}"
    )
  return file, about


def of_weights(weights: str) -> Section:
  """Returns what is known of weights, released ones or a run's.

  Args:
    weights: a released name or its file, the folder or file that
      tools.convert_from_hf writes, or a workdir.

  Returns:
    dict(path=, model=, pp_image=, pp_text=, tokenizer=), optim= of a run, and
    losses= if there are any beside the pair loss.

  Raises:
    UserError: they are of one tower alone, or nothing is known of them.
  """
  if name := known.name_of(weights):
    it = known.get(name)
    if it.tokenizer is None:
      raise errors.UserError(
        f"weights={weights} is an image tower alone; configs/siglip_b16.py: "
        "pretrained= starts from it"
      )
    pp = dict(pp_image=known.pp_image(name), pp_text=known.pp_text(name))
    return dict(pp, path=weights, model=it.model, tokenizer=it.tokenizer)
  keys = ("model", "pp_image", "pp_text")
  if weights.endswith(".npz") or pathlib.Path(weights, "params.npz").exists():
    file, about = config_of_file(weights)
    tokenizer = pathlib.Path(file).parent / "tokenizer.model"
  else:
    file, about = weights, config_of_run(weights)
    keys, tokenizer = (*keys, "optim"), f"{weights}/tokenizer.model"
  found = {key: about[key] for key in keys}
  if about.get("losses"):
    found["losses"] = about["losses"]
  return dict(found, path=file, tokenizer=str(tokenizer))


def curate(config: Config, teacher: str, of: int = 2) -> None:
  """Lets each step choose its examples with a teacher, see curate.py.

  Args:
    config: a config whose images and texts the teacher takes as they are.
    teacher: see of_weights.
    of: out of how many times as many examples.
  """
  found = of_weights(teacher)
  config.curate = dict(path=found["path"], model=found["model"], of=of)


def width_of_embeddings(path: str) -> int:
  """Returns W of a folder of embeddings.

  Raises:
    UserError: there is no such folder.
  """
  records, _, _ = embeddings.open_folder(path)
  return len(records[0]["image"])


def large(
  config: Config, args: Section, res: int, length: int, language: str = ""
) -> None:
  """Sets data, preprocessing, loss, checkpoints and evaluation of a config.

  Args:
    config: the config to fill in.
    args: a value for each key of LARGE_ARGS.
    res: height and width of an image, in pixels.
    length: number of tokens of a text.
    language: the feature with the language of each caption; "" if there is
      none.
  """
  config.batch_size = args["batch_size"]
  config.microbatches, config.feed = args["microbatches"], "device"
  if args["kind"] == "tfds":
    data = lambda split: dict(kind="tfds", name=args["dataset"], split=split)
  else:  # a hundredth is for retrieval
    data = lambda split: own_data(
      args["kind"],
      args["path"],
      (0.99, 1) if split == args["val"] else (0, 0.99 if args["val"] else 1),
    )
  config.data = data(args["split"])
  config.tokenizer = dict(path=args["tokenizer"])
  # Images stay uint8 until the model maps them to [-1, 1] on the device.
  image = f"decode|resize({res})"
  choice = f"choice('{args['captions']}'"
  choice += f", by='{language}')" if language else ")"
  config.pp = f"{image}|{choice}|tokenize({length})|keep('image','text')"
  config.pp_image = f"{image}|keep('image')"
  config.pp_text = f"tokenize({length})|keep('text')"
  config.loss = dict(
    name=args["loss"], dtype="bfloat16", tile=2048, direction="forward"
  )
  config.checkpoints = dict(every_steps=1000, keep_every_steps=10_000)
  config.evals = dict(
    retrieval=dict(
      type="retrieval",
      captions=args["captions"],
      every_steps=5000,
      data=data(args["val"]),
      **(dict(by=language) if language else {}),
    )
  )
  if not args["val"]:
    del config.evals


def adamw(**warmup: float) -> Section:
  """Returns the optimizer that the papers train from scratch with.

  Args:
    **warmup: how long the learning rate rises, such as warmup_steps=20_000.
  """
  return dict(
    name="adamw",
    lr=1e-3,
    wd=1e-4,
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", **warmup),
  )


def distilled(
  config: Config,
  from_percent: float,
  sizes: tuple[int, int],
  views: int,
  masks: bool,
  **options: Any,
) -> Section:
  """Returns a phase that adds self-distillation and masked prediction.

  Args:
    config: a config whose pp decodes images first.
    from_percent: of the steps.
    sizes: of the teacher's view and of the student's, pixels.
    views: how many the student sees; 0 leaves its loss out.
    masks: whether masked patches are predicted.
    **options: other arguments of the loss.
  """
  ops, kept = f"global_view({sizes[0]})", "'image','text','global'"
  if views:
    ops, kept = f"{ops}|local_views({sizes[1]},{views})", f"{kept},'local'"
  pp = config.pp.replace("decode|", f"decode|{ops}|")
  loss = dict(
    type="distill",
    views=1.0 if views else 0.0,
    masks=0.25 if masks else 0.0,
    **options,
  )
  return dict(
    from_percent=from_percent,
    pp=pp.replace("keep('image','text')", f"keep({kept})"),
    losses=dict(views=loss),
  )


def any_aspect(
  config: Config,
  pp: str,
  patches: int,
  lengths: tuple[tuple[int, int], ...],
  end: str,
) -> Section:
  """Returns a phase of images of any aspect ratio, from 90 % of the steps on.

  Args:
    config: a config of images at one resolution, in patches of 16 pixels.
    pp: of training examples, with {length} where the number of patches goes.
    patches: in evaluation.
    lengths: as config.lengths.
    end: the loss that ends with it, for it needs images at one resolution; "".
  """
  phase = dict(
    from_percent=90,
    pp=pp,
    pp_image=f"decode|resize_to_patches({patches},16)|keep('image')",
    model=dict(image=dict(config.model.image.to_dict(), kind="naflex")),
    lengths=lengths,
  )
  return dict(phase, losses={end: None}) if end else phase


def precompute(config: Config, folder: str) -> None:
  """Replaces the image tower by embeddings that tools.embed computed.

  Args:
    config: a config with a locked image tower that has no head.
    folder: the --out folder of tools.embed, which was run with this config.
  """

  def embedded(section: Config, pp_image: str) -> Section:
    filters = {
      k: section[k]
      for k in ("part", "only", "element", "group_by", "shuffle", "mismatch")
      if k in section
    }
    name = section.get("split", section["kind"])
    return dict(
      kind="embeddings", path=f"{folder}/{name}", pp_image=pp_image, **filters
    )

  config.data = embedded(config.data, config.pp_image)
  for section in config.get("evals", {}).values():
    section.data = embedded(section.data, config.pp_image)
  ops = config.pp.split("|")
  config.pp = "|".join(
    op for op in ops if not op.startswith(("decode", "resize"))
  )
  config.pp_image = "keep('image')"
  config.model.image = dict(kind="precomputed", width=config.model.out_dim[1])
  del config["lock"]
  if "init" in config:
    del config.init


def pretrained(config: Config, tower: str, weights: str) -> None:
  """Starts one tower from pretrained weights and fine-tunes it.

  The pretrained tower has a tenth of the learning rate and no weight decay
  (SigLIP, section 4.5 and figure 4).

  Args:
    config: a config whose model and optim are set.
    tower: "img" or "txt".
    weights: the name of a released checkpoint, a URL or a file, see
      docs/checkpoints.md. Its classifier is not loaded.
  """
  config.init = dict(path=weights, into=tower, dont_load=("head/.*",))
  config.optim.lr_mults = ((f"{tower}/.*", 0.1), (".*", 1.0))
  config.optim.wd_mults = (
    (f"{tower}/.*", 0.0),
    (".*/kernel", 1.0),
    (".*", 0.0),
  )


def drawings(split: str) -> Section:
  """Returns the data section of a split of the emoji dataset, without flags.

  Flags look alike in all styles, so they would make the evaluation too easy.
  """
  return dict(kind="emoji", split=split, only=dict(is_flag=0))


def emoji_evals(
  data: Callable[[str], Section] = drawings,
) -> dict[str, Section]:
  """Returns the evaluations on the held-out splits of the emoji dataset.

  The splits: held_style has concepts of the training data in an unseen drawing
  style; held_family has unseen families of concepts in the trained styles;
  held_both has unseen families in the unseen style.

  Args:
    data: fn(split) -> data section.
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
  evals["picture"] = dict(
    type="picture", data=data("held_style"), group="concept", captions="name"
  )
  if data is not drawings:  # of embeddings
    evals["picture"]["shown"] = drawings("held_style")
  return evals


def shrink(config: Config, args: Section) -> None:
  """Turns a config into a smoke test: tiny towers, emoji data, few steps.

  Everything else stays as it is: pooling, scan, dtype, loss, optimizer and
  locked parameters.

  Args:
    config: the config to change.
    args: a value for each key of LARGE_ARGS.
  """
  config.batch_size, config.microbatches = 64, 2
  config.total_steps, config.total_examples = 100, None
  config.data = dict(kind="emoji", split="train", group_by="concept")
  config.tokenizer = dict(vocab_size=1024, captions="captions")
  for key in ("pp", "pp_image", "pp_text"):
    config[key] = (
      config[key]
      .replace("(224)", "(64)")
      .replace(f"'{args['captions']}'", "'captions'")
    )
  for tower in (config.model.image, config.model.text):
    tower.update(variant=None, width=64, depth=2, num_heads=2)
  config.model.image.patch_size = 16
  config.model.text.vocab_size = 1024
  config.model.out_dim = (None, 64)
  config.optim.schedule = dict(name="cosine", warmup_percent=10)
  config.checkpoints = dict(every_percent=50)
  config.evals = {k: v for k, v in emoji_evals().items() if "held_style" in k}
