"""What Weights & Biases and Trackio get, read back from their own files."""

import io
import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.runtime import hosts, metrics, trackers

CONFIG = dict(seed=3, optim=dict(lr=1e-3), out_dim=(None, 32))


def png(value: int) -> bytes:
  data = io.BytesIO()
  Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(data, "PNG")
  return data.getvalue()


def write(workdir, to, pause=0.0):
  """A run is killed in the evaluation of step 4, and goes on from step 2."""
  for first, last in ((0, 4), (2, 5)):
    time.sleep(pause)
    with metrics.Writer(workdir, first, to, CONFIG) as writer:
      for step in range(first + 1, last + 1):
        writer.write(step, {"loss": step + last / 10, "b": float("nan")})
        if step == 4 and last == 4:
          break
        if step % 2 == 0:
          writer.write(step, {"held/top-1": step / 8})
          writer.write_image(step, "picture", png(step))


def expect(rows, pictures):
  """Checks [(step, name, value)]: each is there once."""
  assert sorted(rows) == sorted(
    [("held/top-1", 2, 0.25), ("held/top-1", 4, 0.5)]
    + [("loss", step, step + 0.4) for step in (1, 2, 3, 4)]
    + [("loss", 5, 5.5)]
  )
  found = [Image.open(path).convert("L").getpixel((0, 0)) for path in pictures]
  assert sorted(found) == [2, 4]


def wandb_records(path):
  """Reads a .wandb file: 7 bytes, then LevelDB's log of records."""
  from wandb.proto import wandb_internal_pb2

  data, place, record = path.read_bytes(), 7, b""
  while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:  # no header crosses a block
      place += 32768 - place % 32768
      continue
    length, kind = struct.unpack_from("<HB", data, place + 4)
    record += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # a whole record, or its last part
      yield wandb_internal_pb2.Record.FromString(record)
      record = b""


def test_wandb(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  workdir = tmp_path / "run"
  workdir.mkdir()
  # wandb names a file by the second in which a process starts.
  write(workdir, "wandb:us/shapes", pause=1.0)
  id_ = json.loads((workdir / "wandb.json").read_text())["id"]
  found = []
  for path in workdir.glob("wandb/offline-run-*/*.wandb"):
    found += wandb_records(path)
  runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
  assert {(r.entity, r.project, r.run_id, r.display_name) for r in runs} == {
    ("us", "shapes", id_, "run")
  }
  config = {x.key: json.loads(x.value_json) for x in runs[0].config.update}
  assert {k: config[k] for k in CONFIG} == dict(CONFIG, out_dim=[None, 32])
  rows = []
  for record in found:
    if record.WhichOneof("record_type") == "history":
      items = {
        "/".join(x.nested_key) or x.key: json.loads(x.value_json)
        for x in record.history.item
      }
      step = items["step"]
      rows += [
        (name, step, items[name])
        for name in ("loss", "held/top-1")
        if name in items
      ]
  pictures = workdir.glob("wandb/offline-run-*/files/media/images/picture_*")
  expect(rows, pictures)


def test_trackio(tmp_path, monkeypatch):
  pytest.importorskip("trackio")
  workdir = tmp_path / "run"
  workdir.mkdir()
  # Where it writes is settled when it is imported.
  code = (
    f"import sys; sys.path[:0] = {sys.path!r}\n"
    "import pathlib, test_trackers\n"
    f"test_trackers.write(pathlib.Path({str(workdir)!r}), 'trackio:shapes')\n"
    "import json, trackio\n"
    "from trackio.sqlite_storage import SQLiteStorage as s\n"
    "(name,) = s.get_runs('shapes')\n"
    "print(json.dumps([name, s.get_run_config('shapes', name),"
    " s.get_logs('shapes', name)], default=str))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
  ).stdout.splitlines()
  name, config, logs = json.loads(next(x for x in out if x[0] == "["))
  id_ = json.loads((workdir / "trackio.json").read_text())["id"]
  assert name == f"run-{id_}"
  assert {k: config[k] for k in CONFIG} == dict(CONFIG, out_dim=[None, 32])
  rows = [
    (name, x["step"], x[name])
    for x in logs
    for name in ("loss", "held/top-1")
    if name in x
  ]
  expect(rows, (tmp_path / "trackio").rglob("*.png"))


def test_what_config_log_may_be(monkeypatch):
  monkeypatch.setattr(
    trackers.importlib.util, "find_spec", lambda n: n != "trackio" or None
  )
  assert trackers.parse("wandb:us/shapes") == {"wandb": "us/shapes"}
  for spec, words in (
    ("wanda", '"wanda" is not known .did you mean "wandb"..; choose from: tr'),
    ("wandb,wandb:x", "names wandb twice"),
    ("trackio", r"trackio, which is not installed; pip install 'sigjax.track"),
  ):
    with pytest.raises(errors.UserError, match=words):
      trackers.parse(spec)
  # Only the process that writes needs it.
  monkeypatch.setattr(hosts, "is_primary", lambda: False)
  assert trackers.parse("trackio") == {"trackio": ""}


def test_a_run_that_begins_anew_is_a_new_one(tmp_path, monkeypatch, caplog):
  ids = []
  run = trackers._Run(lambda *_: None, lambda x: x, lambda ok: None)
  monkeypatch.setitem(
    trackers.TRACKERS, "wandb", lambda w, p, id_, c: ids.append(id_) or run
  )
  for project, first in (("a", 0), ("a", 1), ("a", 0), ("a", 1), ("b", 1)):
    tracker = trackers.Tracker("wandb", project, tmp_path, first, {})
    tracker.write(first + 1, {"loss": 1.0})
    tracker.close(ok=True)
  assert ids[0] == ids[1] != ids[2] == ids[3] != ids[4]
  (tmp_path / "wandb.json").write_text("[]")
  trackers.Tracker("wandb", "b", tmp_path, 1, {})
  assert len(set(ids)) == 4 and "wandb.json is damaged" in caplog.text
