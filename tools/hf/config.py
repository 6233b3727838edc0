"""The folders of Hugging Face's SigLIP models, and their config.json."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from sigjax import errors, trees
from sigjax.models import naflex, two_towers, vit
from sigjax.runtime import files
from tools.hf import names

# The defaults of transformers, for keys that config.json leaves out: the sizes
# of a base model.
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
# Those of Siglip2Model, NaFlex, whose images have no size of their own.
NAFLEX_DEFAULTS = dict(
  {k: v for k, v in IMAGE_DEFAULTS.items() if k != "image_size"},
  num_patches=256,  # of the table of positions, 16 x 16
)
# The largest sizes that are read. A model that config.json only claims must not
# take hours to build; the largest SigLIP models are far below these sizes.
_LIMITS = dict(
  num_hidden_layers=256,
  hidden_size=2**15,
  intermediate_size=2**17,
  num_attention_heads=2**10,
  vocab_size=2**22,
  max_position_embeddings=2**12,
  projection_size=2**15,
  image_size=2**12,
  patch_size=2**12,
)
# Methods of `resize`, and their numbers in preprocessor_config.json.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "area": 4}
# The values that both sides have in common: no other can be expressed.
_FIXED = (
  "num_channels",
  "hidden_act",
  "layer_norm_eps",
  "vision_use_head",
  "num_patches",
)


def describe(
  model: two_towers.TwoTowers, size: int, length: int, pad: int = 1
) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
  """Returns the config.json of a model, and the shapes of its arrays.

  Args:
    model: the model.
    size: H and W of the images; of NaFlex, the number of their patches.
    length: L, the number of tokens.
    pad: the id that pads texts.

  Returns:
    The dict of config.json, and our {name: ShapeDtypeStruct} with unstacked
    blocks.

  Raises:
    UserError: transformers' SiglipModel, or Siglip2Model of NaFlex, cannot
      express the model. One line names everything that differs.
  """
  image, text = two_towers.image_tower(model), two_towers.text_tower(model)
  is_naflex = isinstance(image, naflex.NaFlex)
  kind = "siglip2" if is_naflex else "siglip"
  theirs = f"{kind.capitalize()}Model"
  _refuse(
    theirs,
    [
      (
        f"model.image.kind {model.image.get('kind')!r}",
        not isinstance(image, (vit.ViT, naflex.NaFlex)),
      ),
      *(
        (f"model.{part}.{key} {has!r} (it has {value!r})", has != value)
        for part, key, has, value in [
          ("image", "pool_type", getattr(image, "pool_type", "map"), "map"),
          ("image", "posemb", getattr(image, "posemb", "learn"), "learn"),
          ("text", "pool_type", text.pool_type, "last"),
          ("text", "bottleneck", text.bottleneck, 0),
        ]
      ),
      ("an image head (model.out_dim[0])", model.out_dim[0] is not None),
      ("a text tower without head (model.out_dim[1])", not model.out_dim[1]),
    ],
  )
  model = model.clone(
    image={**model.image, "scan": False}, text={**model.text, "scan": False}
  )
  images = (1, size, size, 3)
  if isinstance(image, naflex.NaFlex):
    images = (1, size, 3 * image.patch() ** 2 + 2)
  like = trees.flatten(
    jax.eval_shape(
      model.init,
      jax.random.key(0),
      jax.ShapeDtypeStruct(images, np.float32),
      jax.ShapeDtypeStruct((1, length), np.int32),
    )["params"]
  )
  patch = image.patch()  # pyright: ignore
  image = _part(like, "img", "Transformer")
  text = _part(like, "txt", "Encoder_0")
  _refuse(
    theirs,
    [
      (
        f"embeddings of {model.out_dim[1]} numbers (it has the width of "
        f"the image tower, {image['hidden_size']})",
        model.out_dim[1] != image["hidden_size"],
      )
    ],
  )
  return dict(
    architectures=[theirs],
    model_type=kind,
    vision_config=dict(
      image,
      model_type=f"{kind}_vision_model",
      num_channels=3,
      patch_size=patch,
      vision_use_head=True,
      **(dict(num_patches=256) if is_naflex else dict(image_size=size)),
    ),
    text_config=dict(
      text,
      model_type=f"{kind}_text_model",
      vocab_size=like["txt/Embed_0/embedding"].shape[0],
      max_position_embeddings=length,
      projection_size=model.out_dim[1],
      pad_token_id=pad,
      eos_token_id=1,
      bos_token_id=None,
    ),
  ), like


def _refuse(theirs: str, reasons: Sequence[tuple[str, bool]]) -> None:
  """Raises UserError if any of (what cannot be expressed, is it so) is so."""
  wrong = [what for what, is_so in reasons if is_so]
  if wrong:
    raise errors.UserError(
      f"transformers' {theirs} cannot express {'; '.join(wrong)}"
    )


def _part(
  like: Mapping[str, jax.ShapeDtypeStruct], tower: str, encoder: str
) -> dict[str, Any]:
  """Returns the keys that the text and the image part of config.json share."""
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


def read_config(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
  """Reads a config.json of transformers.

  Returns:
    The keyword arguments of TwoTowers, the size (H and W) of images, of NaFlex
    the number of their patches, and the length L of texts.

  Raises:
    UserError: the file is missing, or of a model that TwoTowers cannot express.
  """
  given = read_json(path)
  kind = given.get("model_type")
  if kind not in ("siglip", "siglip2"):
    raise errors.UserError(
      f'{path}: model_type "{kind!s:.40}" is not known; choose from: siglip, '
      "siglip2"
    )
  is_naflex = kind == "siglip2"
  image_defaults = NAFLEX_DEFAULTS if is_naflex else IMAGE_DEFAULTS
  image, text = (
    _part_of(given, key, defaults, path)
    for key, defaults in (
      ("vision_config", image_defaults),
      ("text_config", TEXT_DEFAULTS),
    )
  )
  for part, defaults in (image, image_defaults), (text, TEXT_DEFAULTS):
    for key in _FIXED:
      if key in defaults and part[key] != defaults[key]:
        raise errors.UserError(
          f"{path}: {key} {part[key]!r:.40} cannot be expressed, only "
          f"{defaults[key]!r}"
        )
  size = image["num_patches" if is_naflex else "image_size"]
  if not is_naflex and image["patch_size"] > size:
    raise errors.UserError(
      f"{path}: patch_size {image['patch_size']} is larger than image_size "
      f"{size}"
    )
  sizes = lambda part: dict(
    width=part["hidden_size"],
    depth=part["num_hidden_layers"],
    mlp_dim=part["intermediate_size"],
    num_heads=part["num_attention_heads"],
  )
  model = dict(
    image=dict(
      sizes(image),
      patch_size=image["patch_size"],
      pool_type="map",
      **(dict(kind="naflex") if is_naflex else {}),
    ),
    text=dict(sizes(text), vocab_size=text["vocab_size"], pool_type="last"),
    out_dim=[None, text["projection_size"]],
  )
  return model, size, text["max_position_embeddings"]


def _part_of(
  given: Mapping[str, Any],
  key: str,
  defaults: Mapping[str, Any],
  path: pathlib.Path,
) -> dict[str, Any]:
  """Returns the text or the image part of a config.json, its sizes checked."""
  found = given.get(key) or {}
  if not isinstance(found, dict):
    raise errors.UserError(f"{path}: {key} is {found!r:.40}, not an object")
  part = {**defaults, **found}
  part["projection_size"] = part.get("projection_size") or part["hidden_size"]
  for name, limit in _LIMITS.items():
    value = part.get(name, 1)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value <= limit:
      raise errors.UserError(
        f"{path}: {name} of {key} is {value!r:.40}, but has to be a whole "
        f"number from 1 to {limit:,}"
      )
  width, heads = part["hidden_size"], part["num_attention_heads"]
  if width % heads:
    raise errors.UserError(
      f"{path}: num_attention_heads {heads} of {key} does not divide "
      f"hidden_size {width}"
    )
  return part


# ---- Files ----


def need(module: str) -> Any:
  """Imports an optional package; a UserError says how to install it."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise errors.UserError(
      f"{module.split('.')[0]} is not installed; it comes with transformers: "
      "pip install 'sigjax[hf]'"
    ) from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the dict in a JSON file; a UserError if there is none."""
  try:
    got = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror}") from None
  except (ValueError, RecursionError):
    got = None
  if not isinstance(got, dict):
    raise errors.UserError(f"{path} is not a JSON file of keys and values")
  return got


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file for people: indented, in UTF-8."""
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
  )


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields an empty folder, which becomes `path` if the body does not raise.

  Raises:
    UserError: `path` exists already, or cannot be written.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise errors.UserError(f"{path} exists: delete it, or choose another --out")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as folder:
      folder.mkdir()
      yield folder
  except OSError as e:
    raise errors.UserError(
      f"cannot write {path}: {e.strerror or e}; make room, or name another "
      "--out"
    ) from e
