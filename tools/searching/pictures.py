"""The pictures below a folder with their embeddings, which are kept.

They are kept in the cache folder, in search/, a file for each folder and image
tower: an .npz with "about", [file, size, time of change, usable] of each
picture as JSON, and "z", the rows of the usable ones.
"""

import hashlib
import json
import logging
import os
import pathlib
import time
from typing import NamedTuple

from jaxtyping import Float
import numpy as np
import tqdm

from sigjax import errors
from sigjax.data.batches import pipeline
from sigjax.data.faults import BadExample
from sigjax.data.shards import files as files_lib
from sigjax.data.source import Source
from sigjax.runtime import files
from tools.embedding import tower as tower_lib
from tools.predict import Predictor

log = logging.getLogger("sigjax")

BATCH = 64  # the most pictures embedded at a time
SAVE_EVERY = 60  # seconds; a killed program loses no more work than this
NAMED = 3  # of the files that are left out, so many are logged


class Pictures(NamedTuple):
  """The pictures below a folder.

  Attributes:
    folder: the folder, as it was given.
    files: paths within it, with "/", sorted.
    z: their embeddings, unit rows.
    left_out: paths of files that cannot be read or decoded.
    embedded: how many files this call has read; the others were known.
  """

  folder: pathlib.Path
  files: list[str]
  z: Float[np.ndarray, "N E"]
  left_out: list[str]
  embedded: int


class _Known(NamedTuple):
  """What is kept of a file; z is None if it cannot be used."""

  stamp: files_lib.Stamp
  z: Float[np.ndarray, " E"] | None


def embed(folder: str | os.PathLike[str], predictor: Predictor) -> Pictures:
  """Embeds the pictures below a folder, new and changed ones alone.

  A picture is taken to be unchanged if its size and time of change are. Links
  to folders are not followed, and names that begin with a dot are passed over.

  Args:
    folder: the folder, on a disk. Nothing is written there.
    predictor: embeds them.

  Raises:
    UserError: there is no such folder, it has no pictures, none can be decoded,
      or the cache folder cannot be written.
  """
  path = pathlib.Path(folder)
  names = _find(path)
  stamps = files_lib.stamps([f"{path}/{name}" for name in names])
  now = {name: stamp for name, stamp in zip(names, stamps) if stamp}
  key = hashlib.sha256(
    json.dumps([str(path.absolute()), predictor.image_checksum]).encode()
  )
  kept_in = files.cache_dir() / "search" / f"{key.hexdigest()[:32]}.npz"
  before = _read(kept_in)
  known = {
    name: before[name]
    for name, stamp in now.items()
    if name in before and before[name].stamp == stamp
  }
  new = [name for name in now if name not in known]
  try:
    saved = time.monotonic()
    for name, z in _embedded(path, new, predictor):
      known[name] = _Known(now[name], z)
      if time.monotonic() - saved > SAVE_EVERY:
        _write(kept_in, known)
        saved = time.monotonic()
  finally:  # interrupted, too
    if new or len(known) != len(before):
      _write(kept_in, known)
  good = {name: z for name in now if (z := known[name].z) is not None}
  if not good:
    raise errors.UserError(
      f"none of the {len(now)} pictures in {folder} can be decoded, among them "
      f"{next(iter(now), '')}"
    )
  return Pictures(
    path,
    list(good),
    np.stack(list(good.values())),
    [name for name in now if name not in good],
    len(new),
  )


def _find(folder):
  """Returns the image files below a folder, as paths within it, sorted."""
  if not folder.is_dir():
    raise errors.UserError(f"there is no folder {folder}")
  found = []
  for path, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    within = pathlib.Path(path).relative_to(folder)
    found += [
      (within / name).as_posix()
      for name in names
      if name.lower().endswith(files_lib.IMAGES) and not name.startswith(".")
    ]
  if not found:
    raise errors.UserError(
      f"{folder} has no pictures: there is no file "
      f"*{', *'.join(files_lib.IMAGES)} in it or its folders"
    )
  return sorted(found)


def _embedded(folder, names, predictor):
  """Yields (name, embedding), None in its place if a file cannot be used."""
  if not names:
    return
  blank = tower_lib.blank(predictor.pp_image)
  bad: dict[str, str] = {}

  def prepare(example, rng):
    del rng
    name = example["file"]
    try:
      data = files_lib.read_whole(f"{folder}/{name}")
      return {"image": predictor.prepared(data)}
    except (OSError, BadExample) as e:
      bad[name] = e.strerror or str(e) if isinstance(e, OSError) else str(e)
      return {"image": blank}

  source = Source(str(folder), [{"file": name} for name in names])
  # The last batch is filled up: for a few files it is a small one.
  batch_size = min(BATCH, 1 << (len(names) - 1).bit_length())
  with tqdm.tqdm(total=len(names), desc="embedding", unit="picture") as bar:
    rest = iter(names)
    for batch in pipeline.eval_batches(source, prepare, batch_size=batch_size):
      for z, _ in zip(
        np.asarray(predictor.images(batch["image"])),
        range(batch["_mask"].sum()),
      ):
        name = next(rest)
        yield name, None if name in bad else z
        bar.update()
  for name, why in list(bad.items())[:NAMED]:
    log.warning("left out: %s: %s", name, why)


def _read(file):
  """Returns {name: _Known}; {} if there is no such file."""
  if not file.exists():
    return {}
  try:
    # Opened here: np.load leaves a damaged file open.
    with open(file, "rb") as f, np.load(f, allow_pickle=False) as found:
      about, z = json.loads(found["about"].tobytes()), iter(found["z"])
    return {
      name: _Known((size, mark), next(z) if usable else None)
      for name, size, mark, usable in about
    }
  except Exception as e:  # truncated, no .npz: NumPy and zipfile raise anything
    log.warning("%s is damaged (%s): all pictures are embedded again", file, e)
    return {}


def _write(file, known):
  """Keeps {name: _Known}."""
  about = [(name, *it.stamp, it.z is not None) for name, it in known.items()]
  rows = [it.z for it in known.values() if it.z is not None]
  text = np.frombuffer(json.dumps(about).encode(), np.uint8)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as aside, open(aside, "wb") as f:
      np.savez(f, about=text, z=np.stack(rows) if rows else np.zeros((0, 1)))
  except OSError as e:
    raise errors.UserError(
      f"{file} cannot be written: {e.strerror or e}; set SIGJAX_CACHE to a "
      "folder with room"
    ) from e
