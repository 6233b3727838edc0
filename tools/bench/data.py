"""Times the data of a config, for tools.benchmark."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import pipe_string, preprocess
from sigjax.data.source import Source
from sigjax.weights import vocabulary
from tools.bench import loaders, timing


def data(
  devices: Sequence[Any],
  *,
  config: Mapping[str, Any] | None = None,
  threads: Sequence[int] | None = None,
  batches: int = 4,
  rounds: int = 5,
) -> list[timing.Row]:
  """Returns rows for the config's pipeline, and for each of its ops.

  The value per_core is examples per second of processor time, which does not
  depend on what else the machine does meanwhile.

  Args:
    devices: not used.
    config: the config, as plain dicts. If None, our pipeline is compared with
      tf.data and webdataset; see loaders.py.
    threads: numbers of threads that load examples; if None, 1 and one per core.
    batches: batches that are timed in a round.
    rounds: how often each variant is timed.
  """
  del devices
  if config is None:
    return loaders.loaders(
      threads=max(threads or [os.cpu_count() or 1]),
      batches=batches,
      rounds=rounds,
    )
  return errors.call(
    data_rows,
    {
      k: config[k]
      for k in config
      if k in inspect.signature(data_rows).parameters
    },
    "config",
    threads or sorted({1, os.cpu_count() or 1}),
    batches,
    rounds,
  )


def data_rows(
  threads: Sequence[int],
  batches: int,
  rounds: int,
  *,
  batch_size: int,
  data: Mapping[str, Any],
  pp: str,
  tokenizer: Mapping[str, Any],
) -> list[timing.Row]:
  """Returns the rows of data(); the keyword arguments are the config's."""
  source = kinds.open_source(**data)
  with tempfile.TemporaryDirectory() as folder:
    tokenize, _ = errors.call(
      vocabulary.of_run,
      tokenizer,
      "config.tokenizer",
      pathlib.Path(folder) / "tokenizer.model",
      functools.partial(kinds.all_captions, source),
      source.name,
      False,
    )
  whole = preprocess.parse(pp, tokenizer=tokenize)
  clocks: list[Clock] = []
  first = clocked(read, clocks)(source=source)
  ops = pipe_string.build(
    pp,
    {name: clocked(op, clocks) for name, op in preprocess.OPS.items()},
    dict(tokenizer=tokenize),
  )

  def pull(n):
    stream = pipeline.train_batches(
      source, whole, batch_size=batch_size, seed=0, num_threads=n
    )
    next(stream)  # now its threads are running
    start = time.perf_counter(), time.process_time()
    for _ in range(batches):
      next(stream)
    end = time.perf_counter(), time.process_time()
    stream.close()
    return np.subtract(end, start) / (batches * batch_size)

  def one_by_one():
    for clock in clocks:
      clock.seconds = 0.0
    rng = np.random.default_rng(0)
    picks = rng.integers(len(source), size=min(batch_size, 256))
    start = time.perf_counter(), time.process_time()
    for i in picks:
      example = first(int(i), rng)
      for op in ops:
        example = op(example, rng)
    end = time.perf_counter(), time.process_time()
    seconds = [*np.subtract(end, start), *(clock.seconds for clock in clocks)]
    return np.array(seconds) / len(picks)

  cases = {n: functools.partial(pull, n) for n in threads}
  times: Any = timing.interleave({**cases, "one by one": one_by_one}, rounds)
  rate = lambda stage, wall, cpu: dict(
    stage=stage,
    **timing.spread(wall, "us"),
    examples_per_second=1 / np.median(wall),
    per_core=1 / np.median(cpu),
  )
  rows = [rate(f"pipeline, {n} thread(s)", *times[n].T) for n in threads]
  wall, cpu, *each = times["one by one"].T
  rows.append(rate("one by one, no batches", wall, cpu))
  return rows + [
    dict(
      stage=f"  {clock.name}",
      **timing.spread(x, "us"),
      share_percent=100 * np.median(x) / np.median(wall),
    )
    for clock, x in zip(clocks, each)
  ]


class Clock:
  """Adds up the time of one op.

  Attributes:
    name: the op, with its arguments.
    seconds: the sum.
  """

  name: str
  seconds: float

  def __init__(self, name: str):
    self.name, self.seconds = name, 0.0


def read(source: Source) -> Callable[..., dict[str, Any]]:
  """Returns the first op: it reads the example of an element's number."""
  return lambda i, rng: dict(source.records[source.pick(i, rng)])


def clocked(op: Callable[..., Any], clocks: list[Clock]) -> Callable[..., Any]:
  """Returns an op that adds a Clock to `clocks` and counts its time there."""

  @functools.wraps(op)
  def make(*args, **context):
    fn = op(*args, **context)
    inside = f"({','.join(map(repr, args))})" if args else ""
    clock = Clock(op.__name__ + inside)
    clocks.append(clock)

    def run(example, rng):
      start = time.perf_counter()
      example = fn(example, rng)
      clock.seconds += time.perf_counter() - start
      return example

    return run

  return make
