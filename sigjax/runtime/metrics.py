"""What a run reports: metrics.jsonl, TensorBoard events, speed, tables."""

from collections.abc import Mapping, Sequence
import json
import logging
import math
import os
import socket
import time
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import record_writer

from sigjax.runtime import files, hosts

log = logging.getLogger("sigjax")

# The classes in these modules are made at run time: no type checker sees them.
_event_pb2: Any = event_pb2
_summary_pb2: Any = summary_pb2

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

  What config.log names gets them, too. Only the primary process writes. What a
  full disk does not take is kept, and written when there is room. A last line
  that a killed run left half-written is cut off.

  Args:
    workdir: the run's directory. In a bucket, what is appended is put every
      few seconds, and by flush().
    first_step: the run resumes from this step. Metrics of later steps are cut
      off: a run wrote them that was killed after its last checkpoint. Lines
      that are not metrics are cut off as well. None keeps everything, and a
      workdir that cannot be written gets nothing: for evaluation alone.
    to: config.log, see trackers.py; with first_step alone.
    config: of the run, for those that `to` names.

  Raises:
    UserError: one of those does not start.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    first_step: int | None = None,
    to: str = "",
    config: Mapping[str, Any] | None = None,
  ):
    self._file = self._events = None
    self._appended = []
    self._trackers = []
    if not hosts.is_primary():
      return
    workdir = files.path(workdir)
    if to and first_step is not None:
      from sigjax.runtime import trackers  # few runs have any

      self._trackers = [
        trackers.Tracker(name, project, workdir, first_step, config or {})
        for name, project in trackers.parse(to).items()
      ]
    path = workdir / "metrics.jsonl"
    host = socket.gethostname()
    try:
      if path.exists():
        _cut(path, first_step)
      self._file = self._append(path)
      self._events = record_writer.RecordWriter(
        self._append(workdir / f"events.out.tfevents.{time.time_ns()}.{host}")
      )
    except OSError as e:
      if first_step is not None:
        raise
      log.warning(
        "%s cannot be written (%s): the results are only printed",
        path,
        e.strerror,
      )
      return
    self._write_event(file_version="brain.Event:2")
    if first_step is not None:  # TensorBoard forgets what came after it
      start = _event_pb2.SessionLog(status=_event_pb2.SessionLog.START)
      self._write_event(step=first_step + 1, session_log=start)

  def _append(self, path: files.Path) -> Any:
    """Opens a file to append to."""
    if files.in_bucket(path):
      from sigjax.runtime import bucket  # most runs are on a disk

      self._appended.append(bucket.Appended(path))
    else:
      self._appended.append(_AppendedFile(path))
    return self._appended[-1]

  def flush(self) -> None:
    """Puts into a bucket what was written, before a checkpoint of this step."""
    for file in self._appended:
      file.flush()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one JSON object {"step": step, **scalars}; NaN becomes null."""
    if self._file is None:
      return
    clean = {
      k: float(v) if math.isfinite(v) else None for k, v in scalars.items()
    }
    self._file.write((json.dumps({"step": int(step), **clean}) + "\n").encode())
    for tracker in self._trackers:
      tracker.write(int(step), scalars)
    self._write_event(
      step=int(step),
      summary=_summary_pb2.Summary(
        value=[
          _summary_pb2.Summary.Value(tag=name, simple_value=value)
          for name, value in scalars.items()
        ]
      ),
    )

  def write_image(self, step: int, name: str, png: bytes) -> None:
    """Adds a PNG to the TensorBoard events."""
    for tracker in self._trackers:
      tracker.write_image(int(step), name, png)
    image = _summary_pb2.Summary.Image(encoded_image_string=png, colorspace=3)
    value = _summary_pb2.Summary.Value(tag=name, image=image)
    self._write_event(
      step=int(step), summary=_summary_pb2.Summary(value=[value])
    )

  def _write_event(self, **fields) -> None:
    """Appends an event as a TFRecord."""
    if self._events is None:
      return
    data = _event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    self._events.write(data)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    for file in self._appended:
      file.close()
    for tracker in self._trackers:
      tracker.close(ok=error is None)


class _AppendedFile:
  """A file to append to; what a full disk does not take waits for room."""

  def __init__(self, path: files.Path):
    self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # see close()
    self._waiting = b""

  def write(self, data: bytes) -> None:
    full = bool(self._waiting)
    self._waiting += data
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
    except OSError as e:
      if not full:
        log.warning(
          "%s cannot be written, the run continues: %s",
          self._file.name,
          e.strerror,
        )

  def flush(self) -> None:
    """Tries again what did not find room."""
    self.write(b"")

  def close(self) -> None:
    self.flush()
    self._file.close()


def _cut(path: files.Path, last_step: int | None) -> None:
  """Leaves the whole lines of metrics.jsonl, up to last_step if given."""
  lines = path.read_bytes().splitlines(keepends=True)
  whole = files.in_bucket(path) or not lines or lines[-1].endswith(b"\n")
  if not whole:
    # In place: a run that only evaluates may not replace another run's file.
    os.truncate(path, sum(map(len, lines)) - len(lines.pop()))
  if last_step is None:
    return
  steps = [_step_of(line) for line in lines]
  if unreadable := steps.count(None):
    log.warning(
      "%s: %d lines are not metrics; they are removed", path, unreadable
    )
  kept = [
    line
    for line, step in zip(lines, steps)
    if step is not None and step <= last_step
  ]
  if kept != lines:
    files.write(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
  """Returns the step of a line of metrics.jsonl; None of anything else."""
  try:
    return int(json.loads(line)["step"])
  except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
    return None


class Clock:
  """Measures speed since the last call, and model FLOP utilisation.

  Args:
    batch_size: B, over all devices.
    flops_per_example: FLOP of one training step, forward and backward, per
      example.
  """

  def __init__(self, batch_size: int, flops_per_example: float):
    self._batch_size = batch_size
    self._flops = flops_per_example
    self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    self.start(0.0)

  def start(self, waited: float) -> None:
    """Starts anew, so that what was before does not count; see read."""
    self._time, self._steps, self._waited = time.monotonic(), 0, waited

  def change(self, flops_per_example: float, waited: float) -> None:
    """Starts anew, with steps of another kind."""
    self._flops = flops_per_example
    self.start(waited)

  def tick(self) -> None:
    """Counts one more step."""
    self._steps += 1

  def read(self, waited: float = 0.0) -> dict[str, float]:
    """Returns the rates since start() or the last read(), and starts anew.

    Args:
      waited: seconds that the program has waited for data since it began.

    Returns:
      examples_per_second, examples_per_second_per_device, data_wait_percent,
      and mfu_percent if the device's peak is in PEAK_FLOPS.
    """
    seconds = time.monotonic() - self._time
    rate = self._steps * self._batch_size / max(seconds, 1e-9)
    rates = dict(
      examples_per_second=rate,
      examples_per_second_per_device=rate / jax.device_count(),
      data_wait_percent=100 * (waited - self._waited) / max(seconds, 1e-9),
    )
    if self._peak is not None:
      rates["mfu_percent"] = (
        100 * rate * self._flops / (self._peak * jax.device_count())
      )
    self.start(waited)
    return rates


def read(workdir: files.Path) -> list[dict[str, Any]]:
  """Returns the objects of a workdir's metrics.jsonl, in order."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def table(rows: Sequence[Sequence], header: Sequence) -> list[str]:
  """Returns lines of text with aligned columns, the first one to the left."""
  cells = [list(map(str, row)) for row in [header, *rows]]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = [
    "  ".join(
      cell.ljust(w) if i == 0 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths))
    )
    for row in cells
  ]
  return [lines[0], "-" * len(lines[0]), *lines[1:]]


def finite(metrics: Mapping[str, float]) -> bool:
  """Returns whether loss and gradient norm are finite numbers."""
  return bool(
    np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
  )
