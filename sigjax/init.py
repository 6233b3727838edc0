"""The train state before the first step, and when a phase begins."""

from collections.abc import Mapping, Sequence
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from sigjax import errors, trees
from sigjax import state as state_lib
from sigjax.models import vit
from sigjax.models.two_towers import TwoTowers

if TYPE_CHECKING:
  from sigjax.terms import Term


def init_state(
  model: TwoTowers,
  tx: optax.GradientTransformation,
  seed: int,
  example: Mapping,
  abstract: state_lib.TrainState,
  given: Mapping[str, np.ndarray] | None = None,
  lock: Sequence[str] = (),
  terms: "Sequence[Term]" = (),
) -> state_lib.TrainState:
  """Returns the state before the first step, each array made where it belongs.

  Args:
    model, tx: the towers and the optimizer.
    seed: of the parameters, which do not depend on the number of devices.
    example: dict(image=(H, W, C), text=(L,), ..), for its shapes.
    abstract: from abstract_state.
    given: {name: array} of parameters that do not start from scratch.
    lock: see split_params.
    terms: the losses beside the pair loss, whose parameters are made, too.
  """
  want = trees.flatten(abstract.stored)
  given = {
    name: jax.device_put(x.astype(want[name].dtype), want[name].sharding)
    for name, x in (given or {}).items()
  }

  def first_state(given):
    key = jax.random.key(seed)
    params = state_lib.init_params(model, key, example, terms)
    if "lora" in abstract.trained:
      from sigjax import lora  # few runs have adapters

      params |= lora.init(key, {"lora": abstract.trained["lora"]})
    scratch = trees.flatten(params)
    made = {
      name: given[name] if name in given else scratch[name].astype(x.dtype)
      for name, x in want.items()
    }
    return state_lib.new_state(trees.unflatten(made), tx, lock, terms)

  # It runs once. On a CPU, optimising it takes longer than it saves.
  on_cpu = jax.default_backend() == "cpu"
  options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
  program = jax.jit(
    first_state,
    out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    donate_argnums=0,
    compiler_options=options,
  )
  return program(given)


def carry(
  model: TwoTowers,
  tx: optax.GradientTransformation,
  seed: int,
  example: Mapping,
  abstract: state_lib.TrainState,
  old: state_lib.TrainState,
  lock: Sequence[str] = (),
  terms: "Sequence[Term]" = (),
) -> state_lib.TrainState:
  """Returns the state at the beginning of a phase, from that of the one before.

  Parameters that are new start from scratch; what terms hold starts from the
  parameters. Image positions and kernels of patches are resampled if their
  shapes changed. The optimizer keeps its state of all parameters but new and
  resampled ones, which start with its state of the first step.

  Args:
    old: the state until then.
    model, tx, seed, example, abstract, lock, terms: of the phase, see
      init_state.

  Raises:
    UserError: a parameter has another shape and is none that is resampled.
  """
  want = trees.flatten(abstract.stored)
  for name, x in trees.flatten(old.stored).items():
    if name in want and not _fits(name, x.shape, want[name].shape):
      raise errors.UserError(
        f"config.phases changes the shape of {name} from {x.shape} to "
        f"{want[name].shape}, and only image positions and kernels of patches "
        "can be resampled"
      )

  have = trees.flatten(old)
  every = trees.flatten(abstract)
  # All else is made anew; what stays is not copied.
  stays = {k for k, x in every.items() if k in have and _same(have[k], x)}
  shardings = {k: x.sharding for k, x in every.items() if k not in stays}

  def fn(old):
    key = jax.random.key(seed)
    fresh = trees.flatten(state_lib.init_params(model, key, example, terms))
    stored = trees.flatten(old.stored)
    params = {
      name: _fit(stored[name], x.shape) if name in stored else fresh[name]
      for name, x in want.items()
    }
    params = {name: x.astype(want[name].dtype) for name, x in params.items()}
    new = state_lib.new_state(trees.unflatten(params), tx, lock, terms)
    made = trees.flatten(new)
    for name in shardings:
      if name.startswith("held/") and name in have:  # of a teacher's tower
        made[name] = _fit(have[name], made[name].shape)
    return {name: made[name] for name in shardings}

  made = jax.jit(fn, out_shardings=shardings)(old)
  pick = lambda name, _: have[name] if name in stays else made[name]
  return trees.map_named(pick, abstract)


def _same(a: Any, b: Any) -> bool:
  return a.shape == b.shape and a.dtype == b.dtype


def _fits(name: str, old: Sequence[int], new: Sequence[int]) -> bool:
  """Returns whether _fit makes an array of the new shape."""
  if tuple(old) == tuple(new):
    return True
  if name.endswith("pos_embedding") and name.startswith("img/"):
    return len(old) == 3 and old[0] == 1 and old[2] == new[-1]
  if name.endswith("img/embedding/kernel"):
    return len(old) == 4 and new[-1] == old[-1]
  return False


def _fit(x: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Returns a parameter of the image tower in another shape."""
  if x.shape == tuple(shape):
    return x
  if x.ndim == 3:  # positions; NaFlex' are (rows, columns, W)
    side = math.isqrt(shape[1]) if shape[0] == 1 else shape[0]
    return vit.resized_positions(x, (side, side)).reshape(shape)
  side = shape[0] if len(shape) == 4 else math.isqrt(shape[0] // x.shape[2])
  return vit.resized_kernel(x, side).reshape(shape)
