"""remat="auto": the fastest rematerialisation with which the step fits."""

from collections.abc import Callable, Mapping
import hashlib
import logging
import math
import re
from typing import TYPE_CHECKING, Any

import jax

from sigjax import errors
from sigjax.runtime import files

if TYPE_CHECKING:
  from sigjax.build import Built

log = logging.getLogger(__name__)

NAMES = ("none", "dots", "attention", "full")  # the fastest first


def fastest(
  make: Callable[[Mapping[str, Any]], "Built"],
  model: Mapping[str, Any],
  batch: Mapping[str, Any],
) -> "Built":
  """Returns make(model), "auto" replaced by the first of NAMES that fits.

  Steps are compiled one after the other; JAX keeps the last one for the run. A
  file beside the compiled programs keeps its name, so that the next start does
  not try those that did not fit. CPUs have no limit, and nothing is compiled.

  Args:
    make: fn(config.model) -> the parts of a run.
    model: the section; a tower of it has remat="auto".
    batch: from sharding.abstract_batch.

  Raises:
    UserError: not even "full" fits; or the batch waits on the host, so that
      there is no program to compile.
  """
  made = make(_with(model, NAMES[0]))
  program = made.train_step.program
  if program is None:
    raise errors.UserError(
      'remat="auto" compiles the whole step, which config.feed="host" has not: '
      f"name one of {', '.join(NAMES)}"
    )
  device = batch["text"].sharding.mesh.local_devices[0]
  limit = limit_of(device)
  if limit is None:
    return made
  kept: Any = _file(program.lower(made.state, batch), device, limit)
  if kept and kept.exists():
    return make(_with(model, kept.read_text()))
  needed = math.inf
  for name in NAMES:
    if name != NAMES[0]:
      made = make(_with(model, name))
    needed = needed_by(made, batch, last=name == NAMES[-1])
    if needed <= limit and needed < math.inf:
      log.info('remat="auto" is "%s" here: the fastest that fits', name)
      if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(kept) as aside:
          aside.write_text(name)
      return made
  raise errors.UserError(
    f'the step does not fit on {device.device_kind}, not even with remat="full"'
    + (f": it needs {needed / 2**30:.1f} GiB" if needed < math.inf else "")
    + "; try more microbatches"
  )


def limit_of(device: Any) -> float | None:
  """Returns the bytes of a device's memory; infinity if only the compiler knows
  them, None for a CPU."""
  if device.platform == "cpu":
    return None
  try:
    stats = device.memory_stats()
  except (jax.errors.JaxRuntimeError, AttributeError):  # of a topology
    stats = None
  return (stats or {}).get("bytes_limit", math.inf)


def needed_by(made: "Built", batch: Mapping[str, Any], last: bool) -> float:
  """Compiles the step; returns its bytes per device, infinity if too many.

  The TPU compiler makes a step fit by computing some of its arrays again, which
  it chooses worse than NAMES do: that counts as too many, unless it is the last
  try.
  """
  program: Any = made.train_step.program
  try:
    compiled = program.lower(made.state, batch).compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return math.inf
  if not last and re.search(r"^\s*%\S*\.remat\S* = ", _text(compiled), re.M):
    return math.inf
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _text(compiled: Any) -> str:
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError:  # libtpu cannot print each program of v6e
    return ""


def _with(model: Mapping[str, Any], name: str) -> dict[str, Any]:
  towers = {
    tower: {**model[tower], "remat": name}
    for tower in ("image", "text")
    if model[tower].get("remat") == "auto"
  }
  return {**model, **towers}


def _file(lowered: Any, device: Any, limit: float) -> files.Path | None:
  """Returns where the choice for a program and a device is kept.

  None if no compiled programs are kept, see runtime.start.
  """
  settings: Any = jax.config
  folder = settings.jax_compilation_cache_dir
  if not folder:
    return None
  client = getattr(device, "client", None)
  about = (
    lowered.as_text(),
    device.device_kind,
    str(limit),
    jax.__version__,
    str(getattr(client, "platform_version", "")),
  )
  digest = hashlib.sha256("\0".join(about).encode()).hexdigest()
  return files.path(folder) / "remat" / digest[:32]
