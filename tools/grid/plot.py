"""Draws a study: its metrics over a label, and curves over the steps."""

from collections.abc import Sequence
import math
import pathlib
from typing import Any

import numpy as np

from sigjax.runtime import metrics
from tools.grid import results
from tools.grid.plan import Study


def draw(
  path: pathlib.Path, study: Study, found: Sequence[results.Outcome]
) -> None:
  """Writes a PNG: a panel for each metric, and one for each curve."""
  from matplotlib import figure

  panels = len(study.metrics) + len(study.curves)
  columns = min(panels, 4)
  rows = math.ceil(panels / columns)
  fig = figure.Figure(
    figsize=(4.2 * columns + 1.2, 3.6 * rows + 0.6), layout="constrained"
  )
  fig.suptitle(study.question, fontsize=11)
  axes = list(np.ravel(fig.subplots(rows, columns, squeeze=False)))
  for ax in axes[panels:]:
    ax.remove()
  for ax, metric in zip(axes, study.metrics):
    _draw_metric(ax, study, metric, found)
  for ax, key in zip(axes[len(study.metrics) :], study.curves):
    _draw_curves(ax, study, key, found)
  if study.line or study.curves:
    handles = {}
    for ax in axes[:panels]:
      for handle, label in zip(*ax.get_legend_handles_labels()):
        handles.setdefault(label, handle)
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=5)
  fig.savefig(path, dpi=110)


def _lines(study: Study, found: Sequence[results.Outcome]) -> dict[Any, list]:
  """Groups outcomes by the label that tells the lines apart."""
  lines: dict[Any, list[results.Outcome]] = {}
  for out in found:
    lines.setdefault(out.labels.get(study.line or "", ""), []).append(out)
  return lines


def _draw_metric(
  ax: Any, study: Study, metric: str, found: Sequence[results.Outcome]
) -> None:
  """Draws means with 95 % intervals, and each seed as a faint dot."""
  scale = 100 if metric.endswith("%") else 1
  places = list(dict.fromkeys(out.labels[study.x] for out in found))
  # Numbers of several orders of magnitude; others are put side by side.
  log = all(
    isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0
    for x in places
  )
  log = log and max(places) >= 4 * min(places)
  position = {x: x if log else i for i, x in enumerate(places)}
  for i, (line, outs) in enumerate(_lines(study, found).items()):
    color = f"C{i}"
    outs = [out for out in outs if out.values[metric]]
    if log:
      outs = sorted(outs, key=lambda out: out.labels[study.x])
    stats = [
      results.interval(list(out.values[metric].values())) for out in outs
    ]
    xs = [position[out.labels[study.x]] for out in outs]
    xs = [x * 1.03**i if log else x + 0.08 * i for x in xs]  # no bar hidden
    ax.errorbar(
      xs,
      [scale * mean for mean, _ in stats],
      [0 if math.isnan(half) else scale * half for _, half in stats],
      label=str(line) or None,
      color=color,
      marker="os^vD*"[i % 6],
      linestyle="-" if log else "none",
      capsize=3,
    )
    for x, out in zip(xs, outs):
      values = [scale * v for v in out.values[metric].values()]
      ax.plot([x] * len(values), values, ".", color=color, alpha=0.35)
  if log:
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ax.set_xticks(sorted(places), [f"{x:,}" for x in sorted(places)])
  else:
    ax.set_xticks(range(len(places)), [str(x) for x in places])
  ax.tick_params(axis="x", rotation=30 if len(places) > 4 else 0, labelsize=8)
  ax.set_xlabel(study.x.replace("_", " "))
  ax.set_ylabel(metric)
  ax.grid(alpha=0.3)


def _draw_curves(
  ax: Any, study: Study, key: str, found: Sequence[results.Outcome]
) -> None:
  """Draws a metric over the steps, one line for each run: its first seed."""
  for i, out in enumerate(found):
    if not out.workdirs:
      continue
    steps, values = read_curve(out.workdirs[min(out.workdirs)], key)
    keep = [j for j, s in enumerate(steps) if s <= (study.curve_steps or s)]
    ax.plot(
      [steps[j] for j in keep],
      [values[j] for j in keep],
      label=", ".join(str(v) for v in out.labels.values()),
      color=f"C{i % 10}",
      linestyle=("-", "--", ":")[i // 10 % 3],
      linewidth=1,
    )
  ax.set_yscale("log")
  ax.set_xlabel("step")
  ax.set_ylabel(key.replace("_", " "))
  ax.grid(alpha=0.3)


def read_curve(
  workdir: pathlib.Path, key: str
) -> tuple[list[int], list[float]]:
  """Returns the steps and values of a metric in a workdir's metrics.jsonl."""
  rows = metrics.read(workdir)
  found = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
  return [step for step, _ in found], [value for _, value in found]
