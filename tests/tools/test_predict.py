"""Asks a trained workdir, as a user would."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from sigjax import errors, train
from sigjax.checkpoints import restore
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import two_towers
from tools import predict

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXTS = ["red disc", "blue bar", "a cross, that is green"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The folder of a run, which the first test trains."""
  return tmp_path_factory.mktemp("run")


@pytest.fixture
def trained(workdir, tiny_config):
  """A run of two steps, with its config.json."""
  if not (workdir / "config.json").exists():
    config = dict(tiny_config, total_steps=2, evals={})
    errors.call(train.main, config, "config", workdir)
    (workdir / "config.json").write_text(json.dumps(config))
  return workdir


def png(colour, size):
  data = io.BytesIO()
  Image.new("RGB", size, colour).save(data, "PNG")
  return data.getvalue()


def test_probabilities_are_pairwise_sigmoids(trained, tiny_config):
  images = [png("red", (16, 16)), png("blue", (40, 30))]
  got = predict.Predictor(trained)(images, TEXTS)
  # By hand, from the saved parameters.
  model = two_towers.TwoTowers(**tiny_config["model"])
  params = restore.read_params(
    trained, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  )
  pixels = np.stack(
    [np.full((16, 16, 3), c) for c in ((1, -1, -1), (-1, -1, 1))]
  ).astype(np.float32)
  tokens = tokenizer_lib.Tokenizer(trained / "tokenizer.model")
  text = np.stack([tokens(t, 8) for t in TEXTS])
  zimg, ztxt, out = model.apply({"params": params}, pixels, text)
  logits = np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T
  logits = logits * float(out["t"][0]) + float(out["b"][0])
  np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_command(trained, tmp_path):
  (tmp_path / "a.png").write_bytes(png("red", (16, 16)))
  (tmp_path / "b.png").write_bytes(png("green", (9, 9)))
  ask = lambda *args: subprocess.run(
    [sys.executable, "-m", "tools.predict", *args],
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=False,
    env={**os.environ, "XLA_FLAGS": ""},
  )
  done = ask(
    "--workdir",
    str(trained),
    "--texts",
    'red disc,"a cross, that is green"',
    "--image",
    f"{tmp_path}/a.png,{tmp_path}/b.png",
  )
  assert done.returncode == 0, done.stderr
  head, _, first, second = done.stdout.splitlines()
  assert head.split("  ")[-1] == "a cross, that is green"
  assert first.startswith(f"{tmp_path}/a.png") and "b.png" in second
  assert len(re.findall(r"\d+\.\d\d%", first + second)) == 4

  done = ask("--workdir", str(tmp_path), "--texts", "x", "--image", "y.png")
  assert done.returncode == 1 and "y.png" in done.stderr
  assert done.stderr.startswith("error: ")


def test_mistakes_are_named(trained, tmp_path):
  with pytest.raises(errors.UserError, match="is no workdir"):
    predict.Predictor(tmp_path)
  with pytest.raises(errors.UserError, match="cannot be decoded"):
    predict.Predictor(trained)([png("red", (300, 300))[:80]], TEXTS)
