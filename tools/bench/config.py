"""What tools.benchmark times of a config: its train step and its data."""

import functools
import inspect
import itertools
import os
import pathlib
import tempfile
import time

import jax
import numpy as np

from sigjax import build, errors
from sigjax import config as config_lib
from sigjax import sharding as sharding_lib
from sigjax import state as state_lib
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import pipe_string, preprocess
from sigjax.models import two_towers
from sigjax.runtime import metrics
from sigjax.weights import vocabulary
from tools.aot import compiler
from tools.bench import loaders, timing

# --- The train step -----------------------------------------------------------


def step(devices, *, config, microbatches=None, losses=None, rounds=10):
  """Rows for the config's train step with each loss and microbatches."""
  section = config.get("loss") or {}
  names = losses or [section.get("name", "sigmoid")]
  ks = microbatches or [config.get("microbatches", 1)]
  make, init, batch, flops = errors.call(
    step_parts,
    {
      k: v
      for k, v in config.items()
      if k in inspect.signature(step_parts).parameters
    },
    "config",
    devices,
  )
  B, held, cases, temp = len(batch["text"]), {}, {}, {}

  def run(fn):
    # One state for all: it is handed on, as large models leave no room for two.
    if "state" not in held:
      held["state"] = init()
    start = time.perf_counter()
    held["state"], _ = jax.block_until_ready(fn(held.pop("state"), batch))
    return time.perf_counter() - start

  for case in itertools.product(names, ks):
    name, k = case
    fn, abstract = make({**section, "name": name}, k)
    fn, temp[case] = timing.build(fn, devices, abstract, batch)
    cases[case] = fn and functools.partial(run, fn)
  peak = metrics.PEAK_FLOPS.get(devices[0].device_kind)
  rows = []
  for (name, k), x in timing.interleave(cases, rounds).items():
    rate = None if x is None else B / np.median(x)
    rows.append(
      dict(
        loss=name,
        microbatches=k,
        batch_size=B,
        **timing.spread(x, "ms"),
        examples_per_second=rate,
        mfu_percent=(
          100 * rate * flops / (peak * len(devices)) if rate and peak else None
        ),
        temp_mib=temp[name, k],
      )
    )
  return rows


def step_parts(
  devices,
  *,
  batch_size,
  model,
  pp_image,
  pp_text,
  optim,
  total_steps=None,
  total_epochs=None,
  total_examples=None,
  mesh=None,
  sharding=((".*", "replicate"),),
  lock=(),
):
  """What a config's train step is made of, as in sigjax.train.

  Returns:
    make(loss section, microbatches) -> the jitted step, its abstract state.
    init() -> a state; a batch of noise; the FLOPs of a step per example.
  """
  mesh = errors.call(
    sharding_lib.make_mesh, mesh or {}, "config.mesh", devices=devices
  )
  example = compiler.example_of(model, pp_image, pp_text)
  # How many examples there are bends the schedule, not the time it takes.
  times = config_lib.Durations(
    batch_size,
    1_000_000,
    total_steps=total_steps,
    total_epochs=total_epochs,
    total_examples=total_examples,
  )
  optim = times.resolve(optim, "config.optim")

  def built(loss_section, k):
    return build.build(
      mesh,
      example,
      times.total_steps,
      batch_size=batch_size,
      model=model,
      optim=optim,
      loss=loss_section,
      sharding=sharding,
      lock=lock,
      microbatches=k,
    )

  run = built(None, 1)
  rng = np.random.default_rng(0)
  batch = sharding_lib.put_batch(
    dict(
      image=rng.integers(0, 256, (batch_size, *example["image"].shape)).astype(
        example["image"].dtype
      ),
      text=rng.integers(
        1,
        two_towers.text_tower(run.model).vocab_size,
        (batch_size, *example["text"].shape),
        np.int32,
      ),
    ),
    mesh,
  )

  def make(loss_section, k):
    fn = built(loss_section, k).train_step
    # The state comes out split as it went in: each variant takes it next.
    return jax.jit(
      fn.program,
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, run.state), None),
    ), run.state

  return (
    make,
    functools.partial(
      state_lib.init_state, run.model, run.tx, 0, example, run.state, lock=lock
    ),
    batch,
    run.flops,
  )


# --- The data -----------------------------------------------------------------


def data(devices, *, config=None, threads=None, batches=4, rounds=5):
  """Rows for the config's pipeline, and for what it does to one example.

  Without a config: for our pipeline, tf.data and webdataset on the same files;
  see benchmark_loaders.py.

  Threads are one, and one a core as in training, unless they are given.
  Of the pipeline, per_core is examples a second of processor time, whatever
  else the machine does meanwhile.
  """
  del devices
  if config is None:
    return loaders.loaders(
      threads=max(threads or [os.cpu_count()]), batches=batches, rounds=rounds
    )
  return errors.call(
    data_rows,
    {
      k: config[k]
      for k in config
      if k in inspect.signature(data_rows).parameters
    },
    "config",
    threads or sorted({1, os.cpu_count()}),
    batches,
    rounds,
  )


def data_rows(threads, batches, rounds, *, batch_size, data, pp, tokenizer):
  """See data; the keywords are the config's."""
  source = kinds.open_source(**data)
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = errors.call(
      vocabulary.of_run,
      tokenizer,
      "config.tokenizer",
      pathlib.Path(folder) / "tokenizer.model",
      functools.partial(kinds.all_captions, source),
      source.name,
      False,
    )
  whole = preprocess.parse(pp, tokenizer=tokenizer)
  clocks = []
  first = clocked(read, clocks)(source=source)
  ops = pipe_string.build(
    pp,
    {name: clocked(op, clocks) for name, op in preprocess.OPS.items()},
    dict(tokenizer=tokenizer),
  )

  def pull(n):
    stream = pipeline.train_batches(
      source, whole, batch_size=batch_size, seed=0, num_threads=n
    )
    next(stream)  # its threads have begun
    start = time.perf_counter(), time.process_time()
    for _ in range(batches):
      next(stream)
    end = time.perf_counter(), time.process_time()
    stream.close()
    return np.subtract(end, start) / (batches * batch_size)

  def one_by_one():
    for clock in clocks:
      clock[1] = 0.0
    rng = np.random.default_rng(0)
    picks = rng.integers(len(source), size=min(batch_size, 256))
    start = time.perf_counter(), time.process_time()
    for i in picks:
      example = first(int(i), rng)
      for op in ops:
        example = op(example, rng)
    end = time.perf_counter(), time.process_time()
    return np.array([*np.subtract(end, start), *(c[1] for c in clocks)]) / len(
      picks
    )

  cases = {n: functools.partial(pull, n) for n in threads}
  times = timing.interleave({**cases, "one by one": one_by_one}, rounds)
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
      stage=f"  {name}",
      **timing.spread(x, "us"),
      share_percent=100 * np.median(x) / np.median(wall),
    )
    for (name, _), x in zip(clocks, each)
  ]


def read(source):
  """The first op: the number of an element -> its example, as a dict."""
  return lambda i, rng: dict(source.records[source.pick(i, rng)])


def clocked(op, clocks):
  """An op that appends [what it is, 0.0] to clocks and adds its seconds up."""

  @functools.wraps(op)
  def make(*args, **context):
    fn = op(*args, **context)
    inside = f"({','.join(map(repr, args))})" if args else ""
    clock = [op.__name__ + inside, 0.0]
    clocks.append(clock)

    def run(example, rng):
      start = time.perf_counter()
      example = fn(example, rng)
      clock[1] += time.perf_counter() - start
      return example

    return run

  return make
