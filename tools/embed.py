"""Computes the embeddings of a locked image tower once, and keeps them.

  python -m tools.embed --config configs/siglit_l16.py:dataset=coco_captions \
    --out embeddings/coco

Every data section of the config, of training and of evaluation, becomes a
folder in --out, named after its split; sigjax/data/formats/embeddings.py
describes the files. With embeddings=embeddings/coco, the same config trains on
them.

Pictures of your own by any tower, without a config:

  python -m tools.embed --weights siglip2/b16_256 --data pictures \
    --out embeddings/pictures

--weights is a released model's name, a workdir, a file, or a Python program
with a tower of its own, such as examples/efficientnet_lite0.py (see
tools/embedding/tower.py). --data is as in tools/opened.py; the folder in --out
is called as the kind of the data, "folder" here.

The examples are embedded in parts of --part_size. If the program is killed, the
same command continues: complete parts are not computed again. Several processes
can share the work, each on its own devices. They do not communicate: give each
--process_id and --num_processes, and the same --out on a shared disk.
"""

from collections.abc import Mapping
import inspect
import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags
import tqdm

from sigjax import errors, sharding
from sigjax.data import kinds
from sigjax.data.faults import BAD_FRACTION
from sigjax.data.formats import embeddings
from sigjax.runtime import program
from tools import opened
from tools.embedding import tower as tower_lib
from tools.embedding.job import Job
from tools.embedding.tower import Tower

FLAGS = flags.FLAGS


def sections(
  config: Mapping[str, Any],
) -> dict[str, tuple[dict[str, Any], str]]:
  """Returns {folder: (data section, pp_image)} of all data of a config.

  Sections that differ only in how they choose or group examples are one.

  Raises:
    UserError: two different sections would have the same folder.
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


def embed(
  config: Mapping[str, Any],
  out: str | os.PathLike[str],
  *,
  tower: Tower | None = None,
  dtype: str = "float16",
  part_size: int = 16_384,
  batch_size: int = 256,
  process_id: int = 0,
  num_processes: int = 1,
) -> None:
  """Embeds the data of a config, as described at the top of this file.

  Args:
    config: data, evals and bad_fraction are read; model, init and pp_image if
      there is no tower.
    out: the folder that holds the folders.
    tower: the tower; None: that of the config.
    dtype: in which embeddings are stored, a name in embeddings.DTYPES.
    part_size: examples per part.
    batch_size: images per batch, over all devices.
    process_id: which of the processes this is.
    num_processes: how many share the work.

  Raises:
    UserError: there is no tower, there are too many bad examples, or a folder
      was begun differently.
  """
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"--process_id {process_id} is not below --num_processes {num_processes}"
    )
  if tower is not None:
    config = dict(config, pp_image=tower.pp_image)
  for folder, (section, pp_image) in sections(config).items():
    source = kinds.open_source(**section)
    if tower is None or tower.pp_image != pp_image:
      tower = errors.call(
        tower_lib.of_config,
        {k: config[k] for k in ("model", "init") if k in config},
        "config",
        pp_image,
      )
    sharding.check_batch_size(batch_size, tower.mesh)
    job = Job(
      pathlib.Path(out) / folder,
      source,
      tower,
      dtype,
      part_size,
      config.get("bad_fraction", BAD_FRACTION),
    )
    mine = range(process_id, job.parts, num_processes)
    with tqdm.tqdm(
      total=sum(map(job.size, mine)), desc=folder, unit="image", smoothing=0.05
    ) as bar:
      for i in mine:
        if job.records(i) is not None:
          bar.update(job.size(i))
        else:
          job.run(i, batch_size, bar)
    if job.bad:
      print(
        f"{job.path}: {len(job.bad)} examples were left out: "
        f"{job.tally.faults()}"
      )
    count = job.finish()
    if count is not None:
      size = embeddings.storage(count, tower.width, dtype)
      print(
        f"{job.path}: {count} embeddings of {tower.width} {dtype}, "
        f"{size / 1e6:.1f} MB and captions; tower {tower.checksum[:16]}"
      )
    else:
      print(f"{job.path}: the parts of this process are complete")


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  tower = None
  if FLAGS.weights:
    config = dict(data=opened.data_of(FLAGS.data, "folder"))
    tower = tower_lib.open_tower(FLAGS.weights)
  else:
    config = FLAGS.config.to_dict()
  embed(
    config,
    FLAGS.out,
    tower=tower,
    dtype=FLAGS.dtype,
    part_size=FLAGS.part_size,
    batch_size=FLAGS.batch_size,
    process_id=FLAGS.process_id,
    num_processes=FLAGS.num_processes,
  )


def _check_flags(rest: list[str]) -> None:
  """Raises UserError unless there is a config, or weights and data."""
  if FLAGS.weights is None and FLAGS.data is None:
    program.config_given(rest)
  program.flags_alone(rest)
  if (FLAGS.weights is None) != (FLAGS.data is None) or (
    FLAGS.weights and FLAGS.config is not None
  ):
    raise errors.UserError("give --weights and --data, or --config")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "Config file, as for sigjax.train.", lock_config=True
  )
  flags.DEFINE_string("weights", None, "The tower, without a config.")
  flags.DEFINE_string("data", None, "The data, without a config.")
  flags.DEFINE_string("out", None, "Output folder.")
  flags.DEFINE_enum(
    "dtype", "float16", list(embeddings.DTYPES), "How embeddings are stored."
  )
  flags.DEFINE_integer("part_size", 16_384, "Examples per part.", lower_bound=1)
  flags.DEFINE_integer(
    "batch_size", 256, "Images per batch, over all devices.", lower_bound=1
  )
  flags.DEFINE_integer("process_id", 0, "Which of the processes this is.")
  flags.DEFINE_integer("num_processes", 1, "How many processes share the work.")
  flags.mark_flag_as_required("out")
  program.run(main, _check_flags)
