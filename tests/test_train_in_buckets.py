"""Runs in buckets: killed and resumed, evaluated, and read by the programs."""

import json
import threading

import jax
import numpy as np
import pytest
import train_program

from sigjax import errors, train, trees
from sigjax.checkpoints import layout, restore
from sigjax.runtime import bucket, lock
from tools import convert_to_hf, opened
from tools.embedding import tower

RATES = {"examples_per_second", "examples_per_second_per_device"}


def arrays(workdir):
  """Returns {name: array} of all that the newest checkpoint holds."""
  path = restore.checkpoint_of(workdir)
  stored = restore._metadata(path)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    {k: stored[k] for k in ("params", "rest")},
  )
  found = restore._read_items(path, **like)
  return trees.flatten({k: jax.device_get(found[k]) for k in like})


def metrics(text):
  lines = map(json.loads, text.splitlines())
  rates = RATES | {"data_wait_percent"}
  return [{k: v for k, v in x.items() if k not in rates} for x in lines]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_that_is_killed_ends_like_one_left_alone(
  scheme, tmp_path, tiny_config, server, monkeypatch
):
  """Killed between two requests of a save, and resumed: equal bit for bit."""
  monkeypatch.setattr(lock, "DEAD_S", 1.0)
  config = dict(
    tiny_config, checkpoints=dict(every_steps=3), evals={}, total_steps=8
  )
  workdir = bucket.Path(f"{scheme}://bucket/run")
  reached, never = threading.Event(), threading.Event()

  def stop_at_the_manifest(method, name):
    if method in ("PUT", "POST") and name.endswith("/6/manifest.json"):
      reached.set()
      server.lock.release()  # other requests are answered
      never.wait(60)
      server.lock.acquire()
      return 500
    return None

  server.fail = stop_at_the_manifest
  program = train_program.start(
    tmp_path / "killed", config, 8, [f"--workdir={workdir}"]
  )
  alone = tmp_path / "alone"
  train.main(alone, **config)
  while not reached.wait(0.1):
    assert program.poll() is None, program.communicate()
  program.kill()
  program.communicate()
  server.fail = lambda method, name: None
  never.set()
  assert layout.steps(workdir / "checkpoints") == [3]
  assert (workdir / "lock").exists() and (workdir / "checkpoints/6").exists()

  with lock.hold(workdir):
    train.main(str(workdir), **config)
  assert layout.steps(workdir / "checkpoints") == [6, 8]
  whole, resumed = arrays(alone), arrays(workdir)
  assert whole.keys() == resumed.keys()
  for name in whole:
    np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
  files = [path.name for path in workdir.iterdir()]
  assert [x for x in files if not x.startswith("events.")] == sorted(
    path.name for path in alone.iterdir() if not path.name.startswith("events.")
  )
  lines = (workdir / "metrics.jsonl").read_text()
  assert metrics(lines) == metrics((alone / "metrics.jsonl").read_text())
  # The programs read it where it is, and a checkpoint by its name.
  model = opened.open_model(f"{workdir}")
  assert model.name == f"{workdir}/checkpoints/8" and model.is_run
  assert tower.open_tower(f"{workdir}/checkpoints/6").width == 32
  for i, weights in enumerate((f"{workdir}", alone)):
    convert_to_hf.convert(weights, tmp_path / f"hf{i}")
  for path in (tmp_path / "hf1").iterdir():
    assert (tmp_path / "hf0" / path.name).read_bytes() == path.read_bytes()
  with pytest.raises(errors.UserError, match="run0 has no checkpoints; train"):
    opened.open_model(f"{workdir}0")


def test_an_evaluation_alone_adds_to_the_metrics(
  tiny_config, server, monkeypatch
):
  workdir = bucket.Path("gs://bucket/run")
  data = dict(tiny_config["evals"]["zeroshot"]["data"])
  config = dict(
    tiny_config,
    total_steps=2,
    evals=dict(
      zeroshot=tiny_config["evals"]["zeroshot"],
      picture=dict(type="picture", data=data, captions="captions"),
    ),
  )
  monkeypatch.setattr(bucket, "PUT_EVERY_S", 1000)
  written = []

  def watch(method, name):
    if method == "POST" and name.endswith("checkpoints/2/commit_success.txt"):
      written.append(server.get("bucket/run/metrics.jsonl"))

  server.fail = watch
  train.main(workdir, **config)
  # A resumed run lacks nothing of what led to its checkpoint.
  assert [line.count(b"\n") for line in written] == [2]
  before = server.names()
  with lock.hold(workdir):  # it may run beside another run
    train.main(workdir, eval_only=True, **config)
  lines = list(
    map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  )
  assert [x["step"] for x in lines] == [1, 2, 2, 2]
  assert lines[2] == lines[3] and "zeroshot/24-way top-1" in lines[3]
  (new,) = set(server.names()) - set(before)
  assert "/events.out" in new
  assert (workdir / "picture.png").read_bytes().startswith(b"\x89PNG")
