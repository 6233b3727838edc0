"""Shows what tools.benchmark has measured: a table, a CSV file, a plot."""

from collections.abc import Mapping, Sequence
import csv
import importlib.util
import os
import pathlib
from typing import Any

from sigjax import errors
from sigjax.runtime import metrics
from tools.bench.timing import Row

# The table of each mode: (key of a row, header, format).
TIME = (("ms", "ms", ",.2f"), ("ms_q1", "q1", ",.2f"), ("ms_q3", "q3", ",.2f"))
COLUMNS = {
  "loss": (
    ("variant", "variant", ""),
    ("tile", "tile", ""),
    ("batch_size", "B", ","),
    *TIME,
    ("vs_naive", "/ naive", ".2f"),
    ("vs_remat", "/ remat", ".2f"),
    ("temp_mib", "temp MiB", ",.1f"),
  ),
  "step": (
    ("loss", "loss", ""),
    ("microbatches", "microbatches", ""),
    ("batch_size", "B", ","),
    *TIME,
    ("examples_per_second", "examples/s", ",.1f"),
    ("mfu_percent", "MFU %", ".1f"),
    ("temp_mib", "temp MiB", ",.1f"),
  ),
  "data": (
    ("stage", "stage", ""),
    ("us", "us/example", ",.1f"),
    ("us_q1", "q1", ",.1f"),
    ("us_q3", "q3", ",.1f"),
    ("share_percent", "%", ".1f"),
    ("examples_per_second", "examples/s", ",.0f"),
    ("per_core", "per core", ",.0f"),
    ("vs_sigjax", "/ sigjax", ".2f"),
  ),
  "peers": (
    ("code", "code", ""),
    *TIME,
    ("ours", "sigjax /", ".2f"),
    ("wall_ms", "wall ms", ",.0f"),
    ("ours_wall", "sigjax / wall", ".2f"),
    ("first_loss", "first loss", ".5f"),
    ("last_loss", "last loss", ".5f"),
  ),
}
# The plot of each mode: (key, format) of the names, (key, label) of the panels.
MEMORY = ("temp_mib", "temporary memory per device (MiB)")
PANELS = {
  "loss": (
    (("variant", "{}"), ("tile", "{}")),
    (("ms", "value and gradients (ms)"), MEMORY),
  ),
  "step": (
    (("loss", "{}"), ("microbatches", "/ {} microbatch(es)")),
    (("ms", "train step (ms)"), MEMORY),
  ),
  "data": ((("stage", "{}"),), (("us", "time per example (µs)"),)),
  "peers": ((("code", "{}"),), (("ms", "processor time of a step (ms)"),)),
}


def table(mode: str, rows: Sequence[Row]) -> list[str]:
  """Returns the lines of a table of the rows."""

  def cell(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
      return "no memory" if key in ("ms", "us") else "-"
    return format(value, form)

  columns = COLUMNS[mode]
  return metrics.table(
    [[cell(row, key, form) for key, _, form in columns] for row in rows],
    [header for _, header, _ in columns],
  )


def write(
  folder: pathlib.Path, mode: str, rows: Sequence[Row], machine: Row, plot: bool
) -> None:
  """Writes MODE.csv and, if asked to, MODE.png into a folder."""
  rows = [{**machine, **row} for row in rows]
  keys = list(dict.fromkeys(key for row in rows for key in row))
  with open(folder / f"{mode}.csv", "w", newline="", encoding="utf-8") as f:
    writer = csv.DictWriter(f, keys)
    writer.writeheader()
    writer.writerows(rows)
  if plot:
    draw(folder / f"{mode}.png", mode, rows)


def check_out(out: str | os.PathLike[str] | None, plot: bool) -> None:
  """Makes the output folder, and checks early that a plot can be drawn.

  Raises:
    UserError: there is no folder for the plot, it cannot be made, or matplotlib
      is not installed.
  """
  if out:
    try:
      os.makedirs(out, exist_ok=True)
    except OSError as e:
      raise errors.UserError(f"--out {out}: {e.strerror}") from e
  if not plot:
    return
  if not out:
    raise errors.UserError("--plot needs a folder to draw into: give --out DIR")
  check_matplotlib("--plot")


def check_matplotlib(what: str) -> None:
  """Raises UserError, with `what` needs it, unless matplotlib is installed."""
  if importlib.util.find_spec("matplotlib") is None:
    raise errors.UserError(
      f"{what} needs matplotlib: pip install 'sigjax[bench]'"
    )


def draw(path: pathlib.Path, mode: str, rows: Sequence[Row]) -> None:
  """Draws lines if there are several batch sizes, otherwise bars."""
  from matplotlib import figure

  names, panels = PANELS[mode]
  series: dict[str, list[Row]] = {}
  for row in rows:
    name = " ".join(
      form.format(row[key]) for key, form in names if row[key] is not None
    )
    series.setdefault(name, []).append(row)
  lines = max(map(len, series.values())) > 1
  fig = figure.Figure(
    figsize=(5.5 * len(panels) + 1, 5 if lines else 1.5 + 0.3 * len(rows)),
    layout="constrained",
  )
  some = rows[0]
  known = [
    f"{label} = {some[key]:,}"
    for label, key in (("B", "batch_size"), ("E", "width"))
    if key in some and not (lines and key == "batch_size")
  ]
  fig.suptitle(
    ", ".join(
      [
        f"{some['devices']} x {some['device_kind']}",
        f"{some['cores']} cores",
        f"jax {some['jax']}",
        *known,
        some.get("dtype", ""),
      ]
    ).rstrip(", "),
    fontsize=11,
  )
  plots = fig.subplots(1, len(panels), squeeze=False, sharey=not lines)[0]
  for ax, (key, label) in zip(plots, panels):
    (draw_lines if lines else draw_bars)(ax, key, label, series)
  if lines:
    fig.legend(*plots[0].get_legend_handles_labels(), loc="outside right upper")
  else:
    plots[0].invert_yaxis()  # the first row on top; the panels share the axis
  fig.savefig(path, dpi=120)


def draw_lines(
  ax: Any, key: str, label: str, series: Mapping[str, Sequence[Row]]
) -> None:
  """Draws one line per name, over the batch size."""
  for i, (name, found) in enumerate(series.items()):
    rows = [row for row in found if row[key] is not None]
    ax.errorbar(
      [row["batch_size"] for row in rows],
      [row[key] for row in rows],
      error(rows, key),
      label=name,
      marker="os^vD*"[i % 6],
      linestyle=("-", "--")[name.startswith("softmax")],
      capsize=2,
    )
  sizes = sorted(
    {row["batch_size"] for rows in series.values() for row in rows}
  )
  ax.set_xscale("log", base=2)
  ax.set_yscale("log")
  ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
  ax.grid(alpha=0.3, which="both")
  ax.set_xlabel("batch size B (pairs)")
  ax.set_ylabel(label)


def draw_bars(
  ax: Any, key: str, label: str, series: Mapping[str, Sequence[Row]]
) -> None:
  """Draws one bar per name."""
  rows = [found[0] for found in series.values()]
  values = [row[key] or 0 for row in rows]
  bars = ax.barh(list(series), values, xerr=error(rows, key), capsize=2)
  ax.bar_label(
    bars,
    [
      f"{row[key]:,.4g}" if row[key] is not None else "no memory"
      for row in rows
    ],
    padding=4,
    fontsize=9,
  )
  ax.set_xlim(0, 1.2 * max(values + [1e-9]))
  ax.set_xlabel(label)


def error(rows: Sequence[Row], key: str) -> list[list[float]] | None:
  """Returns error bars: the distances of the quartiles from the medians."""
  if not rows or f"{key}_q1" not in rows[0]:
    return None
  if any(row[key] is None for row in rows):
    rows = [
      {key: 0, f"{key}_q1": 0, f"{key}_q3": 0} if row[key] is None else row
      for row in rows
    ]
  return [
    [row[key] - row[f"{key}_q1"] for row in rows],
    [row[f"{key}_q3"] - row[key] for row in rows],
  ]
