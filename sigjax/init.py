"""Initialisation: the train state before the first step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax

from sigjax import state as state_lib
from sigjax import trees
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
  given = given or {}
  want = trees.flatten(abstract.stored)
  scratch = {k: x.sharding for k, x in want.items() if k not in given}

  def from_scratch():
    key = jax.random.key(seed)
    params = state_lib.init_params(model, key, example, terms)
    if "lora" in abstract.trained:
      from sigjax import lora  # few runs have adapters

      params |= lora.init(key, {"lora": abstract.trained["lora"]})
    flat = trees.flatten(params)
    return {name: flat[name].astype(want[name].dtype) for name in scratch}

  params = jax.jit(from_scratch, out_shardings=scratch)()
  for name, x in given.items():
    x = x.astype(want[name].dtype)
    params[name] = jax.device_put(x, want[name].sharding)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  start = jax.jit(
    lambda p: state_lib.new_state(p, tx, lock, terms), out_shardings=shardings
  )
  return start(trees.unflatten(params))
