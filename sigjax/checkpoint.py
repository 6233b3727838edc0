"""Checkpoints of a run, by orbax: asynchronous, atomic, the data's place too.

    WORKDIR/checkpoints/STEP/params  the parameters: all that serving needs
    WORKDIR/checkpoints/STEP/rest    step and optimizer state
    WORKDIR/checkpoints/STEP/data    where the data iterator was (JSON)
"""

import contextlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from sigjax import errors
from sigjax import trees
from sigjax.models import load


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    workdir: the run's directory.
    keep: how many of the newest are kept.
    keep_every_steps: steps that it divides are kept for good; None for none.
    read_only: nothing is created, written or deleted.
  """

  def __init__(self, workdir, *, keep=2, keep_every_steps=None,
               read_only=False):
    self.dir = epath.Path(workdir).absolute() / "checkpoints"
    if read_only and not self.dir.exists():
      raise errors.UserError(f"{workdir} has no checkpoints; train there first")
    self._manager = ocp.CheckpointManager(
        self.dir,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=None if read_only else keep_every_steps,
            create=not read_only, read_only=read_only,
            cleanup_tmp_directories=not read_only),
        item_handlers=dict(params=ocp.StandardCheckpointHandler(),
                           rest=ocp.StandardCheckpointHandler(),
                           data=ocp.JsonCheckpointHandler()))

  def newest(self):
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step, state, data_state):
    """Begins to write a checkpoint; training may go on meanwhile."""
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          rest=ocp.args.StandardSave(_rest(state)),
          data=ocp.args.JsonSave(data_state)))

  def restore(self, step, state):
    """Returns (TrainState, data state) of a step.

    Args:
      step: one that newest() named.
      state: TrainState of ShapeDtypeStructs with shardings.

    Raises:
      UserError: the checkpoint is of another model or optimizer, or damaged.
    """
    found = self._restore(step, params=state.params, rest=_rest(state))
    with self._one_line(step):
      data = self._manager.restore(
          step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    return state.replace(params=found["params"], **found["rest"]), data

  def restore_params(self, step, sharding):
    """Returns the parameters of a step, each array placed by `sharding`."""
    with self._one_line(step):
      stored = _tree(self._manager.item_metadata(step)["params"])
    return self._restore(step, params=jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        stored))["params"]

  def _restore(self, step, **items):
    with self._one_line(step):
      stored = self._manager.item_metadata(step)
      for item, want in items.items():
        different = trees.difference(want, _tree(stored[item]))
        if different:
          raise errors.UserError(
              f"{self.dir / str(step)} is of another "
              f"{dict(params='model', rest='optimizer')[item]}, "
              f"{len(different)} arrays differ: {'; '.join(different[:3])}. "
              "Take the config it was trained with, or another --workdir")
      return self._manager.restore(step, args=ocp.args.Composite(**{
          item: ocp.args.StandardRestore(want)
          for item, want in items.items()}))

  @contextlib.contextmanager
  def _one_line(self, step):
    try:
      yield
    except errors.UserError:
      raise
    except Exception as e:  # orbax and tensorstore raise anything
      reason = str(e).split(": ")[0][:80] or type(e).__name__
      raise errors.UserError(
          f"{self.dir / str(step)} is damaged ({reason}); delete this folder "
          "to go on from the checkpoint before it") from e

  def wait(self):
    """Returns when what save() began is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits, then ends the threads that save."""
    self._manager.close()


def _rest(state):
  return dict(step=state.step, opt_state=state.opt_state)


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
  return (find(path)[0] / "checkpoints").exists()


def read_init(shapes, path=None, *, into=None, dont_load=(), url=None):
  """Reads weights to start from, out of a .npz file or a run's checkpoint.

  Args:
    shapes: the tree of the model's parameters.
    path: FILE.npz[:PART], a workdir, or WORKDIR/checkpoints/STEP.
    into: "img" or "txt": the file is of this tower alone.
    dont_load: regexes of names (within `into`) that start from scratch, or
      that the file may have beside the model's.
    url: where the file is to be had, for the error if it is missing.

  Returns:
    {name: array} of what was loaded.
  """
  if path is None:
    return {}
  like = shapes if into is None else shapes[into]
  if _is_checkpoint(path):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = load.fit(
        trees.flatten(read_params(path, sharding)), like, dont_load,
        path)
  elif url and not epath.Path(path).exists():
    raise errors.UserError(
        f"there is no file {path}; it is fetched by: gsutil cp {url} {path}")
  else:
    loaded = load.load_params(path, like, dont_load)
  prefix = f"{into}/" if into else ""
  return {prefix + name: leaf for name, leaf in trees.flatten(loaded).items()
          if not isinstance(leaf, jax.ShapeDtypeStruct)}
