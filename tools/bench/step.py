"""Times the train step of a config, for tools.benchmark."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import itertools
import time
from typing import Any

import jax
import numpy as np

from sigjax import build, errors, init
from sigjax import config as config_lib
from sigjax import sharding as sharding_lib
from sigjax.models import flops as flops_lib
from sigjax.models import two_towers
from sigjax.runtime import metrics
from tools.aot import compiler
from tools.bench import timing


def step(
  devices: Sequence[Any],
  *,
  config: Mapping[str, Any],
  microbatches: Sequence[int] | None = None,
  losses: Sequence[str] | None = None,
  rounds: int = 10,
) -> list[timing.Row]:
  """Returns a row for each loss and number of microbatches.

  Args:
    devices: the devices to use.
    config: the config, as plain dicts.
    microbatches: numbers of microbatches; the config's if None.
    losses: names of losses; the config's if None.
    rounds: how often each variant is timed.
  """
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
    # All variants share one state: two of a large model would not fit.
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
  devices: Sequence[Any],
  *,
  batch_size: int,
  model: Mapping[str, Any],
  pp_image: str,
  pp_text: str,
  optim: Mapping[str, Any],
  total_steps: int | None = None,
  total_epochs: float | None = None,
  total_examples: int | None = None,
  mesh: Mapping[str, Any] | None = None,
  loss: Mapping[str, Any] | None = None,
  losses: Mapping[str, Mapping[str, Any]] | None = None,
  sharding: Sequence[Any] = sharding_lib.REPLICATED,
  lock: Sequence[str] = (),
) -> tuple[Callable[..., Any], Callable[[], Any], dict[str, jax.Array], float]:
  """Returns what is needed to run a config's train step, as in sigjax.train.

  Args:
    devices: the devices to use.
    **others: values of the config, see train.main.

  Returns:
    make(loss section, microbatches) -> the jitted step and its abstract state;
    init() -> a state; a batch of noise; the FLOPs of a step per example.
  """
  over = errors.call(
    sharding_lib.make_mesh, mesh or {}, "config.mesh", devices=devices
  )
  example = compiler.example_of(model, pp_image, pp_text, loss)
  # The number of examples affects the schedule, but not the time of a step.
  times = config_lib.Durations(
    batch_size,
    1_000_000,
    total_steps=total_steps,
    total_epochs=total_epochs,
    total_examples=total_examples,
  )
  optim = times.resolve(optim, "config.optim")
  terms = times.resolve(losses or {}, "config.losses")

  def built(loss_section, k):
    return build.build(
      over,
      example,
      times.total_steps,
      batch_size=batch_size,
      model=model,
      optim=optim,
      loss=loss_section,
      losses=terms,
      sharding=sharding,
      lock=lock,
      microbatches=k,
    )

  run = built(dict(positives=(loss or {}).get("positives")), 1)
  rng = np.random.default_rng(0)
  noise = dict(
    image=rng.integers(0, 256, (batch_size, *example["image"].shape)).astype(
      example["image"].dtype
    ),
    text=rng.integers(
      1,
      two_towers.text_tower(run.model).vocab_size,
      (batch_size, *example["text"].shape),
      np.int32,
    ),
  )
  if "group" in example:
    noise["group"] = np.arange(batch_size, dtype=np.int32)[:, None]
  batch = sharding_lib.put_batch(noise, over)

  def make(loss_section, k):
    # Any variant can take the state that another one returns.
    return built(loss_section, k).train_step.program, run.state

  return (
    make,
    functools.partial(
      init.init_state,
      run.model,
      run.tx,
      0,
      example,
      run.state,
      lock=lock,
      terms=run.terms,
    ),
    batch,
    flops_lib.training(run.model, example, run.state.trained, run.terms),
  )
