"""The small run that tools.chaos disturbs: its data, config and process.

  python -m tools.chaos.run LOG PAUSE [flags of sigjax.train]

is sigjax.train, except that it logs which examples each step is given. It also
sleeps PAUSE seconds in each step, so that faults can hit the middle of a step.
The number of an example is in the first pixel of its image.
"""

from collections.abc import Sequence
import contextlib
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

EXAMPLES, BATCH = 48, 16
ROOT = pathlib.Path(__file__).parents[2]  # of the repository


class Numbered(tfds.core.GeneratorBasedBuilder):
  """EXAMPLES patches of noise; example i has i in its first pixel."""

  VERSION = tfds.core.Version("1.0.0")
  # Otherwise TFDS searches for it with a package that may not be installed.
  code_path = epath.Path(__file__)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(16, 16, 3), encoding_format="png"
          ),
          "captions": tfds.features.Sequence(tfds.features.Text()),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    rng = np.random.default_rng(0)
    words = [
      "red",
      "green",
      "blue",
      "small",
      "large",
      "round",
      "square",
      "noisy",
      "plain",
      "old",
    ]
    for i in range(EXAMPLES):
      pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
      pixels[0, 0] = i
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, "PNG")
      yield (
        i,
        dict(
          image=png.getvalue(),
          captions=[" ".join(rng.choice(words, 3)) for _ in range(2)],
        ),
      )


def write_config(folder: pathlib.Path, total_steps: int) -> pathlib.Path:
  """Writes the dataset and a config file to a folder; returns the file."""
  tfds.disable_progress_bar()
  Numbered(data_dir=folder, file_format="array_record").download_and_prepare()
  tower = dict(width=32, depth=1, num_heads=2, mlp_dim=64)
  config = dict(
    batch_size=BATCH,
    total_steps=total_steps,
    log_every_steps=1,
    data=dict(
      kind="tfds", name="numbered", split="train", data_dir=str(folder)
    ),
    tokenizer=dict(vocab_size=28),
    pp="decode|value_range(-1,1)|choice('captions')|lower|tokenize(8)"
    "|keep('image','text')",
    pp_image="decode|value_range(-1,1)|keep('image')",
    pp_text="lower|tokenize(8)|keep('text')",
    model=dict(
      image=dict(tower, patch_size=8),
      text=dict(tower, vocab_size=28, dropout=0.1),
      out_dim=(None, 32),
    ),
    # With a small eps, Adam would blow up gradients that consist of rounding
    # errors, and other numbers of devices would end with other parameters.
    optim=dict(
      lr=1e-3,
      wd=1e-4,
      grad_clip_norm=1.0,
      options=dict(eps=1e-3),
      schedule=dict(warmup_percent=10),
    ),
    checkpoints=dict(every_steps=7),
    evals={},
  )
  path = folder / "config.py"
  path.write_text(
    "from ml_collections import ConfigDict\n\n\n"
    "def get_config(arg=None):\n"
    f"  return ConfigDict({config!r})\n"
  )
  return path


class Run:
  """The processes of one start of the program.

  Args:
    config: the config file; logs are kept beside it.
    workdir: the workdir.
    processes: how many.
    devices: how many each process has.
    pause: seconds added to each step.

  Attributes:
    log: the file with the examples that each step was given, of all starts.
  """

  log: pathlib.Path

  def __init__(
    self,
    config: pathlib.Path,
    workdir: pathlib.Path,
    processes: int,
    devices: int,
    pause: float,
  ):
    folder = config.parent
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    env = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
      ),
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
      + f" --xla_force_host_platform_device_count={devices}",
    }
    self._output = open(folder / f"{workdir.name}.txt", "a+")  # noqa: SIM115
    self._output.seek(0, os.SEEK_END)
    self._start = self._output.tell()
    self.log = folder / f"{workdir.name}.jsonl"
    self._processes = []
    for i in range(processes):
      flags = (
        []
        if processes == 1
        else [
          f"--coordinator=localhost:{port}",
          f"--num_processes={processes}",
          f"--process_id={i}",
        ]
      )
      self._processes.append(
        subprocess.Popen(
          [
            sys.executable,
            "-m",
            "tools.chaos.run",
            str(self.log),
            str(pause),
            "--config",
            str(config),
            "--workdir",
            str(workdir),
            *flags,
          ],
          env=env,
          cwd=folder,
          stdout=self._output,
          stderr=self._output,
        )
      )

  def running(self) -> bool:
    """Returns whether no process has ended."""
    return all(p.poll() is None for p in self._processes)

  def send(self, number: int) -> None:
    """Sends a signal to all processes that have not ended."""
    for p in self._processes:
      if p.poll() is None:
        p.send_signal(number)

  def end(self, seconds: float = 300) -> list[int]:
    """Waits for the end and returns the exit codes; kills what hangs."""
    try:
      return [p.wait(timeout=seconds) for p in self._processes]
    except subprocess.TimeoutExpired:
      self.send(signal.SIGKILL)
      raise

  def close(self) -> None:
    """Closes the file with the output."""
    self._output.close()

  def said(self) -> str:
    """Returns what the processes have printed since this start."""
    with open(self._output.name) as f:
      f.seek(self._start)
      return f.read()


def read_log(path: pathlib.Path) -> list[tuple[int, int, list[int]]]:
  """Returns (step, first row, numbers of the examples) of each batch in a log.

  Each process logs its own rows of a batch. Lines that a kill cut short are
  left out.
  """
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      found.append(tuple(json.loads(line)))
  return found


class _Logged:
  """TrainBatches that log which examples they give."""

  def __init__(self, batches: Any, path: str, pause: float, process: int):
    self._batches, self._pause, self._process = batches, pause, process
    self._file = open(path, "ab", buffering=0)  # noqa: SIM115

  def __next__(self):
    batch = next(self._batches)
    time.sleep(self._pause)
    numbers = np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
    # The newline comes first: a kill may have cut the line before.
    self._file.write(
      b"\n"
      + json.dumps(
        [
          self.get_state()["step"],
          self._process * len(numbers),
          numbers.tolist(),
        ]
      ).encode()
    )
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


def main(argv: Sequence[str]) -> None:
  """Runs sigjax.train, with logged batches."""
  import jax

  from sigjax import train
  from sigjax.data.batches import pipeline
  from sigjax.runtime import program

  _, path, pause, *flags = argv
  plain = pipeline.train_batches
  pipeline.train_batches = lambda *args, **kwargs: _Logged(
    plain(*args, **kwargs), path, float(pause), jax.process_index()
  )
  sys.argv = [argv[0], *flags]
  train.define_flags()
  program.run(train.command_line, program.config_given)


if __name__ == "__main__":
  main(sys.argv)
