"""Reads a Hugging Face folder of SigLIP or SigLIP 2, NaFlex or not.

  python -m tools.convert_from_hf --folder FOLDER --out OUT

OUT is a folder that holds:

  params.npz       the weights, in the layout of the released files. With --scan
                   the blocks are stacked, as in those of SigLIP 2. A captioning
                   decoder, decoder.npz of tools.convert_to_hf, is among them
  config.json      `model`, the keyword arguments of TwoTowers; `pp_image` and
                   `pp_text`, if the folder says enough about them; `losses`, if
                   there is a decoder
  tokenizer.model  the SentencePiece model, if the folder has one

tools.convert_to_hf --weights OUT/params.npz converts back. Weights are read
from model.safetensors, which may be split into several files, and become
float32.

Images are prepared with Pillow, as transformers does without torchvision. With
it, transformers resizes with PyTorch, which rounds otherwise.

Needs: pip install 'sigjax[hf]'
"""

from collections.abc import Mapping
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from sigjax import errors, trees
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import decoder as decoder_lib
from sigjax.models import two_towers
from sigjax.runtime import program
from sigjax.weights import npz
from tools.hf import config as config_lib
from tools.hf import names as names_lib

FLAGS = flags.FLAGS

# Tokenizers that lower-case texts. Gemma's do not, but SigLIP 2, which uses
# them, was trained on lower-case texts.
LOWER = (
  "SiglipTokenizer",
  "Siglip2Tokenizer",
  "GemmaTokenizer",
  "GemmaTokenizerFast",
)

# The defaults of SiglipImageProcessor, for keys that preprocessor_config.json
# leaves out.
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


# The same of Siglip2ImageProcessor. Those that are not sizes have to be so.
PATCH_DEFAULTS: dict[str, Any] = dict(
  max_num_patches=256,
  patch_size=16,
  do_resize=True,
  resample=2,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=[0.5] * 3,
  image_std=[0.5] * 3,
)


class Folder(NamedTuple):
  """What a folder of Hugging Face holds.

  Attributes:
    config: `model`, unrolled; `pp_image` and `pp_text`, if the folder says
      enough about them; `losses` with a decoder.
    arrays: {name: array} in the layout of the released files, unrolled; a
      decoder's below "dec".
    tokenizer: the SentencePiece model; None if there is none.
    notes: about what the folder does not say, or cannot be expressed exactly.
  """

  config: dict[str, Any]
  arrays: dict[str, Any]
  tokenizer: pathlib.Path | None
  notes: list[str]


def read(source: str | os.PathLike[str]) -> Folder:
  """Reads a folder that SiglipModel or Siglip2Model.from_pretrained loads.

  Raises:
    UserError: something is missing or cannot be expressed. If arrays do not fit
      config.json, all of them are listed.
  """
  source = pathlib.Path(source)
  model, size, length = config_lib.read_config(source / "config.json")
  _, like = config_lib.describe(two_towers.TwoTowers(**model), size, length)
  arrays = names_lib.to_ours(read_arrays(source), like, source)
  config: dict[str, Any] = dict(model=model)
  if (source / "decoder.npz").exists():
    found, config["losses"] = decoder(source / "decoder.npz", model)
    arrays.update(found)
  notes = []
  for key, (value, note) in {
    "pp_image": (
      pp_patches(source, model["image"]["patch_size"])
      if model["image"].get("kind") == "naflex"
      else pp_image(source, size)
    ),
    "pp_text": pp_text(source, length),
  }.items():
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
    tokenizer_lib.Tokenizer(pieces)  # checked before it is copied
  else:
    notes.append(
      "tokenizer.model: the folder has no SentencePiece model "
      "(tokenizer.model or spiece.model)"
    )
  return Folder(config, arrays, pieces, notes)


def convert(
  source: str | os.PathLike[str],
  out: str | os.PathLike[str],
  scan: bool = False,
) -> list[str]:
  """Writes the folder `out`, all of it or nothing.

  Args:
    source: a folder that SiglipModel.from_pretrained loads.
    out: the folder to make, see above; it must not exist yet.
    scan: whether blocks are stacked.

  Returns:
    The notes of read().

  Raises:
    UserError: as read() does; or the folder cannot be made.
  """
  config, arrays, pieces, notes = read(source)
  if scan:
    config["model"]["image"]["scan"] = config["model"]["text"]["scan"] = True
  with config_lib.new_folder(out) as folder:
    npz.save_params(folder / "params.npz", trees.unflatten(arrays), scan)
    config_lib.write_json(folder / "config.json", config)
    if pieces:
      shutil.copyfile(pieces, folder / "tokenizer.model")
  return notes


def decoder(
  file: pathlib.Path, model: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads the captioning decoder beside a model.

  Args:
    file: what tools.convert_to_hf wrote.
    model: keyword arguments of TwoTowers.

  Returns:
    {name: array}, all below "dec"; and config.losses of a run with it.

  Raises:
    UserError: it is not a decoder, or not of this model.
  """
  params = npz.load_params(file)
  if set(params) != {"dec"}:
    raise errors.UserError(f'{file} has to hold the parameters of "dec" alone')
  made = decoder_lib.of_params(params["dec"])
  towers = two_towers.TwoTowers(**model)
  image, text = two_towers.image_tower(towers), two_towers.text_tower(towers)
  made = made.clone(vocab_size=text.vocab_size)
  # With regions (docs/siglip2.md) it is not that of the text tower.
  table = trees.flatten(params).get("dec/pos_embedding", np.zeros((1, 2, 1)))
  like = jax.eval_shape(
    made.init,
    jax.random.key(0),
    np.zeros((1, 1, image.sizes().width), np.float32),
    np.zeros(table.shape[:2], np.int32),
    np.zeros(1, bool),
  )["params"]
  if lines := trees.difference({"dec": like}, params):
    raise errors.UserError(
      f"{file} is not of this model: {lines[0]}"
      + (f", and {len(lines) - 1} more" if lines[1:] else "")
    )
  section = dict(type="caption", **made.size._asdict())
  return trees.flatten(params), dict(caption=section)


def read_arrays(source: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns {name: array} of model.safetensors, or of the files it is split in.

  Raises:
    UserError: a file is missing or damaged.
  """
  safetensors = config_lib.need("safetensors")
  load_file = config_lib.need("safetensors.numpy").load_file
  index = source / "model.safetensors.index.json"
  if (source / "model.safetensors").exists():
    names = ["model.safetensors"]
  elif index.exists():
    files = config_lib.read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
      isinstance(name, str) and pathlib.PurePath(name).name == name
      for name in files.values()
    ):
      raise errors.UserError(
        f'{index}: "weight_map" has to give a file name for each array'
      )
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
    except (
      OSError,
      safetensors.SafetensorError,
      KeyError,  # a dtype that NumPy does not have
      TypeError,
    ) as e:
      raise errors.UserError(f"cannot read {source / name}: {e}") from None
  return arrays


def pp_image(source: pathlib.Path, size: int) -> tuple[str | None, str | None]:
  """Returns the pipe string of an image processor, and a note.

  Args:
    source: the folder.
    size: H and W of the images that the model takes.

  Returns:
    The pipe string, or None if the processor is missing or cannot be expressed;
    and what there is to say about it, or None.
  """
  got = _image_processor(source, PIXEL_DEFAULTS)
  if not got:
    return None, _NO_PROCESSOR
  method = next(
    (m for m, n in config_lib.RESAMPLE.items() if n == got["resample"]), None
  )
  mean, std = _equal(got["image_mean"]), _equal(got["image_std"])
  wrong = [
    key
    for key, is_so in dict(
      do_resize=not got["do_resize"],
      do_rescale=not got["do_rescale"],
      do_normalize=not got["do_normalize"],
      image_mean=mean is None,
      image_std=std is None or std <= 0,
      rescale_factor=got["rescale_factor"] != 1 / 255,
      size=got["size"] != dict(height=size, width=size),
      resample=method is None,
    ).items()
    if is_so
  ]
  if wrong or mean is None or std is None:
    return (
      None,
      f"{', '.join(wrong)} of the image processor cannot be expressed",
    )
  # transformers computes (v / 255 - mean) / std.
  low, high = (float((x - mean) / std) for x in (0, 1))
  return (
    f"decode|resize({size}, method='{method}')"
    f"|value_range({low!r}, {high!r})|keep('image')"
  ), None


def pp_patches(
  source: pathlib.Path, patch: int
) -> tuple[str | None, str | None]:
  """Returns the same as pp_image, of NaFlex.

  Args:
    source: the folder.
    patch: the side of a patch of the model, pixels.
  """
  got = _image_processor(source, PATCH_DEFAULTS)
  if not got:
    return None, _NO_PROCESSOR
  length = got["max_num_patches"]
  want = dict(PATCH_DEFAULTS, patch_size=patch, max_num_patches=length)
  wrong = [key for key, value in want.items() if got[key] != value]
  string = f"decode|resize_to_patches({length!r:.20},{patch})|keep('image')"
  try:
    preprocess.parse(string)
  except errors.UserError:
    wrong.append("max_num_patches")
  if wrong:
    return (
      None,
      f"{', '.join(wrong)} of the image processor cannot be expressed",
    )
  return string, None


_NO_PROCESSOR = "the folder has no preprocessor_config.json"


def _image_processor(
  source: pathlib.Path, defaults: dict[str, Any]
) -> dict[str, Any]:
  """Returns the keys of a folder's image processor; {} if it has none."""
  got = _first(source, "preprocessor_config.json", "processor_config.json")
  inner = got.get("image_processor", got)
  return got and {**defaults, **(inner if isinstance(inner, dict) else {})}


def _equal(values: Any) -> float | None:
  """Returns the number that all values of a list are; None if they are not."""
  if not isinstance(values, list) or not values:
    return None
  first = values[0]
  if isinstance(first, bool) or not isinstance(first, (int, float)):
    return None
  same = all(x == first for x in values)
  return first if same and abs(first) < 1e6 else None  # no nan or inf either


def pp_text(source: pathlib.Path, length: int) -> tuple[str | None, str | None]:
  """Returns the pipe string of a tokenizer, and a note, as pp_image does.

  Args:
    source: the folder.
    length: L, the number of tokens.
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
  # Without tokenizer.json: the ids of SigLIP's and Gemma's vocabularies.
  pads: dict[str, Any] = {"</s>": 1, "<pad>": 0}
  tokens = fast.get("added_tokens")
  for token in tokens if isinstance(tokens, list) else ():
    if isinstance(token, dict) and isinstance(token.get("content"), str):
      pads[token["content"]] = token.get("id")
  pad = pads.get(pad) if isinstance(pad, str) else None
  if not isinstance(pad, int) or not 0 <= pad < 2**31:
    return None, "the folder does not say which token is the padding"
  tokenize = f"tokenize({length}{'' if pad == 1 else f', pad={pad}'})"
  note = None
  if kind == "SiglipTokenizer":
    note = (
      "transformers' SiglipTokenizer also removes punctuation; sigjax keeps it"
    )
  inputs = got.get("model_input_names", ["input_ids", "attention_mask"])
  if kind == "Siglip2Tokenizer" and inputs != ["input_ids"]:
    note = (
      "transformers' Siglip2Tokenizer masks the padding unless "
      'model_input_names is ["input_ids"]; sigjax never does, as in training'
    )
  return f"{'lower|' if lower else ''}{tokenize}|keep('text')", note


def _first(source: pathlib.Path, *names: str) -> dict[str, Any]:
  """Returns the dict in the first of these JSON files that exists, or {}."""
  found = [source / name for name in names if (source / name).exists()]
  return config_lib.read_json(found[0]) if found else {}


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  notes = convert(FLAGS.folder, FLAGS.out, FLAGS.scan)
  out = pathlib.Path(FLAGS.out)
  print(f"wrote {out}, with config.json:")
  print((out / "config.json").read_text(encoding="utf-8").rstrip())
  for note in notes:
    print(f"note: {note}")


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "A folder of Hugging Face.")
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.DEFINE_bool("scan", False, "Stacks the blocks, as SigLIP 2 files do.")
  flags.mark_flags_as_required(["folder", "out"])
  program.run(main)
