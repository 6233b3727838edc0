"""Paths in buckets, gs:// of Google Cloud and s3://, for runs that live there.

Tensorstore, which writes the arrays of checkpoints, reads and writes all other
objects, too: no other package is needed, and its credentials are those of the
checkpoints. Nothing is cached: a lookup asks the bucket.

A bucket has objects, no folders. A folder is there when an object's name begins
with it. An object appears whole or not at all, but nothing can be renamed:
rename() copies.
"""

from collections.abc import Callable, Iterable, Iterator
import errno
import fnmatch
import functools
import io
import logging
import os
import re
import sys
import threading
import time
from typing import Any, Self, TypeVar
import uuid

from etils import epath
import tensorstore as ts

from sigjax import errors

log = logging.getLogger("sigjax")

T = TypeVar("T")

# Of requests for small objects: a run that starts says within half a minute
# that the bucket does not answer. Arrays have tensorstore's own, more patience.
RETRIES = dict(max_retries=6, initial_delay="0.5s", max_delay="8s")
PUT_EVERY_S = 5.0  # what is appended reaches the bucket after so many seconds

# Buckets whose listings show an object later than it was written, see lock.py.
# Those of Google and Amazon show it at once.
lagging: set[str] = set()
LISTED_S = 10.0  # so much later, and no more
_PROBE = ".is-it-listed"

_LOG_IN = {
  "gs": "log in with `gcloud auth application-default login`, or name a key in "
  "GOOGLE_APPLICATION_CREDENTIALS",
  "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


class BucketError(errors.UserError, OSError):
  """A bucket refuses, or does not answer. `strerror` is the reason alone."""

  def __init__(self, path: "Path", why: str):
    super().__init__(f"{path}: {why}")
    self.strerror = why

  def __str__(self) -> str:
    return self.args[0]


@epath.register_path_cls(("gs://", "s3://"))
class Path(epath.Path):
  """A path in a bucket, with the methods of pathlib.Path that we use.

  Orbax gets it from epath.Path("gs://.."), too.

  Raises:
    BucketError: in any method that asks the bucket: it refuses or does not
      answer.
    FileNotFoundError: as pathlib.Path does.
  """

  # Python 3.12 makes paths in another method.
  if sys.version_info < (3, 12):

    def __new__(cls, *parts: epath.PathLike) -> "Path":
      return super().__new__(cls, *_inside(parts))

  else:

    def __init__(self, *parts: epath.PathLike):
      super().__init__(*_inside(parts))

  def __str__(self) -> str:
    if len(self.parts) > 1 and self.parts[0] == "/":
      return f"{self.parts[1]}://{'/'.join(self.parts[2:])}"
    return "/".join(self.parts) or "."

  def __fspath__(self) -> str:
    return str(self)

  def __repr__(self) -> str:
    return f"Path({str(self)!r})"

  def as_posix(self) -> str:
    return str(self)

  @property
  def scheme(self) -> str:
    """ "gs" or "s3"."""
    return self.parts[1]

  @property
  def bucket(self) -> str:
    """The bucket's name."""
    return self.parts[2] if len(self.parts) > 2 else ""

  @property
  def key(self) -> str:
    """The name within the bucket."""
    return "/".join(self.parts[3:])

  def _ask(self, ask: Callable[[ts.KvStore], T]) -> T:
    """Returns ask(the bucket); what tensorstore raises becomes BucketError."""
    if not self.bucket:
      raise errors.UserError(f"{self} names no bucket")
    try:
      return ask(stores(self.scheme, self.bucket))
    except Exception as e:  # tensorstore raises anything
      raise BucketError(self, reason(e, self.scheme)) from e

  # ---- Objects ----

  def read(self) -> tuple[bytes | None, bytes]:
    """Returns (an object's content, or None if there is none; its generation).

    The generation changes with every write of other content.
    """
    got = self._ask(lambda store: store.read(self.key).result())
    return None if got.state == "missing" else got.value, got.stamp.generation

  def write(self, data: bytes | None, was: bytes | None = None) -> bytes | None:
    """Writes an object, or deletes it with None.

    Args:
      data: its content.
      was: the generation that it must have, as read() gave it, also of no
        object; None writes in any case.

    Returns:
      Its generation; None if it had another one than `was`, so that nothing was
      written.
    """
    got = self._ask(
      lambda store: store.write(self.key, data, if_equal=was).result()
    )
    return got.generation or None

  def read_bytes(self) -> bytes:
    data, _ = self.read()
    if data is None:
      raise FileNotFoundError(
        errno.ENOENT, os.strerror(errno.ENOENT), str(self)
      )
    return data

  def read_text(self, encoding: str | None = None) -> str:
    return self.read_bytes().decode(encoding or "utf-8")

  def write_bytes(self, data: bytes) -> int:
    self.write(bytes(data))
    return len(data)

  def write_text(
    self, data: str, encoding: str | None = None, errors: str | None = None
  ) -> int:
    return self.write_bytes(
      data.encode(encoding or "utf-8", errors or "strict")
    )

  def open(self, mode: str = "r", **_: Any) -> Any:
    """Opens an object as a file in memory, which close() writes."""
    if mode.strip("bt") == "r":
      data = io.BytesIO(self.read_bytes())
    elif mode.strip("bt") == "w":
      data = _Written(self)
    else:
      raise io.UnsupportedOperation(f"mode {mode!r} in a bucket")
    return data if "b" in mode else io.TextIOWrapper(data, encoding="utf-8")

  def unlink(self, missing_ok: bool = False) -> None:
    if not missing_ok and not self.is_file():
      raise FileNotFoundError(
        errno.ENOENT, os.strerror(errno.ENOENT), str(self)
      )
    self.write(None)

  def is_file(self) -> bool:
    if not self.key:
      return False
    got = self._ask(
      lambda store: store.read(self.key, byte_range=slice(0, 0)).result()
    )
    return got.state == "value"

  # ---- Folders ----

  def below(self) -> list[str]:
    """Returns the names of all objects below a folder, relative to it.

    What a console makes for a folder is left out: an object named "FOLDER/".
    """
    others = ("/", _PROBE)
    return [name for name in self._all() if name and not name.endswith(others)]

  def _all(self) -> list[str]:
    if self.bucket in lagging:
      self._wait_until_listed()
    return self._list()

  def _wait_until_listed(self) -> None:
    """Waits until a listing has what was written before this call."""
    probe = self / f"{uuid.uuid4().hex}{_PROBE}"
    probe.write_bytes(b"")
    end = time.monotonic() + LISTED_S
    try:
      while probe.name not in self._list():
        if time.monotonic() > end:
          raise BucketError(
            self,
            f"it cannot be listed, or lacks what was written {LISTED_S:.0f} s "
            "ago; the credentials need the right to list objects "
            "(storage.objects.list, s3:ListBucket)",
          )
        time.sleep(LISTED_S / 100)
    finally:
      probe.unlink()

  def _list(self) -> list[str]:
    start = f"{self.key}/" if self.key else ""
    # "0" is the character after "/".
    ends = (start, f"{self.key}0") if self.key else ()
    found = self._ask(
      lambda store: store.list(ts.KvStore.KeyRange(*ends)).result()
    )
    if not found:
      # To tensorstore a listing that GCS refuses is empty. A lookup that GCS
      # refuses, of an object that is not there, is an error.
      self._ask(lambda store: store.read(start or "/").result())
    # Not every emulator keeps to the range.
    names = [name.decode() for name in found]
    return sorted(
      name.removeprefix(start) for name in names if name.startswith(start)
    )

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def is_dir(self) -> bool:
    return bool(self.below())

  def mkdir(
    self, mode: int | None = None, parents: bool = False, exist_ok: bool = False
  ) -> None:
    """Does nothing: a folder is there when something is in it."""

  def iterdir(self) -> Iterator["Path"]:
    names = dict.fromkeys(name.split("/")[0] for name in self.below())
    return (self / name for name in names)

  def glob(self, pattern: str) -> Iterator["Path"]:
    """Yields what matches a pattern in this folder, without "**"."""
    depth = pattern.count("/") + 1
    names = dict.fromkeys(
      "/".join(name.split("/")[:depth]) for name in self.below()
    )
    return (
      self / name
      for name in names
      if name.count("/") == depth - 1
      and all(map(fnmatch.fnmatchcase, name.split("/"), pattern.split("/")))
    )

  def rmtree(self, missing_ok: bool = False) -> None:
    """Deletes an object, or all below a folder, those directly in it first.

    So the file that marks a checkpoint as complete is gone before the others.
    """
    names = self._all()
    if not names and not missing_ok and not self.is_file():
      raise FileNotFoundError(
        errno.ENOENT, os.strerror(errno.ENOENT), str(self)
      )
    for path in (self, *(self / name for name in names if "/" not in name)):
      path.write(None)
    keys = [f"{self.key}/{name}" for name in names if "/" in name]
    self._ask(
      lambda store: [
        future.result() for future in [store.write(key, None) for key in keys]
      ]
    )

  def rmdir(self) -> None:
    """Does nothing: a folder without objects is not there."""

  def rename(self, target: epath.PathLike) -> Self:
    """Copies an object, or all below a folder, then deletes it."""
    target = type(self)(target)
    for name in [""] if self.is_file() else self.below():
      (target / name).write_bytes((self / name).read_bytes())
    self.rmtree()
    return target

  replace = rename

  def resolve(self, strict: bool = False) -> Self:
    return self


def _inside(parts: Iterable[epath.PathLike]) -> list[str]:
  """Returns the parts of a path as PurePosixPath keeps them.

  It would take "gs://bucket/x" for "gs:/bucket/x".
  """
  return [re.sub("^(gs|s3)://", r"/\1/", os.fspath(part)) for part in parts]


class _Written(io.BytesIO):
  """What is written to a file that is open; closing it writes the object."""

  def __init__(self, path: Path):
    super().__init__()
    self._path = path

  def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
    if error is None:
      self.close()
    super().close()

  def close(self) -> None:
    if not self.closed:
      self._path.write_bytes(self.getvalue())
    super().close()


class Appended:
  """An object to append to: what is written is put whole, now and then.

  Another process may append to it, too: of what was put, nothing is lost. What
  the bucket does not take waits.

  Args:
    path: the object; what is there stays.
  """

  def __init__(self, path: Path):
    self._path = path
    self._new: list[bytes] = []  # one thread adds, another takes from the front
    data, self._generation = path.read()
    self._put = data or b""  # what the bucket has
    self._lock, self._ends = threading.Lock(), threading.Event()
    self._failed = False
    self._thread = threading.Thread(target=self._now_and_then, daemon=True)
    self._thread.start()

  def write(self, data: bytes) -> None:
    """Appends; returns at once."""
    self._new.append(data)

  def flush(self) -> None:
    """Puts what is not yet in the bucket, if it takes it."""
    with self._lock:
      try:
        while count := len(self._new):
          whole = b"".join([self._put, *self._new[:count]])
          generation = self._path.write(whole, self._generation)
          if generation is None:  # someone has written, perhaps we ourselves
            data, self._generation = self._path.read()
            self._put = data or b""
            if self._put != whole:
              continue
          else:
            self._generation = generation
          self._put = whole
          del self._new[:count]
        self._failed = False
      except BucketError as e:
        if not self._failed:
          log.warning("%s; the run continues", e)
        self._failed = True

  def _now_and_then(self) -> None:
    pause = PUT_EVERY_S
    while not self._ends.wait(pause):
      start = time.monotonic()
      self.flush()
      # A long file is put less often.
      pause = max(PUT_EVERY_S, 10 * (time.monotonic() - start))

  def close(self) -> None:
    self._ends.set()
    self._thread.join()
    self.flush()


@functools.cache
def stores(scheme: str, bucket: str) -> ts.KvStore:
  retries = {"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES}
  return ts.KvStore.open(
    spec(f"{scheme}://{bucket}/"), context=ts.Context(retries)
  ).result()


def spec(path: str) -> dict[str, Any]:
  """Returns how tensorstore opens gs://BUCKET/PATH or s3://BUCKET/PATH.

  It reads TENSORSTORE_GCS_HTTP_URL by itself, and AWS_ENDPOINT_URL not.
  """
  scheme, _, rest = path.partition("://")
  bucket, _, key = rest.partition("/")
  found = dict(
    driver="gcs" if scheme == "gs" else "s3", bucket=bucket, path=key
  )
  endpoint = os.environ.get("AWS_ENDPOINT_URL")
  if scheme == "s3" and endpoint:
    found["endpoint"] = endpoint
  return found


def reason(error: BaseException, scheme: str = "") -> str:
  """Returns what went wrong, in one line, of an error of tensorstore."""
  text = " ".join(str(error).split())
  code = (re.findall(r"http_response_code='(\d+)'", text) or [""])[-1]
  if "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text:
    remedy = f"; {_LOG_IN[scheme]}" if scheme in _LOG_IN else ""
    return f"access is denied ({code or 'no credentials'}){remedy}"
  if code == "404":
    return "there is no such bucket"
  text = re.sub(r" \[\w+='.*", "", text)
  return text.removeprefix("ABORTED: ")[:160] + (f" ({code})" if code else "")


def teach_orbax() -> None:
  """Lets orbax write s3:// as it writes gs://.

  Orbax 0.12.8 asks in four places whether a path is gs://, and takes all others
  for local ones. Tensorstore, with which it writes, knows both.

  Raises:
    UserError: this orbax has other places.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  places = {
    (gcs_utils, "_GCS_PATH_PREFIX"): ("gs://", "s3://"),
    (gcs_utils, "get_kvstore_for_gcs"): spec,
    (tensorstore_utils, "_use_gcs_driver"): lambda path: "://" in path,
    (tensorstore_utils, "_normalize_path"): lambda path: (
      path.rstrip("/") if "://" in path else os.path.normpath(path)
    ),
  }
  for (module, name), ours in places.items():
    if not hasattr(module, name):
      raise errors.UserError(
        "this version of orbax-checkpoint cannot write s3://; "
        "pip install orbax-checkpoint==0.12.8"
      )
    setattr(module, name, ours)
