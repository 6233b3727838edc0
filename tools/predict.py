"""How well do texts fit images? Asks a trained workdir.

  python -m tools.predict --workdir DIR --image cat.png --texts "a cat,a dog"

Prints the probability of each image-text pair by itself, sigmoid(t * s + b):
unlike a softmax's, they need not add up to one. Any number of images and texts,
separated by commas; a text with a comma in it stands in double quotes.

A run on precomputed embeddings has no image tower: --tower names the config
with which tools.embed computed them, such as configs/siglit_l16.py.
"""

import io
import json
import pathlib
import sys

from absl import app, flags, logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
from PIL import Image

from sigjax import errors, sharding
from sigjax.checkpoints import restore
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.data.formats import embeddings
from sigjax.models import two_towers
from sigjax.runtime import metrics
from tools import tower as tower_lib

FLAGS = flags.FLAGS


class Predictor:
  """The model of a run, on one device.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    tower: of a run on precomputed embeddings, the config (as plain dicts) of
      the tower that computed them.

  Raises:
    UserError: no run there, no complete checkpoint, or a damaged one; no tower,
      or another one.
  """

  def __init__(self, path, tower=None):
    workdir = pathlib.Path(restore.find(path)[0])
    if not (workdir / "config.json").exists():
      raise errors.UserError(
        f"{workdir} is no workdir of sigjax.train: it has no config.json"
      )
    config = json.loads((workdir / "config.json").read_text())
    tokenizer = tokenizer_lib.Tokenizer(workdir / "tokenizer.model")
    self._pp = {
      key: preprocess.parse(config[f"pp_{key}"], tokenizer=tokenizer)
      for key in ("image", "text")
    }
    self._model = errors.call(
      two_towers.TwoTowers, config["model"], "config.model"
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self._params = restore.read_params(path, sharding.batch_sharding(mesh))
    self._apply = jax.jit(self._model.apply)
    self._tower = None
    if config["model"]["image"].get("kind") == "precomputed":
      self._open_tower(tower, config["data"])

  def _open_tower(self, config, data):
    """Prepares the tower that computed the embeddings of config.data."""
    index = embeddings.read_index(data["path"])
    if config is None or index is None:
      raise errors.UserError(
        "this run has precomputed images: give --tower, the config with "
        f"which tools.embed wrote {data['path']}"
        + ("" if index else "; that folder is gone, or not written by it")
      )
    self._pp["image"] = preprocess.parse(index["pp_image"])
    blank = io.BytesIO()
    Image.new("RGB", (512, 512)).save(blank, "PNG")
    image = self._pp["image"]({"image": blank.getvalue()}, None)["image"]
    self._tower = errors.call(
      tower_lib.Tower,
      {k: config[k] for k in ("model", "init") if k in config},
      "the config of --tower",
      image,
      devices=jax.devices()[:1],
    )
    if self._tower.checksum != index["tower"]:
      raise errors.UserError(
        f"--tower is not the one of {data['path']}: other weights, another "
        "architecture or another dtype"
      )

  def __call__(self, images, texts):
    """Returns (N, M) float32 probabilities of N images and M texts.

    Args:
      images: list of encoded images (bytes).
      texts: list of str.
    """
    zimg = self._embed("image", images, lambda x: (x, None))
    ztxt = self._embed("text", texts, lambda x: (None, x))
    _, _, out = self._apply({"params": self._params}, None, None)
    return jax.nn.sigmoid(zimg @ ztxt.T * out["t"][None] + out["b"][None])

  def _embed(self, key, values, place):
    # One at a time: any number of them, and one compilation.
    rows = []
    for value in values:
      x = self._pp[key]({key: value}, np.random.default_rng(0))[key][None]
      if key == "image" and self._tower:
        x = self._tower(x)
      z = self._apply({"params": self._params}, *place(jnp.asarray(x)))
      rows += [row for row in z[:2] if row is not None]
    return jnp.concatenate(rows)


def main(argv):
  del argv
  names, images = FLAGS.image, []
  for name in names:
    try:
      images.append(pathlib.Path(name).read_bytes())
    except OSError as e:
      raise errors.UserError(f"image {name}: {e.strerror}") from e
  tower = FLAGS.tower.to_dict() if FLAGS.tower else None
  table = Predictor(FLAGS.workdir, tower)(images, FLAGS.texts)
  for line in metrics.table(
    [(name, *(f"{p:.2%}" for p in row)) for name, row in zip(names, table)],
    ("image", *FLAGS.texts),
  ):
    print(line)


def run(argv):
  """What app.run calls."""
  logging.set_verbosity(logging.ERROR)  # orbax tells a lot
  try:
    main(argv)
  except errors.UserError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A run's workdir or a checkpoint of it.")
  flags.DEFINE_list("image", None, "Image files.")
  flags.DEFINE_list("texts", None, "Texts.")
  config_flags.DEFINE_config_file(
    "tower", None, "The config of the tower, if images were precomputed."
  )
  flags.mark_flags_as_required(["workdir", "image", "texts"])
  app.run(run)
