"""Prints how well texts fit images, or writes captions, by a trained model.

  python -m tools.predict --weights siglip2/b16_256 --image cat.png \
    --texts "a cat,a dog"
  python -m tools.predict --weights WORKDIR --image 'photos,more/*.jpg' \
    --texts ...
  python -m tools.predict --weights WORKDIR --image photos --caption [--beam 4]

--weights is the name of a released model, a workdir, a folder of Hugging Face
or a file; see tools/opened.py.

For each image, the texts are listed from the best to the worst, with the cosine
s of both embeddings and the probability sigmoid(t * s + b). Each pair is judged
by itself: unlike the values of a softmax, probabilities need not add up to one.
They are small for images that are unlike the training data; the order of the
texts still says something.

With --caption, the captioning decoder of the model writes a caption of each
image: a run's with a term of type "caption" in config.losses (docs/siglip2.md).
At each place it takes the most probable token; with --beam it searches, and
--length_power is as in sigjax/decode.py. Beside it stands the logarithm of the
caption's probability.

Images are files, globs or folders, separated by commas. Texts are separated by
commas, too; a text that contains a comma stands in double quotes.

A run on precomputed embeddings has no image tower. Their folder says which one
computed them. If it does not, or that tower has moved, --tower names the config
that tools.embed was given, such as configs/siglit_l16.py.
"""

from collections.abc import Mapping, Sequence
import functools
import glob
import os
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import config_flags
import numpy as np

from sigjax import decode, errors
from sigjax.data.example import preprocess
from sigjax.data.faults import BadExample
from sigjax.data.formats import embeddings
from sigjax.data.shards import files as files_lib
from sigjax.models import two_towers
from sigjax.runtime import metrics, program
from tools import opened
from tools.embedding import tower as tower_lib

FLAGS = flags.FLAGS

BATCH = 16  # the most images captioned at a time


class Scores(NamedTuple):
  """The scores of all pairs of N images and M texts, float32.

  Attributes:
    cosine: the cosines of the embeddings.
    probability: sigmoid(t * cosine + b).
  """

  cosine: Float[Array, "N M"]
  probability: Float[Array, "N M"]


class Predictor:
  """A trained model, on one device.

  Args:
    weights: what names it, see tools/opened.py.
    tower: for a run on precomputed embeddings, the config of the tower that
      computed them, as plain dicts.

  Attributes:
    name: the model's, for people.
    pp_image: the preprocessing of its images.

  Raises:
    UserError: there is no such model, or no such tower; or it is damaged.
  """

  name: str
  pp_image: str

  def __init__(
    self,
    weights: str | os.PathLike[str],
    tower: Mapping[str, Any] | None = None,
  ):
    found = opened.open_model(weights)
    self.name, config, self._params = found.name, found.config, found.params
    self._model = two_towers.of_config(config["model"])
    self._apply = jax.jit(self._model.apply)
    self._tower = None
    self.pp_image = config["pp_image"]
    if config["model"]["image"].get("kind") == "precomputed":
      self._tower = self._open_tower(tower, config["data"])
      self.pp_image = self._tower.pp_image
    self._prepare_image = preprocess.parse(self.pp_image)
    self._tokenizer = found.tokenizer
    self._prepare_text = preprocess.parse(
      config["pp_text"], tokenizer=found.tokenizer
    )

  def _open_tower(self, config, data) -> tower_lib.Tower:
    """Returns the tower that computed the embeddings of the run's data."""
    about = embeddings.read_about(data["path"])
    made_by = dict(config=config) if config else about.get("made_by")
    if not about or not isinstance(made_by, dict):
      raise errors.UserError(
        "this run has precomputed images: give --tower, the config with "
        f"which tools.embed wrote {data['path']}"
        + ("" if about else "; that folder is gone, or not written by it")
      )
    devices = jax.devices()[:1]
    if "weights" in made_by:
      found = tower_lib.open_tower(made_by["weights"], devices)
    else:
      sections = made_by["config"]
      found = errors.call(
        tower_lib.of_config,
        {k: sections[k] for k in ("model", "init") if k in sections},
        "the config of --tower",
        about["pp_image"],
        devices=devices,
      )
    if found.checksum != about["tower"]:
      raise errors.UserError(
        f"--tower is not the one of {data['path']}: other weights, another "
        "architecture or another dtype"
      )
    return found

  @functools.cached_property
  def image_checksum(self) -> str:
    """A text that tells what embeds images from what embeds them otherwise."""
    of_tower = self._tower.checksum if self._tower else ""
    own = {"img": self._params.get("img", {})}
    found = tower_lib.checksum_of(self._model, own)
    return f"{of_tower} {found} {self.pp_image}"

  def prepared(self, data: bytes) -> np.ndarray:
    """Returns an encoded image, preprocessed, as images() takes them.

    Raises:
      BadExample: it cannot be decoded.
    """
    return np.asarray(self._prepare_image({"image": data}, _rng())["image"])

  def images(self, images: np.ndarray) -> Float[Array, "B E"]:
    """Returns the embeddings of preprocessed images, (B, ...)."""
    x = self._tower(images) if self._tower else jnp.asarray(images)
    return self._apply({"params": self._params}, x, None)[0]

  def image(self, data: bytes) -> Float[Array, " E"]:
    """Returns the embedding of an encoded image.

    Raises:
      BadExample: it cannot be decoded.
    """
    return self.images(self.prepared(data)[None])[0]

  def text(self, text: str) -> Float[Array, " E"]:
    """Returns the embedding of a text."""
    x = jnp.asarray(self._prepare_text({"text": text}, _rng())["text"])[None]
    return self._apply({"params": self._params}, None, x)[1][0]

  def check_captions(self) -> None:
    """Raises UserError if the model cannot write captions."""
    if self._model.image.get("kind") == "precomputed":
      raise errors.UserError(
        f"{self.name} was trained on embeddings: it has no image tower, whose "
        "patches a captioning decoder reads"
      )
    if "dec" not in self._params:
      raise errors.UserError(
        f"{self.name} has no captioning decoder: train one with "
        'config.losses=dict(caption=dict(type="caption")), see docs/siglip2.md'
      )

  def captions(
    self, images: np.ndarray, beams: int = 1, length_power: float = 1.0
  ) -> list[tuple[str, float]]:
    """Returns (caption, log-probability) of each of preprocessed images.

    Args:
      images: (B, ...).
      beams, length_power: see decode.beam_search; 1 beam: greedily.

    Raises:
      UserError: see check_captions.
    """
    self.check_captions()
    out: Any = self._apply({"params": self._params}, jnp.asarray(images), None)
    found = decode.captions(
      self._model.dtype,
      self._params["dec"],
      out[2]["img/encoded"],
      out[2].get("img/mask"),
      beams,
      length_power,
      self._tokenizer.vocab_size,
    )
    rows = zip(np.asarray(found.tokens), np.asarray(found.log_p))
    return [(self._tokenizer.text(ids), float(log_p)) for ids, log_p in rows]

  def scores(
    self, zimg: Sequence[Float[Array, " E"]], ztxt: Sequence[Float[Array, " E"]]
  ) -> Scores:
    """Returns the scores of all pairs of N images and M texts."""
    cosine = jnp.stack(zimg) @ jnp.stack(ztxt).T
    return Scores(cosine, self.probability(cosine))

  def probability(self, cosine: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """Returns sigmoid(t * cosine + b)."""
    out: Any = self._apply({"params": self._params}, None, None)[2]
    return jax.nn.sigmoid(cosine * out["t"][None] + out["b"][None])


def _rng() -> np.random.Generator:
  return np.random.default_rng(0)


def image_files(names: Sequence[str]) -> list[pathlib.Path]:
  """Returns the files that names, globs and folders stand for, each once.

  Of a folder, these are the image files directly in it.

  Raises:
    UserError: a file does not exist, or there is none for a glob or a folder.
  """
  found: dict[pathlib.Path, None] = {}
  for name in names:
    path = pathlib.Path(name)
    if path.is_dir():
      files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in files_lib.IMAGES
      )
    elif path.exists():  # brackets may be part of its name
      files = [path]
    else:
      files = sorted(map(pathlib.Path, glob.glob(name, recursive=True)))
      files = [file for file in files if file.is_file()]
    if not files:
      raise errors.UserError(
        f"--image {name}: there is no "
        + (
          f"file *{', *'.join(files_lib.IMAGES)}"
          if path.is_dir()
          else "such file"
        )
      )
    found.update(dict.fromkeys(files))
  return list(found)


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  files = image_files(FLAGS.image)
  tower = FLAGS.tower.to_dict() if FLAGS.tower else None
  predictor = Predictor(FLAGS.weights, tower)
  if FLAGS.caption:
    predictor.check_captions()
  print(f"model: {predictor.name}")
  pixels: dict[pathlib.Path, np.ndarray] = {}
  for file in files:
    try:
      pixels[file] = predictor.prepared(file.read_bytes())
    except OSError as e:
      print(f"image {file} is left out: {e.strerror}", file=sys.stderr)
    except BadExample as e:
      print(f"image {file} is left out: {e}", file=sys.stderr)
  if not pixels:
    raise errors.UserError("no image could be read")
  lines = _captions if FLAGS.caption else _fits
  print("\n".join(lines(predictor, pixels)))


def _captions(
  predictor: Predictor, pixels: Mapping[pathlib.Path, np.ndarray]
) -> list[str]:
  """Returns a table of a caption for each image."""
  images = list(pixels.values())
  size = min(BATCH, len(images))
  found: list[tuple[str, float]] = []
  for i in range(0, len(images), size):
    part = images[i : i + size]
    part += part[:1] * (size - len(part))  # one size compiles once
    power = 1.0 if FLAGS.length_power is None else FLAGS.length_power
    found += predictor.captions(np.stack(part), FLAGS.beam or 1, power)
  return metrics.table(
    [
      (file, text, f"{log_p:.2f}") for file, (text, log_p) in zip(pixels, found)
    ],
    ("image", "caption", "log p"),
  )


def _fits(
  predictor: Predictor, pixels: Mapping[pathlib.Path, np.ndarray]
) -> list[str]:
  """Returns a table of how well the texts fit each image."""
  scores = predictor.scores(
    [predictor.images(x[None])[0] for x in pixels.values()],
    [predictor.text(text) for text in FLAGS.texts],
  )
  rows = []
  for file, cosine, probability in zip(pixels, *map(np.asarray, scores)):
    for rank, j in enumerate(np.argsort(-cosine, kind="stable"), start=1):
      rows.append(
        (
          file,
          rank,
          FLAGS.texts[j],
          f"{cosine[j]:.3f}",
          f"{100 * probability[j]:.2g}%",
        )
      )
  return metrics.table(rows, ("image", "rank", "text", "cosine", "probability"))


def check_flags(rest: list[str]) -> None:
  """Raises UserError unless flags say what to do, and none is ignored."""
  program.flags_alone(rest)
  if bool(FLAGS.texts) == FLAGS.caption:
    raise errors.UserError("give --texts or --caption")
  if FLAGS.beam and not FLAGS.caption:
    raise errors.UserError("--beam is of --caption alone")
  if FLAGS.length_power is not None and (FLAGS.beam or 1) == 1:
    raise errors.UserError("--length_power is of --beam 2 and more alone")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of this program."""
  given: Any = dict(flag_values=values)
  flags.DEFINE_string(
    "weights",
    None,
    "A released model's name, a workdir, a checkpoint, a folder or a file.",
    **given,
  )
  flags.DEFINE_alias("workdir", "weights", **given)
  flags.DEFINE_list("image", None, "Image files, globs and folders.", **given)
  flags.DEFINE_list("texts", None, "Texts.", **given)
  flags.DEFINE_bool(
    "caption", False, "Writes a caption of each image.", **given
  )
  flags.DEFINE_integer(
    "beam", None, "Of --caption: texts kept at each place.", 1, **given
  )
  flags.DEFINE_float(
    "length_power",
    None,
    "Of --beam: see sigjax/decode.py; 1 if unset.",
    0,
    **given,
  )
  config_flags.DEFINE_config_file(
    "tower",
    None,
    "The config of the tower, if images were precomputed.",
    **given,
  )
  flags.mark_flags_as_required(["weights", "image"], **given)


if __name__ == "__main__":
  define_flags()
  program.run(main, check_flags)
