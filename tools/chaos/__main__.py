"""Trains a small run while it is killed, cut short, filled up and damaged.

  python -m tools.chaos --faults 20

After each fault the same command is given again, as somebody would who knows
nothing of the run. At the end the parameters, the order of the examples and the
metrics are compared with those of a run that was left alone. Faults are:

  kill       SIGKILL at a random step
  start      SIGKILL, and once more in the first seconds of starting again
  save       SIGKILL while a checkpoint is being written
  term       SIGTERM: the step is saved, and the run stops
  full disk  no room while a checkpoint is written; then room again
  damage     SIGKILL, and a byte of the newest checkpoint is changed, or a file
             of it cut or deleted
  devices    SIGTERM, and another number of devices or processes: a second run,
             for other sums of floats are other roundings
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time

from absl import app, flags
import jax
import numpy as np

from sigjax import trees
from sigjax.checkpoints import manifest, restore, save
from sigjax.runtime import metrics
from tools.chaos import run

FAULTS = flags.DEFINE_integer("faults", 20, "How many faults there are.")
SEED = flags.DEFINE_integer("seed", 0, "Of their order and their moments.")
STEPS = flags.DEFINE_integer(
  "steps_per_fault", 15, "Steps of training per fault, about."
)
OUT = flags.DEFINE_string(
  "out", None, "Where all is kept; a temporary folder, if unset."
)

SAME = ("save", "full disk", "damage", "term", "kill", "start")  # bit for bit
DEVICES = ((1, 2), (2, 2), (1, 8), (1, 4))  # (processes, devices of each)
ROUNDING = 1e-4  # by which parameters may differ, relative to their norm
PAUSE = 0.04  # seconds added to each step
DISK = 24  # MiB


class Chaos:
  """One disturbed run, from its first start to its end.

  Args:
    config: the config file; all is kept beside it.
    workdir: of the run.
    rng: a random.Random.
    rows: a list, to which each fault adds a row: what, when, what came of it,
      and where the run went on.
  """

  def __init__(self, config, workdir, rng, rows):
    self.config, self.workdir, self.rng, self.rows = config, workdir, rng, rows
    self.run, self.given = None, 0
    self.where = DEVICES[0]

  def step(self):
    """The step whose batch was given last."""
    log = run.read_log(self.run.log)
    return log[-1][0] if log else 0

  def start(self):
    """Gives the command, once more; notes where it goes on."""
    self.run = run.Run(self.config, self.workdir, *self.where, PAUSE)
    self.given = len(run.read_log(self.run.log))  # batches until now

  def went_on(self):
    """Waits until the run has said where it starts; returns the step."""
    self.until(
      lambda: (
        "resuming from" in self.run.said() or "starting from" in self.run.said()
      )
    )
    _, found, rest = self.run.said().partition("resuming from ")
    return int(rest.split()[0].rpartition("/")[2]) if found else 0

  def until(self, condition, seconds=300):
    """Waits for a condition; the run is not to end before that."""
    end = time.monotonic() + seconds
    while not condition():
      if not self.run.running() or time.monotonic() > end:
        self.run.send(signal.SIGKILL)
        raise SystemExit(
          f"error: the run did not go as it should; it said:\n{self.run.said()}"
        )
      time.sleep(0.002)

  def checkpoints(self):
    """The complete ones, the newest last."""
    return sorted(
      self.workdir.glob("checkpoints/*[0-9]"), key=lambda p: int(p.name)
    )

  def fault(self, kind, target):
    """Does one fault, at about a step, and starts the run again if it ended.

    Not before it trains: what it does while it starts is kill_while_starting's.
    """

    def trains():
      log = run.read_log(self.run.log)
      return len(log) > self.given and log[-1][0] >= target

    self.until(trains)
    what = dict(
      kill=self.kill,
      start=self.kill_while_starting,
      save=self.kill_while_saving,
      term=self.term,
      damage=self.damage,
      devices=self.other_devices,
    )
    if kind == "full disk":
      self.rows.append((kind, *self.full_disk(), "-"))
    else:
      row = kind, *what[kind]()
      self.run.end()
      self.start()
      self.rows.append((*row, self.went_on()))
      if kind == "damage" and "is damaged" not in self.run.said():
        raise SystemExit("error: damage was not noticed")
    print("  ".join(map(str, self.rows[-1])), flush=True)

  def kill(self):
    """SIGKILL, now."""
    self.run.send(signal.SIGKILL)
    self.run.end()
    return self.step(), "killed"

  def kill_while_starting(self):
    """SIGKILL twice: imports, restoring and compiling are interrupted, too."""
    step, _ = self.kill()
    self.start()
    seconds = self.rng.uniform(0.5, 6)
    time.sleep(seconds)
    self.kill()
    return step, f"killed, and again {seconds:.1f} s after the next start"

  def kill_while_saving(self):
    """SIGKILL with a half-written checkpoint on disk."""

    def half():
      return list(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    self.until(half)
    time.sleep(self.rng.uniform(0, 0.02))
    self.run.send(signal.SIGKILL)
    self.run.end()
    return self.step(), (
      "left half a checkpoint" if half() else "the checkpoint was just complete"
    )

  def term(self):
    """SIGTERM; the run saves and stops."""
    begin = time.monotonic()
    self.run.send(signal.SIGTERM)
    codes = self.run.end()
    said = self.run.said().strip().splitlines()[-1]
    if set(codes) != {1} or not said.startswith("SIGTERM: saved step "):
      raise SystemExit(f"error: after SIGTERM the run said {said}")
    return int(
      said.split()[3]
    ), f"saved, and ended after {time.monotonic() - begin:.1f} s"

  def other_devices(self):
    """SIGTERM; the next start has other devices."""
    step, said = self.term()
    before, self.where = (
      self.where,
      DEVICES[(DEVICES.index(self.where) + 1) % len(DEVICES)],
    )
    return step, "{} x {} -> {} x {} devices, {}".format(
      *before, *self.where, said
    )

  def damage(self):
    """SIGKILL, then a file of the newest checkpoint is not what it was."""
    self.until(lambda: len(self.checkpoints()) > 1)
    self.run.send(signal.SIGKILL)
    self.run.end()
    newest = self.checkpoints()[-1]
    names = json.loads((newest / manifest.NAME).read_text())["sha256_and_size"]
    name = self.rng.choice(sorted(names))
    path, how = newest / name, self.rng.choice(("cut", "altered", "deleted"))
    data = bytearray(path.read_bytes())
    place = self.rng.randrange(len(data))
    if how == "deleted":
      path.unlink()
    elif how == "cut":
      path.write_bytes(data[:place])
    else:
      data[place] ^= 1 << self.rng.randrange(8)
      path.write_bytes(data)
    short = "/".join(part[:12] for part in name.split("/"))
    return self.step(), f"{newest.name}/{short} {how}, set aside"

  def full_disk(self):
    """No room until a save has failed; the run goes on."""
    filler = self.workdir.parent / "filler"
    before = self.run.said().count("could not be saved")
    step = self.step()
    with filler.open("wb") as f:
      try:
        while True:
          os.write(f.fileno(), bytes(4096))
      except OSError:
        pass
    self.until(lambda: self.run.said().count("could not be saved") > before)
    filler.unlink()
    failed = self.run.said().rpartition("could not be saved")[0].split()[-1]
    return step, f"step {failed} was not saved, the run went on"


def disturbed(name, config, workdir, kinds, rng, rows):
  """Runs a config to its end, with faults on the way; returns the Chaos."""
  it = Chaos(config, workdir, rng, rows)
  it.start()
  it.went_on()
  for i, kind in enumerate(kinds):
    it.fault(kind, int(STEPS.value * (i + rng.random())) + 1)
  if set(it.run.end()) != {0}:
    raise SystemExit(f"error: {name} did not end well:\n{it.run.said()}")
  return it


def compare(name, config, whole, workdir, bitwise):
  """Compares a run with the whole one; returns a line, exits if they differ."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  a, b = (
    trees.flatten(jax.device_get(restore.read_params(path, here)))
    for path in (whole, workdir)
  )
  far = max(
    float(np.linalg.norm(a[k] - b[k]) / max(np.linalg.norm(a[k]), 1)) for k in a
  )
  same = all(np.array_equal(a[k], b[k]) for k in a)
  if not (same if bitwise else far < ROUNDING):
    raise SystemExit(f"error: {name}: parameters differ by {far:.1e}")
  order = {
    step: numbers
    for step, _, numbers in run.read_log(config.parent / f"{whole.name}.jsonl")
  }
  given = run.read_log(config.parent / f"{workdir.name}.jsonl")
  rows = {step: set() for step in order}
  for step, row, numbers in given:
    if numbers != order[step][row : row + len(numbers)]:
      raise SystemExit(f"error: {name}: step {step} had other examples")
    rows[step].update(range(row, row + len(numbers)))
  if any(len(seen) != run.BATCH for seen in rows.values()):
    raise SystemExit(f"error: {name}: a step lacks examples")
  losses = [
    [
      (x["step"], x["loss"])
      for x in map(
        json.loads, (path / "metrics.jsonl").read_text().splitlines()
      )
    ]
    for path in (whole, workdir)
  ]
  if [s for s, _ in losses[0]] != [s for s, _ in losses[1]]:
    raise SystemExit(f"error: {name}: metrics.jsonl has other steps")
  return (
    f"{name}: {len(a)} arrays "
    + ("equal bit for bit" if same else f"equal to {far:.0e}")
    + f"; {len(order)} steps with the same examples, "
    f"{len(given) * len(given[0][2]) // run.BATCH - len(order)} "
    "given again; each step's metrics once"
  )


def each_once_per_epoch(path):
  """Exits unless every example was given once in every epoch."""
  log = run.read_log(path)
  steps = run.EXAMPLES // run.BATCH
  for i in range(0, len(log) - steps + 1, steps):
    seen = sorted(n for _, _, numbers in log[i : i + steps] for n in numbers)
    if seen != list(range(run.EXAMPLES)):
      raise SystemExit(f"error: examples of steps {i + 1} to {i + steps}")
  return f"{len(log) // steps} epochs of each of {run.EXAMPLES} examples"


def main(argv):
  del argv
  begin = time.monotonic()
  save.quiet()
  rng = random.Random(SEED.value)
  folder = pathlib.Path(OUT.value or tempfile.mkdtemp(prefix="chaos_"))
  disk = folder.absolute() / "disk"
  disk.mkdir(parents=True)
  others = max(FAULTS.value // 5, 1)
  kinds = [SAME[i % len(SAME)] for i in range(FAULTS.value - others)]
  rng.shuffle(kinds)
  if subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(disk)],
    stderr=subprocess.DEVNULL,
  ).returncode:
    raise SystemExit(
      "error: a disk to fill up needs the right to mount one; "
      "run this as root, such as in a container"
    )
  rows = []
  try:
    config = run.write_config(
      disk.parent, STEPS.value * max(len(kinds), others) + 20
    )
    whole = run.Run(config, disk / "whole", 1, 2, 0)
    if whole.end() != [0]:
      raise SystemExit(f"error: the undisturbed run:\n{whole.said()}")
    ends = [each_once_per_epoch(whole.log)]
    for name, faults in (("disturbed", kinds), ("moved", ["devices"] * others)):
      it = disturbed(name, config, disk / name, faults, rng, rows)
      ends.append(
        compare(name, config, disk / "whole", disk / name, name == "disturbed")
      )
      it.run.output.close()
  finally:
    subprocess.run(["umount", str(disk)], check=False)
  print()
  for line in metrics.table(
    [(i + 1, *row) for i, row in enumerate(rows)],
    ("", "fault", "step", "what came of it", "went on at"),
  ):
    print(line)
  print("\n".join(["", *ends]))
  print(f"{len(rows)} faults in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  app.run(main)
