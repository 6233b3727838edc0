"""Trains a small run and disturbs it; nothing may be lost.

  python -m tools.chaos --faults 20

After each fault the same command is given again, as a user would do who knows
nothing of the run. At the end the parameters, the order of the examples and the
metrics are compared with those of an undisturbed run. The faults are:

  kill       SIGKILL at a random step
  start      SIGKILL, and again in the first seconds after the next start
  save       SIGKILL while a checkpoint is being written
  term       SIGTERM: the step is saved, and the run stops
  full disk  no space while a checkpoint is written; then there is space again
  damage     SIGKILL, then a file of the newest checkpoint is altered, cut or
             deleted
  devices    SIGTERM, then another number of devices or processes. These are in
             a second run: other sums of floats round differently

It mounts a small disk, which needs the rights of root.
"""

import pathlib
import random
import subprocess
import tempfile
import time

from absl import flags
import jax

from sigjax import errors
from sigjax.runtime import metrics, program
from tools.chaos import compare, faults, run

FLAGS = flags.FLAGS
DISK = 24  # MiB


def mount(path: pathlib.Path) -> None:
  """Mounts an empty disk of DISK MiB at a new folder."""
  path.mkdir(parents=True)
  command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(path)]
  if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
    raise errors.UserError(
      f"a disk that can be filled up cannot be mounted at {path}; run this as "
      "root, such as in a container"
    )


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  begin = time.monotonic()
  rng = random.Random(FLAGS.seed)
  folder = pathlib.Path(FLAGS.out or tempfile.mkdtemp(prefix="chaos_"))
  disk = folder.absolute() / "disk"
  mount(disk)
  moves = max(FLAGS.faults // 5, 1)
  kinds = [
    faults.BITWISE[i % len(faults.BITWISE)] for i in range(FLAGS.faults - moves)
  ]
  rng.shuffle(kinds)
  done: list[faults.Fault] = []
  try:
    steps = FLAGS.steps_per_fault * max(len(kinds), moves) + 20
    config = run.write_config(disk.parent, steps)
    whole = run.Run(config, disk / "whole", 1, 2, 0)
    if whole.end() != [0]:
      raise errors.UserError(f"the undisturbed run failed:\n{whole.said()}")
    whole.close()
    lines = [compare.each_once_per_epoch(whole.log)]
    for name, these in ("disturbed", kinds), ("moved", ["devices"] * moves):
      disturbed = faults.Disturbed(config, disk / name, rng, done)
      disturbed.train(these, FLAGS.steps_per_fault)
      lines.append(
        compare.with_whole(
          config, disk / "whole", disk / name, name == "disturbed"
        )
      )
  finally:
    subprocess.run(["umount", str(disk)], check=False)
  print()
  for line in metrics.table(
    [(i + 1, *fault) for i, fault in enumerate(done)],
    ("", "fault", "step", "effect", "resumed at"),
  ):
    print(line)
  print("\n".join(["", *lines]))
  print(f"{len(done)} faults in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
  flags.DEFINE_integer("faults", 20, "Number of faults.", lower_bound=2)
  flags.DEFINE_integer("seed", 0, "Seed of their order and times.")
  flags.DEFINE_integer("steps_per_fault", 15, "Training steps per fault.")
  flags.DEFINE_string(
    "out", None, "Output folder; a temporary one if not given."
  )
  jax.config.update("jax_platforms", "cpu")
  program.run(main)
