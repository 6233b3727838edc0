"""A lock on a workdir, which only one run at a time may write."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import time
from typing import TextIO

from sigjax import errors
from sigjax.runtime import hosts


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Holds WORKDIR/lock, on the primary process, until the body ends.

  The workdir is made if it is not there. At the end the lock is removed, and
  so are the folders that were made for it, unless something else is in them: a
  command that is refused leaves nothing behind. A process that is killed leaves
  the file, but the kernel frees the lock.

  Args:
    workdir: the run's directory.

  Raises:
    UserError: another run holds the lock, the file cannot be written, or not
      all hosts see the same workdir.
  """
  me = hosts.broadcast(f"{hosts.process_name()}, {time.time_ns()}")
  path = workdir / "lock"
  with contextlib.ExitStack() as stack:
    with hosts.primary_first():
      if hosts.is_primary():
        stack.enter_context(_held(path, me))
      else:
        _wait_for(path, me)
    yield


@contextlib.contextmanager
def _held(path: pathlib.Path, me: str) -> Iterator[None]:
  """Makes and locks the file; in the end removes all that was made."""
  made = [p for p in path.parents if not p.exists()]  # the innermost first

  def remove() -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in a folder
      for folder in made:
        folder.rmdir()

  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
  except OSError as e:
    raise errors.UserError(
      f"{path} cannot be written ({e.strerror}); give a --workdir that can be, "
      "or --eval_only"
    ) from e
  with file:
    _take(file, path, me)
    hosts.before_leaving.append(remove)
    try:
      yield
    finally:
      hosts.before_leaving.remove(remove)
      remove()  # while it is locked: nobody else has taken it


def _take(file: TextIO, path: pathlib.Path, me: str) -> None:
  """Locks the file and writes into it who holds the lock."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Of a run that has just ended, the file was removed after it was opened.
    free = path.exists() and os.path.samestat(
      os.fstat(file.fileno()), path.stat()
    )
  except BlockingIOError:
    free = False
  except OSError as e:
    raise errors.UserError(
      f"{path} cannot be locked ({e.strerror}), so a second run would not be "
      "noticed; give a --workdir on another file system"
    ) from e
  if not free:
    file.seek(0)
    holder = file.read().partition(",")[0] or "another process"
    raise errors.UserError(
      f"{path.parent} is being written by {holder}; wait for it, stop it, or "
      "give another --workdir"
    )
  file.truncate(0)
  file.write(me)
  file.flush()


def _wait_for(path: pathlib.Path, me: str, seconds: float = 30) -> None:
  """Waits until the primary's file is seen: a network file system is slow."""
  end = time.monotonic() + seconds
  while True:
    with contextlib.suppress(OSError):
      if path.read_text() == me:
        return
      os.listdir(path.parent)  # makes NFS look again
    if time.monotonic() > end:
      raise errors.UserError(
        f"{path.parent} of {hosts.process_name()} is not that of process 0: "
        "the workdir has to be on a file system that all hosts share"
      )
    time.sleep(0.1)
