"""Compiles a config's train step, or its loss, for TPUs that are not there.

  pip install 'sigjax[aot]'
  python -m tools.aot_compile --config configs/siglip_b16.py \
    --topology v4:2x2x1 --batch_size 32768 --microbatches 32

Prints what it takes on each chip: memory, FLOPs, what is sent over the links
and what is computed meanwhile, and an estimate of the time. No TPU, dataset,
tokenizer or weights are needed, and nothing is run. --what loss is the loss and
its gradients alone. --find_batch looks for the largest batch that fits, its
microbatches staying as large as they are.

Topologies: v4:2x2x1, v5e:2x4, v5p:2x2x1, v6e:2x4, and larger ones.
"""

import inspect
import sys

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from sigjax import errors
from sigjax import sharding as sharding_lib
from sigjax.runtime import metrics, program
from tools.aot import compiler, hlo

FLAGS = flags.FLAGS
GIB, MIB = 2**30, 2**20


def memory_rows(job, compiled, capacity):
  """Rows (what, GiB, share of the chip)."""
  stats = compiled.memory_analysis()
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


def flop_rows(job, compiled, peak, devices):
  """Rows (what, TFLOP, ms at the chip's peak)."""
  rows = [
    ("by formula: what the gradients need", job.flops),
    (
      "as traced: and what is computed again",
      compiler.traced_flops(job, devices),
    ),
    (
      "by the compiler, which counts a loop once",
      compiled.cost_analysis()["flops"],
    ),
  ]
  return [
    (what, f"{n / 1e12:.3f}", f"{1e3 * n / peak:.1f}") for what, n in rows
  ]


def link_rows(collectives, chip):
  """Rows (kind, array, times, MiB sent each, in all, ms each, hidden ms)."""
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


def exposed(collectives, chip):
  """Seconds in which nothing but the links are at work."""
  return sum(
    c.times * max(c.sent / chip.link - (c.hidden or 0) / chip.clock, 0)
    for c in collectives
  )


def report(job, compiled, mesh, chip, capacity):
  """Prints all that is known of a compiled program."""

  def show(rows, *header):
    print()
    for line in metrics.table(rows, header):
      print(line)

  peak = metrics.PEAK_FLOPS[mesh.devices.flat[0].device_kind]
  program = hlo.Program(compiled.as_text())
  sent = program.collectives()
  flops = flop_rows(job, compiled, peak, mesh.size)
  show(memory_rows(job, compiled, capacity), "memory per chip", "GiB", "share")
  print(
    "(temporaries by the compiler's temp_size_in_bytes: "
    f"{compiled.memory_analysis().temp_size_in_bytes / MIB:,.1f} MiB)"
  )
  show(
    [
      (array, f"{size / GIB:.3f}", made_by[-60:])
      for array, size, made_by in program.largest(5)
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
    "ms of work meanwhile",
  )
  print(
    "in all: "
    + ", ".join(
      f"{kind} {size / MIB:,.1f} MiB"
      for kind in hlo.KINDS
      if (size := sum(c.sent * c.times for c in sent if c.kind == kind))
    )
  )
  if program.uncounted:
    print(f"{program.uncounted} loop(s) of unknown length count once")
  waits = f"{1e3 * exposed(sent, chip):.1f}"
  print(f"""
estimate of the time, in ms:
  at the chip's peak: products {flops[1][2]} + links not hidden {waits}
  by the compiler's guess of cycles: {1e3 * program.cycles() / chip.clock:.1f}\
 + links not hidden {waits}
assumed: {peak / 1e12:.0f} TFLOP/s in bfloat16, {chip.clock / 1e9:.2f} GHz,\
 {chip.link / 1e9:.0f} GB/s over a link one way;
collectives as rings over one link at a time, between neighbours. The mesh's
are up to {hops(mesh)} link(s) apart, links that close a torus not counted.""")


def hops(mesh):
  """The most links between a device and the next of the mesh, in its order."""
  order = [device.coords for device in mesh.devices.flat]
  return max(
    sum(abs(x - y) for x, y in zip(a, b))
    for a, b in zip(order, order[1:] + order[:1])
  )


def main(
  config, topology, what="step", batch_size=None, microbatches=None, find=False
):
  """Compiles and reports; see the top of this file."""
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

  def build(n):
    more = {"microbatches": n // piece} if k > 1 else {}
    return errors.call(
      make, {**config, "batch_size": n, **more}, "config", mesh
    )

  def tried(n, got):
    text = (
      f"needs {got.needed / GIB:.2f} GiB"
      if isinstance(got, compiler.DoesNotFit)
      else f"fits: {got.memory_analysis().peak_memory_in_bytes / GIB:.2f} GiB"
    )
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


def run(argv):
  """What app.run calls."""
  del argv
  logging.set_verbosity(logging.ERROR)  # JAX tells what it has not found
  jax.config.update("jax_platforms", "cpu")  # a TPU here is left alone
  try:
    main(
      FLAGS.config.to_dict(),
      FLAGS.topology,
      FLAGS.what,
      FLAGS.batch_size,
      FLAGS.microbatches,
      FLAGS.find_batch,
    )
  except errors.UserError as e:
    sys.exit(f"error: {e}")


def define_flags():
  """Only where this is the program: others have a --config as well."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, as for sigjax.train.", lock_config=True
  )
  flags.DEFINE_string("topology", "v4:2x2x1", "Chip and how many of them.")
  flags.DEFINE_enum("what", "step", ["step", "loss"], "What is compiled.")
  flags.DEFINE_integer(
    "batch_size", None, "Instead of the config's.", lower_bound=1
  )
  flags.DEFINE_integer(
    "microbatches", None, "Instead of the config's.", lower_bound=1
  )
  flags.DEFINE_bool("find_batch", False, "Finds the largest batch that fits.")


if __name__ == "__main__":
  define_flags()
  app.run(
    run,
    flags_parser=lambda argv: program.parse_flags(argv, program.config_given),
  )
