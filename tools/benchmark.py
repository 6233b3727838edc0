"""Times the losses, the whole train step, or the data on this machine.

  python -m tools.benchmark loss --batch_sizes 1024,4096 --devices 2
  python -m tools.benchmark step --config configs/siglip_emoji.py \
      --microbatches 1,2,4
  python -m tools.benchmark data --config configs/siglip_emoji.py
  python -m tools.benchmark data
  taskset -c 0 python -m tools.benchmark peers

The fourth command compares our loading with tf.data's and webdataset's, from
the same tar shards (pip install 'sigjax[loaders]'). The last one compares our
train step with transformers' and open_clip's, on one core (pip install
open_clip_torch transformers).

All variants take turns in one process, round after round, so that a slow phase
of the machine affects all of them. The table shows the median and the quartiles
of the rounds. --out DIR also writes DIR/MODE.csv, which has the fastest and the
slowest round, too; --plot draws DIR/MODE.png.

To compare two versions of the code, run the command in both checkouts, several
times in turns. For data, compare the columns "per core".
"""

from collections.abc import Callable
import os
import pathlib
from typing import Any

from absl import flags
import jax

from sigjax import defaults, errors
from sigjax.runtime import program
from tools.bench import data, loss, peers, report, step, timing

FLAGS = flags.FLAGS

MODES: dict[str, Callable[..., list[timing.Row]]] = {
  "loss": loss.loss,
  "step": step.step,
  "data": data.data,
  "peers": peers.peers,
}
NUMBERS = dict(
  batch_sizes="loss: batch sizes, over all devices.",
  tiles="loss: tile sizes of the ring.",
  microbatches="step: numbers of microbatches; the config's if not given.",
  threads="data: numbers of threads that load examples; 1 and one per core if "
  "not given.",
)
NUMBER = dict(
  devices="The number of devices to use; all if not given. On a CPU, so many "
  "are simulated.",
  width="loss: E, the length of embeddings.",
  rounds="How often each variant is timed.",
  batches="data: batches that are timed in a round.",
)


def benchmark(
  mode: str,
  *,
  devices: int | None = None,
  out: str | os.PathLike[str] | None = None,
  plot: bool = False,
  **options: Any,
) -> list[timing.Row]:
  """Measures and reports.

  Args:
    mode: a name in MODES.
    devices: the number of devices; all if None.
    out: a folder for the CSV file and the plot.
    plot: whether to draw a plot.
    **options: keyword arguments of MODES[mode].

  Returns:
    The rows of the table.

  Raises:
    UserError: an option is wrong.
  """
  measure = errors.pick(MODES, mode, "the benchmark")
  report.check_out(out, plot)
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
  for line in report.table(mode, rows):
    print(line)
  if out:
    report.write(pathlib.Path(out), mode, rows, machine, plot)
  return rows


def given_flags(argv: list[str] | None = None) -> dict[str, Any]:
  """Returns {name: value} of the flags that were given.

  The defaults of the others are in the signatures of the functions.
  """
  del argv
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
      given[name] = [int(x) for x in value]
    elif value is not None:
      given[name] = value.to_dict() if name == "config" else value
  return given


def main(argv: list[str]) -> None:
  """Runs the program."""
  if len(argv) != 2:
    raise errors.UserError(
      f"give one of: {', '.join(MODES)}, then flags that begin with --"
    )
  benchmark(argv[1], **given_flags())


if __name__ == "__main__":
  defaults.define_config_flag()  # for step and data
  for flag, text in NUMBERS.items():
    flags.DEFINE_list(flag, None, text)
  for flag, text in NUMBER.items():
    flags.DEFINE_integer(flag, None, text, lower_bound=1)
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "loss: the dtype of embeddings."
  )
  flags.DEFINE_list(
    "losses", None, "step: names of losses; the config's if not given."
  )
  flags.DEFINE_string("out", None, "A folder for the CSV file and the plot.")
  flags.DEFINE_bool("plot", None, "Draws a plot, too.")
  FLAGS.set_gnu_getopt(True)  # flags may follow the mode
  program.run(main, given_flags)
