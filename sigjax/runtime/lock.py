"""One run at a time writes to a workdir."""

import contextlib
import fcntl
import os
import time

from sigjax import errors
from sigjax.runtime import hosts


@contextlib.contextmanager
def hold(workdir):
  """Holds WORKDIR/lock, on process 0, until the body ends.

  The kernel frees it when the process ends in whatever way. The file stays.

  Args:
    workdir: the run's directory, a pathlib.Path, there on every host.

  Raises:
    UserError: another run holds it, or not all hosts see the same workdir.
  """
  me = hosts.broadcast(f"{hosts.process_name()}, {time.time_ns()}")
  path = workdir / "lock"
  with contextlib.ExitStack() as stack:
    with hosts.primary_first():
      if hosts.is_primary():
        _take(stack.enter_context(path.open("a+")), workdir, me)
      else:
        _see(path, me)
    yield


def _take(file, workdir, me):
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


def _see(path, me, seconds=30):
  """Waits for process 0's file: a network's file system may take a while."""
  end = time.monotonic() + seconds
  while True:
    with contextlib.suppress(OSError):
      if path.read_text() == me:
        return
      os.listdir(path.parent)  # NFS looks again
    if time.monotonic() > end:
      raise errors.UserError(
        f"{path.parent} of {hosts.process_name()} is not that of process 0: the "
        "workdir has to be on a file system that all hosts share"
      )
    time.sleep(0.1)
