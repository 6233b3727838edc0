"""Runs a config's locked image tower over its data, once, and keeps the result.

  python -m tools.embed --config configs/siglit_l16.py:dataset=coco_captions \
    --out embeddings/coco

Every data section of the config, of training and of evaluation, becomes a
folder in --out, named after its split; sigjax/data/embeddings.py describes it.
The same config then trains on them, with embeddings=embeddings/coco.

Examples are worked off in parts of --part_size. Killed, the same command goes
on: a part that is whole is not computed again. Several processes share the work
without talking to each other, each on its own devices: give each --process_id
and --num_processes, and the same --out on a disk that all of them see.
"""

import hashlib
import inspect
import json
import os
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import tqdm

from sigjax import checkpoint
from sigjax import config as config_lib
from sigjax import errors
from sigjax import sharding
from sigjax import trees
from sigjax.data import embeddings
from sigjax.data import pipeline
from sigjax.data import preprocess
from sigjax.data import sources
from sigjax.models import two_towers

FLAGS = flags.FLAGS


class Tower:
  """The image tower that a config describes, on this process's devices.

  Args:
    image: an example of its input, (H, W, C) float32.
    model, init: sections of the config.

  Attributes:
    checksum: SHA-256 of its architecture, compute dtype and weights.
    width: of its embeddings.

  Raises:
    UserError: the config names no weights, or they do not fit.
  """

  def __init__(self, image, *, model, init=None):
    if model["image"].get("kind", "vit") == "precomputed":
      raise errors.UserError(
          "config.model.image is precomputed: give the config that has the "
          "tower itself, the one without embeddings=")
    if not init or init.get("into") == "txt":
      raise errors.UserError(
          "config.init names no weights of the image tower, and embeddings of "
          "one at random are worth nothing; set config.init.path")
    model = errors.call(two_towers.TwoTowers, model, "config.model")
    self.mesh = sharding.make_mesh(devices=jax.local_devices())
    shapes = jax.eval_shape(
        two_towers.image_tower(model).init, jax.random.key(0), image[None])
    params = {"img": self._weights(shapes["params"], model.dtype, init)}
    about = json.dumps([dict(model.image), model.out_dim[0], model.dtype],
                       sort_keys=True, default=list)
    digest = hashlib.sha256(about.encode())
    for name, x in sorted(trees.flatten(params).items()):
      digest.update(f"{name} {x.dtype} {x.shape}".encode())
      digest.update(np.asarray(x).tobytes())
    self.checksum = digest.hexdigest()
    if model.bias_init is not None:
      params["b"] = jnp.zeros(1)
    params["t"] = jnp.zeros(1)
    self._params = jax.device_put(
        params, jax.sharding.NamedSharding(self.mesh, jax.P()))
    self._apply = jax.jit(lambda p, x: model.apply({"params": p}, x, None)[0])
    self.width = jax.eval_shape(self._apply, params, image[None]).shape[1]

  @staticmethod
  def _weights(shapes, dtype, init):
    if init.get("into") is None:  # of a file of both towers, one is enough
      init = dict(init, dont_load=(
          *init.get("dont_load", ()), "txt/.*", "t", "b"))
    given = errors.call(
        checkpoint.read_init, init, "config.init", {"img": shapes})
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)),
                        trees.unflatten(given)["img"])

  def __call__(self, images):
    """(B, H, W, C) numpy -> (B, E) unit rows, float32, on the devices."""
    return self._apply(self._params, sharding.put_batch(images, self.mesh))


class Job:
  """The embeddings of one source, in one folder.

  Args:
    path: the folder.
    source: what is embedded.
    tower: a Tower.
    pp_image: its preprocessing.
    dtype: in which embeddings are stored, a name in embeddings.DTYPES.
    part_size: examples of a part.

  Raises:
    UserError: the folder holds something else: of another tower, ...
  """

  def __init__(self, path, source, tower, pp_image, dtype, part_size):
    self.path, self.source, self.tower = path, source, tower
    self.dtype, self.part_size = embeddings.DTYPES[dtype], part_size
    self.count = len(source)
    self.parts = -(-self.count // part_size)
    self.pp = preprocess.parse(pp_image)
    self.about = dict(
        source=source.name, count=self.count, width=tower.width, dtype=dtype,
        tower=tower.checksum, pp_image=pp_image, part_size=part_size,
        label_names=source.label_names)
    path.mkdir(parents=True, exist_ok=True)
    file = path / "job.json"
    if file.exists():
      found = json.loads(file.read_text())
      for key, value in self.about.items():
        if found.get(key) != value:
          raise errors.UserError(
              f"{path} was begun with {key} {found.get(key)}, now it is "
              f"{value}; give another --out, or delete that folder")
    write(file, json.dumps(self.about, indent=1))

  def file(self, i):
    return self.path / f"embeddings-{i:05d}-of-{self.parts:05d}.array_record"

  def size(self, i):
    return min(self.part_size, self.count - i * self.part_size)

  def whole(self, i):
    """Whether part i is there with all its records."""
    from array_record.python import array_record_module
    if not self.file(i).exists():
      return False
    reader = array_record_module.ArrayRecordReader(str(self.file(i)))
    # Of a file that was cut short it only says so when asked.
    return reader.ok() and reader.num_records() == self.size(i)

  def run(self, i, batch_size, bar):
    """Computes part i and writes it, aside first."""
    from array_record.python import array_record_module
    first = i * self.part_size
    part = self.source.narrowed(
        np.arange(first, first + self.size(i))[:, None])
    aside = f"{self.file(i)}.{os.getpid()}.partial"
    writer = array_record_module.ArrayRecordWriter(aside, "group_size:1")

    def write_rows(batch, z):
      z = np.asarray(z).astype(self.dtype)
      for features, row in zip(batch["features"][batch["_mask"]], z):
        writer.write(features + row.tobytes())
      bar.update(int(batch["_mask"].sum()))

    held = None  # written while the devices work on the next
    for batch in pipeline.eval_batches(
        part, self._with_features, batch_size=batch_size):
      z = self.tower(batch.pop("image"))
      if held:
        write_rows(*held)
      held = batch, z
    write_rows(*held)
    writer.close()
    os.replace(aside, self.file(i))

  def _with_features(self, example, rng):
    image = self.pp(example, rng)["image"]
    rest = {k: v for k, v in example.items() if k != "image"}
    return {"image": image, "features": np.asarray(embeddings.encode(rest))}

  def finish(self):
    """Writes index.json if all parts are there; returns whether they are."""
    if not all(map(self.whole, range(self.parts))):
      return False
    shards = [dict(file=self.file(i).name, count=self.size(i),
                   bytes=self.file(i).stat().st_size)
              for i in range(self.parts)]
    write(self.path / embeddings.INDEX, json.dumps(
        dict(self.about, shards=shards), indent=1))
    return True


def write(path, text):
  """Writes a text file aside, then renames it."""
  aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
  aside.write_text(text)
  os.replace(aside, path)


def sections(config):
  """Returns {folder: (data section, pp_image)} of all data of a config.

  Sections of the same data that choose or group it in different ways are one.
  """
  choosing = set(inspect.signature(sources.open_source).parameters) - {"kind"}
  found = {}
  for section, pp in [(config["data"], config["pp_image"])] + [
      (e["data"], e.get("pp_image", config["pp_image"]))
      for e in (config.get("evals") or {}).values() if "data" in e]:
    bare = {k: v for k, v in section.items() if k not in choosing}
    folder = str(section.get("split", section["kind"])).replace("/", "_")
    if found.setdefault(folder, (bare, pp)) != (bare, pp):
      raise errors.UserError(
          f'two data sections of the config would both be "{folder}" in --out: '
          f"{found[folder][0]} and {bare}")
  return found


def main(config, out, *, dtype="float16", part_size=16_384, batch_size=256,
         process_id=0, num_processes=1):
  """Embeds everything; see the top of this file."""
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
        f"--process_id {process_id} is not below --num_processes "
        f"{num_processes}")
  tower = None
  for folder, (section, pp_image) in sections(config).items():
    source = sources.open_source(**section)
    if tower is None:
      image = preprocess.parse(pp_image)(source[0], np.random.default_rng(0))
      tower = errors.call(
          Tower, {k: config[k] for k in ("model", "init") if k in config},
          "config", image["image"])
      sharding.check_batch_size(batch_size, tower.mesh)
    job = Job(pathlib.Path(out) / folder, source, tower, pp_image, dtype,
              part_size)
    mine = range(process_id, job.parts, num_processes)
    with tqdm.tqdm(total=sum(map(job.size, mine)), desc=folder, unit="image",
                   smoothing=0.05) as bar:
      for i in mine:
        if job.whole(i):
          bar.update(job.size(i))
        else:
          job.run(i, batch_size, bar)
    if job.finish():
      print(f"{job.path}: {job.count} embeddings of {tower.width} {dtype}, "
            f"{embeddings.storage(job.count, tower.width, dtype) / 1e6:.1f} MB "
            f"and captions; tower {tower.checksum[:16]}")
    else:
      print(f"{job.path}: the parts of this process are done")


def run(argv):
  """What app.run calls."""
  del argv
  logging.set_verbosity(logging.ERROR)  # orbax tells a lot
  try:
    main(FLAGS.config.to_dict(), FLAGS.out, dtype=FLAGS.dtype,
         part_size=FLAGS.part_size, batch_size=FLAGS.batch_size,
         process_id=FLAGS.process_id, num_processes=FLAGS.num_processes)
  except errors.UserError as e:
    sys.exit(f"error: {e}")


def define_flags():
  """Only where this is the program: others have a --config as well."""
  config_flags.DEFINE_config_file(
      "config", None, "Config file, as for sigjax.train.", lock_config=True)
  flags.DEFINE_string("out", None, "Where the embeddings go.")
  flags.DEFINE_enum("dtype", "float16", list(embeddings.DTYPES),
                    "In which they are stored.")
  flags.DEFINE_integer("part_size", 16_384, "Examples of a part.",
                       lower_bound=1)
  flags.DEFINE_integer("batch_size", 256, "Images at a time, on all devices.",
                       lower_bound=1)
  flags.DEFINE_integer("process_id", 0, "Which of the processes this is.")
  flags.DEFINE_integer("num_processes", 1, "How many share the work.")
  flags.mark_flag_as_required("out")


if __name__ == "__main__":
  define_flags()
  app.run(run, flags_parser=lambda argv: config_lib.parse_flags(
      argv, config_lib.check_config))
