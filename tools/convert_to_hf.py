"""Writes a run, or a released .npz file, as a folder for transformers.

  python -m tools.convert_to_hf --weights WORKDIR --out FOLDER
  python -m tools.convert_to_hf --weights FILE.npz --config FILE.json \
      --tokenizer FILE.model --out FOLDER

The folder is what AutoModel (SiglipModel) and AutoProcessor of Hugging Face's
transformers load. Texts have to be padded as in training:

  processor(text=texts, images=images, padding="max_length", truncation=True,
            return_tensors="pt")

A config is what a run keeps as config.json; `model`, `pp_image` and `pp_text`
are read. Without --config and --tokenizer it is config.json and tokenizer.model
in the workdir, or beside the .npz file, as tools.convert_from_hf leaves them.

Only what SiglipModel can express is converted, exactly: pool_type "map" and
"last", a head on the text alone, a bias; `resize` to a square and
`value_range`; `lower` and `tokenize`. Pixels are equal for opaque images of 8
bits, through transformers' Pillow image processor (with torchvision it takes
another one, which rounds in other ways). For the ids of texts see
tools/hf_tokenizer.py.

Needs: pip install 'sigjax[hf]'
"""

import functools
import inspect
import pathlib
import shutil
import sys

from absl import app, flags, logging
import jax

from sigjax import errors, trees
from sigjax.checkpoints import restore
from sigjax.data.example import pipe_string, preprocess
from sigjax.models import two_towers
from sigjax.weights import npz
from tools.hf import config as config_lib
from tools.hf import names as names_lib
from tools.hf import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS


def convert(weights, out, config=None, tokenizer=None):
  """Writes the folder `out`, whole or not at all.

  Args:
    weights: a workdir, WORKDIR/checkpoints/STEP, or a .npz file, as
      load.load_params takes it.
    out: the folder; must not be there yet.
    config, tokenizer: files, see the top.

  Raises:
    UserError: something is missing, does not fit, or cannot be expressed.
  """
  save_file = config_lib.need("safetensors.numpy").save_file
  is_run = pathlib.Path(weights).is_dir()
  home = restore.find(weights)[0] if is_run else pathlib.Path(weights).parent
  flat = _read(weights, is_run)
  tokenizer = pathlib.Path(tokenizer or home / "tokenizer.model")
  config = pathlib.Path(config or home / "config.json")
  given = config_lib.read_json(config)
  for key in "model", "pp_image", "pp_text":
    if key not in given:
      raise errors.UserError(f'{config} has no "{key}"')
  size, pixels = image_processor(given["pp_image"])
  length, pad, lower = text_processor(given["pp_text"])
  model = errors.call(two_towers.TwoTowers, given["model"], "config.model")
  their_config, like = config_lib.describe(model, size, length, pad)
  text_files = tokenizer_lib.files(
    tokenizer, lower, their_config["text_config"]["vocab_size"], length, pad
  )
  arrays = names_lib.to_theirs(_fit(flat, like, weights))

  with config_lib.new_folder(out) as folder:
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for name, value in {
      "config.json": their_config,
      "preprocessor_config.json": pixels,
      **text_files,
    }.items():
      config_lib.write_json(folder / name, value)


def _read(path, is_run):
  """Returns our {name: array}, in the form that they are stored in."""
  if is_run:
    return trees.flatten(
      restore.read_params(
        path, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      )
    )
  return trees.flatten(npz.load_params(path))


def _fit(flat, like, path):
  """Returns our {name: array}, unrolled and of exactly the shapes of `like`."""
  for name in "img/pos_embedding", "txt/pos_embedding":
    # load.fit would adapt them, and the folder be another model.
    if name in flat and flat[name].shape != like[name].shape:
      raise errors.UserError(
        f"{path} is for images or texts of another size than the config "
        f"says: {name} is {flat[name].shape}, not {like[name].shape}"
      )
  return {
    k: jax.device_get(v)
    for k, v in trees.flatten(
      npz.fit(flat, trees.unflatten(like), (), path)
    ).items()
  }


def _ops(string, key):
  """Returns (name, {argument: value}) of each op of a pipe string."""

  def recorder(op):
    @functools.wraps(op)  # pipe_string checks arguments by the op's signature
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


def _expect(string, key, *patterns):
  """Returns {op: arguments}; refuses other sequences of ops than patterns."""
  ops = _ops(string, key)
  names = [name for name, _ in ops]
  if names not in patterns:
    raise errors.UserError(
      f'{key} "{string}" cannot be expressed by transformers\' '
      f"SiglipProcessor, only: {' or '.join('|'.join(p) for p in patterns)}"
    )
  return dict(ops)


def image_processor(string):
  """Returns H = W of a pp_image, and preprocessor_config.json for it.

  Raises:
    UserError: it does more, or resizes to no square.
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
      f'pp_image "{string}" resizes to no square, but transformers\' '
      "SiglipModel takes squares only"
    )
  # Bytes are mapped to [-1, 1] by the model.
  low, high = ops.get("value_range", dict(low=-1.0, high=1.0)).values()
  if high <= low:
    raise errors.UserError(
      f'pp_image "{string}": no range from {low} to {high}'
    )
  # They compute (v / 255 - mean) / std.
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


def text_processor(string):
  """Returns of a pp_text: L, what it pads with, whether it is lower case.

  Raises:
    UserError: it does more.
  """
  ops = _expect(string, "pp_text", ["tokenize"], ["lower", "tokenize"])
  args = ops["tokenize"]
  return args["length"], args["pad"], "lower" in ops


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]}?")
  logging.set_verbosity(logging.ERROR)  # orbax tells a lot
  try:
    convert(FLAGS.weights, FLAGS.out, FLAGS.config, FLAGS.tokenizer)
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
  flags.DEFINE_string("weights", None, "A workdir, a checkpoint, or a .npz.")
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.DEFINE_string("config", None, "JSON: model, pp_image and pp_text.")
  flags.DEFINE_string("tokenizer", None, "A SentencePiece model.")
  flags.mark_flags_as_required(["weights", "out"])
  app.run(main)
