"""The folders of Hugging Face's SigLIP models, and their config.json."""

import contextlib
import importlib
import json
import os
import pathlib
import shutil

import jax
import numpy as np

from sigjax import errors, trees
from sigjax.models import two_towers, vit
from tools.hf import names

# Of the text and image parts of config.json: what its writers leave out is
# what a base model has.
TEXT_DEFAULTS = dict(
  vocab_size=32_000,
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  max_position_embeddings=64,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
)
IMAGE_DEFAULTS = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_channels=3,
  image_size=224,
  patch_size=16,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
  vision_use_head=True,
)
# Methods of `resize`, and what preprocessor_config.json calls them.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "area": 4}
_FIXED = ("num_channels", "hidden_act", "layer_norm_eps", "vision_use_head")


def describe(model, size, length, pad=1):
  """Returns config.json for a TwoTowers, and what arrays it has.

  Args:
    model: a TwoTowers.
    size: H and W of the image; length: L of the text; pad: what fills it.

  Returns:
    A dict as written to config.json, and our {name: ShapeDtypeStruct} with
    unrolled blocks.

  Raises:
    UserError: transformers' SiglipModel cannot express the model; everything
      that does not fit is named, in one line.
  """
  image, text = two_towers.image_tower(model), two_towers.text_tower(model)
  _refuse(
    [
      (
        f"model.image.kind {model.image.get('kind')!r}",
        not isinstance(image, vit.ViT),
      ),
      *(
        (f"model.{part}.{key} {has!r} (it has {value!r})", has != value)
        for part, key, has, value in [
          ("image", "pool_type", getattr(image, "pool_type", "map"), "map"),
          ("image", "posemb", getattr(image, "posemb", "learn"), "learn"),
          ("text", "pool_type", text.pool_type, "last"),
          ("text", "embed_rank", text.embed_rank, None),
        ]
      ),
      ("an image head (model.out_dim[0])", model.out_dim[0] is not None),
      ("a text tower without head (model.out_dim[1])", not model.out_dim[1]),
      ("model.bias_init None (it has a bias)", model.bias_init is None),
    ]
  )
  model = model.clone(
    image={**model.image, "scan": False}, text={**model.text, "scan": False}
  )
  like = trees.flatten(
    jax.eval_shape(
      model.init,
      jax.random.key(0),
      np.zeros((1, size, size, 3), np.float32),
      np.zeros((1, length), np.int32),
    )["params"]
  )
  image = _part(like, "img", "Transformer")
  text = _part(like, "txt", "Encoder_0")
  _refuse(
    [
      (
        f"embeddings of {model.out_dim[1]} numbers (it has the width of "
        f"the image tower, {image['hidden_size']})",
        model.out_dim[1] != image["hidden_size"],
      )
    ]
  )
  return dict(
    architectures=["SiglipModel"],
    model_type="siglip",
    vision_config=dict(
      image,
      model_type="siglip_vision_model",
      num_channels=3,
      image_size=size,
      patch_size=like["img/embedding/kernel"].shape[0],
      vision_use_head=True,
    ),
    text_config=dict(
      text,
      model_type="siglip_text_model",
      vocab_size=like["txt/Embed_0/embedding"].shape[0],
      max_position_embeddings=length,
      projection_size=model.out_dim[1],
      pad_token_id=pad,
      eos_token_id=1,
      bos_token_id=None,
    ),
  ), like


def _refuse(reasons):
  """Raises if any of (what, whether it is so) is so."""
  wrong = [what for what, is_so in reasons if is_so]
  if wrong:
    raise errors.UserError(
      f"transformers' SiglipModel cannot express {'; '.join(wrong)}"
    )


def _part(like, tower, encoder):
  """Returns what both parts of config.json say of a tower's encoder."""
  block = f"{tower}/{encoder}/encoderblock_0"
  width, heads, _ = like[
    f"{block}/MultiHeadDotProductAttention_0/query/kernel"
  ].shape
  return dict(
    hidden_size=width,
    num_attention_heads=heads,
    intermediate_size=like[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[1],
    num_hidden_layers=names.depth(like, tower),
    attention_dropout=0.0,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
  )


def read_config(path):
  """Reads a config.json of theirs.

  Returns:
    Keyword arguments of TwoTowers, size (H and W of the image), and length (L
    of the text).

  Raises:
    UserError: no such file, another kind of model, or what TwoTowers lacks.
  """
  given = read_json(path)
  kind = given.get("model_type")
  if kind == "siglip2":
    raise errors.UserError(
      f'{path}: model_type "siglip2" is NaFlex, images of any aspect ratio; '
      'only fixed resolutions can be read (theirs is "siglip")'
    )
  if kind != "siglip":
    raise errors.UserError(
      f'{path}: model_type "{kind}" is not known; choose from: siglip'
    )
  image = {**IMAGE_DEFAULTS, **(given.get("vision_config") or {})}
  text = {**TEXT_DEFAULTS, **(given.get("text_config") or {})}
  for part, defaults in (image, IMAGE_DEFAULTS), (text, TEXT_DEFAULTS):
    for key in _FIXED:
      if part.get(key) != defaults.get(key):
        raise errors.UserError(
          f"{path}: {key} {part[key]!r} cannot be expressed, only "
          f"{defaults[key]!r}"
        )
    for key in "image_size", "patch_size":
      if not isinstance(part.get(key, 0), int):
        raise errors.UserError(
          f"{path}: {key} {part[key]!r} cannot be expressed, only a square"
        )
  sizes = lambda part: dict(
    width=part["hidden_size"],
    depth=part["num_hidden_layers"],
    mlp_dim=part["intermediate_size"],
    num_heads=part["num_attention_heads"],
  )
  out = text.get("projection_size") or text["hidden_size"]
  model = dict(
    image=dict(sizes(image), patch_size=image["patch_size"], pool_type="map"),
    text=dict(sizes(text), vocab_size=text["vocab_size"], pool_type="last"),
    out_dim=[None, out],
  )
  return model, image["image_size"], text["max_position_embeddings"]


# Files.


def need(module):
  """Imports what not every user has; a UserError says how to install it."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise errors.UserError(
      f"{module.split('.')[0]} is not installed; it comes with transformers: "
      "pip install 'sigjax[hf]'"
    ) from None


def read_json(path):
  """Returns the dict in a JSON file; a UserError if there is none."""
  try:
    got = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror}") from None
  except ValueError:
    got = None
  if not isinstance(got, dict):
    raise errors.UserError(f"{path} is not a JSON file of keys and values")
  return got


def write_json(path, value):
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
  )


@contextlib.contextmanager
def new_folder(path):
  """Gives a folder to write to, which becomes `path` if all goes well.

  Raises:
    UserError: there is a `path` already, or it cannot be written.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise errors.UserError(f"{path} exists: delete it, or choose another --out")
  aside = path.parent / f"{path.name}.{os.getpid()}.partial"
  try:
    aside.mkdir(parents=True)
    yield aside
    aside.rename(path)
  except OSError as e:
    raise errors.UserError(
      f"cannot write {path}: {e.strerror or e}; make room, or name another "
      "--out"
    ) from e
  finally:
    shutil.rmtree(aside, ignore_errors=True)
