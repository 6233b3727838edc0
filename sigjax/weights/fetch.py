"""Fetches files by URL into a cache, each one whole or not at all.

    CACHE/HOST/PATH               a complete file; only it has this name
    CACHE/HOST/PATH.partial       what has arrived, locked while it grows
    CACHE/HOST/PATH.partial.etag  which version of the file that is

CACHE is files.cache_dir(). No credentials are sent: only public files can be
fetched.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
from typing import Any, BinaryIO, NamedTuple
import urllib.error
import urllib.parse
import urllib.request

import tqdm

from sigjax import errors
from sigjax.runtime import files

log = logging.getLogger("sigjax")

# The HTTP addresses of the public files in a bucket.
ENDPOINTS = {
  "gs": "https://storage.googleapis.com/{bucket}/{name}",
  "s3": "https://{bucket}.s3.amazonaws.com/{name}",
}
ATTEMPTS = 5  # requests in a row that bring nothing new, then it gives up
PAUSE = 1.0  # seconds between them
TIMEOUT = 60.0  # seconds without an answer
CHUNK = 1 << 20


# Weak ones, W/"..", do not identify bytes.
_STRONG_ETAG = re.compile(r'"[\x20\x21\x23-\x7e]{1,500}"')


class _Answer(NamedTuple):
  """What a server said of a file."""

  whole: bool  # all of it has arrived
  total: int | None  # bytes
  md5: str | None  # in hexadecimal


def is_url(path: object) -> bool:
  """Returns whether a path is a URL that local() takes."""
  return bool(re.match(r"(gs|s3|https?)://", str(path)))


def local(url: str, missing: str = "") -> str:
  """Returns the path of a URL's file in the cache, after fetching it if needed.

  If several processes need the same file, one fetches it and the others wait. A
  download that was cut off resumes where it stopped, if the server allows that.

  Args:
    url: gs://BUCKET/NAME, s3://BUCKET/NAME, https://.. or http://..
    missing: is added to the error if the server has no such file.

  Raises:
    UserError: the file does not exist or is private, there is no network or no
      room, https redirects to http, or the server's size or MD5 differs from
      what arrived. Then the cache has nothing under the file's name.
  """
  target = cached(url)
  if not os.path.exists(target):
    try:
      os.makedirs(os.path.dirname(target), exist_ok=True)
      with _locked(f"{target}.partial") as f:
        if not os.path.exists(target):
          log.info("fetching %s to %s", _shown(url), target)
          _download(url, f, target, missing)
        else:  # another process fetched it meanwhile
          _remove(f"{target}.partial")
    except OSError as e:  # errors of the network are UserErrors by now
      raise errors.UserError(
        f"cannot write {target}: {e.strerror or e}; make room, or name "
        "another folder in SIGJAX_CACHE"
      ) from e
  return target


def cached(url: str) -> str:
  """Returns the path that a URL's file has, or would have, in the cache.

  Raises:
    UserError: the URL names no file.
  """
  web = _web(url)
  try:
    parts = urllib.parse.urlsplit(web)
  except ValueError:  # "http://[", for one
    parts = urllib.parse.urlsplit("")
  names = parts.path.removeprefix("/").split("/")
  if parts.query:
    names[-1] += "?" + urllib.parse.quote(parts.query, safe="=&")
  if names[-1].endswith((".partial", ".partial.etag")):
    names[-1] += "_"  # not what has arrived of another file
  names.insert(0, parts.netloc)
  if {".", "..", ""} & set(names) or re.search(r"[\0-\x1f\x7f]", web):
    raise errors.UserError(f"{_shown(url)} names no file")
  return str(files.cache_dir().joinpath(*map(_short, names)))


def _short(name: str) -> str:
  """Returns a name that file systems take, with room for ".partial.etag"."""
  data = name.encode(errors="surrogateescape")
  if len(data) <= 200:
    return name
  return f"{name[:40]}..{hashlib.sha256(data).hexdigest()[:32]}"


def _shown(url: str) -> str:
  """Returns a URL for messages, without the signature of a presigned one."""
  start, _, query = str(url).partition("?")
  return f"{start}?.." if len(query) > 40 else str(url)


def _web(url: str) -> str:
  """Returns the http(s) form of a URL."""
  scheme, _, rest = str(url).partition("://")
  if scheme not in ENDPOINTS:
    return str(url)
  bucket, _, name = rest.partition("/")
  return ENDPOINTS[scheme].format(bucket=bucket, name=urllib.parse.quote(name))


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[BinaryIO]:
  """Opens a file to append to, after waiting for other processes that do."""
  while True:
    with open(path, "ab") as f:
      try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        log.info("another process is fetching %s; waiting", path)
        fcntl.flock(f, fcntl.LOCK_EX)
      # The process that held the lock may have renamed or deleted the file.
      if not _still_there(path, f):
        continue
      try:
        yield f
      finally:
        if not os.fstat(f.fileno()).st_size:  # nothing arrived
          _remove(path)
          _remove(f"{path}.etag")
      return


def _still_there(path: str, f: BinaryIO) -> bool:
  """Returns whether f is the file at path, or was renamed when complete."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
  except FileNotFoundError:
    return os.path.exists(path.removesuffix(".partial"))


def _download(url: str, f: BinaryIO, target: str, missing: str) -> None:
  """Fills f, the file TARGET.partial, and renames it to target."""
  partial, etag = f"{target}.partial", f"{target}.partial.etag"
  best = tries = 0
  while True:
    answer = _fill(url, f, target, missing)
    have = f.seek(0, os.SEEK_END)
    if answer.whole:
      break
    tries = 0 if have > best else tries + 1
    best = max(best, have)
    if tries == ATTEMPTS:
      raise errors.UserError(
        f"{_shown(url)} was cut off again and again, at last after {have} of "
        f"{answer.total} bytes; run again to resume there"
      )
    time.sleep(PAUSE)

  os.fsync(f.fileno())
  if answer.md5:
    with open(partial, "rb") as whole:
      md5 = hashlib.file_digest(whole, "md5").hexdigest()
    if md5 != answer.md5:
      _remove(etag)
      _remove(partial)
      raise errors.UserError(
        f"{_shown(url)} arrived damaged and was deleted: its MD5 is {md5}, not "
        f"{answer.md5} as the server says; run again to fetch it again"
      )
  os.replace(partial, target)
  _remove(etag)


def _fill(url: str, f: BinaryIO, target: str, missing: str) -> _Answer:
  """Appends to f what one request brings."""
  have = f.seek(0, os.SEEK_END)
  response = _request(url, _resume(target, have), target, missing)
  if response is None:
    return _Answer(False, None, None)
  with response:
    content_range = response.headers.get("Content-Range", "")
    got = re.match(r"bytes ([0-9]{1,18})-", content_range)
    if response.status != 206 or not got or int(got[1]) != have:
      # The server sends the whole file, or another part than was asked for.
      f.truncate(0)
      have = 0
      _note_version(response.headers, target)
      if response.status != 200:
        _remove(f"{target}.partial.etag")
        return _Answer(False, None, None)
    length = response.length  # None if it is not a number
    if length is None and not response.chunked:
      raise errors.UserError(
        f"the server does not say how long {_shown(url)} is, so that half of "
        f"it would look like all; {_by_hand(target)}"
      )
    total = None if length is None else have + length
    room = shutil.disk_usage(os.path.dirname(target)).free
    if total and total - have > room:
      raise errors.UserError(
        f"no room for {_shown(url)}: it needs {(total - have) / 1e9:.3f} GB, "
        f"{os.path.dirname(target)} has {room / 1e9:.3f}; make room, or name "
        "another folder in SIGJAX_CACHE"
      )
    broken = False
    with tqdm.tqdm(
      total=total,
      initial=have,
      unit="B",
      unit_scale=True,
      disable=None,
      desc=os.path.basename(target),
    ) as bar:
      while True:
        try:
          chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException):
          broken = True
          break
        if not chunk:
          break
        f.write(chunk)
        bar.update(len(chunk))
    whole = not broken and f.seek(0, os.SEEK_END) == (total or f.tell())
    return _Answer(whole, total, _md5(url, response.headers))


def _resume(target: str, have: int) -> dict[str, str]:
  """Returns the headers that ask for the missing rest of the same version."""
  etag = ""
  with (
    contextlib.suppress(FileNotFoundError, UnicodeDecodeError),
    open(f"{target}.partial.etag", encoding="ascii") as f,
  ):
    etag = f.read(1000)
  if not have or not _STRONG_ETAG.fullmatch(etag):
    return {}
  return {"Range": f"bytes={have}-", "If-Range": etag}


def _note_version(headers: Mapping[str, str], target: str) -> None:
  """Stores the version of the file that is about to arrive."""
  etag = headers.get("ETag", "")
  _remove(f"{target}.partial.etag")
  if _STRONG_ETAG.fullmatch(etag):
    with open(f"{target}.partial.etag", "w", encoding="ascii") as f:
      f.write(etag)


def _md5(url: str, headers: Any) -> str | None:
  """Returns the MD5 that a server gives for the file, or None."""
  goog = re.search(
    r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash") or [])
  )
  stored = headers.get("x-goog-stored-content-encoding", "identity")
  if goog and stored == "identity":  # else it is that of the compressed file
    with contextlib.suppress(binascii.Error):
      digest = base64.b64decode(goog[1], validate=True)
      return digest.hex() if len(digest) == 16 else None
    return None
  # S3: the ETag is the MD5, unless the file was uploaded in parts ("..-8") or
  # is encrypted with a key of its own.
  etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
  kms = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
  if str(url).startswith("s3://") and etag and not kms:
    return etag[1]
  return None


def _by_hand(target: str) -> str:
  return f"fetch it by hand and put it at {target}"


def _request(
  url: str, headers: dict[str, str], target: str, missing: str
) -> Any:
  """Opens a URL; see local for the errors.

  Returns:
    The response; None if the server says that nothing is left of the version
    which `headers` name, so that the next request has to be for all of it.
  """
  shown = _shown(url)
  try:
    quoted = urllib.parse.quote(_web(url), safe=":/?#[]@!$&'()*+,;=%~")
    request = urllib.request.Request(quoted, headers=headers)
    opener = urllib.request.build_opener(_Redirects)
    return opener.open(request, timeout=TIMEOUT)
  except errors.UserError:
    raise
  except urllib.error.HTTPError as e:
    e.close()
    if e.code == 416 and headers:  # the file is another one by now
      _remove(f"{target}.partial.etag")
      return None
    if e.code in (404, 410):
      raise errors.UserError(
        f"there is no {shown} (the server says {e.code})"
        + (f"; {missing}" if missing else "")
      ) from None
    if e.code in (401, 403):
      # Google's buckets answer so for absent files, too, if they may not be
      # listed.
      raise errors.UserError(
        f"{shown} is private, or does not exist (the server says {e.code}): "
        "copy it by hand and give the path of the copy"
        + (f"; {missing}" if missing else "")
      ) from None
    raise errors.UserError(
      f"{shown} cannot be fetched now (the server says {e.code} {e.reason}): "
      f"try again, or {_by_hand(target)}"
    ) from None
  except (OSError, http.client.HTTPException, ValueError) as e:
    reason = getattr(e, "reason", e)
    raise errors.UserError(
      f"{shown} cannot be reached ({reason}): {_by_hand(target)}"
    ) from None


class _Redirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects to http or https, but never from https to http."""

  def redirect_request(
    self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
  ) -> urllib.request.Request | None:
    allowed = ("https",) if req.type == "https" else ("http", "https")
    if urllib.parse.urlsplit(newurl).scheme not in allowed:
      fp.close()
      raise errors.UserError(
        f"{_shown(req.full_url)} redirects to {_shown(newurl)}, which is not "
        "encrypted: somebody on the way could change the file; give an https "
        "URL of it, or fetch it by hand"
      )
    return super().redirect_request(req, fp, code, msg, headers, newurl)
