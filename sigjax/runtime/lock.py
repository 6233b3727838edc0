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

  The kernel frees the lock when the process ends, in whatever way. The file
  stays.

  Args:
    workdir: the run's directory, which exists on every host.

  Raises:
    UserError: another run holds the lock, the file cannot be written, or not
      all hosts see the same workdir.
  """
  me = hosts.broadcast(f"{hosts.process_name()}, {time.time_ns()}")
  path = workdir / "lock"
  with contextlib.ExitStack() as stack:
    with hosts.primary_first():
      if hosts.is_primary():
        try:
          file = stack.enter_context(path.open("a+"))
        except OSError as e:
          raise errors.UserError(
            f"{path} cannot be written ({e.strerror}); give a --workdir that "
            "can be, or --eval_only"
          ) from e
        _take(file, workdir, me)
      else:
        _wait_for(path, me)
    yield


def _take(file: TextIO, workdir: pathlib.Path, me: str) -> None:
  """Locks the file and writes into it who holds the lock."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    holder = file.read().partition(",")[0] or "another process"
    raise errors.UserError(
      f"{workdir} is being written by {holder}; wait for it, stop it, or "
      "give another --workdir"
    ) from None
  except OSError as e:
    raise errors.UserError(
      f"{file.name} cannot be locked ({e.strerror}), so a second run would "
      "not be noticed; give a --workdir on another file system"
    ) from e
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
