"""How long a compiled step takes, and where the time goes."""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

from sigjax import errors
from tools.aot import compiler, hlo, kernels, parts
from tools.aot.chips import Chip


class Estimate(NamedTuple):
  """What the programs of a step take.

  Attributes:
    programs: (program, how often it runs) of each.
    collectives: those of all, `times` in a step.
    kernels: (cost, how often it runs in a step) of each Pallas kernel.
    uncounted: loops of unknown length, which count once.
    saved: what --out writes: "title", "ms" {what: {tower: ms}}, "computing" in
      ms, "seconds" of a step, "rate" in examples per second and chip.
  """

  programs: list[tuple[hlo.Program, int]]
  collectives: list[hlo.Collective]
  kernels: list[tuple[kernels.Cost, int]]
  uncounted: int
  saved: dict[str, Any]


def of(
  title: str, compiled: Sequence[compiler.Compiled], chip: Chip, examples: float
) -> Estimate:
  """Returns the estimate of a step.

  Args:
    title: what it is.
    compiled: its programs.
    chip: where it runs.
    examples: those of a step on one chip.
  """
  costs: list[tuple[kernels.Cost, int]] = []
  programs, uncounted = [], 0
  for x in compiled:
    scheduled = _Scheduled(x.schedules, chip)
    program = hlo.Program(x.text, scheduled.cycles, x.torus)
    scheduled.share(op for op, _ in program.kernels())
    programs.append((program, x.times))
    costs += [
      (scheduled.kernel(op), n * x.times) for op, n in program.kernels()
    ]
    uncounted += program.uncounted
  collectives = [
    c._replace(times=c.times * times)
    for program, times in programs
    for c in program.collectives()
  ]
  ms = {
    row: {column: 1e3 * n / chip.clock for column, n in columns.items()}
    for row, columns in parts.by_place(programs).items()
  }
  computing = sum(sum(row.values()) for row in ms.values())
  waits = 1e3 * exposed(collectives, chip)
  ms["links not hidden"] = {"neither": waits}
  seconds = (computing + waits) / 1e3
  saved = dict(
    title=title,
    ms=ms,
    computing=computing,
    seconds=seconds,
    rate=examples / seconds,
  )
  uncounted += sum(cost.unknown for cost, _ in costs)
  return Estimate(programs, collectives, costs, uncounted, saved)


class _Scheduled:
  """Cycles of the ops of a program that the compiler has no estimate for."""

  def __init__(self, schedules: Mapping[str, str], chip: Chip):
    self._schedules, self._chip = schedules, chip
    self._costs: dict[str, kernels.Cost] = {}
    self._twins: dict[str, str] = {}

  def share(self, ops: Iterable[hlo.Op]) -> None:
    """Of equal kernels the compiler schedules one; the others take its."""
    for op in ops:
      if op.name in self._schedules:
        self._twins[kernels.code(op.rest)] = op.name

  def kernel(self, op: hlo.Op) -> kernels.Cost:
    if op.name not in self._costs:
      schedule = self._schedules[self._twins[kernels.code(op.rest)]]
      self._costs[op.name] = kernels.cost(op.rest, schedule, self._chip)
    return self._costs[op.name]

  def cycles(self, op: hlo.Op) -> int:
    if hlo.is_kernel(op):
      return self.kernel(op).cycles
    schedule = self._schedules.get(op.name)
    return kernels.bundles(schedule)[0] if schedule else 0


def exposed(collectives: Sequence[hlo.Collective], chip: Chip) -> float:
  """Returns the seconds in which a chip only waits for its links."""
  return sum(
    c.times * max(c.over_link / chip.link - (c.hidden or 0) / chip.clock, 0)
    for c in collectives
  )


def load(file: str) -> dict[str, Any]:
  """Returns the `saved` of an Estimate from a file that --out wrote.

  Raises:
    UserError: there is no such file, or it is another.
  """
  try:
    found = json.loads(pathlib.Path(file).read_text())
    return {key: found[key] for key in ("title", "ms", "computing", "rate")}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"--against {file}: cannot be read; give a file that --out wrote"
    ) from e
