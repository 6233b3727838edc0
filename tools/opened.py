"""What a command line names: a trained model, and data.

The programs take --weights, which is one of these:

  a name of docs/checkpoints.md, such as siglip2/b16_256. The file and the
      tokenizer are fetched once
  a workdir, or WORKDIR/checkpoints/STEP
  a folder of Hugging Face with a SigLIP model
  a folder that tools.convert_from_hf wrote, or the .npz file in it; or a .npz
      file (or its URL) that is called as a released one

--data is a folder, or the table of captions in it; or tfds:NAME:SPLIT for a
dataset of TensorFlow Datasets; or tar or Parquet files, whose names may contain
globs and braces.
"""

from collections.abc import Mapping
import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from sigjax import errors, sharding, trees
from sigjax.checkpoints import layout, restore
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.models import two_towers
from sigjax.runtime import files, identity
from sigjax.weights import known, npz, vocabulary
from tools.embedding import tower as tower_lib
from tools.hf import config as hf_config

log = logging.getLogger("sigjax")

SPARE = 0.9  # a table with fewer tokens than this share of its rows is odd


@dataclasses.dataclass(frozen=True)
class Opened:
  """A trained model, on one device.

  Attributes:
    name: what was opened, for people: of a run its checkpoint.
    config: "model", "pp_image" and "pp_text"; of a run the whole config.
    params: the parameters of two_towers.of_config(config["model"]).
    tokenizer: of its texts.
    is_run: whether it is of a run of sigjax.train.
  """

  name: str
  config: Mapping[str, Any]
  params: Any
  tokenizer: Tokenizer
  is_run: bool = False


def open_model(
  weights: str | os.PathLike[str],
  resolution: int | None = None,
  patches: int | None = None,
) -> Opened:
  """Opens what --weights names, see above.

  Args:
    weights: the same.
    resolution: H and W of images in pixels, of a released model: its positions
      are resampled. None: those that it was trained with.
    patches: the most patches of an image, of a released NaFlex model. None:
      256.

  Raises:
    UserError: there is no such model, it is damaged, it has no text tower, or
      nothing says how its images and texts are prepared.
  """
  weights = str(weights)
  if name := known.name_of(weights):
    return _released(name, weights, resolution, patches)
  for flag, value in ("resolution", resolution), ("patches", patches):
    if value is not None:
      raise errors.UserError(
        f"--{flag} is of released models alone; {weights} has its own"
      )
  path = files.path(weights)
  if restore.is_run(weights):
    return _run(weights)
  if files.in_bucket(path) and path.suffix != ".npz":
    raise errors.UserError(f"{path} has no checkpoints; train there first")
  path = pathlib.Path(path)
  if (path / "params.npz").is_file():
    path = path / "params.npz"
  if path.name.endswith(".npz"):
    if (path.parent / "config.json").is_file():
      return _file(path)
    if path.is_file():
      raise errors.UserError(
        f"{path} has no config.json beside it, which says what model it is of; "
        "tools.convert_from_hf writes one"
      )
  elif (path / "config.json").is_file():
    return _hugging_face(path)
  elif path.is_dir():
    raise errors.UserError(
      f"{path} is no workdir and no folder of Hugging Face: it has neither "
      "checkpoints nor config.json"
    )
  raise errors.UserError(known.no_file(weights))


def _released(
  name: str, weights: str, resolution: int | None, patches: int | None
) -> Opened:
  it = known.get(name)
  if it.tokenizer is None:
    raise errors.UserError(
      f"{name} is an image tower alone: there is nothing that reads texts"
    )
  config: dict[str, Any] = dict(
    model=it.model,
    pp_image=known.pp_image(name, resolution, patches),
    pp_text=known.pp_text(name),
  )
  title = name
  if resolution and resolution != it.resolution:
    title = f"{name} at {resolution} pixels"
    log.info(
      "%s was trained with images of %d pixels; its positions are resampled "
      "for %d",
      name,
      it.resolution,
      resolution,
    )
  if patches and patches != it.patches:
    title = f"{name} with {patches} patches"
  model = two_towers.of_config(config["model"])
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    tower_lib.blank(config["pp_image"])[None],
    jnp.zeros((1, it.text_length), jnp.int32),
  )["params"]
  params = npz.load_params(weights, shapes)
  return Opened(
    title,
    config,
    jax.device_put(params, jax.devices()[0]),
    vocabulary.released(it.tokenizer),
  )


def _run(path: str) -> Opened:
  workdir = layout.find(path)[0]
  # That of the checkpoint: a later command may have changed config.json.
  about = restore.read_about(path)
  tokenizer = Tokenizer(workdir / "tokenizer.model")
  identity.check_tokenizer(workdir / "tokenizer.model", about)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Opened(
    str(restore.checkpoint_of(path)),
    about["config"],
    restore.read_params(path, sharding.batch_sharding(mesh)),
    tokenizer,
    is_run=True,
  )


def _file(path: pathlib.Path) -> Opened:
  config = hf_config.read_json(path.parent / "config.json")
  _check(config, path.parent / "config.json", "")
  tokenizer = _tokenizer(path.parent / "tokenizer.model", config)
  params = npz.load_params(path)
  return Opened(
    str(path), config, jax.device_put(params, jax.devices()[0]), tokenizer
  )


def _hugging_face(path: pathlib.Path) -> Opened:
  from tools import convert_from_hf  # needs the extra "hf"

  folder = convert_from_hf.read(path)
  _check(folder.config, path, "; ".join(folder.notes))
  if folder.tokenizer is None:
    raise errors.UserError(f"{path}: {'; '.join(folder.notes)}")
  return Opened(
    str(path),
    folder.config,
    jax.device_put(trees.unflatten(folder.arrays), jax.devices()[0]),
    _tokenizer(folder.tokenizer, folder.config),
  )


def _tokenizer(path: pathlib.Path, config: Mapping[str, Any]) -> Tokenizer:
  """Returns a model's tokenizer; refuses one with more pieces than it has rows.

  With fewer, it may still be its own: some tables have rows to spare.
  """
  found = Tokenizer(path)
  towers = two_towers.of_config(config["model"])
  text: Any = two_towers.text_tower(towers)
  rows = text.vocab_size
  if found.rows > rows:
    raise errors.UserError(
      f"{path} has {found.rows} pieces, but the model has embeddings of {rows} "
      "tokens: it is the tokenizer of another model; put the model's own there"
    )
  if found.rows < SPARE * rows:
    log.warning(
      "%s has %d pieces, but the model has embeddings of %d tokens: it may be "
      "the tokenizer of another model",
      path,
      found.rows,
      rows,
    )
  return found


def _check(config: Mapping[str, Any], path: pathlib.Path, notes: str) -> None:
  """Raises UserError if a config lacks what a model cannot do without."""
  for key in "model", "pp_image", "pp_text":
    if key not in config:
      raise errors.UserError(
        f'{path}: nothing says "{key}"' + (f": {notes}" if notes else "")
      )


def data_of(spec: str, kind: str, label: str = "label") -> dict[str, Any]:
  """Returns the data section of what --data names.

  Args:
    spec: see the top of this file. A table in a folder "annotations", as COCO
      has them, is one of the folder around it.
    kind: how a folder is read, "classes" or "folder".
    label: of "classes", the feature with the class, or classes, of an image.

  Raises:
    UserError: a dataset has no split, or tars are to have classes.
  """
  if spec.startswith("tfds:"):
    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not name or not split:
      raise errors.UserError(
        f"--data {spec}: a dataset is tfds:NAME:SPLIT, such as "
        "tfds:coco_captions:test"
      )
    return dict(kind="tfds", name=name, split=split)
  if spec.endswith(".parquet"):
    classes = dict(captions={}, columns=(label,)) if kind == "classes" else {}
    return dict(kind="parquet", shards=spec, **classes)
  if spec.endswith(".tar"):
    if kind == "classes":
      raise errors.UserError(
        f"--data {spec}: of tars only captions are read, no classes; unpack "
        "them into a folder of images for each class"
      )
    return dict(kind="tar", shards=spec)
  if kind == "folder" and spec.endswith((".csv", ".tsv", ".jsonl", ".json")):
    folder, table = os.path.split(spec)
    if os.path.basename(folder) == "annotations":
      folder, table = os.path.dirname(folder), f"annotations/{table}"
    return dict(kind="folder", path=folder or ".", table=table)
  return dict(kind=kind, path=spec)
