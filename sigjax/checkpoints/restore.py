"""Checkpoints of a run, by orbax: asynchronous, atomic, the data's place too.

    WORKDIR/checkpoints/STEP/params         all that serving needs
    WORKDIR/checkpoints/STEP/rest           step and optimizer state
    WORKDIR/checkpoints/STEP/data           where the data iterator was (JSON)
    WORKDIR/checkpoints/STEP/manifest.json  what the files have to be
    WORKDIR/checkpoints/STEP.damaged        one whose files are not that

A step is written under another name, its manifest last, and then renamed: a
folder named STEP was once whole.
"""

import contextlib
import logging
import re

from etils import epath
import jax
import orbax.checkpoint as ocp

from sigjax import errors, trees
from sigjax.checkpoints import manifest, save
from sigjax.runtime import hosts
from sigjax.weights import npz

log = logging.getLogger("sigjax")


class Checkpoints(save.Saver):
  """The checkpoints of one workdir; its arguments are saving.Saver's."""

  def restore_newest(self, state):
    """Returns restore() of the newest step that is whole; None of none at all.

    One that is damaged is named and set aside, as STEP.damaged.

    Raises:
      UserError: all are damaged, or restore()'s.
    """
    for step in map(
      int, hosts.broadcast(" ".join(map(str, reversed(self.steps())))).split()
    ):
      path = self.dir / str(step)
      fault = self._fault(step)
      if not fault:
        log.info("going on from %s", path)
        return self._restore_all(step, state)
      log.warning(
        "%s is damaged (%s); looking for the one before it", path, fault
      )
      if hosts.is_primary() and not self.read_only:
        aside = self.dir / f"{step}.damaged"
        save.remove([aside])
        path.rename(aside)
    damaged = hosts.broadcast(
      ", ".join(sorted(p.name for p in self.dir.glob("*.damaged")))
    )
    if damaged or self.newest() is not None:
      raise errors.UserError(
        f"{self.dir} has no checkpoint that is whole (there are: "
        f"{damaged or self.newest()}); delete this folder to start anew"
      )
    return None

  def restore(self, step, state):
    """Returns (TrainState, data state) of a step.

    Args:
      step: one that newest() named.
      state: TrainState of ShapeDtypeStructs with shardings.

    Raises:
      UserError: the checkpoint is of another model or optimizer, or damaged.
    """
    self._refuse_damage(step)
    return self._restore_all(step, state)

  def restore_params(self, step, sharding):
    """Returns the parameters of a step, each array placed by `sharding`.

    Raises:
      UserError: the checkpoint is damaged.
    """
    self._refuse_damage(step)
    with self._one_line(step):
      stored = _tree(self._metadata(step)["params"])
    return self._restore(
      step,
      params=jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        stored,
      ),
    )["params"]

  def _fault(self, step):
    """What is wrong with a step, in words, or ""; each host reads a part."""
    path = self.dir / str(step)
    if not (path / manifest.NAME).exists():
      log.warning(
        "%s was written without a %s: damage to it may not be noticed",
        path,
        manifest.NAME,
      )
      return ""
    fault = manifest.fault(path, jax.process_index(), jax.process_count())
    found = hosts.max_over_processes(bool(fault))
    return fault or ("another host names the file" if found else "")

  def _refuse_damage(self, step):
    with self._one_line(step):
      if fault := self._fault(step):
        raise ValueError(fault)

  def _metadata(self, step):
    return self.checkpointer.metadata(self.dir / str(step)).item_metadata

  def _restore_all(self, step, state):
    found = self._restore(step, params=state.params, rest=save.rest(state))
    with self._one_line(step):
      data = self.checkpointer.restore(
        self.dir / str(step),
        args=ocp.args.Composite(data=ocp.args.JsonRestore()),
      )["data"]
    return state.replace(params=found["params"], **found["rest"]), data

  def _restore(self, step, **items):
    with self._one_line(step):
      stored = self._metadata(step)
      for item, want in items.items():
        different = trees.difference(want, _tree(stored[item]))
        if different:
          raise errors.UserError(
            f"{self.dir / str(step)} is of another "
            f"{dict(params='model', rest='optimizer')[item]}, "
            f"{len(different)} arrays differ: {'; '.join(different[:3])}. "
            "Take the config it was trained with, or another --workdir"
          )
      return self.checkpointer.restore(
        self.dir / str(step),
        args=ocp.args.Composite(
          **{
            item: ocp.args.StandardRestore(want) for item, want in items.items()
          }
        ),
      )

  @contextlib.contextmanager
  def _one_line(self, step):
    try:
      yield
    except errors.UserError:
      raise
    except Exception as e:  # orbax and tensorstore raise anything
      raise errors.UserError(
        f"{self.dir / str(step)} is damaged ({save.reason(e)}); delete "
        "this folder to go on from the checkpoint before it"
      ) from e


def _tree(metadata):
  return getattr(metadata, "tree", metadata)


def find(path):
  """Returns (workdir, step or None) of a path to a workdir or a checkpoint.

  Accepts WORKDIR, WORKDIR/checkpoints and WORKDIR/checkpoints/STEP.
  """
  path = epath.Path(path)
  if path.name.isdigit() and path.parent.name == "checkpoints":
    return path.parent.parent, int(path.name)
  return (path.parent if path.name == "checkpoints" else path), None


def open_step(path):
  """Returns (Checkpoints, step) to read the checkpoint that a path names.

  Raises:
    UserError: there is none.
  """
  workdir, step = find(path)
  checkpoints = Checkpoints(workdir, read_only=True)
  newest = checkpoints.newest()
  if newest is None:
    raise errors.UserError(f"{workdir} has no complete checkpoint")
  return checkpoints, newest if step is None else step


def read(path, state):
  """Returns (TrainState, data state) of the checkpoint that a path names."""
  checkpoints, step = open_step(path)
  return checkpoints.restore(step, state)


def read_params(path, sharding):
  """Returns the parameters of the checkpoint that a path names.

  Args:
    path: see find.
    sharding: of every array.
  """
  checkpoints, step = open_step(path)
  return checkpoints.restore_params(step, sharding)


def _is_checkpoint(path):
  """Whether a path names a run's checkpoint, not a file of weights."""
  # Nothing to look for, and perhaps nothing to look with, behind a file's URL.
  if re.match(r"https?://|.*\.npz(:|$)", str(path)):
    return False
  return (find(path)[0] / "checkpoints").exists()


def read_init(shapes, path=None, *, into=None, dont_load=()):
  """Reads weights to start from, released ones or of a run.

  Args:
    shapes: the tree of the model's parameters.
    path: a workdir, WORKDIR/checkpoints/STEP, or what load.load_params takes:
      a .npz file, its URL, or the name of a released checkpoint.
    into: "img" or "txt": the file is of this tower alone.
    dont_load: regexes of names (within `into`) that start from scratch, or
      that the file may have beside the model's.

  Returns:
    {name: array} of what was loaded.

  Raises:
    UserError: there are no such weights, or they do not fit.
  """
  if path is None:
    return {}
  like = shapes if into is None else shapes[into]
  if _is_checkpoint(path):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = npz.fit(
      trees.flatten(read_params(path, sharding)), like, dont_load, path
    )
  else:
    loaded = npz.load_params(path, like, dont_load)
  prefix = f"{into}/" if into else ""
  return {
    prefix + name: leaf
    for name, leaf in trees.flatten(loaded).items()
    if not isinstance(leaf, jax.ShapeDtypeStruct)
  }
