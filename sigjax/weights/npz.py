"""Reads and writes .npz files of weights in the layout of the released ones.

Arrays are named like the parameters, such as "txt/head/kernel"; all names or
none have "params/" in front. SigLIP files keep every layer's arrays under
encoderblock_0, _1, .. SigLIP 2 files stack them under one encoderblock, with a
leading layer axis. Both can be read into both forms of model. The same holds
for EncDecBlock0, 1, .. and EncDecBlock of a captioning decoder.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import logging
import math
import os
import re
from typing import Any
import zipfile

from etils import epath
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sigjax import errors, trees
from sigjax.models import vit
from sigjax.runtime import files
from sigjax.weights import fetch, known

log = logging.getLogger("sigjax")

# Of unstacked blocks: the name that they have when stacked, and the number.
_LAYER = re.compile(r"(?<=/)(encoderblock(?=_)|EncDecBlock)_?([0-9]{1,9})(?=/)")
_stacked = r"\1"

AnyPath = str | os.PathLike[str]

# Files made before flax linen, such as the public ViTs (arXiv 2010.11929) and
# AugReg ViTs (arXiv 2106.10270), number all layers of a block in one sequence.
OLD_NAMES = [
  (r"(encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
  (r"(encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
  (
    r"(encoderblock_\d+)/MultiHeadDotProductAttention_1/",
    r"\1/MultiHeadDotProductAttention_0/",
  ),
  (r"Transformer/posembed_input/pos_embedding", "pos_embedding"),
]


def load_params(
  path: AnyPath,
  like: Any = None,
  dont_load: Sequence[str] = (),
  may_lack: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads parameters from a .npz file, to fit a model.

  Args:
    path: a file, local or one that etils.epath opens, a URL (gs://, s3://,
      https://; see fetch.local), or a name in known.KNOWN. With a suffix, as in
      "file.npz:img" or "siglip/b16_256:img", only the arrays below img/ are
      read, and are named without it.
    like: the model's parameters, or their shapes from jax.eval_shape. None
      returns everything, named as in the file.
    dont_load: regexes of whole names that are not read, whether or not the
      file has them: they stay what they are in `like`.
    may_lack: parts of the tree, such as "dec", that stay what they are in
      `like` if the file has nothing of them.

  Returns:
    Nested dicts like `like`, of float32 numpy arrays; the leaf of `like` itself
    for what is not read.

  To fit `like`, blocks are stacked or unstacked, the position of "cls" is added
  to "cls", and learned image positions are resampled. Of learned text positions
  the first ones are used, and the log says so.

  Raises:
    UserError: the file is missing, damaged or cannot be fetched; or it does not
      fit, in which case all arrays are listed that are missing, left over or of
      another shape. A model for longer texts than the file's is refused.
  """
  file, part = known.split(path)
  flat = _rename(_read(file, part), part, file)
  if like is not None:
    return fit(flat, like, dont_load, path, may_lack)
  for name in flat:
    parents = name.split("/")[:-1]
    for i in range(1, len(parents) + 1):
      if "/".join(parents[:i]) in flat:
        raise errors.UserError(
          f"{path} has an array {'/'.join(parents[:i])} and another one, "
          f"{name}, below it"
        )
  return trees.unflatten(flat)


def fit(
  flat: dict[str, Any],
  like: Any,
  dont_load: Sequence[str],
  path: AnyPath,
  may_lack: Sequence[str] = (),
) -> Any:
  """Fits arrays to a model.

  Args:
    flat: {name: array}.
    like, dont_load, path, may_lack: see load_params, as are the errors.

  Returns:
    A tree like `like`.
  """
  there = {name.split("/")[0] for name in flat}
  lacking = [f"{re.escape(x)}/.*" for x in may_lack if x not in there]
  dont_load = (*dont_load, *lacking)
  skip = re.compile("|".join(f"(?:{p})" for p in dont_load) or r"(?!)")
  want = trees.flatten(like)
  flat = _stack(_unstack(flat, keep=want), want)
  want = {k: v for k, v in want.items() if not skip.fullmatch(k)}
  other = {
    k: v for k, v in flat.items() if not jnp.issubdtype(v.dtype, jnp.floating)
  }
  for name in sorted(other.keys() & want.keys()):
    raise errors.UserError(
      f"{path}: {name} has values of type {other[name].dtype}, but weights are "
      "real numbers"
    )
  flat = {k: v for k, v in flat.items() if k not in other}
  _fit_image_positions(flat, want)
  _fit_patches(flat, want)
  _fit_text_positions(flat, want, path)
  flat = {k: v for k, v in {**flat, **other}.items() if not skip.fullmatch(k)}
  lines = trees.difference(want, flat)
  if lines:
    count = f"{len(lines)} array{'s' if len(lines) > 1 else ''}"
    lines[0] = f"{path} does not fit the model in {count}: {lines[0]}"
    lines.append("(dont_load takes regexes of names to leave as they are)")
    raise errors.UserError("\n  ".join(lines))
  return trees.map_named(lambda name, leaf: flat.get(name, leaf), like)


def save_params(path: AnyPath, params: Any, scan: bool = False) -> None:
  """Writes parameters as a .npz file, whole or not at all.

  Args:
    path: a file, local or one that etils.epath opens.
    params: nested dicts of arrays, of a model in either form.
    scan: False for encoderblock_0, _1, .. as in SigLIP files, True for stacked
      blocks as in SigLIP 2 files.

  Raises:
    UserError: the file cannot be written.
  """
  flat = {k: np.asarray(v) for k, v in trees.flatten(params).items()}
  names = {_LAYER.sub(_stacked, f"/{k}")[1:] for k in flat}
  keep = names if scan else ()
  flat = _stack(_unstack(flat, keep), keep)
  arrays: dict[str, Any] = {f"params/{k}": flat[k] for k in sorted(flat)}
  path = epath.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as aside, aside.open("wb") as f:
      np.savez(f, **arrays)
  except OSError as e:
    raise errors.UserError(
      f"cannot write {path}: {e.strerror or e}; make room, or name another "
      "place"
    ) from e


def _read(path: str, part: str) -> dict[str, np.ndarray]:
  """Returns {name: array} of a .npz file as stored, of one part if given."""
  again = ""
  file = path
  try:
    if fetch.is_url(path):
      file = fetch.local(path, known.names())
      again = f"; delete it to fetch it again from {path}"
    # allow_pickle=False: a foreign file must not run code.
    with epath.Path(file).open("rb") as f:
      return _arrays(f, part)
  except FileNotFoundError:
    raise errors.UserError(known.no_file(path)) from None
  except errors.UserError:  # a ValueError, too
    raise
  except (ImportError, OSError) as e:  # such as hdfs:// without its library
    raise errors.UserError(f"cannot read {file}: {e}") from None
  except MemoryError:
    raise errors.UserError(f"{file} does not fit into memory") from None
  except Exception as e:  # zipfile and numpy raise anything
    raise errors.UserError(
      f"{file} is not a .npz file, or not a whole one{again}"
    ) from e


def _arrays(file: Any, part: str) -> dict[str, np.ndarray]:
  """Returns {name: array} of an open .npz file, of one part if given."""
  if not zipfile.is_zipfile(file):
    raise ValueError("no zip file")
  prefix = f"{part.strip('/')}/" if part else ""
  with zipfile.ZipFile(file) as zipped:
    members = {
      info.filename.removesuffix(".npy"): info for info in zipped.infolist()
    }
    names = [
      name
      for name in members
      if name.removeprefix("params/").startswith(prefix)
    ]
    size = file.seek(0, os.SEEK_END)
    return {
      name: _array(zipped, members[name], size) for name in names or members
    }


def _array(
  zipped: zipfile.ZipFile, member: zipfile.ZipInfo, file_size: int
) -> np.ndarray:
  """Returns the array of a member, whose claimed sizes are checked first.

  Raises:
    ValueError: it is no array, or claims sizes that it cannot have.
  """
  # Deflate shrinks nothing to less than 1/1032. Members that are compressed
  # otherwise are not numpy's.
  most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
  if member.compress_size > file_size or (
    member.file_size > member.compress_size * most[member.compress_type]
  ):
    raise ValueError("sizes that cannot be")
  with zipped.open(member) as f:
    version = np.lib.format.read_magic(f)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(f)
    # A dimension of 0 would let the others be of any size.
    if math.prod(shape) * dtype.itemsize != member.file_size - f.tell() or (
      max(shape, default=0) > member.file_size
    ):
      raise ValueError("a shape that cannot be")
  with zipped.open(member) as f:
    # allow_pickle=False: a foreign file must not run code.
    return np.lib.format.read_array(f, allow_pickle=False)


def _rename(
  flat: dict[str, np.ndarray], part: str, path: str
) -> dict[str, np.ndarray]:
  """Returns the arrays in float32 under today's names, without "params/"."""
  if any(name.startswith("params/") for name in flat):
    # Other arrays, such as optimizer states, are not needed.
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
    if value.dtype == "V2":  # numpy reads bfloat16 so
      value = value.view(ml_dtypes.bfloat16)
    if value.dtype.kind in "fiu" or value.dtype == ml_dtypes.bfloat16:
      value = value.astype(np.float32, copy=False)
    out[name] = value
  return out


def _unstack(
  flat: Mapping[str, np.ndarray], keep: Collection[str] = ()
) -> dict[str, np.ndarray]:
  """Returns flat with encoderblock_0, .. in place of an encoderblock.

  Arrays whose names are in `keep` stay stacked.
  """
  out = {}
  for name, value in flat.items():
    found = re.fullmatch(r"(.*/)(encoderblock|EncDecBlock)(/.*)", f"/{name}")
    if found and name not in keep and value.ndim:
      head, block, tail = found.groups()
      number = "_" if block == "encoderblock" else ""
      for i, layer in enumerate(value):
        out[f"{head}{block}{number}{i}{tail}"[1:]] = layer
    else:
      out[name] = value
  return out


def _stack(
  flat: Mapping[str, np.ndarray], names: Collection[str]
) -> dict[str, np.ndarray]:
  """Stacks encoderblock_0, .. where `names` have an encoderblock."""
  out: dict[str, np.ndarray] = {}
  layers: dict[str, dict[int, np.ndarray]] = {}
  for name, value in flat.items():
    found = _LAYER.search(f"/{name}")
    stacked = _LAYER.sub(_stacked, f"/{name}")[1:]
    if found and stacked in names:
      layers.setdefault(stacked, {})[int(found[2])] = value
    else:
      out[name] = value
  for name, by_layer in layers.items():
    if sorted(by_layer) != list(range(len(by_layer))):
      raise errors.UserError(
        f"of {name} there are only layers "
        f"{', '.join(map(str, sorted(by_layer)))}"
      )
    if len({value.shape for value in by_layer.values()}) > 1:
      raise errors.UserError(
        f"the layers of {name} have shapes "
        f"{', '.join(str(v.shape) for v in by_layer.values())}"
      )
    out[name] = np.stack([by_layer[i] for i in sorted(by_layer)])
  return out


def _positions(
  flat: Mapping[str, np.ndarray], beside: str
) -> Iterator[tuple[str, str]]:
  """Yields (prefix, name) of position tables whose tower has another array.

  Args:
    flat: {name: array}.
    beside: the name of that array within the tower.
  """
  for name in list(flat):
    tower, found, rest = name.rpartition("pos_embedding")
    # NaFlex tables, (rows, columns, width), are not a list of patches.
    if (
      found
      and not rest
      and tower + beside in flat
      and flat[name].ndim == 3
      and flat[name].shape[0] == 1
    ):
      yield tower, name


def _fit_image_positions(
  flat: dict[str, np.ndarray], want: Mapping[str, Any]
) -> None:
  """Resamples image position tables in place, to the shapes in `want`."""
  for tower, name in _positions(flat, "embedding/kernel"):
    table = flat[name]
    cls = flat.get(tower + "cls")
    if (
      cls is not None
      and cls.shape == table[:, :1].shape
      and _grid(table.shape[1] - 1)
    ):
      # The first row is the position of cls (AugReg).
      flat[tower + "cls"] = cls + table[:, :1]
      table = table[:, 1:]
    new = want.get(name, table)
    old_grid, new_grid = _grid(table.shape[1]), _grid(new.shape[1])
    if old_grid and new_grid and old_grid != new_grid:
      grid = new_grid, new_grid
      table = np.asarray(vit.resized_positions(jnp.asarray(table), grid))
      log.info(
        "%s: resampled from %d x %d to %d x %d patches",
        name,
        old_grid,
        old_grid,
        new_grid,
        new_grid,
      )
    flat[name] = table


def _fit_patches(flat: dict[str, np.ndarray], want: Mapping[str, Any]) -> None:
  """Resamples kernels of patches in place, to the shapes in `want`."""
  for name, kernel in flat.items():
    old = kernel.shape
    new = tuple(getattr(want.get(name), "shape", old))
    square = len(old) == len(new) == 4 and old[0] == old[1] and new[0] == new[1]
    if not f"/{name}".endswith("/embedding/kernel") or not square:
      continue
    if old[0] and old != new and old[2:] == new[2:]:
      resized = vit.resized_kernel(jnp.asarray(kernel), new[0])
      flat[name] = np.asarray(resized)
      log.info(
        "%s: resampled from patches of %d x %d to %d x %d pixels",
        name,
        *old[:2],
        *new[:2],
      )


def _fit_text_positions(
  flat: dict[str, np.ndarray], want: Mapping[str, Any], path: AnyPath
) -> None:
  """Cuts text position tables in place, to the lengths in `want`."""
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


def _grid(patches: int) -> int:
  """Returns the side of a square grid of patches, or 0 if it is no square."""
  side = math.isqrt(patches)
  return side if side * side == patches else 0
