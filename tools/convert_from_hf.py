"""Reads a Hugging Face folder of SigLIP, or SigLIP 2 of fixed resolution.

  python -m tools.convert_from_hf --folder FOLDER --out OUT

OUT is a folder, too:

  params.npz       the weights, in the layout of the released files; --scan
                   stacks the blocks, as in those of SigLIP 2
  config.json      `model`, the keyword arguments of TwoTowers; and, as far as
                   the folder tells them, `pp_image` and `pp_text`
  tokenizer.model  the SentencePiece model, if the folder has one

tools.convert_to_hf --weights OUT/params.npz is the way back. Weights are read
from model.safetensors, also in several files; they become float32.

Needs: pip install 'sigjax[hf]'
"""

import json
import pathlib
import shutil
import sys

from absl import app, flags

from sigjax import errors, trees
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import two_towers
from sigjax.weights import npz
from tools.hf import config as config_lib
from tools.hf import names as names_lib

FLAGS = flags.FLAGS

# Their tokenizers that make texts lower case, or, Gemma's, of models (SigLIP 2)
# that were trained on such texts.
LOWER = (
  "SiglipTokenizer",
  "Siglip2Tokenizer",
  "GemmaTokenizer",
  "GemmaTokenizerFast",
)

# What SiglipImageProcessor does where preprocessor_config.json is silent.
PIXEL_DEFAULTS = dict(
  do_resize=True,
  size=dict(height=224, width=224),
  resample=3,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=[0.5] * 3,
  image_std=[0.5] * 3,
)


def convert(source, out, scan=False):
  """Writes the folder `out`, whole or not at all.

  Args:
    source: a folder that SiglipModel.from_pretrained loads.
    out: a folder that is not there yet, see the top.
    scan: whether blocks are stacked.

  Returns:
    Lines about what the folder does not tell, or tells in other words.

  Raises:
    UserError: something is missing or cannot be expressed; all arrays that do
      not fit config.json are listed.
  """
  source = pathlib.Path(source)
  model, size, length = config_lib.read_config(source / "config.json")
  _, like = config_lib.describe(two_towers.TwoTowers(**model), size, length)
  arrays = names_lib.to_ours(read_arrays(source), like, source)
  if scan:
    model["image"]["scan"] = model["text"]["scan"] = True
  config, notes = dict(model=model), []
  for key, fn, args in [
    ("pp_image", pp_image, (source, size)),
    ("pp_text", pp_text, (source, length)),
  ]:
    value, note = fn(*args)
    if value:
      config[key] = value
    if note:
      notes.append(f"{key}: {note}")
  pieces = next(
    (
      source / name
      for name in ("tokenizer.model", "spiece.model")
      if (source / name).exists()
    ),
    None,
  )
  if pieces:
    tokenizer_lib.Tokenizer(pieces)  # refuses what is none before it is copied
  else:
    notes.append(
      "tokenizer.model: the folder has no SentencePiece model "
      "(tokenizer.model or spiece.model)"
    )

  with config_lib.new_folder(out) as folder:
    npz.save_params(folder / "params.npz", trees.unflatten(arrays), scan)
    config_lib.write_json(folder / "config.json", config)
    if pieces:
      shutil.copyfile(pieces, folder / "tokenizer.model")
  return notes


def read_arrays(source):
  """Returns {name: array} of model.safetensors, or of its several files.

  Raises:
    UserError: neither is there, or a file is missing or damaged.
  """
  safetensors = config_lib.need("safetensors")
  load_file = config_lib.need("safetensors.numpy").load_file
  index = source / "model.safetensors.index.json"
  if (source / "model.safetensors").exists():
    names = ["model.safetensors"]
  elif index.exists():
    files = config_lib.read_json(index).get("weight_map", {})
    names = sorted(set(files.values()))
  else:
    raise errors.UserError(
      f"{source} has no model.safetensors; load it in transformers and call "
      "save_pretrained to get one"
    )
  arrays = {}
  for name in names:
    try:
      arrays.update(load_file(source / name))
    except FileNotFoundError:
      raise errors.UserError(
        f"{source} has no {name}, which {index.name} names"
      ) from None
    except (OSError, safetensors.SafetensorError) as e:
      raise errors.UserError(f"cannot read {source / name}: {e}") from None
  return arrays


def pp_image(source, size):
  """Returns (pipe string or None, note or None) of an image processor.

  Args:
    source: the folder.
    size: H and W that the model takes.
  """
  got = _first(source, "preprocessor_config.json", "processor_config.json")
  if not got:
    return None, "the folder has no preprocessor_config.json"
  got = {**PIXEL_DEFAULTS, **got.get("image_processor", got)}
  methods = {number: name for name, number in config_lib.RESAMPLE.items()}
  mean, std = set(got["image_mean"]), set(got["image_std"])
  wrong = [
    key
    for key, is_so in dict(
      do_resize=not got["do_resize"],
      do_rescale=not got["do_rescale"],
      do_normalize=not got["do_normalize"],
      image_mean=len(mean) > 1,
      image_std=len(std) > 1,
      rescale_factor=got["rescale_factor"] != 1 / 255,
      size=got["size"] != dict(height=size, width=size),
      resample=got["resample"] not in methods,
    ).items()
    if is_so
  ]
  if wrong:
    return None, f"{', '.join(wrong)} of the image processor is not expressible"
  # They compute (v / 255 - mean) / std.
  low, high = (float((x - min(mean)) / min(std)) for x in (0, 1))
  return (
    f"decode|resize({size}, method='{methods[got['resample']]}')"
    f"|value_range({low!r}, {high!r})|keep('image')"
  ), None


def pp_text(source, length):
  """Returns (pipe string or None, note or None) of a tokenizer.

  Args:
    source: the folder.
    length: L, tokens.
  """
  got = _first(source, "tokenizer_config.json")
  if not got:
    return None, "the folder has no tokenizer_config.json"
  kind = got.get("tokenizer_class", "")
  fast = _first(source, "tokenizer.json")
  lower = kind in LOWER and got.get("do_lower_case", True)
  lower = lower or '"Lowercase"' in json.dumps(fast.get("normalizer"))
  pad = got.get("pad_token")
  pad = pad.get("content") if isinstance(pad, dict) else pad
  pads = {
    token["content"]: token["id"] for token in fast.get("added_tokens", [])
  }
  # Without tokenizer.json: what SigLIP's and Gemma's vocabularies have.
  pad = {"</s>": 1, "<pad>": 0, **pads}.get(pad)
  if pad is None:
    return None, "the folder does not tell which token pads"
  tokenize = f"tokenize({length}{'' if pad == 1 else f', pad={pad}'})"
  note = None
  if kind == "SiglipTokenizer":
    note = (
      "transformers' SiglipTokenizer also removes punctuation; here it stays"
    )
  return f"{'lower|' if lower else ''}{tokenize}|keep('text')", note


def _first(source, *names):
  """Returns the dict in the first of these JSON files that is there, or {}."""
  found = [source / name for name in names if (source / name).exists()]
  return config_lib.read_json(found[0]) if found else {}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]}?")
  try:
    notes = convert(FLAGS.folder, FLAGS.out, FLAGS.scan)
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  out = pathlib.Path(FLAGS.out)
  print(f"wrote {out}, with config.json:")
  print((out / "config.json").read_text(encoding="utf-8").rstrip())
  for note in notes:
    print(f"note: {note}")


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "A folder for transformers' SiglipModel.")
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.DEFINE_bool("scan", False, "Stack the blocks, as SigLIP 2 files do.")
  flags.mark_flags_as_required(["folder", "out"])
  app.run(main)
