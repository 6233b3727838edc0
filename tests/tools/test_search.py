"""Searching a folder: the order, what is embedded again, and the page."""

import copy
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import cpu_devices
import hf_case  # beside this file
import jax
import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.models import two_towers
from tools import opened, predict, search
from tools.searching import finder as finder_lib
from tools.searching import page, pictures

ROOT = pathlib.Path(__file__).parent.parent.parent
RES, LENGTH = 32, 12
TEXT = "A photo of the red cat"
NAMES = ["0.jpg", "2.jpg", "4.jpg", "more/1.jpg", "more/3.jpg"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  return hf_case.golden_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(weights):
  return predict.Predictor(weights)


@pytest.fixture(name="folder")
def fixture_folder(tmp_path, monkeypatch):
  """The folder of make_folder; the cache is beside it."""
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(pictures, "BATCH", 2)
  return make_folder(tmp_path / "pictures")


def make_folder(folder):
  """Makes a folder of five pictures, NAMES, and a broken one."""
  for i in range(5):
    hf_case.jpeg(folder / f"{'more/' * (i % 2)}{i}.jpg", i)
  (folder / "broken.png").write_bytes(b"no picture")
  (folder / "notes.txt").write_text("no picture, either")
  hf_case.jpeg(folder / ".thumbnails/0.jpg", 0)
  hf_case.jpeg(folder / ".0.jpg", 0)
  return folder


@pytest.fixture(scope="module", name="by_hand")
def fixture_by_hand(weights, tmp_path_factory):
  """Cosines of NAMES with TEXT and their probabilities, in float64."""
  x = []
  for i in (0, 2, 4, 1, 3):
    file = tmp_path_factory.mktemp("one") / "0.jpg"
    hf_case.jpeg(file, i)
    with Image.open(file) as image:
      x.append(np.asarray(image.resize((RES, RES), Image.Resampling.BILINEAR)))
  model = opened.open_model(weights)
  zimg, ztxt, out = jax.jit(two_towers.of_config(model.config["model"]).apply)(
    {"params": model.params},
    np.stack(x).astype(np.float32) / np.float32(127.5) - 1,
    model.tokenizer(TEXT.lower(), LENGTH)[None],
  )
  cosine = np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64)[0]
  logits = float(out["t"][0]) * cosine + float(out["b"][0])
  return cosine, 1 / (1 + np.exp(-logits))


def command(weights, folder, *more):
  """Returns arguments of subprocess; the cache is beside the folder."""
  return dict(
    args=[sys.executable, "-m", "tools.search", f"--weights={weights}"]
    + [f"--path={folder}", *more],
    cwd=ROOT,
    text=True,
    env={
      **os.environ,
      "XLA_FLAGS": cpu_devices.xla_flags(1),
      "SIGJAX_CACHE": str(folder.parent / "cache"),
    },
  )


def test_what_is_printed(weights, folder, by_hand):
  done = subprocess.run(
    **command(weights, folder, f"--query={TEXT}", "--best=4"),
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "left out: broken.png: image cannot be decoded" in done.stderr
  _, counts, head, _, *rows = done.stdout.splitlines()
  assert counts == (
    f"pictures: 5 in {folder}; files embedded now: 6; left out: 1"
  )
  assert head.split() == ["picture", "rank", "cosine", "probability"]
  cosine, probability = by_hand
  order = np.argsort(-cosine)[:4]
  assert len(rows) == 4
  for rank, (row, i) in enumerate(zip(rows, order), start=1):
    name, number, s, p = row.split()
    assert (name, number) == (NAMES[i], str(rank))
    assert float(s) == pytest.approx(cosine[i], abs=6e-4)
    assert float(p[:-1]) / 100 == pytest.approx(probability[i], rel=0.06)


def test_only_new_and_changed_pictures_are_embedded(
  predictor, folder, monkeypatch, caplog
):
  read = []
  prepared = predict.Predictor.prepared
  monkeypatch.setattr(
    predict.Predictor,
    "prepared",
    lambda self, data: (read.append(data), prepared(self, data))[1],
  )

  def embed(new, left_out, by=predictor):
    """Embeds the folder; the files in `new`, and no others, are read."""
    read.clear()
    found = pictures.embed(folder, by)
    assert found.embedded == len(new)
    assert set(read) == {(folder / name).read_bytes() for name in new}
    assert found.left_out == left_out
    again = [by.image((folder / name).read_bytes()) for name in found.files]
    np.testing.assert_allclose(found.z, np.stack(again), atol=1e-6)
    return found.files

  assert embed([*NAMES, "broken.png"], ["broken.png"]) == NAMES
  assert embed([], ["broken.png"]) == NAMES
  hf_case.jpeg(folder / "2.jpg", 22)  # changed
  hf_case.jpeg(folder / "a.png", 5)  # new
  hf_case.jpeg(folder / "broken.png", 6)  # repaired
  (folder / "more/1.jpg").unlink()
  images = ["0.jpg", "2.jpg", "4.jpg", "a.png", "broken.png", "more/3.jpg"]
  assert embed(["2.jpg", "a.png", "broken.png"], []) == images
  (folder / "0.jpg").unlink()
  assert embed([], []) == images[1:]
  assert len(list((folder.parent / "cache/search").iterdir())) == 1

  # Another image tower knows nothing of this; another text tower does not
  # matter.
  for params, new in (
    (dict(predictor._params, txt=None), []),
    (jax.tree.map(lambda x: x * 2, predictor._params), images[1:]),
  ):
    other = copy.copy(predictor)
    del other.image_checksum
    other._params = params
    assert embed(new, [], other) == images[1:]

  # Interrupted in the second batch.
  for i in range(3):
    hf_case.jpeg(folder / f"b{i}.jpg", 30 + i)
  given = predict.Predictor.images
  calls = []

  def interrupted(self, x):
    calls.append(x)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return given(self, x)

  monkeypatch.setattr(predict.Predictor, "images", interrupted)
  with pytest.raises(KeyboardInterrupt):
    pictures.embed(folder, predictor)
  monkeypatch.setattr(predict.Predictor, "images", given)
  embed(["b2.jpg"], [])

  kept = max(
    (folder.parent / "cache/search").iterdir(), key=lambda p: p.stat().st_mtime
  )
  kept.write_bytes(kept.read_bytes()[:-9])
  embed([*images[1:], "b0.jpg", "b1.jpg", "b2.jpg"], [])
  assert "is damaged" in caplog.text


def test_naflex(tmp_path, folder):
  scan = dict(scan=True)
  hf_case.write_config(
    tmp_path,
    text=scan,
    **dict(hf_case.NAFLEX, image=dict(kind="naflex", **scan)),
  )
  shutil.copy(hf_case.GOLDEN / "naflex_tiny.npz", tmp_path / "params.npz")
  model = predict.Predictor(tmp_path)
  found = pictures.embed(folder, model)
  for name, z in zip(found.files, found.z, strict=True):
    want = model.image((folder / name).read_bytes())
    np.testing.assert_allclose(z, want, atol=1e-6)


def test_the_best():
  rng = np.random.default_rng(0)
  z = rng.standard_normal((1000, 8)).astype(np.float32)
  for count in 1, 7, 1000, 2000:
    rows, products = finder_lib.best(z, z[3], count)
    want = np.argsort(-(z.astype(np.float64) @ z[3]))[:count]
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(products, z[want] @ z[3], rtol=1e-5)


def test_answers_of_the_page(predictor, folder, by_hand):
  found = pictures.embed(folder, predictor)
  answers = page.Answers(finder_lib.Finder(predictor, found), 3)
  assert found.files == NAMES
  cosine, probability = by_hand
  order = np.argsort(-cosine)[:3]
  shown, line = answers.by_text(TEXT)
  assert TEXT in line and "probabilities" in line
  for (image, caption), i in zip(shown, order, strict=True):
    percent, name = caption.split()
    assert name == found.files[i]
    assert float(percent[:-1]) / 100 == pytest.approx(probability[i], rel=0.06)
    assert image.shape == (page.SIDE, round(page.SIDE * 60 / 45), 3)
    with Image.open(folder / name) as want:
      want = want.resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    assert np.abs(image - np.asarray(want, np.float64)).mean() < 4

  # By a picture: itself first, with the cosine in place of a probability.
  shown, line = answers.by_picture(str(folder / "more/1.jpg"))
  want = found.z.astype(np.float64) @ found.z[found.files.index("more/1.jpg")]
  assert "cosines" in line
  assert [caption for _, caption in shown] == [
    f"{want[i]:.3f}  {found.files[i]}" for i in np.argsort(-want)[:3]
  ]
  assert shown[0][1] == "1.000  more/1.jpg"

  assert answers.by_text("  ") == ([], page.HINT)
  assert answers.by_picture(None) == ([], page.HINT)
  shown, line = answers.by_picture(str(folder / "notes.txt"))
  assert not shown and "cannot be decoded" in line
  (folder / "more/1.jpg").unlink()
  answers = page.Answers(finder_lib.Finder(predictor, found), 5)
  shown, line = answers.by_text(TEXT)
  assert len(shown) == 4 and "1 cannot be shown" in line


def test_mistakes(predictor, folder, tmp_path, monkeypatch):
  with pytest.raises(errors.UserError, match="there is no folder .*none"):
    pictures.embed(tmp_path / "none", predictor)
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match=r"has no pictures: .*\*\.jpg"):
    pictures.embed(tmp_path / "empty", predictor)
  shutil.copy(folder / "broken.png", tmp_path / "empty/0.png")
  for _ in range(2):
    with pytest.raises(errors.UserError, match="none of the 1 .* 0.png"):
      pictures.embed(tmp_path / "empty", predictor)
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    s.listen()
    port = s.getsockname()[1]
    with pytest.raises(errors.UserError, match=f"port {port} .* is in use"):
      search.check_port(port)
  search.check_port(port)
  monkeypatch.setitem(sys.modules, "gradio", None)
  with pytest.raises(errors.UserError, match=r"pip install -e '\.\[demo\]'"):
    page.check_gradio()
  monkeypatch.setenv("SIGJAX_CACHE", str(folder / "0.jpg"))
  with pytest.raises(errors.UserError, match="cannot be written"):
    pictures.embed(folder, predictor)


# ---- The page, where Gradio is installed ----


@pytest.fixture(scope="module", name="served")
def fixture_served(weights, tmp_path_factory):
  """The address of the page, served by the program, and the folder."""
  if importlib.util.find_spec("gradio") is None:
    pytest.skip("pip install -e '.[demo]'")
  folder = make_folder(tmp_path_factory.mktemp("served") / "pictures")
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  with subprocess.Popen(
    **command(weights, folder, f"--port={port}", "--best=3"),
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout
    url = f"http://127.0.0.1:{port}"
    assert any(url in line for line in process.stdout)
    yield url, folder
    process.terminate()


def call(url, data=None):
  with urllib.request.urlopen(url, data, timeout=60) as answer:
    return answer.read().decode()


def test_the_page_over_http(served, by_hand):
  url, folder = served
  data = json.dumps({"data": [TEXT]}).encode()
  request = urllib.request.Request(
    f"{url}/gradio_api/call/by_text",
    data,
    {"Content-Type": "application/json"},
  )
  event = json.loads(call(request))["event_id"]
  said = call(f"{url}/gradio_api/call/by_text/{event}")
  shown, line = json.loads(said.split("event: complete\ndata: ")[1])
  assert TEXT in line
  order = np.argsort(-by_hand[0])[:3]
  assert [x["caption"].split()[1] for x in shown] == [NAMES[i] for i in order]
  with urllib.request.urlopen(shown[0]["image"]["url"]) as answer:
    assert Image.open(answer).size == (round(page.SIDE * 60 / 45), page.SIDE)
  with pytest.raises(urllib.error.HTTPError, match="403"):
    call(f"{url}/gradio_api/file={folder}/0.jpg")


def test_the_page_in_a_browser(served):
  """Types a text, drops a picture; nothing is asked of other servers."""
  url, folder = served
  sync_api = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright"
  )
  chromium = shutil.which("chromium")
  if chromium is None:
    pytest.skip("there is no chromium")
  with sync_api.sync_playwright() as p:
    browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    tab = browser.new_page()
    tab.set_default_timeout(120_000)  # ms; the first picture takes long
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(url)
    tab.get_by_label("Text").fill(TEXT)
    tab.keyboard.press("Enter")
    tab.get_by_text(f"The best for “{TEXT}”").wait_for()
    assert tab.locator(".caption-label").count() == 3
    tab.set_input_files("input[type=file]", folder / "2.jpg")
    tab.get_by_text("The most similar").wait_for()
    captions = tab.locator(".caption-label").all_inner_texts()
    assert captions[0].split() == ["1.000", "2.jpg"]
    sync_api.expect(tab.get_by_label("Text")).to_have_value("")
    browser.close()
  assert {
    x for x in asked if not x.startswith((url, "data:", "blob:"))
  } == set()
