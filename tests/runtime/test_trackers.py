"""What Weights & Biases and Trackio get, read back from their own files."""

import importlib.util
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
import train_program

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


def of_wandb(workdir):
  """Returns what its files hold: runs, and {name: value} of each call."""
  found = []
  for path in workdir.glob("wandb/offline-run-*/*.wandb"):
    found += wandb_records(path)
  runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
  rows = [
    {
      "/".join(x.nested_key) or x.key: json.loads(x.value_json)
      for x in r.history.item
    }
    for r in found
    if r.WhichOneof("record_type") == "history"
  ]
  return runs, rows


def of_trackio(folder, before=""):
  """Returns what its database holds: the run's name, config and rows.

  Where it writes is settled when it is imported, so a process of its own runs
  `before` and reads.
  """
  code = (
    f"import sys; sys.path[:0] = {sys.path!r}\n"
    f"{before}\n"
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
    env={**os.environ, "TRACKIO_DIR": str(folder)},
  ).stdout.splitlines()
  return json.loads(next(x for x in out if x[0] == "["))


def both(rows):
  """Returns [(name, step, value)] of the metrics that write() writes."""
  return [
    (name, x["step"], x[name])
    for x in rows
    for name in ("loss", "held/top-1")
    if name in x
  ]


def test_wandb(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  workdir = tmp_path / "run"
  workdir.mkdir()
  # wandb names a file by the second in which a process starts.
  write(workdir, "wandb:us/shapes", pause=1.0)
  id_ = json.loads((workdir / "wandb.json").read_text())["id"]
  runs, rows = of_wandb(workdir)
  assert {(r.entity, r.project, r.run_id, r.display_name) for r in runs} == {
    ("us", "shapes", id_, "run")
  }
  config = {x.key: json.loads(x.value_json) for x in runs[0].config.update}
  assert {k: config[k] for k in CONFIG} == dict(CONFIG, out_dim=[None, 32])
  pictures = workdir.glob("wandb/offline-run-*/files/media/images/picture_*")
  expect(both(rows), pictures)


def test_trackio(tmp_path):
  pytest.importorskip("trackio")
  workdir = tmp_path / "run"
  workdir.mkdir()
  name, config, rows = of_trackio(
    tmp_path / "trackio",
    "import pathlib, test_trackers\n"
    f"test_trackers.write(pathlib.Path({str(workdir)!r}), 'trackio:shapes')",
  )
  id_ = json.loads((workdir / "trackio.json").read_text())["id"]
  assert name == f"run-{id_}"
  assert {k: config[k] for k in CONFIG} == dict(CONFIG, out_dim=[None, 32])
  expect(both(rows), (tmp_path / "trackio").rglob("*.png"))


def test_a_whole_run(tmp_path, tiny_config, monkeypatch):
  """What sigjax.train writes to metrics.jsonl is there, and its picture."""
  names = [n for n in trackers.TRACKERS if importlib.util.find_spec(n)]
  if not names:
    pytest.skip("pip install -e '.[wandb,trackio]'")
  for key, value in dict(
    WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "trackio")
  ).items():
    monkeypatch.setenv(key, value)
  workdir, data = tmp_path / "run", tiny_config["evals"]["zeroshot"]["data"]
  evals = dict(
    zeroshot=tiny_config["evals"]["zeroshot"],
    picture=dict(type="picture", data=data, captions="captions"),
  )
  config = dict(
    tiny_config,
    total_steps=2,
    evals=evals,
    log=",".join(f"{name}:shapes" for name in names),
  )
  run = train_program.start(workdir, config, devices=1)
  _, err = run.communicate(timeout=300)
  assert run.returncode == 0, err
  want = {
    (x["step"], name): value
    for x in train_program.lines(workdir)
    for name, value in x.items()
    if name != "step" and value is not None
  }
  assert (2, "loss") in want and (2, "zeroshot/24-way top-1") in want
  for name in names:
    if name == "wandb":
      _, found = of_wandb(workdir)
      pictures = workdir.glob("wandb/offline-run-*/files/media/images/*.png")
    else:
      _, _, found = of_trackio(tmp_path / "trackio")
      pictures = (tmp_path / "trackio").rglob("*.png")
    for (step, metric), value in want.items():
      values = [x[metric] for x in found if x["step"] == step and metric in x]
      assert values == [pytest.approx(value)], (name, step, metric)
    (picture,) = pictures
    same = [Image.open(x) for x in (picture, workdir / "picture.png")]
    np.testing.assert_array_equal(*(np.asarray(x)[..., :3] for x in same))


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
