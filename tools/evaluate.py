"""Evaluates a trained model on what others publish, or on data of your own.

  python -m tools.evaluate --weights siglip2/b16_256 --task imagenet \\
    --data imagenet/val --task coco --data coco

--weights is the name of a released model, a workdir, a folder of Hugging Face
or a file; see tools/opened.py. A workdir needs no training data and stays as it
is. Each --task has its --data; docs/evaluate.md lists the tasks and the layouts
of data.

--data is a folder, tfds:NAME:SPLIT, or tar or Parquet files.

The table has the published values of released models beside the measured ones.
--out FILE.json writes it as JSON, too. Images are prepared as the tasks'
protocols say: in classification of a released model they are cropped to the
central 7/8, except of NaFlex, which sees whole images. A run's own
preprocessing is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from absl import flags
import jax

from sigjax import embed, errors, evaluators, sharding
from sigjax.data import kinds
from sigjax.data.example import pipe_string
from sigjax.data.faults import BAD_FRACTION
from sigjax.evaluators import Row, xm3600
from sigjax.evaluators.embedder import Embedder
from sigjax.models import two_towers
from sigjax.runtime import files, metrics, program
from sigjax.weights import known
from tools import opened
from tools.opened import Opened

FLAGS = flags.FLAGS

CROP = 0.875  # the share of the side that classification keeps
IMAGENET = 1000
# XM3600, mean over languages, recall@1 in percent: text->image of mSigLIP in
# the SigLIP paper (arXiv 2303.15343), both ways in SigLIP 2's (2502.14786).
XM3600 = {
  "siglip/b16_256_i18n": dict(t2i=34.9),
  "siglip/so400m16_256_i18n": dict(i2t=62.8, t2i=50.0),
  "siglip2/b16_224": dict(i2t=50.7, t2i=40.3),
}


class Result(NamedTuple):
  """A row of a task, and the published value in percent if there is one."""

  task: str
  row: Row
  published: float | None


class Task(NamedTuple):
  """A task of --task.

  Attributes:
    section: fn(data) -> an evaluator's section, of what --data names.
    crop: whether a released model sees the central part of images.
    published: {metric: its key in Known.scores or XM3600}.
    needs: what the data is, and where it comes from.
  """

  section: Callable[[str], dict[str, Any]]
  crop: bool
  published: Mapping[str, str]
  needs: str


# ---- Tasks ----


def _classes(spec: str) -> dict[str, Any]:
  return dict(
    type="zeroshot",
    data=opened.data_of(spec, "classes"),
    templates="clip_7",
    canonical=True,
  )


def _imagenet(spec: str) -> dict[str, Any]:
  return dict(_classes(spec), classes="imagenet")


def _imagenet_real(spec: str) -> dict[str, Any]:
  label = "real_label"  # as TFDS calls it
  data = opened.data_of(spec, "classes", label)
  if data["kind"] == "classes":
    data["labels"] = os.path.join(spec, "real.json")
    label = "label"
  return dict(_imagenet(spec), data=data, label=label)


def _retrieval(spec: str) -> dict[str, Any]:
  return dict(
    type="retrieval", data=opened.data_of(spec, "folder"), equal_captions=False
  )


def _karpathy(name: str, spec: str) -> dict[str, Any]:
  section = _retrieval(spec)
  data = section["data"]
  ours = data["kind"] == "folder" and data.get("table", name) == name
  if ours and os.path.isfile(os.path.join(data["path"], name)):
    data.update(table=name, split="test")
  return section


def _xm3600(spec: str) -> dict[str, Any]:
  return dict(
    type="xm3600",
    path=os.path.join(spec, "captions.jsonl"),
    images=os.path.join(spec, "images"),
  )


def _fewshot(spec: str) -> dict[str, Any]:
  train, _, test = spec.partition(",")
  if not test:
    raise errors.UserError(
      f"--data {spec}: fewshot needs two, for training and test, joined by a "
      "comma: DIR/train,DIR/val"
    )
  return dict(
    type="fewshot",
    data=opened.data_of(train, "classes"),
    data_test=opened.data_of(test, "classes"),
  )


_KARPATHY = (
  "from caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent "
  "(arXiv 1412.2306)"
)
_TOP1 = {"1000-way top-1": "imagenet"}
_RECALL = {"image->text recall@1": "i2t", "text->image recall@1": "t2i"}

TASKS = dict(
  imagenet=Task(
    _imagenet,
    True,
    _TOP1,
    "ILSVRC2012_img_val.tar of image-net.org, its images sorted into a folder "
    "for each of the 1,000 WordNet ids: DIR/n01440764/*.JPEG",
  ),
  imagenet_v2=Task(
    _imagenet,
    True,
    {},
    "imagenetv2-matched-frequency.tar.gz of huggingface.co/datasets/vaishaal/"
    "ImageNetV2 (arXiv 1902.10811), a folder for each class: DIR/0 to DIR/999",
  ),
  imagenet_real=Task(
    _imagenet_real,
    True,
    {},
    "ImageNet's validation images as for imagenet, and beside the folders "
    "DIR/real.json of github.com/google-research/reassessed-imagenet (arXiv "
    "2006.07159)",
  ),
  classes=Task(
    _classes,
    True,
    {},
    "images of your own in a folder for each class, named after it: DIR/red "
    "car/*.jpg",
  ),
  coco=Task(
    functools.partial(_karpathy, "dataset_coco.json"),
    False,
    _RECALL,
    "val2014.zip of cocodataset.org as DIR/val2014/*.jpg, and beside it "
    f"DIR/dataset_coco.json with Karpathy's splits {_KARPATHY}",
  ),
  flickr30k=Task(
    functools.partial(_karpathy, "dataset_flickr30k.json"),
    False,
    {},
    "Flickr30k's images (shannon.cs.illinois.edu/DenotationGraph) as "
    "DIR/*.jpg, and beside them DIR/dataset_flickr30k.json with Karpathy's "
    f"splits {_KARPATHY}",
  ),
  xm3600=Task(
    _xm3600,
    False,
    {f"mean {k}": v for k, v in _RECALL.items()},
    "captions.jsonl of Crossmodal-3600 (google.github.io/crossmodal-3600) as "
    "DIR/captions.jsonl, and beside it its images as DIR/images/*.jpg",
  ),
  fewshot=Task(
    _fewshot,
    True,
    {},
    "images of your own for training and test, each in a folder for each "
    "class: DIR/train/red car/*.jpg and DIR/val/red car/*.jpg",
  ),
  retrieval=Task(
    _retrieval,
    False,
    {},
    "images of your own with captions in a form of docs/data.md, such as "
    "DIR/captions.csv with the columns file and caption",
  ),
)


# ---- Evaluating ----


def evaluate(
  weights: str | os.PathLike[str] | Opened,
  tasks: Sequence[tuple[str, str]],
  *,
  batch_size: int = 128,
  resolution: int | None = None,
  patches: int | None = None,
) -> list[Result]:
  """Evaluates a model.

  Args:
    weights: what names it, or the model.
    tasks: (name in TASKS, what --data names) of each task.
    batch_size: B of the embedding, over all devices.
    resolution: H and W of images in pixels, of a released model; None: those
      that it was trained with.
    patches: the most patches of an image, of a released NaFlex model; None:
      256.

  Raises:
    UserError: there is no such model or task, or the data is not there.
  """
  # All that can be wrong with data comes before the model, which may have to be
  # fetched.
  sections = [_with_data(name, spec) for name, spec in tasks]
  model = (
    weights
    if isinstance(weights, Opened)
    else opened.open_model(weights, resolution, patches)
  )
  config = model.config
  if config["model"]["image"].get("kind") == "precomputed":
    raise errors.UserError(
      f"{model.name} was trained on embeddings and has no image tower, so it "
      "cannot be shown images"
    )
  mesh = sharding.make_mesh()
  sharding.check_batch_size(batch_size, mesh)
  params = jax.device_put(
    model.params, jax.sharding.NamedSharding(mesh, jax.P())
  )
  towers = two_towers.of_config(config["model"])
  embedder = Embedder(
    functools.partial(embed.make_embed(towers, mesh), params), model.tokenizer
  )
  image = config["pp_image"]
  made = []
  for (name, _), section in zip(tasks, sections):
    task = TASKS[name]
    crops = task.crop and not model.is_run
    shared = dict(
      pp_image=cropped(image) if crops else image,
      pp_text=config["pp_text"],
      bad_fraction=config.get("bad_fraction", BAD_FRACTION),
      batch_size=batch_size,
    )
    with _needed(name):
      made.append(
        evaluators.make(f"--task {name}", pathlib.Path(), section, shared)
      )
  results = []
  for (name, spec), evaluator in zip(tasks, made):
    task = TASKS[name]
    data = task.section(spec).get("data", {})
    # A table without Karpathy's splits has other images than the published.
    others = data.get("kind") == "folder" and "split" not in data
    found = {} if others else published(model.name, name)
    results += [
      Result(name, row, found.get(task.published.get(row.metric, "")))
      for row in evaluator.run(embedder, mesh)
    ]
  return results


def _with_data(name: str, spec: str) -> dict[str, Any]:
  """Returns the evaluator's section of a task, its data opened.

  Raises:
    UserError: there is no such task, or its data is not there.
  """
  task = errors.pick(TASKS, name, "--task")
  for path in spec.split(",") if name == "fewshot" else [spec]:
    folder = opened.data_of(path, "folder").get("path")
    if folder and not os.path.isdir(folder):
      raise errors.UserError(
        f"--task {name}: there is no folder {folder}; it needs {task.needs}"
      )
  section = task.section(spec)
  with _needed(name):
    for key in {"data", "data_test"} & set(section):
      section[key] = kinds.open_source(**section[key])
    if name == "xm3600":
      xm3600.open_source(section["path"], section["images"], None)
  if name != "xm3600":
    _check_classes(name, spec, section["data"].label_names.get("label", ()))
  return section


@contextlib.contextmanager
def _needed(name: str) -> Iterator[None]:
  """Adds what a task needs to an error of its data."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(
      f"--task {name}: {e}; it needs {TASKS[name].needs}"
    ) from None


def cropped(pp_image: str) -> str:
  """Returns a preprocessing string that keeps the central 7/8 of the sides.

  The image is resized to size / 0.875 and its centre cut out.

  Args:
    pp_image: a string with resize(size); another one is returned as it is.
  """
  calls = pipe_string.calls(pp_image)
  ops = pp_image.split("|")
  for i, (name, args, _) in enumerate(calls):
    if name == "resize" and len(args) == 1 and len(calls) == len(ops):
      size = args[0]
      ops[i] = ops[i].replace(str(size), str(round(size / CROP)), 1)
      return "|".join([*ops[: i + 1], f"central_crop({size})", *ops[i + 1 :]])
  return pp_image


def published(model: str, task: str) -> dict[str, float]:
  """Returns {key: percent} that is published of a released model."""
  if task == "xm3600":
    return XM3600.get(model, {})
  it = known.KNOWN.get(model)
  return (it.scores if it else None) or {}


def _check_classes(task: str, spec: str, names: Sequence[str]) -> None:
  """Raises UserError for class folders that are not what the task needs."""
  if task.startswith("imagenet") and len(names) not in (0, IMAGENET):
    raise errors.UserError(
      f"--task {task}: {spec} has {len(names)} classes, not {IMAGENET}; it "
      f"needs {TASKS[task].needs}"
    )
  if task.startswith("imagenet") and os.path.isdir(spec):
    # Their order says which class is which.
    folders = [e.name for e in os.scandir(spec) if e.is_dir()]
    wrong = [n for n in folders if not re.fullmatch(r"n\d{8}|\d{1,3}", n)]
    if wrong:
      raise errors.UserError(
        f'--task {task}: nothing says which class "{min(wrong)}" in {spec} is; '
        f"it needs {TASKS[task].needs}"
      )
  ids = [
    n for n in names if n.isdecimal() or (n[:1] == "n" and n[1:].isdigit())
  ]
  if task == "classes" and ids:
    raise errors.UserError(
      f'--task classes: nothing says what "{ids[0]}" in {spec} is; '
      + (
        f'write classes.txt there, with lines such as "{ids[0]} tench"'
        if os.path.isdir(spec)
        else "take a folder for each class, named after it"
      )
    )


def table(results: Sequence[Result]) -> list[str]:
  """Returns lines for people."""
  percent = lambda x: "" if x is None else f"{x:.1f}"
  return metrics.table(
    [
      (
        f"{task} {row.metric}",
        percent(100 * row.value),
        percent(given),
        f"{100 * row.chance:.2f}",
        row.count(),
      )
      for task, row, given in results
    ],
    ("", "%", "published", "chance", "n"),
  )


def as_json(
  weights: str, tasks: Sequence[tuple[str, str]], results: Sequence[Result]
) -> str:
  """Returns the results, with what they are of, as JSON."""
  return json.dumps(
    dict(
      weights=weights,
      data=[dict(task=task, data=spec) for task, spec in tasks],
      results=[
        dict(task=x.task, **x.row._asdict(), published=x.published)
        for x in results
      ],
    ),
    indent=1,
  )


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  names = [name for x in FLAGS.task for name in x.split(",")]
  if len(names) != len(FLAGS.data):
    raise errors.UserError(
      f"there are {len(names)} tasks, but {len(FLAGS.data)} --data: each "
      "--task needs its own"
    )
  tasks = list(zip(names, FLAGS.data))
  results = evaluate(
    FLAGS.weights,
    tasks,
    batch_size=FLAGS.batch_size,
    resolution=FLAGS.resolution,
    patches=FLAGS.patches,
  )
  print("\n".join(table(results)))
  if FLAGS.out:
    text = as_json(FLAGS.weights, tasks, results)
    files.write(pathlib.Path(FLAGS.out), text)


if __name__ == "__main__":
  flags.DEFINE_string(
    "weights", None, "A released model's name, a workdir, a folder or a file."
  )
  flags.DEFINE_multi_string("task", None, f"One of {', '.join(TASKS)}.")
  flags.DEFINE_multi_string("data", None, "The data of each task.")
  flags.DEFINE_string("out", None, "A JSON file to write.")
  flags.DEFINE_integer("batch_size", 128, "Images per batch.", lower_bound=1)
  flags.DEFINE_integer(
    "resolution", None, "H and W of images, of a released model.", lower_bound=8
  )
  flags.DEFINE_integer(
    "patches", None, "The most patches of an image, of NaFlex.", lower_bound=1
  )
  flags.mark_flags_as_required(["weights", "task", "data"])
  program.run(main)
