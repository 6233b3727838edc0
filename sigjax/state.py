"""The train state: parameters that are trained or locked, optimizer state.

Locked parts of the parameters (config.lock, such as ("img",)) get no gradients
and no optimizer state. They are stored once, in the compute dtype.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from sigjax import sharding, trees
from sigjax.models.two_towers import TwoTowers

if TYPE_CHECKING:
  from sigjax.terms import Term


class TrainState(flax.struct.PyTreeNode):
  """What a step reads and replaces."""

  step: Any  # () int32, the number of steps done
  trained: dict  # float32, such as {"txt": .., "t": (1,), "b": (1,)}
  locked: dict  # parameters that stay as they are, such as {"img": ..}
  opt_state: optax.OptState  # over `trained`
  # What the losses beside the pair loss keep, by their parts, see terms.Kind.
  held: dict = flax.struct.field(default_factory=dict)

  @property
  def stored(self) -> dict:
    """All parameters as they are kept: low-rank adapters by themselves."""
    return trees.join(self.trained, self.locked)

  @property
  def params(self) -> dict:
    """The parameters that the model takes: adapters are merged."""
    stored = self.stored
    if "lora" not in stored:
      return stored
    from sigjax import lora  # few runs have adapters

    return jax.jit(lora.merge)(stored)

  def restored(
    self,
    params: dict,
    step: Any,
    opt_state: optax.OptState,
    held: dict | None = None,
  ) -> "TrainState":
    """Returns the same kind of state with the values of a checkpoint."""
    locked = trees.flatten(self.locked)
    trained, locked = trees.split(params, lambda name: name in locked)
    return TrainState(step, trained, locked, opt_state, held or {})


def split_params(params: dict, lock: Sequence[str]) -> tuple[dict, dict]:
  """Returns (trained, locked) parts of parameters.

  Args:
    params: nested dicts.
    lock: names of what is locked, such as ("img",) or ("txt/Embed_0",).

  Raises:
    UserError: a name that is not in the parameters.
  """
  return trees.split_off(params, lock, "config.lock")


def init_params(
  model: TwoTowers,
  rng: jax.Array,
  example: Mapping,
  terms: "Sequence[Term]" = (),
) -> dict:
  """Returns parameters from scratch, for dict(image=, text=, ..) like example.

  Those of terms (terms.make) are beside the towers'.
  """
  batch = {k: jnp.asarray(x)[None] for k, x in example.items()}
  (_, _, out), variables = model.init_with_output(
    rng, batch["image"], batch["text"]
  )
  params: Any = variables["params"]
  for term in terms:
    params = {**params, **term.init(rng, out, batch)}
  return params


def param_shapes(
  model: TwoTowers,
  example: Mapping,
  lock: Sequence[str] = (),
  terms: "Sequence[Term]" = (),
) -> dict:
  """Returns the ShapeDtypeStructs of a run's parameters.

  They are those of init_params, but locked parts (see split_params) of a tower
  are stored in the compute dtype.
  """
  init = lambda rng: init_params(model, rng, example, terms)
  params = jax.eval_shape(init, jax.random.key(0))
  trained, locked = split_params(params, lock)

  def stored(name, x):
    if name in ("t", "b", "r"):
      return x
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.dtype))

  return trees.join(trained, trees.map_named(stored, locked))


def abstract_state(
  shapes: dict,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  table: Sequence,
  lock: Sequence[str] = (),
  terms: "Sequence[Term]" = (),
) -> TrainState:
  """Returns the train state as ShapeDtypeStructs with shardings.

  Args:
    shapes: from param_shapes.
    tx: the optimizer.
    mesh: from sharding.make_mesh.
    table: rows (regex, split), see sharding.shard_params.
    lock: see split_params.
    terms: what they hold is split like the parameters that it is a copy of.
  """
  split = sharding.shard_params(shapes, mesh, table)
  new = lambda params: new_state(params, tx, lock, terms)
  state = jax.eval_shape(new, shapes)
  moments, held = (
    sharding.shard_like(tree, shapes, split, mesh)
    for tree in (state.opt_state, state.held)
  )
  step = NamedSharding(mesh, P())
  shardings = TrainState(step, *split_params(split, lock), moments, held)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings,
  )


def new_state(
  params: dict,
  tx: optax.GradientTransformation,
  lock: Sequence[str] = (),
  terms: "Sequence[Term]" = (),
) -> TrainState:
  """Returns the state before the first step."""
  trained, locked = split_params(params, lock)
  step = jnp.zeros((), jnp.int32)
  state = TrainState(step, trained, locked, tx.init(trained))
  held = {term.kind.part: term.kind.hold(state.params) for term in terms}
  return state.replace(held={part: x for part, x in held.items() if x})
