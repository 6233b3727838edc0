"""Reads and writes the released .npz files.

Names are those of the parameters, such as "txt/head/kernel", all of them with
"params/" before or none. SigLIP files keep every layer's arrays under
encoderblock_0, _1, ..; SigLIP 2 files stack them under one encoderblock, with a
leading layer axis. Either is read into either form of model.
"""

import math
import re
import zipfile
import zlib

from absl import logging
from etils import epath
import jax
import ml_dtypes
import numpy as np

from sigjax import errors
from sigjax import trees

# Files from before flax linen, such as the public ViTs (arXiv 2010.11929) and
# AugReg ViTs (arXiv 2106.10270), count the layers of a block together.
OLD_NAMES = [
    (r"(encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"(encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    (r"(encoderblock_\d+)/MultiHeadDotProductAttention_1/",
     r"\1/MultiHeadDotProductAttention_0/"),
    (r"Transformer/posembed_input/pos_embedding", "pos_embedding"),
]


def load_params(path, like=None, dont_load=()):
  """Reads parameters from a .npz file, to fit a model.

  Args:
    path: a file, local or anything etils.epath opens (gs://..). With a suffix,
      "file.npz:img", only the arrays under img/, named without it.
    like: the model's parameters, or their shapes from jax.eval_shape. Without
      it everything is returned as named in the file.
    dont_load: regexes of whole names that are not taken from the file, whether
      or not it has them: they stay what they are in `like`.

  Returns:
    Nested dicts like `like` of float32 numpy arrays; where dont_load matches,
    the leaf of `like` itself.

  To fit `like`, blocks are stacked or unstacked, a position row of "cls" is
  added to "cls", and learned image positions are resampled (see the log).

  Raises:
    UserError: the file is missing or damaged, or does not fit: all arrays that
      are missing, left over or of another shape are listed.
  """
  file, colon, part = str(path).partition(".npz:")
  file += ".npz" if colon else ""
  flat = _rename(_read(file), part, file)
  return trees.unflatten(flat) if like is None else fit(
      flat, like, dont_load, path)


def fit(flat, like, dont_load, path):
  """Fits {name: array} to a model; arguments and errors as in load_params."""
  skip = re.compile("|".join(f"(?:{p})" for p in dont_load) or r"(?!)")
  want = trees.flatten(like)
  flat = _stack(_unstack(flat), want)
  want = {k: v for k, v in want.items() if not skip.fullmatch(k)}
  _fit_positions(flat, want)
  flat = {k: v for k, v in flat.items() if not skip.fullmatch(k)}
  lines = trees.difference(want, flat)
  if lines:
    lines[0] = (f"{path} does not fit the model in {len(lines)} arrays: "
                f"{lines[0]}")
    lines.append("(dont_load takes regexes of names to leave as they are)")
    raise errors.UserError("\n  ".join(lines))
  return trees.map_named(lambda name, leaf: flat.get(name, leaf), like)


def save_params(path, params, scan=False):
  """Writes parameters as a .npz file in the layout of the released ones.

  The file is written aside and renamed: `path` is never half a file.

  Args:
    path: as in load_params, without a suffix.
    params: nested dicts of arrays, of a model in either form.
    scan: False for encoderblock_0, _1, .. as in SigLIP files, True for stacked
      blocks as in SigLIP 2 files.
  """
  flat = trees.flatten(params)
  flat = _unstack({k: np.asarray(v) for k, v in flat.items()})
  if scan:
    flat = _stack(flat, [re.sub(r"encoderblock_\d+", "encoderblock", k)
                         for k in flat])
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.parent / f"{path.name}.partial"
  with aside.open("wb") as f:
    np.savez(f, **{f"params/{k}": flat[k] for k in sorted(flat)})
  aside.replace(path)


def _read(path):
  """Returns {name: array} of a .npz file, as stored."""
  try:
    # allow_pickle=False: a file from elsewhere must not run code.
    with epath.Path(path).open("rb") as f:
      arrays = np.load(f, allow_pickle=False)
      if isinstance(arrays, np.ndarray):
        raise ValueError("a single array")
      return {name: arrays[name] for name in arrays.files}
  except FileNotFoundError:
    name = path.rsplit("/", 1)[-1]
    bucket = "siglip2" if name.startswith("siglip2") else "siglip"
    raise errors.UserError(
        f"there is no file {path}; a released one is fetched by: "
        f"gsutil cp gs://big_vision/{bucket}/{name} {path}") from None
  except (ImportError, OSError) as e:  # Such as gs:// without gcsfs.
    raise errors.UserError(f"cannot read {path}: {e}") from None
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
    raise errors.UserError(
        f"{path} is not a .npz file, or not a whole one") from None


def _rename(flat, part, path):
  """Returns the arrays in float32 under today's names, without "params/"."""
  if any(name.startswith("params/") for name in flat):
    # What else there is, optimizer states for one, is not asked for.
    flat = {name.removeprefix("params/"): value
            for name, value in flat.items() if name.startswith("params/")}
  if part:
    prefix = part.strip("/") + "/"
    parts = {name.split("/")[0] for name in flat}
    flat = {name.removeprefix(prefix): value
            for name, value in flat.items() if name.startswith(prefix)}
    if not flat:
      raise errors.UserError(
          f'{path} has no part "{part}"{errors.closest(part, parts)}; '
          f"it has: {', '.join(sorted(parts))}")
  out = {}
  for name, value in flat.items():
    for old, new in OLD_NAMES:
      name = re.sub(old, new, name)
    if value.dtype == "V2":  # What numpy makes of bfloat16 in a file.
      value = value.view(ml_dtypes.bfloat16)
    if value.dtype.kind in "fiuV":
      value = value.astype(np.float32, copy=False)
    out[name] = value
  return out


def _unstack(flat):
  """Returns flat with encoderblock_0, _1, .. in place of an encoderblock."""
  out = {}
  for name, value in flat.items():
    head, block, tail = f"/{name}".partition("/encoderblock/")
    if block:
      for i, layer in enumerate(value):
        out[f"{head}/encoderblock_{i}/{tail}"[1:]] = layer
    else:
      out[name] = value
  return out


def _stack(flat, names):
  """Stacks encoderblock_0, _1, .. where `names` have an encoderblock."""
  out, layers = {}, {}
  for name, value in flat.items():
    stacked = re.sub(r"(^|/)encoderblock_\d+/", r"\1encoderblock/", name)
    if stacked != name and stacked in names:
      i = int(re.search(r"encoderblock_(\d+)/", name).group(1))
      layers.setdefault(stacked, {})[i] = value
    else:
      out[name] = value
  for name, by_layer in layers.items():
    if len({value.shape for value in by_layer.values()}) > 1:
      raise errors.UserError(
          f"the layers of {name} have shapes "
          f"{', '.join(str(v.shape) for v in by_layer.values())}")
    out[name] = np.stack([by_layer[i] for i in sorted(by_layer)])
  return out


def _fit_positions(flat, want):
  """Adapts image position tables, in place, to the shapes that are wanted."""
  for name in [n for n in flat if re.fullmatch(r"(.*/)?pos_embedding", n)]:
    tower = name.removesuffix("pos_embedding")
    table = flat[name]
    if tower + "embedding/kernel" not in flat or table.ndim != 3:
      continue  # Of a text tower, or NaFlex: not a square as a list of patches.
    if tower + "cls" in flat and _grid(table.shape[1] - 1):
      # The first row is the position of cls (AugReg).
      flat[tower + "cls"] = flat[tower + "cls"] + table[:, :1]
      table = table[:, 1:]
    new = want[name] if name in want else table
    old_grid, new_grid = _grid(table.shape[1]), _grid(new.shape[1])
    if old_grid and new_grid and old_grid != new_grid:
      table = _resample(table, old_grid, new_grid)
      logging.info("%s: resampled from %d x %d to %d x %d patches", name,
                   old_grid, old_grid, new_grid, new_grid)
    flat[name] = table


def _grid(patches):
  """Returns the side of a square grid of patches, or 0 if it is not one."""
  side = math.isqrt(patches)
  return side if side * side == patches else 0


def _resample(table, old, new):
  """(1, old * old, W) -> (1, new * new, W), bilinear.

  Pixels are areas (half-pixel centres), and shrinking averages over all old
  positions (antialiased), as when the images themselves are resized.
  """
  table = table.reshape(old, old, -1)
  table = jax.image.resize(table, (new, new, table.shape[-1]), "linear")
  return np.asarray(table).reshape(1, new * new, -1)
