"""How tools.benchmark measures, and how it shows what it found."""

import csv
import os
import platform
import time

import jax
import numpy as np

from sigjax import errors
from sigjax.runtime import metrics

MIB = 2**20

# What the table of each mode shows: (key of a row, header, format).
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
}
# What is drawn: the keys that name a row and how; (key, label) of each panel.
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
}


# --- Measuring ----------------------------------------------------------------


def timed(fn, *args):
  """Seconds until fn's results are there."""
  start = time.perf_counter()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - start


def interleave(runs, rounds):
  """Runs all in turn, `rounds` times after a round that is not counted.

  The order is drawn anew in each round: so none always runs behind the same
  one, with what that left in the caches.

  Args:
    runs: {key: fn() -> seconds or an array of them}; None for what does not
      fit.
    rounds: how often.

  Returns:
    {key: (rounds, ...) array, or None where memory ran out}.
  """
  times = {key: [] if run else None for key, run in runs.items()}
  rng, keys = np.random.default_rng(0), list(runs)
  for i in range(rounds + 1):
    for key in (keys[j] for j in rng.permutation(len(keys))):
      if times[key] is None:
        continue
      try:
        seconds = runs[key]()
      except (jax.errors.JaxRuntimeError, MemoryError) as e:
        check_memory_ran_out(e)
        times[key] = None
      else:
        times[key] += [seconds] if i else []
  return {key: x if x is None else np.array(x) for key, x in times.items()}


def build(fn, devices, *args):
  """Compiles a jitted function.

  Returns:
    The executable, or None if it does not fit; and its temporary memory per
    device in MiB, or None if that is not known.
  """
  try:
    fn = fn.lower(*args).compile()
  except jax.errors.JaxRuntimeError as e:
    check_memory_ran_out(e)
    return None, None
  memory = fn.memory_analysis()
  if memory is None:
    return fn, None
  temp = memory.temp_size_in_bytes
  # A CPU has no limit that would stop it in time: the system kills it.
  fits = devices[0].platform != "cpu" or temp * len(devices) < host_memory()
  return fn if fits else None, temp / MIB


def check_memory_ran_out(error):
  """Raises the error again if it says anything else."""
  if not isinstance(error, MemoryError) and (
    "RESOURCE_EXHAUSTED" not in str(error)
  ):
    raise error


def host_memory():
  """Bytes of memory that the host has left, as far as one can know."""
  try:
    with open("/proc/meminfo", encoding="ascii") as f:
      fields = dict(line.split(":") for line in f)
    return int(fields["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError):
    return float("inf")


def spread(samples, unit):
  """Columns of a row: the median of seconds, quartiles and extremes, in unit.

  None, for what did not fit, becomes None.
  """
  names = ("", "_q1", "_q3", "_min", "_max")
  if samples is None:
    return {unit + name: None for name in names}
  scale = {"ms": 1e3, "us": 1e6}[unit]
  found = np.percentile(samples, (50, 25, 75, 0, 100)) * scale
  return {unit + name: float(x) for name, x in zip(names, found)}


# --- Showing ------------------------------------------------------------------


def machine(devices):
  """What it runs on, by name."""
  cores = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count()
  )
  return {
    "devices": len(devices),
    "device_kind": devices[0].device_kind,
    "jax": jax.__version__,
    "cores": cores,
    "machine": platform.machine(),
    # Of other programs, before this one began.
    "load": round(os.getloadavg()[0], 1),
  }


def table(mode, rows):
  """Returns the lines of a table of the rows."""

  def cell(row, key, form):
    value = row.get(key)
    if value is None:
      return "no memory" if key in ("ms", "us") else "-"
    return format(value, form)

  columns = COLUMNS[mode]
  return metrics.table(
    [[cell(row, key, form) for key, _, form in columns] for row in rows],
    [header for _, header, _ in columns],
  )


def write(folder, mode, rows, machine, plot):
  """Writes MODE.csv into a folder and, if asked to, MODE.png."""
  rows = [{**machine, **row} for row in rows]
  keys = list(dict.fromkeys(key for row in rows for key in row))
  with open(folder / f"{mode}.csv", "w", newline="", encoding="utf-8") as f:
    writer = csv.DictWriter(f, keys)
    writer.writeheader()
    writer.writerows(rows)
  if plot:
    draw(folder / f"{mode}.png", mode, rows)


def check_out(out, plot):
  """Makes the folder; what is amiss is a UserError before hours are spent."""
  if out:
    try:
      os.makedirs(out, exist_ok=True)
    except OSError as e:
      raise errors.UserError(f"--out {out}: {e.strerror}") from e
  if not plot:
    return
  if not out:
    raise errors.UserError("--plot needs a folder to draw into: give --out DIR")
  try:
    import matplotlib  # pylint: disable=g-import-not-at-top,unused-import
  except ImportError as e:
    raise errors.UserError(
      "--plot needs matplotlib: pip install 'sigjax[bench]'"
    ) from e


def draw(path, mode, rows):
  """Lines over the batch size if there are several of them, else bars."""
  from matplotlib import figure  # pylint: disable=g-import-not-at-top

  names, panels = PANELS[mode]
  series = {}
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
    plots[0].invert_yaxis()  # the first row on top; both share the axis
  fig.savefig(path, dpi=120)


def draw_lines(ax, key, label, series):
  """One line per name, over the batch size."""
  for i, (name, rows) in enumerate(series.items()):
    rows = [row for row in rows if row[key] is not None]
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


def draw_bars(ax, key, label, series):
  """One bar per name."""
  rows = [rows[0] for rows in series.values()]
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


def error(rows, key):
  """The quartiles of rows below and above their medians, for error bars."""
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
