"""How fast is it here? Times the losses, the whole train step, or the data.

  python -m tools.benchmark loss --batch_sizes 1024,4096 --devices 2
  python -m tools.benchmark step --config configs/siglip_emoji.py \
      --microbatches 1,2,4
  python -m tools.benchmark data --config configs/siglip_emoji.py
  python -m tools.benchmark data

The last one compares our loading with tf.data's and webdataset's, from the same
tar shards (pip install 'sigjax[loaders]').

All variants take turns, round after round, in one process: what slows the
machine down for a while slows all of them. Medians and quartiles of the rounds
are printed as a table. --out DIR also writes DIR/MODE.csv, where the fastest
and the slowest round are, too; --plot draws DIR/MODE.png.
"""

import functools
import pathlib
import sys

from absl import app, flags, logging
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags
import numpy as np

from sigjax import errors, losses
from sigjax import sharding as sharding_lib
from sigjax.runtime import program
from tools.bench import config, timing

FLAGS = flags.FLAGS


# --- The loss -----------------------------------------------------------------


def loss(
  devices,
  *,
  batch_sizes=(1024, 4096),
  width=512,
  dtype="float32",
  tiles=(512, 1024),
  rounds=15,
):
  """Rows for value and gradients of each variant at each batch size."""
  mesh = sharding_lib.make_mesh(devices=devices)
  rows, whole = sharding_lib.batch_sharding(mesh), NamedSharding(mesh, P())
  scalars = [jax.device_put(np.float32(x), whole) for x in (10, -10)]
  variants = loss_variants(mesh, tiles)
  cases, temp = {}, {}
  for B in batch_sizes:
    if B % mesh.size:
      raise errors.UserError(
        f"--batch_sizes: {B} does not divide over {mesh.size} devices"
      )
    z = np.random.default_rng(0).normal(size=(2, B, width))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    args = [jax.device_put(x.astype(jnp.dtype(dtype)), rows) for x in z]
    for key, fn in variants.items():
      fn = jax.jit(
        jax.value_and_grad(fn, argnums=(0, 1, 2, 3)),
        out_shardings=(whole, (rows, rows, whole, whole)),
      )
      fn, temp[B, key] = timing.build(fn, devices, *args, *scalars)
      cases[B, key] = fn and functools.partial(
        timing.timed, fn, *args, *scalars
      )

  times = timing.interleave(cases, rounds)
  median = {
    case: None if x is None else np.median(x) for case, x in times.items()
  }
  ratio = lambda x, y: None if None in (x, y) else x / y
  return [
    dict(
      variant=name,
      tile=tile,
      batch_size=B,
      width=width,
      dtype=dtype,
      **timing.spread(x, "ms"),
      vs_naive=ratio(median[B, (name, tile)], median[B, ("naive", None)]),
      vs_remat=ratio(median[B, (name, tile)], median[B, ("remat ring", None)]),
      temp_mib=temp[B, (name, tile)],
    )
    for (B, (name, tile)), x in times.items()
  ]


def loss_variants(mesh, tiles):
  """Returns {(name, tile): loss(zimg, ztxt, t, b)}.

  All but the plain ring are shown with the last of the tiles.
  """
  on = functools.partial
  ring = on(losses.ring_sigmoid_loss, mesh=mesh, axes=sharding_lib.AXES)
  softmax = on(losses.ring_softmax_loss, mesh=mesh, axes=sharding_lib.AXES)
  last = tiles[-1]
  return {
    ("naive", None): losses.sigmoid_loss,
    ("remat ring", None): on(remat_ring_loss, mesh=mesh),
    **{("ring", tile): on(ring, tile=tile) for tile in tiles},
    ("ring both", last): on(ring, tile=last, direction="both"),
    ("all_gather", last): on(ring, tile=last, comm="all_gather"),
    ("softmax naive", None): losses.softmax_loss,
    ("softmax ring", last): on(softmax, tile=last),
  }


def remat_ring_loss(zimg, ztxt, t, b, *, mesh, axes=sharding_lib.AXES):
  """sigmoid_loss on a ring as it is usually written: what to compare with.

  One b x b block of logits at a time, differentiated by JAX; jax.checkpoint
  keeps it from storing them all, at the price of computing each twice.
  """

  @jax.checkpoint
  def block(zimg, ztxt, t, b, labels):
    exact = lax.Precision.HIGHEST if zimg.dtype == jnp.float32 else None
    logits = (
      jnp.dot(zimg, ztxt.T, precision=exact, preferred_element_type=jnp.float32)
      * t
      + b
    )
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits))

  def share(zimg, ztxt, t, b):
    own = 2 * jnp.eye(len(zimg)) - 1
    perm = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    def step(carry, _):
      ztxt, total = carry
      ztxt = lax.ppermute(ztxt, axes, perm)
      return (ztxt, total + block(zimg, ztxt, t, b, -1)), None

    (_, total), _ = lax.scan(
      step, (ztxt, block(zimg, ztxt, t, b, own)), length=mesh.size - 1
    )
    return lax.psum(total, axes)

  total = jax.shard_map(
    share, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P()
  )(zimg, ztxt, t, b)
  return total / len(zimg)


# --- The command line ---------------------------------------------------------

MODES = {"loss": loss, "step": config.step, "data": config.data}
NUMBERS = dict(
  batch_sizes="loss: batch sizes, over all devices.",
  tiles="loss: tile sizes of the ring.",
  microbatches="step: numbers of microbatches; the config's if unset.",
  threads="data: numbers of threads that load examples; 1 and one a core if "
  "unset.",
)
NUMBER = dict(
  devices="Devices to use: on a CPU that many are made. All there are if "
  "unset.",
  width="loss: E, the width of the embeddings.",
  rounds="How often each variant is timed.",
  batches="data: batches timed in a round.",
)


def main(mode, *, devices=None, out=None, plot=False, **options):
  """Measures and reports; the options are the keywords of MODES[mode]."""
  measure = errors.pick(MODES, mode, "the benchmark")
  timing.check_out(out, plot)
  if devices:
    jax.config.update("jax_num_cpu_devices", devices)
  found = jax.devices()
  if len(found) < (devices or 1):
    raise errors.UserError(
      f"--devices={devices}, but there are {len(found)}: {found[0]}, ..."
    )
  found = found[:devices]
  machine = timing.machine(found)
  print(", ".join(f"{k} {v}" for k, v in machine.items()), flush=True)
  rows = errors.call(measure, options, f"benchmark {mode}", found)
  for line in timing.table(mode, rows):
    print(line)
  if out:
    timing.write(pathlib.Path(out), mode, rows, machine, plot)
  return rows


def define_flags():
  """Only where this is the program: others have a --config as well."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "step, data: a config file, as for sigjax.train.",
    lock_config=True,
  )
  for name, text in NUMBERS.items():
    flags.DEFINE_list(name, None, text)
  for name, text in NUMBER.items():
    flags.DEFINE_integer(name, None, text, lower_bound=1)
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "loss: the embeddings' type."
  )
  flags.DEFINE_list(
    "losses", None, "step: names of losses; the config's if unset."
  )
  flags.DEFINE_string("out", None, "A folder for the CSV and the plot.")
  flags.DEFINE_bool("plot", None, "Draws a plot, too.")


def given_flags():
  """The flags that were set, as keywords: their defaults are main's and its."""
  given = {}
  names = ("config", "losses", "dtype", "out", "plot", *NUMBERS, *NUMBER)
  for name in names:
    value = FLAGS[name].value
    if name in NUMBERS and value is not None:
      if not value or not all(x.isdecimal() and int(x) for x in value):
        raise errors.UserError(
          f"--{name} takes whole numbers from 1, such as 1,2,4, not "
          f'"{",".join(value)}"'
        )
      value = [int(x) for x in value]
    if value is not None:
      given[name] = value.to_dict() if name == "config" else value
  return given


def run(argv):
  """What app.run calls."""
  logging.set_verbosity(logging.WARNING)  # JAX tells what it has not found
  try:
    if len(argv) != 2:
      raise errors.UserError(
        f"give one of: {', '.join(MODES)}, then flags that begin with --"
      )
    main(argv[1], **given_flags())
  except errors.UserError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  define_flags()
  FLAGS.set_gnu_getopt(True)  # flags may stand behind the mode
  app.run(
    run,
    flags_parser=lambda argv: program.parse_flags(
      argv, lambda rest: given_flags()
    ),
  )
