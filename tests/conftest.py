"""Eight simulated CPU devices, JAX's strict flags, and a dataset for tests."""

import gc
import io
import pathlib
from typing import Any

import bucket_server
import corpus
import cpu_devices  # noqa: F401  # it has to come before JAX
import jax
import numpy as np
from PIL import Image, ImageDraw
import pytest
import tensorflow_datasets as tfds

from sigjax.data.example import tokenizer

# JAX makes many objects when it traces. Looking for garbage at every 700th, as
# Python 3.11 does, takes a sixteenth of the time of tests that compile steps.
gc.set_threshold(5000, 10, 10)

# Silent broadcasting and silent mixes of dtypes are how losses go wrong.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

COLOURS = {
  "red": (220, 30, 30),
  "green": (30, 180, 60),
  "blue": (40, 60, 220),
  "yellow": (240, 220, 40),
  "black": (20, 20, 20),
  "pink": (250, 140, 190),
}
FORMS = ("square", "disc", "cross", "bar")


def draw(colour: str, form: str, rng: np.random.Generator) -> bytes:
  """Returns a PNG, 16 x 16, of a form at a random place on a noisy ground."""
  ground = rng.integers(150, 256, (16, 16, 3), dtype=np.uint8)
  image = Image.fromarray(ground)
  pen = ImageDraw.Draw(image)
  x, y = rng.integers(0, 5, 2).tolist()
  fill = COLOURS[colour]
  if form == "square":
    pen.rectangle((x, y, x + 10, y + 10), fill=fill)
  elif form == "disc":
    pen.ellipse((x, y, x + 10, y + 10), fill=fill)
  elif form == "cross":
    pen.rectangle((x + 4, y, x + 6, y + 10), fill=fill)
    pen.rectangle((x, y + 4, x + 10, y + 6), fill=fill)
  else:
    pen.rectangle((x, y + 4, x + 10, y + 6), fill=fill)
  data = io.BytesIO()
  image.save(data, "PNG")
  return data.getvalue()


class Shapes(tfds.core.GeneratorBasedBuilder):
  """24 concepts, "red square" and the like, each drawn several times."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="png"),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "concept": tfds.features.Text(),
          "label": tfds.features.ClassLabel(
            names=[f"{c} {f}" for c in COLOURS for f in FORMS]
          ),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(0, 8),
      "test": self._generate_examples(1, 2),
    }

  def _generate_examples(self, seed, copies):
    rng = np.random.default_rng(seed)
    for copy in range(copies):
      for colour in COLOURS:
        for form in FORMS:
          name = f"{colour} {form}"
          yield (
            f"{name} {copy}",
            dict(
              image=draw(colour, form, rng),
              concept=name,
              label=name,
              captions=[name, f"a {form} that is {colour}"],
            ),
          )


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory) -> pathlib.Path:
  """Returns the data_dir of a real TFDS dataset "shapes", as ArrayRecord."""
  path = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  Shapes(data_dir=path, file_format="array_record").download_and_prepare()
  return path


@pytest.fixture
def tiny_config(shapes_dir) -> dict[str, Any]:
  """Returns a config (plain dicts) that trains on shapes in seconds."""
  data = dict(kind="tfds", name="shapes", data_dir=str(shapes_dir))
  tower = dict(width=32, depth=1, num_heads=2, mlp_dim=64)
  return dict(
    batch_size=24,
    total_steps=8,
    log_every_steps=1,
    data=dict(data, split="train", group_by="concept"),
    tokenizer=dict(vocab_size=32),
    pp="decode|value_range(-1,1)|choice('captions')|lower|tokenize(8)"
    "|keep('image','text')",
    pp_image="decode|resize(16)|value_range(-1,1)|keep('image')",
    pp_text="lower|tokenize(8)|keep('text')",
    model=dict(
      image=dict(tower, patch_size=8),
      text=dict(tower, vocab_size=32),
      out_dim=(None, 32),
    ),
    optim=dict(
      lr=3e-3, wd=1e-4, grad_clip_norm=1.0, schedule=dict(warmup_percent=10)
    ),
    evals=dict(
      zeroshot=dict(type="zeroshot", data=dict(data, split="test")),
      retrieval=dict(
        type="retrieval",
        data=dict(data, split="test"),
        group="concept",
        every_percent=50,
      ),
    ),
  )


@pytest.fixture
def server(monkeypatch):
  """Returns an emulator in which gs://.. and s3://.. are; nobody waits long."""
  from sigjax.runtime import bucket

  retries = dict(max_retries=2, initial_delay="0.02s", max_delay="0.02s")
  monkeypatch.setattr(bucket, "RETRIES", retries)
  monkeypatch.setattr(bucket, "PUT_EVERY_S", 0.05)
  with bucket_server.serve() as server:
    for name, value in server.env.items():
      monkeypatch.setenv(name, value)
    yield server
    bucket.stores.cache_clear()
    bucket.lagging.clear()


@pytest.fixture
def tpu(monkeypatch):
  """Opens a topology, where the TPU compiler is installed: (devices, chip)."""
  pytest.importorskip("libtpu")
  for key, value in dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v4-8",
    TPU_WORKER_HOSTNAMES="localhost",
  ).items():
    monkeypatch.setenv(key, value)  # and away again afterwards
  from tools.aot import compiler  # few tests need it

  return compiler.open_topology


@pytest.fixture(scope="session")
def spm_path(tmp_path_factory) -> pathlib.Path:
  """Returns the path of a SentencePiece model of 26 pieces of corpus.TEXTS."""
  path = tmp_path_factory.mktemp("tokenizer") / "test.model"
  tokenizer.train(corpus.TEXTS, 26, path)
  return path
