"""Asks a trained workdir, as a user would."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import flags
import cpu_devices
import hf_case  # beside this file
import jax
import numpy as np
from PIL import Image
import pytest

from sigjax import decode, errors, train
from sigjax.checkpoints import restore
from sigjax.data import faults
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import two_towers
from tools import evaluate, predict
from tools.embedding import tower as tower_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXTS = ["red disc", "blue bar", "a cross, that is green"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The folder of a run, which the first test trains."""
  return tmp_path_factory.mktemp("run")


@pytest.fixture
def trained(workdir, tiny_config):
  """A run of two steps with a captioning decoder, and its config.json."""
  if not (workdir / "config.json").exists():
    words = dict(type="caption", depth=1)
    config = dict(
      tiny_config, total_steps=2, evals={}, losses=dict(words=words)
    )
    errors.call(train.main, config, "config", workdir)
    (workdir / "config.json").write_text(json.dumps(config))
  return workdir


def png(colour, size):
  data = io.BytesIO()
  Image.new("RGB", size, colour).save(data, "PNG")
  return data.getvalue()


def scores(workdir, images, texts):
  model = predict.Predictor(workdir)
  return model.scores(
    [model.image(image) for image in images], [model.text(t) for t in texts]
  )


def command(folder, workdir, *more):
  """Runs the program in a folder."""
  return subprocess.run(
    [sys.executable, "-m", "tools.predict", f"--workdir={workdir}", *more],
    cwd=folder,
    text=True,
    capture_output=True,
    check=False,
    env={
      **os.environ,
      "XLA_FLAGS": cpu_devices.xla_flags(1),
      "PYTHONPATH": str(ROOT),
    },
  )


def test_scores_are_cosines_and_pairwise_sigmoids(trained, tiny_config):
  images = [png("red", (16, 16)), png("blue", (40, 30))]
  got = scores(trained, images, TEXTS)
  # By hand, from the saved parameters.
  model = two_towers.TwoTowers(**tiny_config["model"])
  params = restore.read_params(
    trained, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  )
  pixels = np.stack(
    [np.full((16, 16, 3), c) for c in ((1, -1, -1), (-1, -1, 1))]
  ).astype(np.float32)
  tokenizer = tokenizer_lib.Tokenizer(trained / "tokenizer.model")
  tokens = np.stack([tokenizer(text, 8) for text in TEXTS])
  zimg, ztxt, out = model.apply({"params": params}, pixels, tokens)
  cosine = np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T
  np.testing.assert_allclose(got.cosine, cosine, atol=1e-5)
  logits = cosine * float(out["t"][0]) + float(out["b"][0])
  want = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(got.probability, want, rtol=1e-4)


def test_command(trained, tmp_path):
  """A folder and a glob; one image is no image; run from another folder."""
  for name in ("a.png", "more/b.png"):
    path = tmp_path / "pictures" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(png("red", (16, 16)))
  (tmp_path / "pictures/broken.jpg").write_bytes(png("red", (99, 99))[:80])
  (tmp_path / "pictures/captions.csv").write_text("not an image")
  done = command(
    tmp_path,
    trained,
    '--texts=red disc,"a cross, that is green",blue bar',
    "--image=pictures,pictures/mor*/*.png",
  )
  assert done.returncode == 0, done.stderr
  assert "image pictures/broken.jpg is left out: " in done.stderr
  first, head, _, *rows = done.stdout.splitlines()
  assert first == f"model: {trained}/checkpoints/2"
  assert head.split() == ["image", "rank", "text", "cosine", "probability"]
  images = [row.split()[0] for row in rows]
  assert images == ["pictures/a.png"] * 3 + ["pictures/more/b.png"] * 3
  assert [row.split()[1] for row in rows] == ["1", "2", "3"] * 2
  # The best text comes first, and small probabilities are not 0.
  texts = ["red disc", "a cross, that is green", "blue bar"]
  want = scores(trained, [png("red", (16, 16))], texts)
  for row, j in zip(rows, np.argsort(-np.asarray(want.cosine)[0])):
    cosine, percent = row.split()[-2:]
    assert texts[j] in row
    assert float(cosine) == pytest.approx(float(want.cosine[0, j]), abs=6e-4)
    probability = float(percent.removesuffix("%")) / 100
    assert probability == pytest.approx(float(want.probability[0, j]), rel=0.06)
    assert probability > 0


def test_captions(trained, tiny_config, tmp_path):
  """Of the run's own decoder, patches and tokenizer."""
  images = [png("red", (16, 16)), png("blue", (40, 30))]
  model = predict.Predictor(trained)
  pixels = np.stack([model.prepared(image) for image in images])
  params = restore.read_params(
    trained, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  )
  towers = two_towers.TwoTowers(**tiny_config["model"])
  _, _, out = towers.apply({"params": params}, pixels, None)
  want = decode.captions("float32", params["dec"], out["img/encoded"], None)
  tokenizer = tokenizer_lib.Tokenizer(trained / "tokenizer.model")
  got = model.captions(pixels)
  for (text, log_p), ids, p in zip(got, np.asarray(want.tokens), want.log_p):
    assert text == tokenizer.text(ids)
    assert log_p == pytest.approx(float(p), abs=1e-3)

  for i, image in enumerate(images):
    (tmp_path / f"{i}.png").write_bytes(image)
  done = command(tmp_path, trained, "--image=0.png,1.png", "--caption")
  assert done.returncode == 0, done.stderr
  _, head, _, *rows = done.stdout.splitlines()
  assert head.split() == ["image", "caption", "log", "p"]
  for i, (row, (text, log_p)) in enumerate(zip(rows, got, strict=True)):
    assert row.split() == [f"{i}.png", *text.split(), f"{log_p:.2f}"]


@pytest.mark.parametrize(
  "more, says",
  [
    ((), "give --texts or --caption"),
    (("--caption", "--texts=x"), "give --texts or --caption"),
    (("--texts=x", "--beam=2"), "--beam is of --caption alone"),
    (("--caption", "--length_power=0"), "--length_power is of --beam 2"),
  ],
)
def test_flags_that_do_not_go_together(monkeypatch, more, says):
  values = flags.FlagValues()
  monkeypatch.setattr(predict, "FLAGS", values)
  predict.define_flags(values)
  values(["predict", "--weights=x", "--image=y", *more])
  with pytest.raises(errors.UserError, match=says):
    predict.check_flags([])


def test_models_that_write_no_captions(trained, tmp_path):
  hf_case.golden_folder(tmp_path)
  with pytest.raises(
    errors.UserError, match="has no captioning decoder: train"
  ):
    predict.Predictor(tmp_path).check_captions()
  model = predict.Predictor(trained)
  model._model = model._model.clone(image=dict(kind="precomputed", width=32))
  with pytest.raises(errors.UserError, match="was trained on embeddings"):
    model.check_captions()


def test_its_image_tower_alone(trained):
  """The decoder does not stand in the way."""
  pixels = np.zeros((1, 16, 16, 3), np.float32)
  want = predict.Predictor(trained).images(pixels)
  got = tower_lib.open_tower(trained, jax.devices()[:1])(pixels)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_run_is_evaluated_and_stays_as_it_is(trained, tmp_path):
  """Without its training data, with its own preprocessing; same as by hand."""
  before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
  colours = ["red", "blue", "green"]
  for colour in colours:
    file = tmp_path / f"{colour} disc/1.png"
    file.parent.mkdir()
    file.write_bytes(png(colour, (20, 16)))
  got = evaluate.evaluate(trained, [("classes", str(tmp_path))], batch_size=8)
  prompts = [
    prompt.format(f"{colour} disc")
    for colour in sorted(colours)
    for prompt in ("itap of a {}", "a bad photo of the {}", "a origami {}")
    + ("a photo of the large {}", "a {} in a video game", "art of the {}")
    + ("a photo of the small {}",)
  ]
  images = [png(colour, (20, 16)) for colour in sorted(colours)]
  cosine = np.asarray(scores(trained, images, prompts).cosine)
  # The mean of unit rows, but for its length.
  mean = cosine.reshape(3, 3, 7).mean(axis=2)
  model = predict.Predictor(trained)
  ztxt = np.stack([model.text(p) for p in prompts]).reshape(3, 7, -1)
  mean /= np.linalg.norm(ztxt.mean(axis=1), axis=1)
  right = np.mean(mean.argmax(axis=1) == np.arange(3))
  assert got[0].row.metric == "3-way top-1"
  assert got[0].row.value == pytest.approx(right)
  assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_another_tokenizer_is_refused(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  file = tmp_path / "run/tokenizer.model"
  tokenizer_lib.train(["other words", "than these"], 24, file)
  with pytest.raises(errors.UserError, match="is not the tokenizer"):
    predict.Predictor(tmp_path / "run")


def test_images_that_are_not_there(tmp_path):
  (tmp_path / "a[1].png").write_bytes(b"")
  files = predict.image_files([f"{tmp_path}/a[1].png", f"{tmp_path}/*.png"])
  assert files == [tmp_path / "a[1].png"]
  (tmp_path / "empty").mkdir()
  for name in ("none.png", "*.jpg", "empty"):
    with pytest.raises(errors.UserError, match="--image .*: there is no "):
      predict.image_files([f"{tmp_path}/a[1].png", str(tmp_path / name)])


def test_mistakes_are_named(trained, tmp_path):
  with pytest.raises(errors.UserError, match=str(tmp_path)):
    predict.Predictor(tmp_path)
  with pytest.raises(faults.BadExample, match="cannot be decoded"):
    predict.Predictor(trained).image(png("red", (300, 300))[:80])
