"""Prints how well texts fit images, according to a trained run.

  python -m tools.predict --workdir DIR --image cat.png --texts "a cat,a dog"

The probability of a pair is sigmoid(t * s + b), where s is the cosine of the
two embeddings. Each pair is judged by itself: unlike the values of a softmax,
probabilities need not add up to one. Images and texts are separated by commas;
a text that contains a comma stands in double quotes.

A run on precomputed embeddings has no image tower. For such a run, --tower
names the config that tools.embed was given, such as configs/siglit_l16.py.
"""

from collections.abc import Callable, Mapping, Sequence
import io
import json
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import config_flags
import numpy as np
from PIL import Image

from sigjax import errors, sharding
from sigjax.checkpoints import layout, restore
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.data.formats import embeddings
from sigjax.models import two_towers
from sigjax.runtime import metrics, program
from tools.embedding.tower import Tower

FLAGS = flags.FLAGS


class Predictor:
  """The model of a run, on one device.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    tower: for a run on precomputed embeddings, the config of the tower that
      computed them, as plain dicts.

  Raises:
    UserError: there is no run, no complete checkpoint, or no such tower; or the
      checkpoint is damaged.
  """

  def __init__(self, path: str, tower: Mapping[str, Any] | None = None):
    workdir = pathlib.Path(layout.find(path)[0])
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

  def _open_tower(self, config, data) -> None:
    """Loads the tower that computed the embeddings of the run's data."""
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
    image = self._pp["image"](
      {"image": blank.getvalue()}, np.random.default_rng(0)
    )["image"]
    self._tower = errors.call(
      Tower,
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

  def __call__(
    self, images: Sequence[bytes], texts: Sequence[str]
  ) -> Float[Array, "N M"]:
    """Returns the probabilities of N encoded images and M texts, float32."""
    zimg = self._embed("image", images, lambda x: (x, None))
    ztxt = self._embed("text", texts, lambda x: (None, x))
    out: Any = self._apply({"params": self._params}, None, None)[2]
    return jax.nn.sigmoid(zimg @ ztxt.T * out["t"][None] + out["b"][None])

  def _embed(
    self,
    key: str,
    values: Sequence[bytes] | Sequence[str],
    place: Callable[[Array], tuple[Array | None, Array | None]],
  ) -> Float[Array, "N E"]:
    """Embeds images or texts; place(x) gives both arguments of the model."""
    rows = []
    for value in values:  # one by one: any number of them, one compilation
      example = self._pp[key]({key: value}, np.random.default_rng(0))
      x = np.asarray(example[key])[None]
      if key == "image" and self._tower:
        x = self._tower(x)
      z = self._apply({"params": self._params}, *place(jnp.asarray(x)))
      rows += [row for row in z[:2] if row is not None]
    return jnp.concatenate(rows)


def main(argv: list[str]) -> None:
  """Runs the program."""
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


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A run's workdir or a checkpoint of it.")
  flags.DEFINE_list("image", None, "Image files.")
  flags.DEFINE_list("texts", None, "Texts.")
  config_flags.DEFINE_config_file(
    "tower", None, "The config of the tower, if images were precomputed."
  )
  flags.mark_flags_as_required(["workdir", "image", "texts"])
  program.run(main)
