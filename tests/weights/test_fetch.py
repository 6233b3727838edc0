"""Downloads, from a server on this machine that fails on purpose."""

import base64
import hashlib
import http.server
import os
import resource
import ssl
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from sigjax import errors
from sigjax.checkpoints import restore
from sigjax.weights import fetch, npz, vocabulary

# Of a server on this machine, for nothing but these tests: openssl req -x509
# -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500
# -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1
KEY_AND_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgB/Ri7STFlYkjLKEA
3Bx4MSiqlekIoM95UhOW69G2mnehRANCAAT/oFzuG91zv+jTplTjgp0/VQuM3syD
GLbzfxdKqtg0ydADzTp8F4GQzzauLBcZEninAHWH2OjG4qrcMmCcCO/J
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUW3tV/PWBZ0r467pzWdiXyA9yWckwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNTAxNDM0NVoYDzIxMjYxMTAx
MDE0MzQ1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAT/oFzuG91zv+jTplTjgp0/VQuM3syDGLbzfxdKqtg0ydADzTp8F4GQ
zzauLBcZEninAHWH2OjG4qrcMmCcCO/Jo28wbTAdBgNVHQ4EFgQUjF1+ZtO1NxIA
h9m7OHPX2Z2RImQwHwYDVR0jBBgwFoAUjF1+ZtO1NxIAh9m7OHPX2Z2RImQwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgeRlKtM148T95n+Yi0WmdewiOzwqyl3viwG7Wbl50cZ4CIQDq
Mtpao0Vy5hyFWD3DPqz8LewdQoAr5lWeDFIV5cXbgw==
-----END CERTIFICATE-----
"""

DATA = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
  """Serves `files` {path: bytes}; the rest are its faults."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.files = {"/bucket/dir/x.bin": DATA}
    self.cut = []  # of the next answers: after how many bytes they break off
    self.status = None
    self.ranges = True
    self.etag = '"version one"'
    self.length = True
    self.chunked = False
    self.delay = 0
    self.headers = {}
    self.moved = {}  # {path: the URL that it redirects to}
    self.asked = []  # (path, Range) of every request

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def do_GET(self):
    server = self.server
    self.close_connection = True
    server.asked.append((self.path, self.headers["Range"]))
    data = server.files.get(self.path)
    if self.path in server.moved:
      data = b""
    if server.status or data is None:
      self.send_error(server.status or 404)
      return
    if self.path in server.moved:
      self.send_response(302)
      self.send_header("Location", server.moved[self.path])
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    start = 0
    wanted = self.headers["Range"]
    if wanted and server.ranges and self.headers["If-Range"] == server.etag:
      start = int(wanted.removeprefix("bytes=").removesuffix("-"))
      if start >= len(data):
        self.send_error(416)
        return
    self.send_response(206 if start else 200)
    if start:
      self.send_header(
        "Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}"
      )
    if server.etag:
      self.send_header("ETag", server.etag)
    for name, value in server.headers.items():
      self.send_header(name, value)
    body = data[start:]
    if server.chunked:
      self.send_header("Transfer-Encoding", "chunked")
    elif server.length:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    time.sleep(server.delay)
    sent = body[: server.cut.pop(0)] if server.cut else body
    if not server.chunked:
      self.wfile.write(sent)
      return
    for i in range(0, len(sent), 500_000):
      piece = sent[i : i + 500_000]
      self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if sent == body:
      self.wfile.write(b"0\r\n\r\n")


@pytest.fixture(name="server")
def a_server(tmp_path, monkeypatch):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setattr(fetch, "PAUSE", 0)
  with Server() as server:
    for scheme in fetch.ENDPOINTS:
      monkeypatch.setitem(
        fetch.ENDPOINTS, scheme, server.url + "/{bucket}/{name}"
      )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def files(tmp_path):
  """Returns {name: size} of what the cache holds."""
  return {
    p.name: p.stat().st_size
    for p in (tmp_path / "cache").rglob("*")
    if p.is_file()
  }


def message(url, *args):
  """Returns the one line that local() refuses a URL with."""
  with pytest.raises(errors.UserError) as e:
    fetch.local(url, *args)
  assert "\n" not in str(e.value)
  return str(e.value)


def read(path):
  with open(path, "rb") as f:
    return f.read()


@pytest.mark.parametrize("scheme", ["gs", "s3", "http"])
def test_once_and_found_again(server, tmp_path, scheme):
  url = f"{scheme}://bucket/dir/x.bin".replace("http:/", server.url)
  path = fetch.local(url)
  assert (
    path
    == fetch.cached(url)
    == str(tmp_path / f"cache/127.0.0.1:{server.server_port}/bucket/dir/x.bin")
  )
  assert read(path) == DATA
  server.status = 500  # It is not asked again.
  assert fetch.local(url) == path
  assert len(server.asked) == 1
  assert files(tmp_path) == {"x.bin": len(DATA)}


def test_where_buckets_are():
  home = os.path.expanduser("~/.cache/sigjax/")
  for url, path in {
    "gs://b/c/d.npz": "storage.googleapis.com/b/c/d.npz",
    "s3://b/c/d.npz": "b.s3.amazonaws.com/c/d.npz",
    "https://h.org/c/d.npz?e=f/g": "h.org/c/d.npz?e=f%2Fg",
  }.items():
    assert fetch.cached(url) == home + path
  for url in "gs://b", "https://h/../../x", "http:///x", "https://h/":
    with pytest.raises(errors.UserError, match="names no file"):
      fetch.cached(url)
  assert not fetch.is_url("/gs:/x") and not fetch.is_url("hdfs://x")


def test_a_cut_connection_goes_on(server, tmp_path):
  server.cut = [1_000_000, 500_000]
  assert read(fetch.local("gs://bucket/dir/x.bin")) == DATA
  assert [r for _, r in server.asked] == [
    None,
    "bytes=1000000-",
    "bytes=1500000-",
  ]
  assert files(tmp_path) == {"x.bin": len(DATA)}


def test_cut_for_good_then_another_run(server, tmp_path):
  url = "gs://bucket/dir/x.bin"
  server.cut = [1_000_000] + [0] * fetch.ATTEMPTS
  assert f"cut off again and again, at last after 1000000 of {len(DATA)} " in (
    message(url)
  )
  left = files(tmp_path)
  assert left.pop("x.bin.partial") == 1_000_000
  assert set(left) == {"x.bin.partial.etag"}  # and no x.bin
  server.asked.clear()
  assert read(fetch.local(url)) == DATA
  assert [r for _, r in server.asked] == ["bytes=1000000-"]
  assert files(tmp_path) == {"x.bin": len(DATA)}


@pytest.mark.parametrize("why", ["no ranges", "another version", "no version"])
def test_from_the_start_if_it_cannot_go_on(server, why):
  url = "gs://bucket/dir/x.bin"
  if why == "no version":
    server.etag = ""
  server.cut = [1_000_000] + [0] * 9
  if why == "no ranges":
    server.ranges = False
  message(url)
  server.cut = []
  if why != "no ranges":
    server.etag = server.etag and '"version two"'
    server.files["/bucket/dir/x.bin"] = DATA[::-1]
  assert read(fetch.local(url)) == server.files["/bucket/dir/x.bin"]


def test_a_server_that_answers_416_for_ever(server, tmp_path):
  """Asked for a rest once, and then for all of it."""
  url = "gs://bucket/dir/x.bin"
  server.cut = [1_000_000] + [0] * fetch.ATTEMPTS
  message(url)
  server.asked.clear()
  server.status = 416
  assert "cannot be fetched now (the server says 416" in message(url)
  assert [r for _, r in server.asked] == ["bytes=1000000-", None]
  server.status = None
  assert read(fetch.local(url)) == DATA


@pytest.mark.parametrize(
  "headers, expected",
  [
    ({"Content-Length": "many"}, "does not say how long"),
    ({"Content-Length": "-5"}, "does not say how long"),
    ({"Content-Length": "9" * 5000}, "does not say how long"),
    ({"Content-Length": "9" * 17}, "no room for"),
    # What is no MD5 is none.
    ({"x-goog-hash": "md5=A"}, None),
    ({"x-goog-hash": "md5=AAAA"}, None),
    ({"x-goog-hash": "md5====="}, None),
    ({"ETag": '"' + "x" * 9000 + '"'}, None),
    ({"ETag": '"\xe4"'}, None),
    ({"Content-Range": "bytes 0-1/2"}, None),
  ],
)
def test_whatever_a_server_says(server, tmp_path, headers, expected):
  url = "gs://bucket/dir/x.bin"
  server.length = "Content-Length" not in headers
  server.etag = "" if "ETag" in headers else server.etag
  server.headers = headers
  if expected:
    assert expected in message(url)
    assert not files(tmp_path)
  else:
    server.cut = [1_000_000]
    assert read(fetch.local(url)) == DATA


@pytest.mark.parametrize("kept", [b"\xff", b"a\r\nb", b"", b"x" * 5000])
def test_a_damaged_note_of_the_version(server, tmp_path, kept):
  """It is fetched from the start: nobody knows of what the first part is."""
  url = "gs://bucket/dir/x.bin"
  server.cut = [1_000_000] + [0] * fetch.ATTEMPTS
  message(url)
  (note,) = (tmp_path / "cache").rglob("*.etag")
  note.write_bytes(kept)
  server.files["/bucket/dir/x.bin"] = DATA[::-1]
  assert read(fetch.local(url)) == DATA[::-1]


def test_redirects(server, tmp_path, monkeypatch):
  """To where the server says, but never from https to http."""
  server.moved = {"/old": f"{server.url}/bucket/dir/x.bin"}
  assert read(fetch.local(f"{server.url}/old")) == DATA
  (tmp_path / "both.pem").write_text(KEY_AND_CERTIFICATE)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(tmp_path / "both.pem")
  monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "both.pem"))
  with Server() as safe:
    safe.socket = context.wrap_socket(safe.socket, server_side=True)
    thread = threading.Thread(target=safe.serve_forever, args=(0.01,))
    thread.start()
    home = f"https://localhost:{safe.server_port}"
    safe.moved = {
      "/a": f"{server.url}/bucket/dir/x.bin?X-Signature=" + 64 * "0",
      "/b": f"{home}/bucket/dir/x.bin",
      "/c": "ftp://localhost/x.bin",
    }
    said = [message(f"{home}/{name}") for name in "ac"]
    assert read(fetch.local(f"{home}/b")) == DATA
    safe.shutdown()
    thread.join()
  assert (
    f"{home}/a redirects to {server.url}/bucket/dir/x.bin?.., which"
    in (said[0])
  )
  assert "redirects to ftp://localhost/x.bin, which is not encr" in said[1]
  assert len(server.asked) == 2  # not asked for what could be anything


def test_presigned_urls(server, tmp_path):
  """Their signatures are longer than a file's name may be, and secret."""
  query = "?X-Amz-Signature=" + "0123456789abcdef" * 60
  server.files["/bucket/dir/x.bin" + query] = DATA
  url = f"{server.url}/bucket/dir/x.bin{query}"
  path = fetch.local(url)
  assert read(path) == DATA and fetch.local(url) == path
  assert fetch.cached(url[:-1]) != path != fetch.cached(url + "0")
  assert len(server.asked) == 1
  del server.files["/bucket/dir/x.bin" + query]
  os.remove(path)
  assert f"there is no {server.url}/bucket/dir/x.bin?.. (" in message(url)
  long = f"{server.url}/{'x' * 5000}.npz"
  assert "there is no" in message(long)


@pytest.mark.parametrize(
  "url",
  [
    "http://../x",
    "https://./x",
    "http://..",
    "gs://../x",
    "gs://b/../../x",
    "https://h/a/./b",
    "https://h//x",
    "https:///x",
    "https://[/x",
    "https://h/x\0y",
    "https://h/x\ny",
  ],
)
def test_nothing_is_outside_of_the_cache(url):
  with pytest.raises(errors.UserError, match="names no file"):
    fetch.cached(url)


@pytest.mark.parametrize(
  "url",
  [
    "http://a..b/x",
    "http://h:port/x",
    "http://h:99999999/x",
    "http://\N{SNOWMAN}.invalid/x",
    "https://h.invalid/a b/\N{SNOWMAN}",
  ],
)
def test_urls_that_cannot_be(server, url):
  assert "cannot be reached" in message(url)


def test_what_has_arrived_is_not_taken_for_a_file(server, tmp_path):
  server.files["/x"] = DATA
  server.files["/x.partial"] = b"another file"
  server.cut = [1_000_000] + [0] * fetch.ATTEMPTS
  message(f"{server.url}/x")
  assert read(fetch.local(f"{server.url}/x.partial")) == b"another file"
  assert read(fetch.local(f"{server.url}/x")) == DATA


def test_more_is_there_than_the_file_has(server):
  url = "gs://bucket/dir/x.bin"
  target = fetch.cached(url)
  os.makedirs(os.path.dirname(target))
  for name, content in (
    (".partial", DATA + b"x"),
    (".partial.etag", b'"version one"'),
  ):
    with open(target + name, "wb") as f:
      f.write(content)
  assert read(fetch.local(url)) == DATA
  assert [bool(r) for _, r in server.asked] == [True, False]


def test_checksums(server, tmp_path):
  def goog(data):
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    return {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}

  url = "gs://bucket/dir/x.bin"
  server.headers = goog(DATA + b"other")
  assert "arrived damaged and was deleted: its MD5 is" in message(url)
  assert not files(tmp_path)
  # Of what was compressed, the checksum is that of the compressed.
  server.headers["x-goog-stored-content-encoding"] = "gzip"
  os.remove(fetch.local(url))
  server.headers = goog(DATA)
  fetch.local(url)

  s3 = "s3://bucket/dir/y.bin"
  server.files["/bucket/dir/y.bin"] = DATA
  server.headers = {}
  server.etag = f'"{hashlib.md5(b"other").hexdigest()}"'
  assert "arrived damaged" in message(s3)
  server.headers = {"x-amz-server-side-encryption": "aws:kms"}
  os.remove(fetch.local(s3))
  server.etag, server.headers = server.etag[:-1] + '-2"', {}
  os.remove(fetch.local(s3))
  server.etag = f'"{hashlib.md5(DATA).hexdigest()}"'
  fetch.local(s3)


def test_without_a_length(server, tmp_path):
  url = "gs://bucket/dir/x.bin"
  server.length = False
  assert "does not say how long" in message(url)
  assert not files(tmp_path)
  server.chunked = True
  server.cut = [600_000] * 9
  assert "cut off again" in message(url)
  assert "x.bin" not in files(tmp_path)
  server.cut = []
  assert read(fetch.local(url)) == DATA


@pytest.mark.parametrize(
  "status, expected",
  [
    (404, "there is no gs://bucket/dir/x.bin (the server says 404); known: a"),
    (403, "is private, or does not exist (the server says 403): copy it by"),
    (401, "copy it by hand and give the path of the copy; known: a"),
    (503, "the server says 503 Service Unavailable): try again, or fetch it"),
  ],
)
def test_refusals(server, tmp_path, status, expected):
  server.status = status
  assert expected in message("gs://bucket/dir/x.bin", "known: a")
  assert not files(tmp_path)


def test_no_network(server, monkeypatch):
  monkeypatch.setitem(fetch.ENDPOINTS, "gs", "http://127.0.0.1:1/{name}")
  text = message("gs://bucket/dir/x.bin")
  assert "cannot be reached" in text and "refused" in text
  assert text.endswith(f"put it at {fetch.cached('gs://bucket/dir/x.bin')}")
  # As a person would do it.
  os.makedirs(
    os.path.dirname(fetch.cached("gs://bucket/dir/x.bin")), exist_ok=True
  )
  with open(fetch.cached("gs://bucket/dir/x.bin"), "wb") as f:
    f.write(b"by hand")
  assert read(fetch.local("gs://bucket/dir/x.bin")) == b"by hand"
  assert not server.asked


def test_no_room(server, tmp_path, monkeypatch):
  url = "gs://bucket/dir/x.bin"
  with monkeypatch.context() as m:
    m.setattr(
      fetch.shutil,
      "disk_usage",
      lambda path: types.SimpleNamespace(free=len(DATA) - 1),
    )
    assert "no room for gs://bucket/dir/x.bin: it needs 0.003 GB" in message(
      url
    )
  # A disk that fills up meanwhile: no file of this process may grow further.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
  try:
    text = message(url)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert text.startswith("cannot write ") and "SIGJAX_CACHE" in text
  assert "x.bin" not in files(tmp_path)
  assert read(fetch.local(url)) == DATA  # there is room again
  monkeypatch.setenv("SIGJAX_CACHE", __file__)
  assert "Not a directory; make room, or name another folder" in message(url)


def test_many_processes_fetch_once(server, tmp_path):
  server.delay = 0.5
  code = (
    "import sys; from sigjax.weights import fetch; "
    f"fetch.ENDPOINTS['gs'] = '{server.url}/{{bucket}}/{{name}}'; "
    "path = fetch.local('gs://bucket/dir/x.bin'); "
    "print(len(open(path, 'rb').read()))"
  )
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE
    )
    for _ in range(3)
  ]
  assert [run.communicate()[0] for run in runs] == [f"{len(DATA)}\n"] * 3
  assert len(server.asked) == 1
  assert files(tmp_path) == {"x.bin": len(DATA)}


def test_a_process_after_one_that_failed(server, tmp_path):
  # What the first one deletes, the second one has open already.
  url = "gs://bucket/dir/x.bin"
  wrong = base64.b64encode(hashlib.md5(b"other").digest()).decode()
  once = [("x-goog-hash", f"md5={wrong}")]  # with the first answer alone
  server.headers = types.SimpleNamespace(
    items=lambda: [once.pop()] if once else []
  )
  server.delay = 0.3
  results = []

  def run():
    try:
      results.append(read(fetch.local(url)))
    except errors.UserError as e:
      results.append(str(e))

  threads = [threading.Thread(target=run) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert "arrived damaged" in results[0] and results[1] == DATA
  assert files(tmp_path) == {"x.bin": len(DATA)}


def test_weights_by_url(server, tmp_path):
  params = {
    "img": {"kernel": np.ones((2, 3), np.float32)},
    "t": np.zeros(1, np.float32),
  }
  npz.save_params(tmp_path / "x.npz", params)
  whole = (tmp_path / "x.npz").read_bytes()
  server.files["/bucket/x.npz"] = whole
  for url in "gs://bucket/x.npz", f"{server.url}/bucket/x.npz":
    np.testing.assert_array_equal(
      npz.load_params(url, params)["img"]["kernel"], 1
    )
    got = restore.read_init(params, f"{url}:img", into="img")
    np.testing.assert_array_equal(got["img/kernel"], 1)
  assert len(server.asked) == 1
  # What is whole by all that the server says, and yet no such file.
  server.files["/bucket/y.npz"] = whole[:-30]
  with pytest.raises(errors.UserError) as e:
    npz.load_params("gs://bucket/y.npz:img", params)
  cached = fetch.cached("gs://bucket/y.npz")
  assert str(e.value) == (
    f"{cached} is not a .npz file, or not a whole one; delete it to fetch it "
    "again from gs://bucket/y.npz"
  )
  with pytest.raises(errors.UserError, match="no gs://bucket/z.npz.*known are"):
    npz.load_params("gs://bucket/z.npz", params)


def kept(copy, *args, **section):
  made, record = vocabulary.of_run(copy, *args, **section)
  vocabulary.keep(copy, made, record)
  return made


def test_tokenizers_by_name(server, tmp_path):
  texts = lambda captions: ["some words of a text"] * 9
  kept(tmp_path / "a", texts, "", False, vocab_size=16)
  name = "/t5-data/vocabs/cc_en.32000/sentencepiece.model"
  server.files[name] = read(tmp_path / "a")
  for i, path in enumerate(["c4_en", f"gs:/{name}", f"{server.url}{name}"]):
    copy = tmp_path / f"copy{i}"
    assert kept(copy, None, "", False, path=path).vocab_size == 16
    assert read(copy) == server.files[name]
  assert len(server.asked) == 1
  with pytest.raises(errors.UserError, match='did you mean "c4_en".*known are'):
    vocabulary.of_run(tmp_path / "no", None, "", False, path="c4_e")
  with pytest.raises(errors.UserError, match="known are: c4_en, mc4, gemma"):
    vocabulary.of_run(tmp_path / "no", None, "", False, path="gemma")
  assert not os.path.exists(tmp_path / "no")
