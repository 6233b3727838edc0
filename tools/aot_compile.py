"""Compiles the train step or the loss of a config for TPUs, without a TPU.

  pip install 'sigjax[aot]'
  python -m tools.aot_compile --config configs/siglip_b16.py \
    --topology v4:2x2x1 --batch_size 32768 --microbatches 32

Prints for each chip: the memory, the FLOPs, the bytes sent over the links and
the computation meanwhile, and an estimate of the time. Nothing is run, so it
needs no TPU, dataset, tokenizer or weights. --what loss compiles the loss and
its gradients alone. --find_batch searches the largest batch that fits, with
microbatches of constant size. --examples 9e9 tells the days that so many take.

--out a.json keeps the estimate, and --against a.json compares another config,
topology or commit with it, row by row.

Topologies: v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1, v6e:2x4, and larger ones.
"""

from collections.abc import Iterable, Mapping, Sequence
import inspect
import json
import pathlib
from typing import Any

from absl import flags
import jax

from sigjax import config as config_lib
from sigjax import defaults, errors, ring
from sigjax import sharding as sharding_lib
from sigjax.runtime import metrics, program
from tools.aot import chips, compiler, estimate, hlo, kernels, parts

FLAGS = flags.FLAGS
GIB, MIB = 2**30, 2**20


Row = tuple[Any, ...]


def memory_rows(job: compiler.Job, memory: Any, capacity: float) -> list[Row]:
  """Returns rows (what, GiB, share of the chip's memory)."""
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.peak_memory_in_bytes
  rows = [
    *job.arguments.items(),
    ("results not written over arguments", results),
    (
      "temporaries (activations, gradients)",
      peak - sum(job.arguments.values()) - results,
    ),
    ("together, at the peak", peak),
    ("the chip has", capacity),
  ]
  return [
    (what, f"{size / GIB:.3f}", f"{size / capacity:.1%}") for what, size in rows
  ]


def flop_rows(
  job: compiler.Job, by_compiler: float, peak: float, devices: int
) -> list[Row]:
  """Returns rows (what, TFLOP, ms at the chip's peak)."""
  rows = [
    ("by formula: what the gradients need", job.flops),
    (
      "as traced: with what is computed again",
      compiler.traced_flops(job, devices),
    ),
    ("by the compiler, which counts a loop once", by_compiler),
  ]
  return [
    (what, f"{n / 1e12:.3f}", f"{1e3 * n / peak:.1f}") for what, n in rows
  ]


def link_rows(
  collectives: Iterable[hlo.Collective], chip: chips.Chip
) -> list[Row]:
  """Returns rows (kind, array, times, MiB each, MiB, ms each, hidden ms)."""
  ms = lambda seconds: f"{1e3 * seconds:.3f}"
  return [
    (
      c.kind,
      c.array,
      c.times,
      f"{c.sent / MIB:.2f}",
      f"{c.sent * c.times / MIB:.1f}",
      ms(c.over_link / chip.link),
      "waits" if c.hidden is None else ms(c.hidden / chip.clock),
    )
    for c in sorted(collectives, key=lambda c: -c.sent * c.times)
  ]


def kernel_rows(
  found: Iterable[tuple[kernels.Cost, int]], chip: chips.Chip
) -> list[Row]:
  """Returns rows (name, times, steps, bundles each, ms, ms of data, ms)."""
  ms = lambda cycles: f"{1e3 * cycles / chip.clock:.3f}"
  return [
    (
      cost.kernel.name,
      times,
      cost.kernel.steps,
      f"{cost.bundles:,}",
      ms(cost.bundles),
      ms(cost.data),
      ms(cost.cycles * times),
    )
    for cost, times in found
  ]


def place_rows(
  found: Mapping[str, Any], other: Mapping[str, Any] | None
) -> list[Row]:
  """Returns rows (what, ms by tower, ms, share), or with the other's ms, ratio.

  Args:
    found: an estimate, see estimate.of.
    other: the one to compare with.
  """
  now, before = found["ms"], (other or {"ms": {}})["ms"]
  total = lambda table: sum(sum(row.values()) for row in table.values())

  def line(name: str, cells: Mapping[str, float], ms: float, was: float) -> Row:
    numbers = [f"{cells[c]:.1f}" if cells.get(c) else "" for c in parts.COLUMNS]
    if other:
      last = [f"{was:.1f}", f"{ms / was:.3f}" if was else ""]
    else:
      last = [f"{ms / total(now):.1%}"]
    return name, *numbers, f"{ms:.1f}", *last

  rows = []
  for name in dict.fromkeys((*before, *now)):
    cells = now.get(name, {})
    was = sum(before.get(name, {}).values())
    rows.append(line(name, cells, sum(cells.values()), was))
  return [*rows, line("together", {}, total(now), total(before))]


def show(rows: Sequence[Row], *header: str) -> None:
  """Prints a table."""
  print()
  for line in metrics.table(rows, header):
    print(line)


def report(
  job: compiler.Job,
  compiled: Sequence[compiler.Compiled],
  found: estimate.Estimate,
  mesh: jax.sharding.Mesh,
  chip: chips.Chip,
  capacity: float,
  other: Mapping[str, Any] | None = None,
  examples: float | None = None,
) -> None:
  """Prints all that is known about a job.

  Args:
    job: the job.
    compiled: its programs.
    found: what they take.
    mesh, chip, capacity: where; the chip's memory in bytes.
    other: a saved estimate to compare with.
    examples: the number of examples to tell the days of.
  """
  peak = metrics.PEAK_FLOPS[mesh.devices.flat[0].device_kind]
  by_compiler = sum(x.flops * x.times for x in compiled)
  flops = flop_rows(job, by_compiler, peak, mesh.size)
  if len(compiled) > 1:
    rows = [
      (x.name, x.times, f"{x.memory.peak_memory_in_bytes / GIB:.3f}")
      for x in compiled
    ]
    show(rows, "program", "times", "GiB at its peak")
  memory = max(
    (x.memory for x in compiled), key=lambda x: x.peak_memory_in_bytes
  )
  show(memory_rows(job, memory, capacity), "memory per chip", "GiB", "share")
  print(
    "(temporaries by the compiler's temp_size_in_bytes: "
    f"{memory.temp_size_in_bytes / MIB:,.1f} MiB)"
  )
  largest = [x for program, _ in found.programs for x in program.largest(5)]
  show(
    [
      (array, f"{size / GIB:.3f}", made_by[-60:])
      for array, size, made_by in sorted(largest, key=lambda x: -x[1])[:5]
    ],
    "largest arrays on a chip",
    "GiB",
    "made by",
  )
  show(flops, "FLOPs per chip", "TFLOP", "ms at peak")
  show(
    link_rows(found.collectives, chip),
    "sent by each chip",
    "array",
    "times",
    "MiB each",
    "MiB",
    "ms each",
    "ms of computation meanwhile",
  )
  print(
    "in all: "
    + ", ".join(
      f"{kind} {size / MIB:,.1f} MiB"
      for kind in hlo.KINDS
      if (
        size := sum(
          c.sent * c.times for c in found.collectives if c.kind == kind
        )
      )
    )
  )
  if found.kernels:
    show(
      kernel_rows(found.kernels, chip),
      "Pallas kernels",
      "times",
      "steps",
      "bundles of a core",
      "ms",
      "ms of its data",
      "ms in all",
    )
  if found.uncounted:
    print(f"{found.uncounted} loop(s) of unknown length count once")
  header = ["where the time goes, ms", *parts.COLUMNS, "all"]
  header += ["against", "ratio"] if other else ["share"]
  show(place_rows(found.saved, other), *header)
  if other:
    print(f"against: {other['title']}")
  saved = found.saved
  waits = f"{sum(saved['ms']['links not hidden'].values()):.1f}"
  print(f"""
estimate of the time, in ms:
  at the chip's peak: products {flops[1][2]} + links not hidden {waits}
  by the compiler's cycles: {saved["computing"]:.1f} + links not hidden {waits}
  MFU {job.flops / peak / saved["seconds"]:.1%}, {saved["rate"]:,.1f} examples\
 a second and chip
assumed: {peak / 1e12:.0f} TFLOP/s in bfloat16, {chip.clock / 1e9:.2f} GHz,\
 {chip.link / 1e9:.0f} GB/s over a link one way,
{chip.hbm / 1e9:.0f} GB/s to the memory; reductions of all chips take the\
 links that the compiler
names, other collectives are rings over one link at a time. Neighbours in the\
 loss's ring are
up to {hops(mesh)} link(s) apart; wrap-around links are not counted. A kernel\
 takes its bundles,
one a cycle, or its bytes: whichever is more.""")
  if examples:
    days = examples / saved["rate"] / mesh.size / 86400
    least = days * job.flops / peak / saved["seconds"]
    print(f"""
{examples:,.0f} examples take {days:.2f} days on {mesh.size} chips, if every\
 step takes what is estimated:
no wait for data, no evaluation, no checkpoint, no restart. At the chips' peak\
 they would take {least:.2f}.""")


def hops(mesh: jax.sharding.Mesh) -> int:
  """Returns the most links between consecutive devices of the loss's ring."""
  devices = list(mesh.devices.flat)
  order = [devices[i].coords for i in ring.order(devices)]
  return max(
    sum(abs(x - y) for x, y in zip(a, b))
    for a, b in zip(order, order[1:] + order[:1])
  )


def compile_config(
  config: Mapping[str, Any],
  topology: str,
  what: str = "step",
  batch_size: int | None = None,
  microbatches: int | None = None,
  find: bool = False,
  examples: float | None = None,
  out: str | None = None,
  against: str | None = None,
  phase: str | None = None,
) -> None:
  """Compiles and reports, as described at the top of this file.

  Args:
    config: the config, as plain dicts.
    topology: such as "v4:2x2x1".
    what: "step" or "loss".
    batch_size: replaces the config's.
    microbatches: replaces the config's.
    find: whether to search for the largest batch that fits.
    examples: a number of examples, to tell the days it takes.
    out: a file for the estimate, to compare others with.
    against: such a file, to compare with.
    phase: of config.phases; None: the beginning.

  Raises:
    UserError: the config, the topology or the file is wrong, or the program
      does not fit.
  """
  other = estimate.load(against) if against else None
  if phase:
    config = config_lib.in_phase(config, phase)
  devices, chip = compiler.open_topology(topology)
  mesh = errors.call(
    sharding_lib.make_mesh,
    config.get("mesh") or {},
    "config.mesh",
    devices=devices,
  )
  make = {"step": compiler.step_job, "loss": compiler.loss_job}[what]
  keys = set(inspect.signature(make).parameters) - {"mesh"}
  config = {k: v for k, v in config.items() if k in keys}
  if batch_size:
    config["batch_size"] = batch_size
  if microbatches and "microbatches" in keys:
    config["microbatches"] = microbatches
  k = config.get("microbatches", 1)
  piece, rest = divmod(config["batch_size"], k)

  def build(n: int) -> compiler.Job:
    more = {"microbatches": n // piece} if k > 1 else {}
    return errors.call(
      make, {**config, "batch_size": n, **more}, "config", mesh
    )

  def tried(n: int, got: list[compiler.Compiled] | compiler.DoesNotFit) -> None:
    if isinstance(got, compiler.DoesNotFit):
      text = f"needs {got.needed / GIB:.2f} GiB"
    else:
      peak = max(x.memory.peak_memory_in_bytes for x in got)
      text = f"fits: {peak / GIB:.2f} GiB"
    print(f"batch {n:,}: {text}", flush=True)

  capacity = compiler.memory_of(devices[0])
  B = config["batch_size"]
  if find:
    smallest = piece if k > 1 and not rest else mesh.size
    B, job, compiled = compiler.find_batch(build, B, smallest, tried)
  else:
    job = errors.call(make, config, "config", mesh)
    compiled = compiler.compile_job(job)
  title = (
    f"{job.title}, on {topology}: {len(devices)} x "
    f"{devices[0].device_kind}, mesh {dict(mesh.shape)}"
  )
  print(title)
  found = estimate.of(title, compiled, chip, B / mesh.size)
  report(job, compiled, found, mesh, chip, capacity, other, examples)
  if out:
    pathlib.Path(out).write_text(json.dumps(found.saved, indent=1) + "\n")


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # leaves a real TPU alone
  # A program from the cache is not written again as text.
  jax.config.update("jax_enable_compilation_cache", False)
  compile_config(
    FLAGS.config.to_dict(),
    FLAGS.topology,
    FLAGS.what,
    FLAGS.batch_size,
    FLAGS.microbatches,
    FLAGS.find_batch,
    FLAGS.examples,
    FLAGS.out,
    FLAGS.against,
    FLAGS.phase,
  )


if __name__ == "__main__":
  defaults.define_config_flag()
  flags.DEFINE_string("topology", "v4:2x2x1", "The kind and number of chips.")
  flags.DEFINE_enum("what", "step", ["step", "loss"], "What is compiled.")
  flags.DEFINE_integer(
    "batch_size", None, "Replaces the config's batch_size.", lower_bound=1
  )
  flags.DEFINE_integer(
    "microbatches", None, "Replaces the config's microbatches.", lower_bound=1
  )
  flags.DEFINE_string("phase", None, "A phase of config.phases.")
  flags.DEFINE_bool("find_batch", False, "Searches the largest batch.")
  flags.DEFINE_float(
    "examples",
    None,
    "Tells the days that so many examples take.",
    lower_bound=1,
  )
  flags.DEFINE_string("out", None, "Writes the estimate to this JSON file.")
  flags.DEFINE_string("against", None, "Compares with this JSON file.")
  program.run(main, program.config_given)
