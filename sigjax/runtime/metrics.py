"""What a run reports: metrics.jsonl, TensorBoard events, the progress bar."""

import json
import logging
import math
import os
import pathlib
import socket
import struct
import time

import jax
import numpy as np
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2
import tqdm

log = logging.getLogger("sigjax")

# Peak rate of dense bfloat16 matrix products per device in FLOP/s, from the
# vendors' data sheets, by the names that jax.devices()[0].device_kind gives.
PEAK_FLOPS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA L4": 121e12,
  "Tesla T4": 65e12,
}


class Writer:
  """Appends scalars to WORKDIR/metrics.jsonl and to TensorBoard events.

  Only process 0 writes. A line that a killed run left half-written is cut off.
  What a full disk does not take is kept, and written when there is room.

  Args:
    workdir: the run's directory.
    first_step: the run goes on from this step: metrics of later ones, of a run
      that was killed after its last checkpoint, are cut off. None cuts nothing.
  """

  def __init__(self, workdir, first_step=None):
    self._file = self._events = None
    if jax.process_index() == 0:
      workdir = pathlib.Path(workdir)
      path = workdir / "metrics.jsonl"
      if path.exists():
        _cut(path, first_step)
      self._file = _Appended(path)
      self._events = _Appended(
        workdir
        / (f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}")
      )
      self._event(file_version="brain.Event:2")
      if first_step is not None:  # TensorBoard forgets what came after it
        self._event(
          step=first_step + 1,
          session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
        )

  def write(self, step, scalars):
    """Writes one JSON object {"step": step, **scalars}, scalars all floats."""
    if self._file is None:
      return
    # JSON has no NaN: null keeps the file readable by everything.
    clean = {
      k: float(v) if math.isfinite(v) else None for k, v in scalars.items()
    }
    self._file.write((json.dumps({"step": int(step), **clean}) + "\n").encode())
    self._event(
      step=int(step),
      summary=summary_pb2.Summary(
        value=[
          summary_pb2.Summary.Value(tag=name, simple_value=value)
          for name, value in scalars.items()
        ]
      ),
    )

  def _event(self, **fields):
    """Appends an event as a TFRecord: lengths and checksums around it."""
    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    self._events.write(
      b"".join(
        part + struct.pack("<I", record_writer.masked_crc32c(part))
        for part in (length, data)
      )
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._file is not None:
      self._file.close()
      self._events.close()


class _Appended:
  """A file to append to; what a full disk does not take waits for room."""

  def __init__(self, path):
    self._file = path.open("ab", buffering=0)
    self._waiting = b""

  def write(self, data):
    full = bool(self._waiting)
    self._waiting += data
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
    except OSError as e:
      if not full:
        log.warning(
          "%s cannot be written, the run goes on: %s",
          self._file.name,
          e.strerror,
        )

  def close(self):
    self.write(b"")
    self._file.close()


def _cut(path, last_step):
  """Leaves the whole lines of metrics.jsonl, those up to a step if given."""
  lines = path.read_bytes().splitlines(keepends=True)
  if lines and not lines[-1].endswith(b"\n"):
    # In place: a run that is only evaluated may not replace another's file.
    os.truncate(path, sum(map(len, lines)) - len(lines.pop()))
  kept = [
    line
    for line in lines
    if last_step is None or json.loads(line)["step"] <= last_step
  ]
  if kept != lines:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(b"".join(kept))
    aside.replace(path)


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
    self._waited = 0.0
    self.start()

  def start(self):
    """Forgets the time since the last call: evaluation is not training."""
    self._time, self._steps = time.monotonic(), 0

  def tick(self):
    """One more step is done."""
    self._steps += 1

  def read(self, waited=0.0):
    """Returns the rates since start() or the last read(), and starts anew.

    Args:
      waited: seconds that the program has waited for data since it began.
    """
    seconds = time.monotonic() - self._time
    rate = self._steps * self._batch_size / max(seconds, 1e-9)
    rates = dict(
      examples_per_second=rate,
      examples_per_second_per_device=rate / jax.device_count(),
      data_wait_percent=100 * (waited - self._waited) / max(seconds, 1e-9),
    )
    self._waited = waited
    if self._peak is not None:
      rates["mfu_percent"] = (
        100 * rate * self._flops / (self._peak * jax.device_count())
      )
    self.start()
    return rates


class Progress:
  """The progress bar: step, examples a second, loss, t, b and the time left."""

  def __init__(self, first_step, total_steps):
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      smoothing=0.1,
      mininterval=0.5,
      dynamic_ncols=True,
      disable=jax.process_index() != 0,
      bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} "
      "[{elapsed}, {remaining} left{postfix}]",
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, step, metrics, examples_per_second=None, **_):
    """Moves to a step; with a rate, the numbers shown are replaced too."""
    if examples_per_second is not None:
      self._bar.set_postfix_str(
        f"{examples_per_second:.0f} ex/s, loss {metrics['loss']:.3f}, "
        f"t {metrics['t']:.2f}, b {metrics['b']:.2f}",
        refresh=False,
      )
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
  lines = [
    "  ".join(
      cell.ljust(w) if i == 0 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths))
    )
    for row in rows
  ]
  return [lines[0], "-" * len(lines[0]), *lines[1:]]


def finite(metrics):
  """Whether loss and gradient norm are finite numbers."""
  return bool(
    np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
  )
