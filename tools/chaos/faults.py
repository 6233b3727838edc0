"""A run that is disturbed by faults and resumed after each of them."""

from collections.abc import Callable, Sequence
import json
import os
import pathlib
import random
import signal
import time
from typing import Any, NamedTuple

from sigjax import errors
from sigjax.checkpoints import manifest
from tools.chaos import run

# Faults after which the run has to end with the same bits.
BITWISE = ("save", "full disk", "damage", "term", "kill", "start")
# (processes, devices of each), which the fault "devices" goes through.
DEVICES = ((1, 2), (2, 2), (1, 8), (1, 4))
PAUSE = 0.04  # seconds added to each step

# What the run prints.
RESUMED = "resuming from "  # WORKDIR/checkpoints/STEP
STARTED = "starting from"
DAMAGED = "is damaged"
NOT_SAVED = "could not be saved"  # after the step
STOPPED = "SIGTERM: saved step "


class Fault(NamedTuple):
  """A fault that was done.

  Attributes:
    kind: one of those in __main__.
    step: the step at which it came.
    effect: what it did, in words.
    resumed: the step from which the run continued, or "-" if it never ended.
  """

  kind: str
  step: int
  effect: str
  resumed: int | str


class Disturbed:
  """One run, from its first start to its end.

  Args:
    config: the config file; the output of the run is kept beside it.
    workdir: the workdir of the run.
    rng: draws the times of the faults.
    done: a list to which each fault is added.
  """

  def __init__(
    self,
    config: pathlib.Path,
    workdir: pathlib.Path,
    rng: random.Random,
    done: list[Fault],
  ):
    self._config, self._workdir = config, workdir
    self._rng, self._done = rng, done
    self._where = DEVICES[0]
    self._start()

  def train(self, kinds: Sequence[str], steps_per_fault: int) -> None:
    """Trains to the end, with these faults on the way.

    Raises:
      UserError: the run did not survive.
    """
    self._resumed_at()
    for i, kind in enumerate(kinds):
      self._disturb(kind, int(steps_per_fault * (i + self._rng.random())) + 1)
    if set(self._run.end()) != {0}:
      raise errors.UserError(
        f"{self._workdir.name} ended with an error:\n{self._run.said()}"
      )
    self._run.close()

  # ---- The run ----

  def _start(self) -> None:
    """Gives the command."""
    self._run = run.Run(self._config, self._workdir, *self._where, PAUSE)
    self._given = len(run.read_log(self._run.log))  # batches until now

  def _step(self) -> int:
    """Returns the step whose batch was given last."""
    log = run.read_log(self._run.log)
    return log[-1][0] if log else 0

  def _resumed_at(self) -> int:
    """Waits until the run says where it starts; returns the step."""
    self._wait(
      lambda: RESUMED in self._run.said() or STARTED in self._run.said()
    )
    _, found, rest = self._run.said().partition(RESUMED)
    return int(rest.split()[0].rpartition("/")[2]) if found else 0

  def _wait(self, condition: Callable[[], Any], seconds: float = 300) -> None:
    """Waits for a condition, before which the run must not end."""
    end = time.monotonic() + seconds
    while not condition():
      if not self._run.running() or time.monotonic() > end:
        self._run.send(signal.SIGKILL)
        raise errors.UserError(
          f"{self._workdir.name} ended or hung:\n{self._run.said()}"
        )
      time.sleep(0.002)

  def _checkpoints(self) -> list[pathlib.Path]:
    """Returns the complete checkpoints, the newest last."""
    found = self._workdir.glob("checkpoints/*[0-9]")
    return sorted(found, key=lambda p: int(p.name))

  # ---- The faults ----

  def _disturb(self, kind: str, target: int) -> None:
    """Does one fault at about step `target`; restarts the run if it ended.

    Waits until the run has trained a step since its last start. Faults during
    the start are those of the kind "start".
    """

    def trains() -> bool:
      log = run.read_log(self._run.log)
      return len(log) > self._given and log[-1][0] >= target

    self._wait(trains)
    do = dict(
      kill=self._kill,
      start=self._kill_while_starting,
      save=self._kill_while_saving,
      term=self._term,
      damage=self._damage,
      devices=self._other_devices,
    )
    if kind == "full disk":
      fault = Fault(kind, *self._full_disk(), "-")
    else:
      step, effect = do[kind]()
      self._run.end()
      self._run.close()
      self._start()
      fault = Fault(kind, step, effect, self._resumed_at())
      if kind == "damage" and DAMAGED not in self._run.said():
        raise errors.UserError("the run did not notice the damage")
    self._done.append(fault)
    print("  ".join(map(str, fault)), flush=True)

  def _kill(self) -> tuple[int, str]:
    """SIGKILL, now."""
    self._run.send(signal.SIGKILL)
    self._run.end()
    return self._step(), "killed"

  def _kill_while_starting(self) -> tuple[int, str]:
    """SIGKILL twice: imports, restoring and compiling are interrupted, too."""
    step, _ = self._kill()
    self._run.close()
    self._start()
    seconds = self._rng.uniform(0.5, 6)
    time.sleep(seconds)
    self._kill()
    return step, f"killed, and again {seconds:.1f} s after the next start"

  def _kill_while_saving(self) -> tuple[int, str]:
    """SIGKILL with a half-written checkpoint on disk."""

    def half() -> list[pathlib.Path]:
      return list(self._workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    self._wait(half)
    time.sleep(self._rng.uniform(0, 0.02))
    self._run.send(signal.SIGKILL)
    self._run.end()
    return self._step(), (
      "left half a checkpoint" if half() else "the checkpoint was just complete"
    )

  def _term(self) -> tuple[int, str]:
    """SIGTERM; the run saves and stops."""
    begin = time.monotonic()
    self._run.send(signal.SIGTERM)
    codes = self._run.end()
    _, found, rest = self._run.said().rpartition(STOPPED)
    if set(codes) != {1} or not found:
      raise errors.UserError(
        f"the run did not save after SIGTERM:\n{self._run.said()}"
      )
    seconds = time.monotonic() - begin
    return int(rest.split()[0]), f"saved, and ended after {seconds:.1f} s"

  def _other_devices(self) -> tuple[int, str]:
    """SIGTERM; the next start has other devices."""
    step, effect = self._term()
    before = self._where
    self._where = DEVICES[(DEVICES.index(before) + 1) % len(DEVICES)]
    return step, "{} x {} -> {} x {} devices, {}".format(
      *before, *self._where, effect
    )

  def _damage(self) -> tuple[int, str]:
    """SIGKILL, then a file of the newest checkpoint is damaged."""
    self._wait(lambda: len(self._checkpoints()) > 1)
    self._run.send(signal.SIGKILL)
    self._run.end()
    newest = self._checkpoints()[-1]
    names = json.loads((newest / manifest.NAME).read_text())["sha256_and_size"]
    name = self._rng.choice(sorted(names))
    path, how = newest / name, self._rng.choice(("cut", "altered", "deleted"))
    data = bytearray(path.read_bytes())
    place = self._rng.randrange(len(data))
    if how == "deleted":
      path.unlink()
    elif how == "cut":
      path.write_bytes(data[:place])
    else:
      data[place] ^= 1 << self._rng.randrange(8)
      path.write_bytes(data)
    short = "/".join(part[:12] for part in name.split("/"))
    return self._step(), f"{newest.name}/{short} {how}, set aside"

  def _full_disk(self) -> tuple[int, str]:
    """No space until a save has failed; the run continues."""
    filler = self._workdir.parent / "filler"
    before = self._run.said().count(NOT_SAVED)
    step = self._step()
    with filler.open("wb") as f:
      try:
        while True:
          os.write(f.fileno(), bytes(4096))
      except OSError:
        pass  # the disk is full
    self._wait(lambda: self._run.said().count(NOT_SAVED) > before)
    filler.unlink()
    failed = self._run.said().rpartition(NOT_SAVED)[0].split()[-1]
    return step, f"step {failed} was not saved, the run continued"
