"""What a run reports: metrics.jsonl, TensorBoard events, the progress bar."""

import json
import logging
import math
import pathlib
import time

import jax
import numpy as np
import tensorboardX
import tqdm

# Peak rate of dense bfloat16 matrix products per device in FLOP/s, from the
# vendors' data sheets, by the names that jax.devices()[0].device_kind gives.
PEAK_FLOPS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
    "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12, "Tesla T4": 65e12,
}


class Writer:
  """Appends scalars to WORKDIR/metrics.jsonl and to TensorBoard events.

  Only process 0 writes. A line that a killed run left half-written is cut off.
  """

  def __init__(self, workdir):
    self._file = self._events = None
    if jax.process_index() == 0:
      workdir = pathlib.Path(workdir)
      path = workdir / "metrics.jsonl"
      if path.exists() and not path.read_bytes().endswith(b"\n"):
        whole = path.read_bytes().rpartition(b"\n")
        path.write_bytes(whole[0] + whole[1])
      self._file = path.open("a")
      self._events = tensorboardX.SummaryWriter(
          str(workdir), write_to_disk=True)

  def write(self, step, scalars):
    """Writes one JSON object {"step": step, **scalars}, scalars all floats."""
    if self._file is None:
      return
    # JSON has no NaN: null keeps the file readable by everything.
    clean = {k: float(v) if math.isfinite(v) else None
             for k, v in scalars.items()}
    self._file.write(json.dumps({"step": int(step), **clean}) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, int(step))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._file is not None:
      self._file.close()
      self._events.close()


class Clock:
  """Speed since the last call, and model FLOP utilisation.

  Args:
    batch_size: B, global.
    flops_per_example: of one training step (forward and backward).
  """

  def __init__(self, batch_size, flops_per_example):
    self._batch_size = batch_size
    self._flops = flops_per_example
    self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    self.start()

  def start(self):
    """Forgets the time since the last call: evaluation is not training."""
    self._time, self._steps = time.monotonic(), 0

  def tick(self):
    """One more step is done."""
    self._steps += 1

  def read(self):
    """Returns the rates since start() or the last read(), and starts anew."""
    seconds = time.monotonic() - self._time
    rate = self._steps * self._batch_size / max(seconds, 1e-9)
    rates = dict(examples_per_second=rate,
                 examples_per_second_per_device=rate / jax.device_count())
    if self._peak is not None:
      rates["mfu_percent"] = (
          100 * rate * self._flops / (self._peak * jax.device_count()))
    self.start()
    return rates


class Progress:
  """The progress bar: step, examples a second, loss, t, b and the time left."""

  def __init__(self, first_step, total_steps):
    self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, smoothing=0.1, mininterval=0.5,
        dynamic_ncols=True, disable=jax.process_index() != 0,
        bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} "
                   "[{elapsed}, {remaining} left{postfix}]")

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, step, metrics, examples_per_second=None, **_):
    """Moves to a step; with a rate, the numbers shown are replaced too."""
    if examples_per_second is not None:
      self._bar.set_postfix_str(
          f"{examples_per_second:.0f} ex/s, loss {metrics['loss']:.3f}, "
          f"t {metrics['t']:.2f}, b {metrics['b']:.2f}", refresh=False)
    self._bar.update(step - self._bar.n)

  def write(self, line):
    """Prints a line above the bar."""
    if jax.process_index() == 0:
      self._bar.write(line)


class _AboveProgress(logging.Handler):
  """Prints log lines without breaking the bar."""

  def emit(self, record):
    tqdm.tqdm.write(self.format(record))


def log_above_progress(logger):
  """Shows a logger's lines, from INFO up, on process 0's standard output."""
  if jax.process_index() == 0 and not logger.handlers:
    logger.addHandler(_AboveProgress())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def table(rows, header):
  """Returns lines of text: columns aligned, the first to the left."""
  rows = [list(map(str, row)) for row in [header, *rows]]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ["  ".join(
      cell.ljust(w) if i == 0 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
  return [lines[0], "-" * len(lines[0]), *lines[1:]]


def finite(metrics):
  """Whether loss and gradient norm are finite numbers."""
  return bool(np.isfinite(metrics["loss"]) and
              np.isfinite(metrics["grad_norm"]))
