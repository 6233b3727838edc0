"""Runs a config's locked image tower over its data, once, and keeps the result.

  python -m tools.embed --config configs/siglit_l16.py:dataset=coco_captions \
    --out embeddings/coco

Every data section of the config, of training and of evaluation, becomes a
folder in --out, named after its split; sigjax/data/formats/embeddings.py describes it.
The same config then trains on them, with embeddings=embeddings/coco.

Examples are worked off in parts of --part_size. Killed, the same command goes
on: a part that is whole is not computed again. Several processes share the work
without talking to each other, each on its own devices: give each --process_id
and --num_processes, and the same --out on a disk that all of them see.
"""

import inspect
import json
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags
import numpy as np
import tqdm

from sigjax import errors, sharding
from sigjax.data import kinds
from sigjax.data.batches import pipeline, tally
from sigjax.data.example import preprocess
from sigjax.data.faults import BadExample
from sigjax.data.formats import embeddings
from sigjax.runtime import program
from tools import tower as tower_lib

FLAGS = flags.FLAGS


class Job:
  """The embeddings of one source, in one folder.

  Args:
    path: the folder.
    source: what is embedded.
    tower: a Tower.
    pp_image: its preprocessing.
    dtype: in which embeddings are stored, a name in embeddings.DTYPES.
    part_size: examples of a part; those that cannot be used are left out.
    bad_fraction: the most that these may be, see tally.Tally.

  Raises:
    UserError: the folder holds something else: of another tower, ...
  """

  def __init__(
    self, path, source, tower, pp_image, dtype, part_size, bad_fraction
  ):
    self.path, self.source, self.tower = path, source, tower
    self.dtype, self.part_size = embeddings.DTYPES[dtype], part_size
    self.count = len(source)
    self.parts = -(-self.count // part_size)
    self.pp = preprocess.parse(pp_image)
    self.tally, self.bad = tally.Tally(bad_fraction, source), set()
    self.about = dict(
      source=source.name,
      count=self.count,
      width=tower.width,
      dtype=dtype,
      tower=tower.checksum,
      pp_image=pp_image,
      part_size=part_size,
      label_names=source.label_names,
    )
    path.mkdir(parents=True, exist_ok=True)
    file = path / "job.json"
    if file.exists():
      found = json.loads(file.read_text())
      for key, value in self.about.items():
        if found.get(key) != value:
          raise errors.UserError(
            f"{path} was begun with {key} {found.get(key)}, now it is "
            f"{value}; give another --out, or delete that folder"
          )
    write(file, json.dumps(self.about, indent=1))

  def file(self, i):
    return self.path / f"embeddings-{i:05d}-of-{self.parts:05d}.array_record"

  def size(self, i):
    return min(self.part_size, self.count - i * self.part_size)

  def records(self, i):
    """How many records part i has; 0 if it is not there, or not whole."""
    from array_record.python import array_record_module

    if not self.file(i).exists():
      return 0
    reader = array_record_module.ArrayRecordReader(str(self.file(i)))
    # Of a file that was cut short it only says so when asked.
    return reader.num_records() if reader.ok() else 0

  def run(self, i, batch_size, bar):
    """Computes part i and writes it, aside first."""
    from array_record.python import array_record_module

    first = i * self.part_size
    part = self.source.replaced(
      records=_Lenient(self.source),
      members=np.arange(first, first + self.size(i))[:, None],
    )
    aside = f"{self.file(i)}.{os.getpid()}.partial"
    writer = array_record_module.ArrayRecordWriter(aside, "group_size:1")

    def write_rows(batch, z):
      z = np.asarray(z).astype(self.dtype)
      for features, row in zip(batch["features"], z):
        if features:  # neither bad nor past the end
          writer.write(features + row.tobytes())
      bar.update(int(batch["_mask"].sum()))

    held = None  # written while the devices work on the next
    for batch in pipeline.eval_batches(
      part, self._with_features, batch_size=batch_size, bad_fraction=1
    ):
      z = self.tower(batch.pop("image"))
      if held:
        write_rows(*held)
      held = batch, z
    write_rows(*held)
    writer.close()
    os.replace(aside, self.file(i))

  def _with_features(self, example, rng):
    record, fault = example.pop("_record"), example.pop("_fault")
    try:
      if fault:
        raise fault
      image = self.pp(example, rng)["image"]
    except BadExample as e:
      if record not in self.bad:  # the last one also fills up the last batch
        self.bad.add(record)
        self.tally.bad(BadExample(f"{self.source.name}[{record}]: {e}", e.kind))
      return {"image": self.tower.blank, "features": np.asarray(b"")}
    self.tally.good()
    rest = {k: v for k, v in example.items() if k != "image"}
    return {"image": image, "features": np.asarray(embeddings.encode(rest))}

  def finish(self):
    """Writes index.json if all parts are there.

    Returns:
      How many embeddings they have; 0 if some are not there yet.
    """
    counts = list(map(self.records, range(self.parts)))
    if not all(counts):
      return 0
    shards = [
      dict(
        file=self.file(i).name, count=count, bytes=self.file(i).stat().st_size
      )
      for i, count in enumerate(counts)
    ]
    write(
      self.path / embeddings.INDEX,
      json.dumps(dict(self.about, count=sum(counts), shards=shards), indent=1),
    )
    return sum(counts)


class _Lenient:
  """Records that are numbered; one that cannot be read says why."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source.records)

  def __getitem__(self, i):
    try:
      return {**self._source.read(i), "_record": i, "_fault": None}
    except BadExample as e:
      return {"_record": i, "_fault": e}


def write(path, text):
  """Writes a text file aside, then renames it."""
  aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
  aside.write_text(text)
  os.replace(aside, path)


def sections(config):
  """Returns {folder: (data section, pp_image)} of all data of a config.

  Sections of the same data that choose or group it in different ways are one.
  """
  choosing = set(inspect.signature(kinds.open_source).parameters) - {"kind"}
  found = {}
  for section, pp in [(config["data"], config["pp_image"])] + [
    (e["data"], e.get("pp_image", config["pp_image"]))
    for e in (config.get("evals") or {}).values()
    if "data" in e
  ]:
    bare = {k: v for k, v in section.items() if k not in choosing}
    folder = str(section.get("split", section["kind"])).replace("/", "_")
    if found.setdefault(folder, (bare, pp)) != (bare, pp):
      raise errors.UserError(
        f'two data sections of the config would both be "{folder}" in --out: '
        f"{found[folder][0]} and {bare}"
      )
  return found


def main(
  config,
  out,
  *,
  dtype="float16",
  part_size=16_384,
  batch_size=256,
  process_id=0,
  num_processes=1,
):
  """Embeds everything; see the top of this file."""
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"--process_id {process_id} is not below --num_processes {num_processes}"
    )
  tower = None
  for folder, (section, pp_image) in sections(config).items():
    source = kinds.open_source(**section)
    if tower is None:
      # Not record 0: it may be a bad one.
      image = pipeline.first_example(source, preprocess.parse(pp_image))
      tower = errors.call(
        tower_lib.Tower,
        {k: config[k] for k in ("model", "init") if k in config},
        "config",
        image["image"],
      )
      sharding.check_batch_size(batch_size, tower.mesh)
    job = Job(
      pathlib.Path(out) / folder,
      source,
      tower,
      pp_image,
      dtype,
      part_size,
      config.get("bad_fraction", tally.BAD_FRACTION),
    )
    mine = range(process_id, job.parts, num_processes)
    with tqdm.tqdm(
      total=sum(map(job.size, mine)), desc=folder, unit="image", smoothing=0.05
    ) as bar:
      for i in mine:
        if job.records(i):
          bar.update(job.size(i))
        else:
          job.run(i, batch_size, bar)
    if job.bad:
      print(
        f"{job.path}: {len(job.bad)} examples were left out: "
        f"{job.tally.faults()}"
      )
    if count := job.finish():
      size = embeddings.storage(count, tower.width, dtype)
      print(
        f"{job.path}: {count} embeddings of {tower.width} {dtype}, "
        f"{size / 1e6:.1f} MB and captions; tower {tower.checksum[:16]}"
      )
    else:
      print(f"{job.path}: the parts of this process are done")


def run(argv):
  """What app.run calls."""
  del argv
  logging.set_verbosity(logging.ERROR)  # orbax tells a lot
  try:
    main(
      FLAGS.config.to_dict(),
      FLAGS.out,
      dtype=FLAGS.dtype,
      part_size=FLAGS.part_size,
      batch_size=FLAGS.batch_size,
      process_id=FLAGS.process_id,
      num_processes=FLAGS.num_processes,
    )
  except errors.UserError as e:
    sys.exit(f"error: {e}")


def define_flags():
  """Only where this is the program: others have a --config as well."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, as for sigjax.train.", lock_config=True
  )
  flags.DEFINE_string("out", None, "Where the embeddings go.")
  flags.DEFINE_enum(
    "dtype", "float16", list(embeddings.DTYPES), "In which they are stored."
  )
  flags.DEFINE_integer(
    "part_size", 16_384, "Examples of a part.", lower_bound=1
  )
  flags.DEFINE_integer(
    "batch_size", 256, "Images at a time, on all devices.", lower_bound=1
  )
  flags.DEFINE_integer("process_id", 0, "Which of the processes this is.")
  flags.DEFINE_integer("num_processes", 1, "How many share the work.")
  flags.mark_flag_as_required("out")


if __name__ == "__main__":
  define_flags()
  app.run(
    run,
    flags_parser=lambda argv: program.parse_flags(argv, program.config_given),
  )
