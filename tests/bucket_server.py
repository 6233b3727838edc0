"""An emulator of buckets: what tensorstore asks of GCS (JSON) and S3 (REST).

with bucket_server.serve() as server: `server.env` is the environment in which
gs://ANY/.. and s3://ANY/.. are read from and written to this process's memory.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import html
import http.server
import json
import re
import threading
import time
from typing import NamedTuple
import urllib.parse


class Object(NamedTuple):
  """An object, or what a listing may still have of a deleted one.

  Attributes:
    data: its content; None if it was deleted.
    generation: a number that no other version has.
    since: when it was created or deleted, by time.monotonic().
  """

  data: bytes | None
  generation: int
  since: float


class Server(http.server.ThreadingHTTPServer):
  """The emulator.

  Attributes:
    objects: {"BUCKET/NAME": Object}, with those that were deleted.
    fail: fn(method, "BUCKET/NAME") -> an HTTP status, or None to do what is
      asked. A listing has the name "BUCKET/". With a negative status it is
      done, and only the answer is lost.
    lag_s: after this many seconds a listing shows what has changed.
    anonymous: whether requests need no credentials.
    seen: (method, "BUCKET/NAME") of all requests.
    page: the most names of an answer to a listing.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("localhost", 0), _Handler)
    self.objects: dict[str, Object] = {}
    self.fail = lambda method, name: None
    self.lag_s, self.anonymous, self.page = 0.0, True, 7
    self.seen: list[tuple[str, str]] = []
    self.lock = threading.Lock()
    self._count = 0

  @property
  def env(self) -> dict[str, str]:
    """The environment variables with which it is found."""
    url = f"http://localhost:{self.server_port}"
    return dict(
      TENSORSTORE_GCS_HTTP_URL=url,
      AWS_ENDPOINT_URL=url,
      AWS_ACCESS_KEY_ID="key",
      AWS_SECRET_ACCESS_KEY="secret",
      AWS_REGION="us-east-1",
      AWS_EC2_METADATA_DISABLED="true",
    )

  def get(self, name: str) -> bytes | None:
    """Returns an object's content; None if there is none."""
    found = self.objects.get(name)
    return found.data if found else None

  def put(self, name: str, data: bytes | None) -> Object:
    """Writes an object, or deletes it."""
    self._count += 1
    before = self.objects.get(name)
    since = time.monotonic()
    if before and (before.data is None) == (data is None):
      since = before.since
    self.objects[name] = made = Object(data, self._count, since)
    return made

  def names(self, prefix: str = "") -> list[str]:
    """Returns the names of all objects below a prefix, in order."""
    return sorted(
      name
      for name, it in self.objects.items()
      if name.startswith(prefix) and it.data is not None
    )

  def listed(self, prefix: str) -> list[str]:
    """Returns what a listing has, which may lag."""
    late = time.monotonic() - self.lag_s
    return sorted(
      name
      for name, it in self.objects.items()
      if name.startswith(prefix) and (it.data is not None) == (it.since <= late)
    )


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  lost = 0  # the status that is answered in place of the true one

  def _serve(self) -> None:
    size = int(self.headers.get("Content-Length", 0))
    body = self.rfile.read(size)
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    path = urllib.parse.unquote(url.path)
    gcs = re.match(r"/(upload/)?storage/v1/b/([^/]+)/o/?(.*)", path, re.DOTALL)
    if gcs:
      bucket, name = gcs[2], gcs[3] or query.get("name", "")
    else:
      bucket, _, name = path.removeprefix("/").partition("/")
    key = f"{bucket}/{name}"
    with self.server.lock:
      self.server.seen.append((self.command, key))
      status = self.server.fail(self.command, key)
      if not self.server.anonymous and "authorization" not in self.headers:
        status = 401 if gcs else 403
      self.lost = -status if status and status < 0 else 0
      if status and status > 0:
        self._answer(status, b'{"error": "emulated"}')
      elif gcs:
        self._gcs(bucket, name, query, body)
      else:
        self._s3(bucket, name, query, body)

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

  def _gcs(self, bucket, name, query, body) -> None:
    if not name:  # a listing
      names, token = self._page(
        bucket,
        query.get("prefix", ""),
        query.get("startOffset", ""),
        query.get("endOffset"),
        query.get("pageToken", ""),
      )
      found = {"items": [{"name": n, "size": "1"} for n in names]}
      if token:
        found["nextPageToken"] = token
      return self._answer(200, json.dumps(found).encode())
    key = f"{bucket}/{name}"
    it = self.server.objects.get(key)
    there = it is not None and it.data is not None
    generation = it.generation if there else 0
    wanted = query.get("ifGenerationMatch")
    unwanted = query.get("ifGenerationNotMatch")
    if wanted is not None and int(wanted) != generation:
      return self._answer(412)
    if unwanted is not None and int(unwanted) == generation:
      return self._answer(304)
    if self.command == "POST":
      it = self.server.put(key, body)
    elif not there:
      return self._answer(404)
    elif self.command == "DELETE":
      self.server.put(key, None)
      return self._answer(204)
    headers = {"x-goog-generation": str(it.generation)}
    if query.get("alt") == "media" and self.command == "GET":
      return self._content(it.data, headers)
    about = {
      "name": name,
      "generation": str(it.generation),
      "size": str(len(it.data)),
    }
    return self._answer(200, json.dumps(about).encode(), headers)

  def _s3(self, bucket, name, query, body) -> None:
    if not name and self.command == "HEAD":  # which region is it in?
      return self._answer(200, headers={"x-amz-bucket-region": "us-east-1"})
    if not name:
      prefix = query.get("prefix", "")
      names, token = self._page(
        bucket,
        prefix,
        query.get("start-after", ""),
        None,
        query.get("continuation-token", ""),
      )
      more = f"<NextContinuationToken>{token}</NextContinuationToken>"
      return self._answer(
        200,
        (
          '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
          f"<Name>{bucket}</Name><KeyCount>{len(names)}</KeyCount>"
          f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>"
          + (more if token else "")
          + "".join(
            f"<Contents><Key>{html.escape(n)}</Key><Size>1</Size></Contents>"
            for n in names
          )
          + "</ListBucketResult>"
        ).encode(),
      )
    key = f"{bucket}/{name}"
    data = self.server.get(key)
    etag = f'"{hashlib.md5(data).hexdigest()}"' if data is not None else None
    match = self.headers.get("If-Match")
    none = self.headers.get("If-None-Match")
    if match is not None and match != etag:
      return self._answer(412 if data is not None else 404)
    if none is not None and data is not None and none in ("*", etag):
      return self._answer(304 if self.command == "GET" else 412)
    if self.command == "PUT":
      self.server.put(key, body)
      etag = f'"{hashlib.md5(body).hexdigest()}"'
      return self._answer(200, headers={"ETag": etag})
    if self.command == "DELETE":
      if data is not None:
        self.server.put(key, None)
      return self._answer(204)
    if data is None:
      return self._answer(404)
    return self._content(data, {"ETag": etag})

  def _page(self, bucket, prefix, start, end, token) -> tuple[list[str], str]:
    """Returns (names, the token of the next page or "")."""
    cut = len(bucket) + 1
    names = [
      n[cut:]
      for n in self.server.listed(f"{bucket}/{prefix}")
      if n[cut:] >= max(start, token) and (end is None or n[cut:] < end)
    ]
    page = self.server.page
    return names[:page], names[page] if len(names) > page else ""

  def _content(self, data: bytes, headers: dict[str, str]) -> None:
    asked = re.fullmatch(
      r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "bytes=-"
    )
    if not asked[1] and not asked[2]:
      return self._answer(200, data, headers)
    if not asked[1]:
      first, end = max(len(data) - int(asked[2]), 0), len(data)
    else:
      first = int(asked[1])
      end = min(int(asked[2]) + 1, len(data)) if asked[2] else len(data)
    if first >= len(data):
      return self._answer(416, headers={"Content-Range": f"*/{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
    return self._answer(206, data[first:end], headers)

  def _answer(self, status, body=b"", headers=()) -> None:
    status = self.lost or status
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD" and status not in (204, 304):
      self.wfile.write(body)

  def log_message(self, *_) -> None:
    pass


@contextlib.contextmanager
def serve() -> Iterator[Server]:
  """Serves in a thread, until the body ends."""
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()
