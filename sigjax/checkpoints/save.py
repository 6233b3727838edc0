"""Saves a run's checkpoints in the background, each whole or not at all."""

from collections.abc import Callable
import logging
import os
import time
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from sigjax import errors
from sigjax.checkpoints import layout, manifest, restore
from sigjax.runtime import files, hosts

log = logging.getLogger("sigjax")

T = TypeVar("T")


class Checkpoints:
  """The checkpoints of one workdir. Saves one at a time.

  All hosts call the same methods in the same order; failed() is an exception.
  A save that fails is logged. It is an error only when check() asks for it.
  Nothing is created, renamed or deleted before open(), which a with statement
  calls: until then the command may be refused.

  Args:
    workdir: the run's directory.
    keep: how many of the newest checkpoints are kept; None for all. An old one
      is deleted when the next save begins, or at the end.
    keep_every_steps: checkpoints of steps that this number divides are never
      deleted; None for none.
    read_only: open() does nothing either, and save() must not be called.

  Attributes:
    dir: WORKDIR/checkpoints.

  Raises:
    UserError: keep is not positive, or there are no checkpoints although
      read_only is set.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int | None = 2,
    keep_every_steps: int | None = None,
    read_only: bool = False,
  ):
    self.dir = layout.folder_of(workdir)
    self._keep, self._keep_every = keep, keep_every_steps
    self._read_only = read_only
    self._step: int | None = None  # the step that is being saved
    self._error: BaseException | None = None  # why it failed on this host
    self._why = "no save was attempted"  # why the last save failed
    self._saves, self._any_failed = 0, False
    self._damaged: list[files.Path] = []  # are set aside by open()
    if keep is not None and keep < 1:
      raise errors.UserError(
        f"config.checkpoints.keep is {keep}, but one is needed to resume from"
      )
    if read_only and not self.dir.exists():
      raise errors.UserError(f"{workdir} has no checkpoints; train there first")

  def open(self) -> "Checkpoints":
    """Makes the folder, sets aside what is damaged, and is ready to save."""
    if self._read_only:
      return self
    with hosts.primary_first():
      self.dir.mkdir(exist_ok=True)
      self._sweep()  # what a killed run left
      if hosts.is_primary():
        for path in self._damaged:
          files.remove(path.with_name(f"{path.name}.damaged"))
          path.rename(path.with_name(f"{path.name}.damaged"))
    self._checkpointer = ocp.AsyncCheckpointer(
      layout.handler(),
      async_options=ocp.options.AsyncOptions(
        barrier_sync_fn=self._barrier, post_finalization_callback=self._seal
      ),
    )
    return self

  def newest(self) -> int | None:
    """Returns the newest complete step, or None."""
    return layout.newest(self.dir)

  def restore_newest(
    self, state: Any, run: Any = None
  ) -> tuple[Any, dict[str, Any]] | None:
    """Returns restore.newest() of this workdir.

    open() then renames a damaged checkpoint to STEP.damaged.

    Args:
      state, run: see restore.newest. A checkpoint of a run with another
        identity (identity.of_run) is refused.
    """
    found, self._damaged = restore.newest(self.dir, state, run)
    return found

  def save(
    self,
    step: int,
    state: Any,
    data_state: dict[str, Any],
    about: dict[str, Any],
  ) -> None:
    """Begins to save a checkpoint; training may continue meanwhile.

    Args:
      step: the steps that are done.
      state: a TrainState.
      data_state: the position in the data, JSON-able.
      about: {"config": the whole config, "identity": see identity.of_run},
        JSON-able: what tools and a resumed run have to know of this one.
    """
    self.wait()
    self._sweep()
    self._step, self._error = step, None
    self._saves += 1
    params, rest = jax.tree.map(_one_copy, (state.stored, layout.rest(state)))
    try:
      self._checkpointer.save(
        self.dir / str(step),
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(params),
          rest=ocp.args.StandardSave(rest),
          data=ocp.args.JsonSave(data_state),
          about=ocp.args.JsonSave(about),
        ),
      )
    except Exception as e:  # orbax and tensorstore raise anything
      if hosts.is_multi_process():  # the other hosts are inside this save, too
        raise errors.UserError(
          f"step {step} could not be saved ({layout.reason(e)}); the same "
          "command resumes from the checkpoint before it"
        ) from e
      self._error = e

  def failed(self) -> bool:
    """Returns, without waiting, whether the save has failed on this host."""
    if self._step is not None and self._error is None:
      try:
        self._checkpointer.check_for_errors()
      except Exception as e:
        self._give_up(e)
    return self._error is not None

  def wait(self) -> None:
    """Waits until the current save is on disk, or has failed and is removed."""
    if self._step is None:
      return
    if not self.failed():
      try:
        self._checkpointer.wait_until_finished()
      except Exception as e:
        self._give_up(e)
    step, self._step = self._step, None
    complete = hosts.max_over_processes(
      hosts.is_primary() and self._is_complete(step)
    )
    if not complete:
      self._why = (
        layout.reason(self._error)
        if self._error
        else "another host could not write"
      )
      log.warning("step %d could not be saved: %s", step, self._why)
      self._any_failed = True
      self._sweep()
    elif hosts.is_primary() and self._keep is not None:
      for old in layout.steps(self.dir)[: -self._keep]:
        if not self._keep_every or old % self._keep_every:
          self._try(layout.discard, self.dir, old)
    self._error = None

  def check(self, step: int) -> None:
    """Waits; raises UserError unless the newest checkpoint is of this step."""
    self.wait()
    if not layout.is_complete(self.dir, step):
      newest = self.newest()
      raise errors.UserError(
        f"step {step} could not be saved ({self._why}); "
        + (
          "there is no checkpoint to resume from"
          if newest is None
          else "the same command resumes from the newest checkpoint, "
          f"{self.dir / str(newest)}"
        )
      )

  def close(self) -> None:
    """Waits for the current save, then ends the threads that save."""
    if self._read_only:
      return
    self.wait()
    self._checkpointer.close()
    # After a failed save, threads of tensorstore may still write for a while.
    end = time.monotonic() + 2 * self._any_failed
    while True:
      self._sweep()
      if time.monotonic() >= end:
        break
      time.sleep(0.1)

  def __enter__(self) -> "Checkpoints":
    return self.open()

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # After an error of this host alone, waiting for the others would not end.
    if not hosts.is_multi_process() or kind is None or kind is SystemExit:
      self.close()

  def _sweep(self) -> None:
    """Removes what failed saves and interrupted deletions left.

    Orbax's threads may still write files of a failed save. The next call
    removes those.
    """
    if hosts.is_primary():
      for path in self._try(layout.leftovers, self.dir) or ():
        self._try(files.remove, path)

  def _is_complete(self, step: int) -> bool:
    """Returns whether a step is known to be complete."""
    try:
      return layout.is_complete(self.dir, step)
    except errors.UserError as e:
      self._error = self._error or e
      return False

  def _try(self, call: Callable[..., T], *args: Any) -> T | None:
    """Returns call(*args); a bucket that does not answer does not end a run."""
    try:
      return call(*args)
    except errors.UserError as e:
      log.warning("%s; it is left there for now", e)
      return None

  # Several hosts: how the failure of one ends the save on all of them.

  def _give_up(self, error: BaseException) -> None:
    self._error = error
    self._tell("given_up")

  def _tell(self, key: str) -> None:
    if hosts.is_multi_process():
      hosts.client().key_value_set(
        f"sigjax/save/{self._saves}/{key}/{jax.process_index()}", "yes"
      )

  def _told(self, key: str) -> int:
    """Returns how many processes have told the key about this save."""
    return len(
      hosts.client().key_value_dir_get(f"sigjax/save/{self._saves}/{key}/")
    )

  def _barrier(self, key: str, timeout_ms: int) -> None:
    """Makes orbax's thread wait for those of the other hosts.

    JAX's own barrier would wait for its whole timeout after a host has failed.
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

  def _seal(self) -> None:
    """Writes the manifest: the primary's last act before orbax renames."""
    assert self._step is not None
    manifest.write(layout.unfinished(self.dir, self._step))


def _one_copy(x: Any) -> Any:
  """Returns one device's copy of an array that is whole on each of them.

  Of such an array orbax has each device save a part, and compiles a program to
  cut it for each shape and device. That pays for several hosts alone.
  """
  whole = isinstance(x, jax.Array) and x.is_fully_replicated
  if whole and x.is_fully_addressable:
    return x.addressable_data(0)
  return x
