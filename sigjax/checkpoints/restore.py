"""Reads checkpoints: to resume a run, for inference, or to start from.

All hosts call these functions together, in the same order.
"""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import os
import pathlib
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from sigjax import errors, trees
from sigjax.checkpoints import layout, manifest
from sigjax.runtime import files, hosts
from sigjax.weights import npz

log = logging.getLogger("sigjax")

AnyPath = str | os.PathLike[str]


def newest(
  folder: pathlib.Path, state: Any, set_aside: bool
) -> tuple[Any, dict[str, Any]] | None:
  """Returns (TrainState, data state) of the newest undamaged checkpoint.

  Args:
    folder: WORKDIR/checkpoints.
    state: TrainState of ShapeDtypeStructs with shardings.
    set_aside: whether a damaged checkpoint is renamed to STEP.damaged.

  Returns:
    None if there are no checkpoints at all.

  Raises:
    UserError: all checkpoints are damaged, or the newest undamaged one is of
      another model or optimizer.
  """
  found = " ".join(map(str, reversed(layout.steps(folder))))
  for step in hosts.broadcast(found).split():
    path = folder / step
    fault = _fault(path)
    if not fault:
      log.info("resuming from %s", path)
      return _read(path, state)
    log.warning(
      "%s is damaged (%s); looking for the one before it", path, fault
    )
    if hosts.is_primary() and set_aside:
      aside = folder / f"{step}.damaged"
      files.remove(aside)
      path.rename(aside)
  damaged = hosts.broadcast(
    ", ".join(sorted(p.name for p in folder.glob("*.damaged")))
  )
  if damaged or layout.newest(folder) is not None:
    raise errors.UserError(
      f"{folder} has no undamaged checkpoint (there are: "
      f"{damaged or layout.newest(folder)}); delete this folder to start anew"
    )
  return None


def read(path: AnyPath, state: Any) -> tuple[Any, dict[str, Any]]:
  """Returns (TrainState, data state) of the checkpoint that a path names.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    state: TrainState of ShapeDtypeStructs with shardings.

  Raises:
    UserError: there is no checkpoint, it is damaged, or it is of another model
      or optimizer.
  """
  found = checkpoint_of(path)
  _refuse_damage(found)
  return _read(found, state)


def read_params(path: AnyPath, sharding: jax.sharding.Sharding) -> dict:
  """Returns the parameters of the checkpoint that a path names.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    sharding: of every array.

  Raises:
    UserError: there is no checkpoint, or it is damaged.
  """
  found = checkpoint_of(path)
  _refuse_damage(found)
  with _one_line(found):
    stored = _metadata(found)["params"]
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stored
  )
  return _read_items(found, params=like)["params"]


def checkpoint_of(path: AnyPath) -> pathlib.Path:
  """Returns the folder of the checkpoint that a path names.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.

  Raises:
    UserError: there is none.
  """
  workdir, step = layout.find(path)
  folder = layout.folder_of(workdir)
  if not folder.exists():
    raise errors.UserError(f"{workdir} has no checkpoints; train there first")
  if layout.newest(folder) is None:
    raise errors.UserError(f"{workdir} has no complete checkpoint")
  return folder / str(layout.newest(folder) if step is None else step)


def read_init(
  shapes: dict,
  path: AnyPath | None = None,
  *,
  into: str | None = None,
  dont_load: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads the weights that a run starts from, released ones or another run's.

  Args:
    shapes: the tree of the model's parameters, arrays or shapes.
    path: a workdir, WORKDIR/checkpoints/STEP, or what npz.load_params takes: a
      .npz file, its URL, or the name of a released checkpoint. None reads
      nothing.
    into: "img" or "txt" if the weights are of this tower alone.
    dont_load: regexes of names (within `into`) that start from scratch, or
      that the weights may have though the model has not.

  Returns:
    {name: array} of what was read.

  Raises:
    UserError: there are no such weights, or they do not fit.
  """
  if path is None:
    return {}
  like = shapes if into is None else shapes[into]
  if _is_run(path):
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = npz.fit(
      trees.flatten(read_params(path, one_device)), like, dont_load, path
    )
  else:
    loaded = npz.load_params(path, like, dont_load)
  prefix = f"{into}/" if into else ""
  return {
    prefix + name: leaf
    for name, leaf in trees.flatten(loaded).items()
    if not isinstance(leaf, jax.ShapeDtypeStruct)
  }


def _is_run(path: AnyPath) -> bool:
  """Returns whether a path names a run's checkpoint, not a file of weights."""
  # A URL of a file is not looked up: that may need libraries or credentials.
  if re.match(r"https?://|.*\.npz(:|$)", str(path)):
    return False
  return (layout.find(path)[0] / "checkpoints").exists()


def _fault(path: pathlib.Path) -> str:
  """Returns what is wrong with a checkpoint, or ""; each host reads a part."""
  if not (path / manifest.NAME).exists():
    log.warning(
      "%s was written without a %s: damage to it may not be noticed",
      path,
      manifest.NAME,
    )
    return ""
  fault = manifest.fault(path, jax.process_index(), jax.process_count())
  anywhere = hosts.max_over_processes(bool(fault))
  return fault or ("another host names the file" if anywhere else "")


def _refuse_damage(path: pathlib.Path) -> None:
  with _one_line(path):
    if fault := _fault(path):
      raise ValueError(fault)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns {item: tree of what has a shape and a dtype}."""
  with contextlib.closing(ocp.Checkpointer(layout.handler())) as checkpointer:
    items = checkpointer.metadata(path).item_metadata or {}
  return {name: getattr(item, "tree", item) for name, item in items.items()}


def _restore(path: pathlib.Path, **items: Any) -> Any:
  """Returns {item: what orbax reads}, for orbax's arguments of each item."""
  with contextlib.closing(ocp.Checkpointer(layout.handler())) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _read(path: pathlib.Path, state: Any) -> tuple[Any, dict[str, Any]]:
  found = _read_items(path, params=state.params, rest=layout.rest(state))
  with _one_line(path):
    data = _restore(path, data=ocp.args.JsonRestore())["data"]
  return state.restored(params=found["params"], **found["rest"]), data


def _read_items(path: pathlib.Path, **items: Any) -> Any:
  """Returns {item: tree}, for trees of ShapeDtypeStructs with shardings."""
  with _one_line(path):
    stored = _metadata(path)
    for item, want in items.items():
      different = trees.difference(want, stored[item])
      if different:
        raise errors.UserError(
          f"{path} is of another "
          f"{dict(params='model', rest='optimizer')[item]}, "
          f"{len(different)} arrays differ: {'; '.join(different[:3])}. "
          "Take the config it was trained with, or another --workdir"
        )
    return _restore(
      path, **{k: ocp.args.StandardRestore(v) for k, v in items.items()}
    )


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
  """Turns any error of the body into a UserError that names the checkpoint."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # orbax and tensorstore raise anything
    raise errors.UserError(
      f"{path} is damaged ({layout.reason(e)}); delete this folder to resume "
      "from the checkpoint before it"
    ) from e
