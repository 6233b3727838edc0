"""The results of a study: means and intervals over seeds, and tables."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import fnmatch
import json
import math
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from sigjax.runtime import metrics as metrics_lib
from tools.grid.plan import Job, Study


@dataclasses.dataclass
class Outcome:
  """What the seeds of one run gave.

  Attributes:
    labels: of the run.
    values: {metric of Study.metrics: {seed: value}} of the finished seeds.
    seconds: {seed: time of the training run, evaluation included}.
    errors: {seed: why it failed}.
    missing: the number of seeds that have neither finished nor failed.
    workdirs: {seed: folder} of the finished seeds.
  """

  labels: dict[str, Any]
  values: dict[str, dict[int, float]]
  seconds: dict[int, float]
  errors: dict[int, str]
  missing: int
  workdirs: dict[int, pathlib.Path]


def outcomes(
  study: Study, jobs: Sequence[Job], errors: Mapping[pathlib.Path, str]
) -> list[Outcome]:
  """Reads what is finished of a study.

  Args:
    study: the study.
    jobs: of its runs and seeds.
    errors: {workdir: error} of the jobs that failed.
  """
  found = []
  for run in study.runs:
    out = Outcome(
      dict(run.labels), {m: {} for m in study.metrics}, {}, {}, 0, {}
    )
    for job in jobs:
      if job.labels != run.labels:
        continue
      if job.workdir in errors:
        out.errors[job.seed] = errors[job.workdir]
      elif job.result.exists():
        result = json.loads(job.result.read_text())
        out.seconds[job.seed] = result["seconds"]
        out.workdirs[job.seed] = job.workdir
        for name, key in study.metrics.items():
          if (value := _value(result["metrics"], key)) is not None:
            out.values[name][job.seed] = value
      else:
        out.missing += 1
    found.append(out)
  return found


def _value(values: Mapping[str, float], key: str) -> float | None:
  """Returns the value of the only key that matches; None if there is none."""
  found = fnmatch.filter(values, key.replace("[", "[[]"))
  return values[found[0]] if len(found) == 1 else None


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and half the width of its 95 % confidence interval.

  Student's t with n - 1 degrees of freedom; NaN for a single value.
  """
  n = len(values)
  if not n:
    return math.nan, math.nan
  mean = float(np.mean(values))
  if n == 1:
    return mean, math.nan
  quantile = float(stats.t.ppf(0.975, n - 1))
  return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def differences(study: Study, found: Sequence[Outcome]) -> list[dict[str, Any]]:
  """Compares the two values of `study.versus`, seed by seed.

  Returns:
    For each pair of runs that differ in the label `line` alone and for each
    metric: {the other labels, "metric", "mean", "half": half the width of the
    95 % interval of the mean difference, "n": the number of shared seeds}.
  """
  if not study.versus or not study.line:
    return []
  first, second = study.versus
  rest = lambda out: {k: v for k, v in out.labels.items() if k != study.line}
  rows = []
  for a in found:
    for b in found:
      if (a.labels[study.line], b.labels[study.line]) != (first, second):
        continue
      if rest(a) != rest(b):
        continue
      for metric in study.metrics:
        x, y = a.values[metric], b.values[metric]
        seeds = sorted(x.keys() & y.keys())
        mean, half = interval([x[s] - y[s] for s in seeds])
        rows.append(
          {**rest(a), "metric": metric, "mean": mean, "half": half}
          | {"n": len(seeds)}
        )
  return rows


def number(metric: str, mean: float, half: float, sign: str = "") -> str:
  """Returns "25.0 ± 0.6", in percent if the metric's name ends in "%"."""
  if math.isnan(mean):
    return "-"
  scale, form = (100, ".1f") if metric.endswith("%") else (1, ".3g")
  text = f"{scale * mean:{sign}{form}}"
  return text if math.isnan(half) else f"{text} ± {scale * half:{form}}"


def table(study: Study, found: Sequence[Outcome]) -> list[list[str]]:
  """Returns the rows of the study's table, the header first."""
  labels = list(study.runs[0].labels)
  rows = [[*labels, *study.metrics, "seeds", "seconds"]]
  for out in found:
    cells = [
      number(metric, *interval(list(values.values())))
      for metric, values in out.values.items()
    ]
    seeds = f"{len(out.seconds)}"
    if out.errors:
      seeds += f", {len(out.errors)} failed"
    if out.missing:
      seeds += f", {out.missing} to do"
    mean, _ = interval(list(out.seconds.values()))
    rows.append(
      [str(out.labels.get(label, "")) for label in labels]
      + [*cells, seeds, "-" if math.isnan(mean) else f"{mean:.0f}"]
    )
  return rows


def versus_table(study: Study, found: Sequence[Outcome]) -> list[list[str]]:
  """Returns the rows of the paired differences, the header first; or []."""
  rows = differences(study, found)
  if not rows or not study.versus:
    return []
  labels = [
    key for key in rows[0] if key not in ("metric", "mean", "half", "n")
  ]
  places = list(dict.fromkeys(tuple(row[k] for k in labels) for row in rows))
  lines = [[*labels, *study.metrics]]
  for place in places:
    mine = [row for row in rows if tuple(row[k] for k in labels) == place]
    cells = [number(r["metric"], r["mean"], r["half"], "+") for r in mine]
    lines.append([*map(str, place), *cells])
  return lines


def text(study: Study, found: Sequence[Outcome]) -> str:
  """Returns what is printed: the question, the tables, what failed."""
  lines = [study.question, f"The paper: {study.paper}", ""]
  header, *rows = table(study, found)
  lines += metrics_lib.table(rows, header)
  if compared := versus_table(study, found):
    assert study.versus
    first, second = study.versus
    lines += ["", f"{first} - {second}, seed by seed:"]
    lines += metrics_lib.table(compared[1:], compared[0])
  lines += ["", "mean ± half of the 95 % interval over seeds"]
  for out in found:
    for seed, error in out.errors.items():
      shown = ", ".join(f"{k}={v}" for k, v in out.labels.items())
      lines.append(f"failed: {shown}, seed {seed}: {error}")
  return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Returns a table as Markdown."""
  if not rows:
    return ""
  line = lambda cells: f"| {' | '.join(cells)} |"
  header, *rest = rows
  return "\n".join(
    [line(header), line(["---"] * len(header)), *map(line, rest)]
  )


def write_csv(
  path: pathlib.Path, study: Study, found: Sequence[Outcome]
) -> None:
  """Writes a row for each finished seed of each run."""
  labels = list(study.runs[0].labels)
  with open(path, "w", newline="", encoding="utf-8") as f:
    writer = csv.writer(f)
    writer.writerow([*labels, "seed", *study.metrics, "seconds"])
    for out in found:
      for seed, seconds in out.seconds.items():
        values = [out.values[m].get(seed, "") for m in study.metrics]
        mine = [out.labels.get(label, "") for label in labels]
        writer.writerow([*mine, seed, *values, round(seconds, 1)])
