"""Saving a run's checkpoints: in the background, whole or not at all.

A step is written under another name by all hosts, its manifest last, and then
renamed by process 0: a folder named STEP was once whole. What is older is
deleted after that.
"""

import logging
import os
import pathlib
import re
import shutil
import sys
import time
import warnings

from absl import logging as absl_logging
import jax
import orbax.checkpoint as ocp

from sigjax import errors
from sigjax.checkpoints import manifest
from sigjax.runtime import hosts

log = logging.getLogger("sigjax")


class Saver:
  """Writes checkpoints, one at a time.

  All hosts call the same methods in the same order, but for failed(). A save
  that fails is logged, and is no error until check() asks for its step.

  Args:
    workdir: the run's directory.
    keep: how many of the newest are kept; None for all. An old one is deleted
      when the next save begins, or at the end.
    keep_every_steps: steps that it divides are kept for good; None for none.
    read_only: nothing is created, written, renamed or deleted.

  Raises:
    UserError: keep is no number of checkpoints, or with read_only there are
      none.
  """

  def __init__(
    self, workdir, *, keep=2, keep_every_steps=None, read_only=False
  ):
    self.dir = pathlib.Path(workdir).absolute() / "checkpoints"
    self._keep, self._keep_every = keep, keep_every_steps
    self.read_only = read_only
    self._step = None  # the one that is being saved
    self._error = None  # what became of it on this host
    self._why = "there was no reason to"  # the last save failed
    self._saves, self._any_failed = 0, False
    if keep is not None and keep < 1:
      raise errors.UserError(
        f"config.checkpoints.keep is {keep}, but one is needed to go on from"
      )
    if read_only and not self.dir.exists():
      raise errors.UserError(f"{workdir} has no checkpoints; train there first")
    if not read_only:
      with hosts.primary_first():
        self.dir.mkdir(exist_ok=True)
        self._sweep()  # a run was killed
    self.checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(),
        rest=ocp.StandardCheckpointHandler(),
        data=ocp.JsonCheckpointHandler(),
      ),
      async_options=ocp.options.AsyncOptions(
        barrier_sync_fn=self._barrier, post_finalization_callback=self._seal
      ),
    )

  def newest(self):
    """The newest complete step, or None."""
    return max(self.steps(), default=None)

  def steps(self):
    """All steps that were once complete, in order."""
    return sorted(int(p.name) for p in self.dir.iterdir() if p.name.isdigit())

  def save(self, step, state, data_state):
    """Begins to write a checkpoint; training may go on meanwhile."""
    self.wait()
    self._sweep()
    self._step, self._error = step, None
    self._saves += 1
    try:
      self.checkpointer.save(
        self.dir / str(step),
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          rest=ocp.args.StandardSave(rest(state)),
          data=ocp.args.JsonSave(data_state),
        ),
      )
    except Exception as e:  # orbax and tensorstore raise anything
      if hosts.is_multi_process():  # they are in the midst of it together
        raise errors.UserError(
          f"step {step} could not be saved ({reason(e)}); the same command "
          "goes on from the checkpoint before it"
        ) from e
      self._error = e

  def failed(self):
    """Whether the save under way has failed on this host; does not wait."""
    if self._step is not None and self._error is None:
      try:
        self.checkpointer.check_for_errors()
      except Exception as e:
        self._give_up(e)
    return self._error is not None

  def wait(self):
    """Returns when what save() began is on disk, or given up and removed."""
    if self._step is None:
      return
    if not self.failed():
      try:
        self.checkpointer.wait_until_finished()
      except Exception as e:
        self._give_up(e)
    step, self._step = self._step, None
    whole = hosts.max_over_processes(
      hosts.is_primary() and (self.dir / str(step)).exists()
    )
    if not whole:
      self._why = reason(self._error or "another host could not write")
      log.warning("step %d could not be saved: %s", step, self._why)
      self._any_failed = True
      self._sweep()
    elif hosts.is_primary() and self._keep is not None:
      for old in self.steps()[: -self._keep]:
        if not self._keep_every or old % self._keep_every:
          # Not half of one under its name, should this be interrupted.
          remove([(self.dir / str(old)).rename(self.dir / f"{old}.old")])
    self._error = None

  def check(self, step):
    """Waits; a UserError unless the newest checkpoint is this step."""
    self.wait()
    newest = self.newest()
    if newest != step:
      raise errors.UserError(
        f"step {step} could not be saved ({self._why}); "
        + (
          "there is no checkpoint to go on from"
          if newest is None
          else "the same command goes on from the newest checkpoint, "
          f"{self.dir / str(newest)}"
        )
      )

  def close(self):
    """Waits, then ends the threads that save."""
    self.wait()
    self.checkpointer.close()
    # After a save that failed, threads of tensorstore may write for a while.
    end = time.monotonic() + 2 * self._any_failed
    while not self.read_only:
      self._sweep()
      if time.monotonic() >= end:
        break
      time.sleep(0.1)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # With an error of this host alone, the others would be waited for forever.
    if not hosts.is_multi_process() or kind is None or kind is SystemExit:
      self.close()

  def _sweep(self):
    """Removes what has no name of its own.

    Of a save that failed orbax's threads may still write other files: what
    this misses is found by the next one.
    """
    for leftover in ("*.orbax-checkpoint-tmp*", "*.old"):
      if hosts.is_primary():
        remove(self.dir.glob(leftover))

  def _give_up(self, error):
    self._error = error
    self._tell("given_up")

  def _tell(self, key):
    if hosts.is_multi_process():
      hosts.client().key_value_set(
        f"sigjax/save/{self._saves}/{key}/{jax.process_index()}", "yes"
      )

  def _told(self, key):
    """How many processes have told the key about this save."""
    return len(
      hosts.client().key_value_dir_get(f"sigjax/save/{self._saves}/{key}/")
    )

  def _barrier(self, key, timeout_ms):
    """What orbax's threads wait with for those of the other hosts.

    JAX's own barrier does not end before its time when one will not come.
    """
    self._tell(key)
    end, pause = time.monotonic() + timeout_ms / 1000, 0.01
    while hosts.is_multi_process() and self._told(key) < jax.process_count():
      if self._told("given_up"):
        raise TimeoutError("another host could not write its part")
      if time.monotonic() > end:
        raise TimeoutError("another host did not write its part in time")
      time.sleep(pause)
      pause = min(2 * pause, 1)

  def _seal(self):
    """Called by orbax on process 0 when all is written but the name."""
    (folder,) = self.dir.glob(f"{self._step}.orbax-checkpoint-tmp*")
    manifest.write(folder)


def quiet():
  """Keeps orbax from printing tracebacks of what we say in a line.

  At the first array that cannot be written it closes an event loop in which
  the others have yet to say the same.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(
    lambda record: "orbax" not in record.pathname
  )
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
  before = sys.unraisablehook
  sys.unraisablehook = lambda it: (
    None if str(it.exc_value) == "Event loop is closed" else before(it)
  )


def rest(state):
  """The part of a TrainState that is no parameter."""
  return dict(step=state.step, opt_state=state.opt_state)


def reason(error):
  """Returns a few words of an error: the operating system's, if there are."""
  text = " ".join(str(error).split())
  number = getattr(error, "errno", None) or next(
    iter(re.findall(r"os_error_code='(\d+)'", text)), None
  )
  if number:
    return os.strerror(int(number))
  return text.split(": ")[0][:80] or type(error).__name__


def remove(paths):
  """Deletes folders, as far as they are there."""
  for path in paths:
    shutil.rmtree(path, ignore_errors=True)
