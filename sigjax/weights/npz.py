"""Reads and writes the released .npz files.

Names are those of the parameters, such as "txt/head/kernel", all of them with
"params/" before or none. SigLIP files keep every layer's arrays under
encoderblock_0, _1, ..; SigLIP 2 files stack them under one encoderblock, with a
leading layer axis. Either is read into either form of model.
"""

import logging
import math
import os
import re
import zipfile
import zlib

from etils import epath
import jax
import ml_dtypes
import numpy as np

from sigjax import errors, trees
from sigjax.weights import fetch, known

log = logging.getLogger("sigjax")

# Files from before flax linen, such as the public ViTs (arXiv 2010.11929) and
# AugReg ViTs (arXiv 2106.10270), count the layers of a block together.
OLD_NAMES = [
  (r"(encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
  (r"(encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
  (
    r"(encoderblock_\d+)/MultiHeadDotProductAttention_1/",
    r"\1/MultiHeadDotProductAttention_0/",
  ),
  (r"Transformer/posembed_input/pos_embedding", "pos_embedding"),
]


def load_params(path, like=None, dont_load=()):
  """Reads parameters from a .npz file, to fit a model.

  Args:
    path: a local file or one that etils.epath opens, a URL (gs://, s3://,
      https://; see fetch.local), or a name from known.KNOWN. With a suffix,
      "file.npz:img" or "siglip/b16_256:img", only the arrays under img/, named
      without it.
    like: the model's parameters, or their shapes from jax.eval_shape. Without
      it everything is returned as named in the file.
    dont_load: regexes of whole names that are not taken from the file, whether
      or not it has them: they stay what they are in `like`.

  Returns:
    Nested dicts like `like` of float32 numpy arrays; where dont_load matches,
    the leaf of `like` itself.

  To fit `like`, blocks are stacked or unstacked, a position row of "cls" is
  added to "cls", learned image positions are resampled, and of text positions
  the first ones are taken (see the log).

  Raises:
    UserError: the file is missing or damaged, or cannot be fetched; or it does
      not fit: all arrays that are missing, left over or of another shape are
      listed. A model for longer texts than the file's is refused.
  """
  file, part = known.split(path)
  flat = _rename(_read(file, part), part, file)
  return (
    trees.unflatten(flat) if like is None else fit(flat, like, dont_load, path)
  )


def fit(flat, like, dont_load, path):
  """Fits {name: array} to a model; arguments and errors as in load_params."""
  skip = re.compile("|".join(f"(?:{p})" for p in dont_load) or r"(?!)")
  want = trees.flatten(like)
  flat = _stack(_unstack(flat, keep=want), want)
  want = {k: v for k, v in want.items() if not skip.fullmatch(k)}
  _fit_image_positions(flat, want)
  _fit_text_positions(flat, want, path)
  flat = {k: v for k, v in flat.items() if not skip.fullmatch(k)}
  lines = trees.difference(want, flat)
  if lines:
    count = f"{len(lines)} array{'s' if len(lines) > 1 else ''}"
    lines[0] = f"{path} does not fit the model in {count}: {lines[0]}"
    lines.append("(dont_load takes regexes of names to leave as they are)")
    raise errors.UserError("\n  ".join(lines))
  return trees.map_named(lambda name, leaf: flat.get(name, leaf), like)


def save_params(path, params, scan=False):
  """Writes parameters as a .npz file in the layout of the released ones.

  The file is written aside and renamed: `path` is never half a file.

  Args:
    path: a file, local or one that etils.epath opens.
    params: nested dicts of arrays, of a model in either form.
    scan: False for encoderblock_0, _1, .. as in SigLIP files, True for stacked
      blocks as in SigLIP 2 files.

  Raises:
    UserError: it cannot be written.
  """
  flat = {k: np.asarray(v) for k, v in trees.flatten(params).items()}
  names = {re.sub(r"encoderblock_\d+/", "encoderblock/", k) for k in flat}
  keep = names if scan else ()
  flat = _stack(_unstack(flat, keep), keep)
  path = epath.Path(path)
  aside = path.parent / f"{path.name}.{os.getpid()}.partial"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with aside.open("wb") as f:
        np.savez(f, **{f"params/{k}": flat[k] for k in sorted(flat)})
      aside.replace(path)
    except BaseException:
      aside.unlink(missing_ok=True)
      raise
  except OSError as e:
    raise errors.UserError(
      f"cannot write {path}: {e.strerror or e}; make room, or name another "
      "place"
    ) from e


def _read(path, part):
  """Returns {name: array} of a .npz file, as stored; the part's, if any."""
  again = ""
  file = path
  try:
    if fetch.is_url(path):
      file = fetch.local(path, known.names())
      again = f"; delete it to fetch it again from {path}"
    # allow_pickle=False: a file from elsewhere must not run code.
    with epath.Path(file).open("rb") as f:
      arrays = np.load(f, allow_pickle=False)
      if isinstance(arrays, np.ndarray):
        raise ValueError("a single array")
      prefix = f"{part.strip('/')}/" if part else ""
      names = [
        name
        for name in arrays.files
        if name.removeprefix("params/").startswith(prefix)
      ]
      arrays = {name: arrays[name] for name in names or arrays.files}
      if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise ValueError("a zip file of something else, such as PyTorch's")
      return arrays
  except FileNotFoundError:
    raise errors.UserError(known.no_file(path)) from None
  except errors.UserError:  # Is a ValueError, too.
    raise
  except (ImportError, OSError) as e:  # Such as hdfs:// without its library.
    raise errors.UserError(f"cannot read {file}: {e}") from None
  except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
    raise errors.UserError(
      f"{file} is not a .npz file, or not a whole one{again}"
    ) from None


def _rename(flat, part, path):
  """Returns the arrays in float32 under today's names, without "params/"."""
  if any(name.startswith("params/") for name in flat):
    # What else there is, optimizer states for one, is not asked for.
    flat = {
      name.removeprefix("params/"): value
      for name, value in flat.items()
      if name.startswith("params/")
    }
  if part:
    prefix = part.strip("/") + "/"
    parts = {name.split("/")[0] for name in flat}
    flat = {
      name.removeprefix(prefix): value
      for name, value in flat.items()
      if name.startswith(prefix)
    }
    if not flat:
      raise errors.UserError(
        f'{path} has no part "{part}"{errors.closest(part, parts)}; '
        f"it has: {', '.join(sorted(parts))}"
      )
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


def _unstack(flat, keep=()):
  """Returns flat with encoderblock_0, _1, .. in place of an encoderblock.

  Names in `keep` stay, which saves taking apart and stacking again.
  """
  out = {}
  for name, value in flat.items():
    head, block, tail = f"/{name}".partition("/encoderblock/")
    if block and name not in keep:
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
    if sorted(by_layer) != list(range(len(by_layer))):
      raise errors.UserError(
        f"of {name} there are layers {', '.join(map(str, sorted(by_layer)))}"
        " alone"
      )
    if len({value.shape for value in by_layer.values()}) > 1:
      raise errors.UserError(
        f"the layers of {name} have shapes "
        f"{', '.join(str(v.shape) for v in by_layer.values())}"
      )
    out[name] = np.stack([by_layer[i] for i in sorted(by_layer)])
  return out


def _positions(flat, beside):
  """Returns (tower, name) of position tables that stand beside an array."""
  for name in list(flat):
    tower, found, rest = name.rpartition("pos_embedding")
    # Other than (1, rows, width): of NaFlex, not a list of patches.
    if (
      found
      and not rest
      and tower + beside in flat
      and (flat[name].ndim == 3 and flat[name].shape[0] == 1)
    ):
      yield tower, name


def _fit_image_positions(flat, want):
  """Adapts image position tables, in place, to the shapes that are wanted."""
  for tower, name in _positions(flat, "embedding/kernel"):
    table = flat[name]
    if tower + "cls" in flat and _grid(table.shape[1] - 1):
      # The first row is the position of cls (AugReg).
      flat[tower + "cls"] = flat[tower + "cls"] + table[:, :1]
      table = table[:, 1:]
    new = want[name] if name in want else table
    old_grid, new_grid = _grid(table.shape[1]), _grid(new.shape[1])
    if old_grid and new_grid and old_grid != new_grid:
      table = _resample(table, old_grid, new_grid)
      log.info(
        "%s: resampled from %d x %d to %d x %d patches",
        name,
        old_grid,
        old_grid,
        new_grid,
        new_grid,
      )
    flat[name] = table


def _fit_text_positions(flat, want, path):
  """Cuts text position tables, in place, to the length that is wanted."""
  for _, name in _positions(flat, "Embed_0/embedding"):
    table, new = flat[name], want.get(name, flat[name])
    if new.shape[2:] != table.shape[2:]:
      continue
    have, length = table.shape[1], new.shape[1]
    if have < length:
      raise errors.UserError(
        f"{path} is for texts of {have} tokens, the model for {length} "
        f"({name}): cut texts to {have} tokens, or name it in dont_load"
      )
    if have > length:
      log.info("%s: the first %d of %d positions", name, length, have)
      flat[name] = table[:, :length]


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
