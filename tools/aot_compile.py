"""Compiles the train step or the loss of a config for TPUs, without a TPU.

  pip install 'sigjax[aot]'
  python -m tools.aot_compile --config configs/siglip_b16.py \
    --topology v4:2x2x1 --batch_size 32768 --microbatches 32

Prints for each chip: the memory, the FLOPs, the bytes sent over the links and
the computation meanwhile, and an estimate of the time. Nothing is run, so it
needs no TPU, dataset, tokenizer or weights. --what loss compiles the loss and
its gradients alone. --find_batch searches the largest batch that fits, with
microbatches of constant size.

Topologies: v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1, v6e:2x4, and larger ones.
"""

from collections.abc import Iterable, Mapping, Sequence
import inspect
from typing import Any

from absl import flags
import jax

from sigjax import defaults, errors
from sigjax import sharding as sharding_lib
from sigjax.runtime import metrics, program
from tools.aot import compiler, hlo

FLAGS = flags.FLAGS
GIB, MIB = 2**30, 2**20


Row = tuple[Any, ...]


def memory_rows(
  job: compiler.Job, compiled: jax.stages.Compiled, capacity: float
) -> list[Row]:
  """Returns rows (what, GiB, share of the chip's memory)."""
  stats: Any = compiled.memory_analysis()
  results = stats.output_size_in_bytes - stats.alias_size_in_bytes
  peak = stats.peak_memory_in_bytes
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
  job: compiler.Job, compiled: jax.stages.Compiled, peak: float, devices: int
) -> list[Row]:
  """Returns rows (what, TFLOP, ms at the chip's peak)."""
  rows = [
    ("by formula: what the gradients need", job.flops),
    (
      "as traced: with what is computed again",
      compiler.traced_flops(job, devices),
    ),
    (
      "by the compiler, which counts a loop once",
      cost["flops"] if (cost := compiled.cost_analysis()) else 0.0,
    ),
  ]
  return [
    (what, f"{n / 1e12:.3f}", f"{1e3 * n / peak:.1f}") for what, n in rows
  ]


def link_rows(
  collectives: Iterable[hlo.Collective], chip: compiler.Chip
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
      ms(c.sent / chip.link),
      "waits" if c.hidden is None else ms(c.hidden / chip.clock),
    )
    for c in sorted(collectives, key=lambda c: -c.sent * c.times)
  ]


def exposed(
  collectives: Iterable[hlo.Collective], chip: compiler.Chip
) -> float:
  """Returns the seconds in which a chip only waits for its links."""
  return sum(
    c.times * max(c.sent / chip.link - (c.hidden or 0) / chip.clock, 0)
    for c in collectives
  )


def report(
  job: compiler.Job,
  compiled: jax.stages.Compiled,
  mesh: jax.sharding.Mesh,
  chip: compiler.Chip,
  capacity: float,
) -> None:
  """Prints all that is known about a compiled program."""

  def show(rows: Sequence[Row], *header: str) -> None:
    print()
    for line in metrics.table(rows, header):
      print(line)

  peak = metrics.PEAK_FLOPS[mesh.devices.flat[0].device_kind]
  scheduled = hlo.Program(compiled.as_text() or "")
  sent = scheduled.collectives()
  flops = flop_rows(job, compiled, peak, mesh.size)
  memory: Any = compiled.memory_analysis()
  show(memory_rows(job, compiled, capacity), "memory per chip", "GiB", "share")
  print(
    "(temporaries by the compiler's temp_size_in_bytes: "
    f"{memory.temp_size_in_bytes / MIB:,.1f} MiB)"
  )
  show(
    [
      (array, f"{size / GIB:.3f}", made_by[-60:])
      for array, size, made_by in scheduled.largest(5)
    ],
    "largest arrays on a chip",
    "GiB",
    "made by",
  )
  show(flops, "FLOPs per chip", "TFLOP", "ms at peak")
  show(
    link_rows(sent, chip),
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
      if (size := sum(c.sent * c.times for c in sent if c.kind == kind))
    )
  )
  if scheduled.uncounted:
    print(f"{scheduled.uncounted} loop(s) of unknown length count once")
  waits = f"{1e3 * exposed(sent, chip):.1f}"
  print(f"""
estimate of the time, in ms:
  at the chip's peak: products {flops[1][2]} + links not hidden {waits}
  by the compiler's cycles: {1e3 * scheduled.cycles() / chip.clock:.1f}\
 + links not hidden {waits}
assumed: {peak / 1e12:.0f} TFLOP/s in bfloat16, {chip.clock / 1e9:.2f} GHz,\
 {chip.link / 1e9:.0f} GB/s over a link one way;
collectives are rings over one link at a time. Neighbours in the mesh are up to
{hops(mesh)} link(s) apart; wrap-around links are not counted.""")


def hops(mesh: jax.sharding.Mesh) -> int:
  """Returns the most links between consecutive devices of the mesh."""
  order = [device.coords for device in mesh.devices.flat]
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
) -> None:
  """Compiles and reports, as described at the top of this file.

  Args:
    config: the config, as plain dicts.
    topology: such as "v4:2x2x1".
    what: "step" or "loss".
    batch_size: replaces the config's.
    microbatches: replaces the config's.
    find: whether to search for the largest batch that fits.

  Raises:
    UserError: the config or the topology is wrong, or the program does not fit.
  """
  devices, chip = compiler.open_topology(topology)
  mesh = errors.call(
    sharding_lib.make_mesh,
    config.get("mesh") or {},
    "config.mesh",
    devices=devices,
  )
  make = {"step": compiler.step_job, "loss": compiler.loss_job}[what]
  keys = inspect.signature(make).parameters
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

  def tried(n: int, got: jax.stages.Compiled | compiler.DoesNotFit) -> None:
    if isinstance(got, compiler.DoesNotFit):
      text = f"needs {got.needed / GIB:.2f} GiB"
    else:
      memory: Any = got.memory_analysis()
      text = f"fits: {memory.peak_memory_in_bytes / GIB:.2f} GiB"
    print(f"batch {n:,}: {text}", flush=True)

  capacity = compiler.memory_of(devices[0])
  if find:
    smallest = piece if k > 1 and not rest else mesh.size
    _, job, compiled = compiler.find_batch(
      build, config["batch_size"], smallest, tried
    )
  else:
    job = errors.call(make, config, "config", mesh)
    compiled = compiler.compile_job(job)
  print(
    f"{job.title}, on {topology}: {len(devices)} x "
    f"{devices[0].device_kind}, mesh {dict(mesh.shape)}"
  )
  report(job, compiled, mesh, chip, capacity)


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # leaves a real TPU alone
  compile_config(
    FLAGS.config.to_dict(),
    FLAGS.topology,
    FLAGS.what,
    FLAGS.batch_size,
    FLAGS.microbatches,
    FLAGS.find_batch,
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
  flags.DEFINE_bool("find_batch", False, "Searches the largest batch.")
  program.run(main, program.config_given)
