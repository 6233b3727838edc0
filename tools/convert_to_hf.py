"""Writes a run, or a released .npz file, as a folder for transformers.

  python -m tools.convert_to_hf --weights WORKDIR --out FOLDER
  python -m tools.convert_to_hf --weights FILE.npz --config FILE.json \
      --tokenizer FILE.model --out FOLDER

AutoModel (SiglipModel, or Siglip2Model of NaFlex) and AutoProcessor of Hugging
Face's transformers load the folder. Texts have to be padded as in training:

  processor(text=texts, images=images, padding="max_length", truncation=True,
            return_tensors="pt")

Of a config, `model`, `pp_image` and `pp_text` are read. A checkpoint has its
config with it. For an .npz file, the default of --config is config.json beside
it, where tools.convert_from_hf writes it. The default of --tokenizer is
tokenizer.model in the workdir, or beside the .npz file.

The decoder of config.losses, if there is one, is written beside the model, to
decoder.npz, which transformers do not read and tools.convert_from_hf does.

The conversion is exact, so it refuses what SiglipModel cannot express. It takes
pool_type "map" (image) and "last" (text), a head on the text tower only, and a
bias; `resize` to a square and `value_range`, or `resize_to_patches` of NaFlex;
`lower` and `tokenize`. Pixels are equal for opaque images of 8 bits, if
transformers prepares them with Pillow; if torchvision is installed, it rounds
differently. tools/hf/tokenizer.py says for which texts token ids may differ.

For NaFlex, Siglip2Processor has defaults of its own, 256 patches of 16 pixels
and 64 tokens. Of a model with others, name them in every call:
images_kwargs={"patch_size": .., "max_num_patches": ..}, max_length=...
AutoProcessor reads the vocabulary as Gemma's then, so it has to be BPE in lower
case without a space in front.

Needs: pip install 'sigjax[hf]'
"""

from collections.abc import Callable
import functools
import inspect
import json
import os
import pathlib
from typing import Any

from absl import flags
import jax
import numpy as np

from sigjax import errors, trees
from sigjax.checkpoints import layout, restore
from sigjax.data.example import pipe_string, preprocess
from sigjax.models import two_towers
from sigjax.runtime import files, identity, program
from sigjax.weights import npz
from tools.hf import config as config_lib
from tools.hf import names as names_lib
from tools.hf import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS


def convert(
  weights: str | os.PathLike[str],
  out: str | os.PathLike[str],
  config: str | os.PathLike[str] | None = None,
  tokenizer: str | os.PathLike[str] | None = None,
) -> None:
  """Writes the folder `out`, all of it or nothing.

  Args:
    weights: a workdir, WORKDIR/checkpoints/STEP, both perhaps in a bucket, or
      a .npz file as npz.load_params takes it.
    out: the folder to make; it must not exist yet.
    config: a JSON file, see above.
    tokenizer: a SentencePiece model, see above.

  Raises:
    UserError: something is missing, does not fit, or cannot be expressed.
  """
  save_file = config_lib.need("safetensors.numpy").save_file
  is_run = restore.is_run(weights) or pathlib.Path(weights).is_dir()
  home = layout.find(weights)[0] if is_run else pathlib.Path(weights).parent
  flat, decoder = _read(weights, is_run), {}
  for name in [name for name in flat if name.startswith("dec/")]:
    decoder[name] = flat.pop(name)
  for name in [name for name in flat if name.startswith("distill/")]:
    del flat[name]  # heads that only training needs
  tokenizer = files.path(tokenizer or home / "tokenizer.model")
  if is_run and not config:
    # That of the checkpoint: a later command may have changed config.json.
    about = restore.read_about(weights)
    identity.check_tokenizer(tokenizer, about)
    given = about["config"]
  else:
    config = pathlib.Path(config or home / "config.json")
    given = config_lib.read_json(config)
  for key in "model", "pp_image", "pp_text":
    if key not in given:
      raise errors.UserError(f'{config or weights}: the config has no "{key}"')
  model = two_towers.of_config(given["model"])
  is_naflex = model.image.get("kind") == "naflex"
  processor = patch_processor if is_naflex else image_processor
  size, pixels = processor(given["pp_image"])
  length, pad, lower = text_processor(given["pp_text"])
  flat = _with_b(flat, model)
  model = model.clone(bias="learned", bias_init=0.0)
  their_config, like = config_lib.describe(model, size, length, pad)
  patch = their_config["vision_config"]["patch_size"]
  if pixels.get("patch_size", patch) != patch:
    raise errors.UserError(
      f'pp_image "{given["pp_image"]}" makes patches of another size than '
      f"the model's, {patch} pixels"
    )
  text_files = tokenizer_lib.files(
    tokenizer, lower, their_config["text_config"]["vocab_size"], length, pad
  )
  if is_naflex:
    _check_gemma(text_files["tokenizer.json"], tokenizer, lower)
  tokenizer_config = text_files["tokenizer_config.json"]
  tokenizer_config["processor_class"] = pixels["processor_class"]
  arrays = names_lib.to_theirs(_fit(flat, like, weights))

  with config_lib.new_folder(out) as folder:
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    if decoder:
      npz.save_params(folder / "decoder.npz", trees.unflatten(decoder))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    for name, value in {
      "config.json": their_config,
      "preprocessor_config.json": pixels,
      **text_files,
    }.items():
      config_lib.write_json(folder / name, value)


def _read(path, is_run) -> dict[str, Any]:
  """Returns {our name: array}, with blocks stacked or not, as stored."""
  if is_run:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return trees.flatten(restore.read_params(path, device))
  return trees.flatten(npz.load_params(path))


def _check_gemma(fast, path, lower) -> None:
  """Raises UserError if Siglip2Tokenizer would read a tokenizer.json wrongly.

  For model_type "siglip2", AutoTokenizer takes that class whatever the folder
  says: byte-pair encoding of the lower-case text, its spaces replaced.
  """
  steps = json.dumps(fast["normalizer"])
  if fast["model"]["type"] != "BPE" or not lower or '"Prepend"' in steps:
    raise errors.UserError(
      f"{path}: transformers' Siglip2Processor reads a vocabulary like Gemma's "
      "alone: BPE of lower-case texts, without a space in front; give such a "
      "tokenizer, or convert a model of square images"
    )


def _with_b(flat, model) -> dict[str, Any]:
  """Returns the arrays with every kind of bias as b, (1,)."""
  if model.bias == "learned":
    return flat
  names = ("t", "r") if model.bias == "relative" else ("t",)
  params = {name: errors.pick(flat, name, "array") for name in names}
  b = model.apply({"params": params}, None, None)[2]["b"]
  return {**{k: v for k, v in flat.items() if k != "r"}, "b": b}


def _fit(flat, like, path) -> dict[str, np.ndarray]:
  """Returns {our name: array}: unstacked blocks, the shapes of `like`."""
  for name in "img/pos_embedding", "txt/pos_embedding":
    # npz.fit would resample them; the folder would be another model.
    if name in flat and flat[name].shape != like[name].shape:
      raise errors.UserError(
        f"{path} is for images or texts of another size than the config "
        f"says: {name} is {flat[name].shape}, not {like[name].shape}"
      )
  fitted = npz.fit(flat, trees.unflatten(like), (), path)
  return {k: jax.device_get(v) for k, v in trees.flatten(fitted).items()}


def _ops(string: str, key: str) -> list[tuple[str, dict[str, Any]]]:
  """Returns (name, {argument: value}) of each op of a pipe string."""

  def recorder(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)  # pipe_string checks arguments by the signature
    def record(*args, **kwargs):
      bound = inspect.signature(op).bind(*args, **kwargs)
      bound.apply_defaults()
      return op.__name__, bound.arguments

    return record

  ops = pipe_string.build(
    string,
    {name: recorder(op) for name, op in preprocess.OPS.items()},
    dict(tokenizer=key),
  )
  return [(name, args) for name, args in ops if name != "keep"]


def _expect(
  string: str, key: str, *patterns: list[str]
) -> dict[str, dict[str, Any]]:
  """Returns {op: arguments}; the names of the ops must be one of patterns."""
  ops = _ops(string, key)
  names = [name for name, _ in ops]
  if names not in patterns:
    raise errors.UserError(
      f'{key} "{string}" cannot be expressed by transformers\' '
      f"SiglipProcessor, only: {' or '.join('|'.join(p) for p in patterns)}"
    )
  return dict(ops)


def image_processor(string: str) -> tuple[int, dict[str, Any]]:
  """Returns the size (H = W) of a pp_image and its preprocessor_config.json.

  Raises:
    UserError: the string has other ops, or resizes to another shape.
  """
  ops = _expect(
    string,
    "pp_image",
    ["decode", "resize", "value_range"],
    ["decode", "resize"],
  )
  height, width, method = ops["resize"].values()
  if (width or height) != height:
    raise errors.UserError(
      f'pp_image "{string}" does not resize to a square, but transformers\' '
      "SiglipModel takes squares only"
    )
  # Without value_range the model itself maps bytes to [-1, 1].
  low, high = ops.get("value_range", dict(low=-1.0, high=1.0)).values()
  if high <= low:
    raise errors.UserError(
      f'pp_image "{string}": value_range({low}, {high}) is empty'
    )
  # transformers computes (v / 255 - mean) / std.
  return height, dict(
    image_processor_type="SiglipImageProcessor",
    processor_class="SiglipProcessor",
    do_convert_rgb=True,
    do_resize=True,
    size=dict(height=height, width=height),
    resample=config_lib.RESAMPLE[method],
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[-low / (high - low)] * 3,
    image_std=[1 / (high - low)] * 3,
  )


def patch_processor(string: str) -> tuple[int, dict[str, Any]]:
  """Returns the same as image_processor of NaFlex, with the number of patches.

  Raises:
    UserError: the string has other ops.
  """
  ops = _expect(string, "pp_image", ["decode", "resize_to_patches"])
  length, patch = ops["resize_to_patches"].values()
  return length, dict(
    image_processor_type="Siglip2ImageProcessor",
    processor_class="Siglip2Processor",
    max_num_patches=length,
    patch_size=patch,
    do_convert_rgb=True,
    do_resize=True,
    resample=config_lib.RESAMPLE["bilinear"],
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
  )


def text_processor(string: str) -> tuple[int, int, bool]:
  """Returns the length L, the padding id and whether a pp_text lower-cases.

  Raises:
    UserError: the string has other ops.
  """
  ops = _expect(string, "pp_text", ["tokenize"], ["lower", "tokenize"])
  args = ops["tokenize"]
  return args["length"], args["pad"], "lower" in ops


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  convert(FLAGS.weights, FLAGS.out, FLAGS.config, FLAGS.tokenizer)
  print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
  flags.DEFINE_string("weights", None, "A workdir, a checkpoint, or a .npz.")
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.DEFINE_string("config", None, "JSON: model, pp_image and pp_text.")
  flags.DEFINE_string("tokenizer", None, "A SentencePiece model.")
  flags.mark_flags_as_required(["weights", "out"])
  program.run(main)
