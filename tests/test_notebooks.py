"""The notebooks run, on small made-up data, and what they store is clean.

As a program it runs a notebook as it is and stores its outputs; settings may
follow:

  python tests/test_notebooks.py released WEIGHTS=workdirs/siglip_emoji
"""

import base64
import io
import os
import pathlib
import random
import re
import string
import sys

import nbclient
import nbformat
from PIL import Image
import pytest

from sigjax import errors, train
from sigjax.data.emoji import builder, packages

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))

# A locked tower that only resizes, written down by the example's own code.
TOWER = """
import argparse
import importlib.util
import pathlib

import jax.numpy as jnp

from sigjax.data import kinds

spec = importlib.util.spec_from_file_location("example", {example!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
PP = "decode|resize(20)|value_range(-1,1)|keep('image')"


def apply(images):
  return jnp.pad(images.reshape(len(images), -1), ((0, 0), (0, 80)))


def get_tower():
  return lambda _, images: apply(images), None, PP, "resized"


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--out", type=pathlib.Path)
  out = parser.parse_args().out
  info = dict(tower="resized", pp_image=PP, made_by=dict(weights=__file__))
  for split in example.SPLITS:
    source = kinds.open_source("emoji", split=split)
    example.embed(source, apply, PP, out / split, info)
"""


def execute(name: str, settings: dict[str, str]) -> nbformat.NotebookNode:
  """Returns a notebook with its outputs; it runs in notebooks/."""
  notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
  client = nbclient.NotebookClient(
    notebook,
    kernel_name="python3",
    timeout=None,
    coalesce_streams=True,  # of a progress bar, its last state
    record_timing=False,
  )
  client.execute(cwd=str(ROOT / "notebooks"), env={**os.environ, **settings})
  return notebook


def outputs_of(notebook: nbformat.NotebookNode) -> list[dict]:
  return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def run(name: str, **settings: str) -> list[dict]:
  """Returns the outputs of a notebook, run with one device."""
  import cpu_devices

  flags = cpu_devices.xla_flags(1)
  return outputs_of(execute(name, dict(settings, XLA_FLAGS=flags)))


def printed(outputs: list[dict]) -> str:
  return "".join(out.get("text", "") for out in outputs)


def pictures(outputs: list[dict]) -> int:
  return sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.fixture
def emoji_dir(tmp_path, monkeypatch):
  """The emoji dataset, of squares with made-up names in two styles."""
  pytest.importorskip("resvg_py", reason="draws the emoji; extra [emoji]")
  rng = random.Random(0)
  word = lambda: "".join(rng.choices(string.ascii_lowercase, k=7))
  names = {(0x1F400 + i,): [word(), f"{word()} {word()}"] for i in range(200)}
  svg = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">'
    '<path fill="#%06x" d="M0 0h9v%dH0z"/></svg>'
  )
  drawn = {
    style: {c: svg % (rng.randrange(1 << 24), rng.randint(1, 9)) for c in names}
    for style in ("noto", builder.HELD_STYLE)
  }
  monkeypatch.setattr(packages, "fetch", lambda package, folder: folder)
  monkeypatch.setattr(packages, "captions", lambda paths: {"en": names})
  monkeypatch.setattr(packages, "drawings", lambda paths, texts: drawn)
  builder.prepare(tmp_path / "tfds")
  return tmp_path / "tfds"


def test_train(emoji_dir, tmp_path):
  tower = tmp_path / "tower.py"
  example = ROOT / "examples/efficientnet_lite0.py"
  tower.write_text(TOWER.format(example=str(example)))
  outputs = run(
    "train",
    OUT=str(tmp_path / "out"),
    TFDS_DATA_DIR=str(emoji_dir),
    TOWER=str(tower),
    STEPS="2",
    BATCH_SIZE="32",
    PICTURES=f"{ROOT}/docs/emoji.png,{ROOT}/docs/studies",
  )
  assert re.search(r"held_style_zeroshot \d+-way top-1 +\d", printed(outputs))
  assert pictures(outputs) == 3  # the curve, the picture, the own pictures


def test_released(tiny_config, emoji_dir, tmp_path):
  config = dict(tiny_config, total_steps=2, evals={})
  errors.call(train.main, config, "config", tmp_path / "run")
  outputs = run(
    "released",
    OUT=str(tmp_path / "out"),
    TFDS_DATA_DIR=str(emoji_dir),
    WEIGHTS=str(tmp_path / "run"),
    FINETUNE="train=calibrate",  # compiles fastest
    EPOCHS="0.5",
    BATCH_SIZE="32",
  )
  text = printed(outputs)
  assert "run: not a released model" in text
  assert "before training: retrieval image" in text
  assert pictures(outputs) == 4  # zero-shot, the search, recall, zero-shot


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored(path):
  """It ran from top to bottom without errors, and shows no machine."""
  notebook = nbformat.read(path, 4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(
    range(1, len(cells) + 1)
  )
  assert path.name in (ROOT / "docs/tree.md").read_text()
  outputs = outputs_of(notebook)
  assert pictures(outputs) >= 3
  assert not [out for out in outputs if out.output_type == "error"]
  for out in outputs:
    text = out.get("text", "") + str(out.get("data", {}).get("text/plain", ""))
    found = re.search(r"(?<![\w.])/(?!s\b)\w+|\w+://|Traceback|Warning", text)
    assert not found, text
  assert path.stat().st_size < 300_000


def test_nothing_stored_is_called_released():
  """A machine of the project cannot fetch the released weights."""
  notebook = nbformat.read(ROOT / "notebooks/released.ipynb", 4)
  text = printed(outputs_of(notebook))
  assert "not a released model" in text and "siglip2/" not in text


def store(notebook: nbformat.NotebookNode, path: pathlib.Path) -> None:
  """Writes a notebook, small enough to be read on the web."""
  for out in outputs_of(notebook):
    if "text" in out:  # checkpoints are named by their whole path
      out["text"] = out["text"].replace(f"{ROOT}/", "")
    if png := out.get("data", {}).get("image/png"):
      image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
      small = io.BytesIO()
      image.quantize(64).save(small, "PNG", optimize=True)
      out["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()
  nbformat.write(notebook, path)


if __name__ == "__main__":
  name, *settings = sys.argv[1:]
  done = execute(name, dict(x.split("=", 1) for x in settings))
  store(done, ROOT / "notebooks" / f"{name}.ipynb")
