"""The small run of tools.chaos: its data, its config, and its process.

  python -m tools.chaos.run LOG PAUSE [flags of sigjax.train]

is sigjax.train, but writes to a file which examples each step was given, and
takes PAUSE seconds more for each step, that faults may hit it in the middle.
Each image's first pixel has its example's number.
"""

import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

EXAMPLES, BATCH = 48, 16
ROOT = pathlib.Path(__file__).parent.parent


class Numbered(tfds.core.GeneratorBasedBuilder):
  """EXAMPLES patches of noise; example i has i in its first pixel."""

  VERSION = tfds.core.Version("1.0.0")
  # Else TFDS looks for it with a package that it does not depend on.
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


def write_config(folder, total_steps, save_every=7):
  """Prepares the dataset and a config file in a folder; returns the file."""
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
    # A large eps: else Adam makes gradients of nothing but rounding as large
    # as others, and other numbers of devices end elsewhere.
    optim=dict(
      lr=1e-3,
      wd=1e-4,
      grad_clip_norm=1.0,
      options=dict(eps=1e-3),
      schedule=dict(warmup_percent=10),
    ),
    checkpoints=dict(every_steps=save_every),
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
  """The program on a workdir, in one or more processes of some devices."""

  def __init__(self, config, workdir, processes, devices, pause):
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
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    self.output = open(folder / f"{workdir.name}.txt", "a+")
    self.output.seek(0, os.SEEK_END)
    self._start = self.output.tell()
    self.log = folder / f"{workdir.name}.jsonl"
    self.processes = []
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
      self.processes.append(
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
          stdout=self.output,
          stderr=self.output,
        )
      )

  def running(self):
    """Whether no process has ended."""
    return all(p.poll() is None for p in self.processes)

  def send(self, number):
    """Sends a signal to all processes that are there."""
    for p in self.processes:
      if p.poll() is None:
        p.send_signal(number)

  def end(self, seconds=300):
    """Waits for the end; returns the exit codes, and kills what hangs."""
    try:
      return [p.wait(timeout=seconds) for p in self.processes]
    except subprocess.TimeoutExpired:
      self.send(signal.SIGKILL)
      raise
    finally:
      self.output.flush()

  def said(self):
    """Returns what the processes have printed so far."""
    with open(self.output.name) as f:
      f.seek(self._start)
      return f.read()


def read_log(path):
  """Returns [(step, first row, numbers of the examples)] in the order given.

  Args:
    path: a log, to which each of several processes adds its own rows of the
      batch. A line may be cut by a kill.
  """
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(tuple(json.loads(line)))
    except ValueError:
      pass
  return found


class _Logged:
  """TrainBatches that write down what they give."""

  def __init__(self, batches, path, pause, process):
    self._batches, self._pause, self._process = batches, pause, process
    self._file = open(path, "ab", buffering=0)

  def __next__(self):
    batch = next(self._batches)
    time.sleep(self._pause)
    numbers = np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
    # A newline first: the line before may have been cut by a kill.
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


def _main():
  from absl import app  # pylint: disable=g-import-not-at-top
  import jax

  from sigjax import train
  from sigjax.data.batches import pipeline
  from sigjax.runtime import program

  path, pause = sys.argv[1], float(sys.argv[2])
  plain = pipeline.train_batches
  pipeline.train_batches = lambda *args, **kwargs: _Logged(
    plain(*args, **kwargs), path, pause, jax.process_index()
  )
  app.run(
    train.run,
    argv=[sys.argv[0], *sys.argv[3:]],
    flags_parser=lambda argv: program.parse_flags(argv, program.config_given),
  )


if __name__ == "__main__":
  _main()
