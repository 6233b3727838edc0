"""A lock on a workdir, which only one run at a time may write."""

from collections.abc import Iterator
import contextlib
import fcntl
import logging
import os
import pathlib
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn, TextIO

from sigjax import errors
from sigjax.runtime import files, hosts

if TYPE_CHECKING:
  from sigjax.runtime import bucket

log = logging.getLogger("sigjax")

# In a bucket no kernel frees a lock: who holds it writes it again and again.
BEAT_S = 10.0
DEAD_S = 30.0  # unchanged for so long, it is of a run that was killed


@contextlib.contextmanager
def hold(workdir: files.Path) -> Iterator[None]:
  """Holds WORKDIR/lock, on the primary process, until the body ends.

  The workdir is made if it is not there. At the end the lock is removed, and
  so are the folders that were made for it, unless something else is in them: a
  command that is refused leaves nothing behind. A process that is killed leaves
  the file, but the kernel frees the lock. In a bucket the next run waits until
  the lock has not changed for DEAD_S.

  Args:
    workdir: the run's directory.

  Raises:
    UserError: another run holds the lock, the file cannot be written, or not
      all hosts see the same workdir. In a bucket, another run that takes the
      lock ends this one.
  """
  me = hosts.broadcast(f"{hosts.process_name()}, {time.time_ns()}")
  path = workdir / "lock"
  with contextlib.ExitStack() as stack:
    with hosts.primary_first():
      if hosts.is_primary():
        if files.in_bucket(path):
          stack.enter_context(_held_in_bucket(path, me))
        else:
          stack.enter_context(_held(pathlib.Path(path), me))
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


@contextlib.contextmanager
def _held_in_bucket(path: "bucket.Path", me: str) -> Iterator[None]:
  """Makes the lock, and writes it anew every BEAT_S until the body ends."""
  held = _BucketLock(path, me)
  held.take()
  ended = threading.Event()
  thread = threading.Thread(target=_beat, args=(held, ended), daemon=True)
  thread.start()

  def remove() -> None:
    ended.set()
    if threading.current_thread() is not thread:
      thread.join()
    with contextlib.suppress(errors.UserError):  # it will be taken for dead
      held.write(None)

  hosts.before_leaving.append(remove)
  try:
    _check_listed(path)
    yield
  finally:
    hosts.before_leaving.remove(remove)
    remove()


class _BucketLock:
  """A lock in a bucket: an object that is only written if nobody else has.

  Args:
    path: the object.
    me: who holds it, and nobody else does; with a comma behind the name.
  """

  def __init__(self, path: "bucket.Path", me: str):
    self.path, self._me = path, me
    self._generation, self._beats = None, 0

  def beat(self) -> bool:
    """Writes the lock with another content; returns whether it was ours."""
    self._beats += 1
    return self.write(f"{self._me}, {self._beats}".encode())

  def write(self, data: bytes | None) -> bool:
    """Writes the lock, or deletes it with None; returns whether it was ours."""
    now = self.path.write(data, self._generation)
    if now is None:
      there, now = self.path.read()
      if there and not there.startswith(f"{self._me}, ".encode()):
        return False
      if there != data:  # the last answer was lost, or somebody has deleted it
        self._generation = now
        return self.write(data)
    self._generation = now
    return True

  def take(self) -> None:
    """Takes the lock, if nobody holds it.

    Raises:
      UserError: another run holds it.
    """
    there, self._generation = self.path.read()
    if there is not None:
      self._wait_until_dead(there)
    if not self.beat():
      self._refuse(self.path.read()[0])

  def _wait_until_dead(self, there: bytes) -> None:
    log.info(
      "%s is there, of %s; waiting %.0f s for a sign of life",
      self.path,
      _holder(there),
      DEAD_S,
    )
    end = time.monotonic() + DEAD_S
    while time.monotonic() < end:
      time.sleep(DEAD_S / 15)
      now, generation = self.path.read()
      if now is None:  # it has just ended
        self._generation = generation
        return
      if generation != self._generation:
        self._refuse(now)

  def _refuse(self, there: bytes | None) -> NoReturn:
    raise errors.UserError(
      f"{self.path.parent} is being written by {_holder(there)}; wait for it, "
      "stop it, or give another --workdir"
    )


def _check_listed(path: "bucket.Path") -> None:
  """Raises BucketError if a listing of the workdir lacks the lock.

  To tensorstore a listing that GCS refuses is empty. A run would not see its
  own checkpoints, and begin anew.
  """
  from sigjax.runtime import bucket

  if path.name not in path.parent.below():
    log.warning("listings of %s lag behind: saving takes longer", path.parent)
    bucket.lagging.add(path.bucket)
    path.parent.below()  # waits


def _holder(there: bytes | None) -> str:
  return (there or b"").decode().partition(",")[0] or "another process"


def _beat(held: _BucketLock, ended: threading.Event) -> None:
  """Writes the lock anew, in a thread, as long as it is ours."""
  while not ended.wait(BEAT_S):
    try:
      if held.beat():
        continue
      holder = _holder(held.path.read()[0])
    except errors.UserError:  # no answer; the next beat may have one
      continue
    # Nothing more may be written.
    error = errors.UserError(
      f"{held.path} was taken by {holder}, because it did not change for "
      f"{DEAD_S:.0f} s: the bucket was out of reach"
    )
    if hosts.is_multi_process():
      hosts.end_all(error)
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _wait_for(path: files.Path, me: str, seconds: float = 30) -> None:
  """Waits until the primary's file is seen: a network file system is slow."""
  end = time.monotonic() + seconds
  while True:
    with contextlib.suppress(OSError):
      if path.read_text().startswith(me):
        return
      if not files.in_bucket(path):
        os.listdir(path.parent)  # makes NFS look again
    if time.monotonic() > end:
      raise errors.UserError(
        f"{path.parent} of {hosts.process_name()} is not that of process 0: "
        "the workdir has to be on a file system that all hosts share"
      )
    time.sleep(0.1)
