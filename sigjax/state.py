"""The train state: the parameters, which of them are locked, the optimizer's.

Locked parts of the parameters (config.lock, such as ("img",)) get no gradients
and have no optimizer state; they are stored once, in the compute dtype.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from sigjax import sharding, trees


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # int32 (), steps done
  params: dict  # {"img": .., "txt": .., "t": (1,), "b": (1,)}, float32; what
  # is locked is in the model's compute dtype
  opt_state: optax.OptState

  def restored(self, params, step, opt_state):
    """Returns the same kind of state with the values of a checkpoint."""
    return self.replace(params=params, step=step, opt_state=opt_state)


def init_params(model, rng, example):
  """Parameters from scratch, for examples like this dict(image=, text=)."""
  batch = {k: jnp.asarray(example[k])[None] for k in ("image", "text")}
  return model.init(rng, **batch)["params"]


def param_shapes(model, example, lock=()):
  """The tree of ShapeDtypeStructs of a run's parameters.

  Those of init_params, but of a tower what is locked is stored in the compute
  dtype.

  Args:
    model: TwoTowers.
    example: as for init_params.
    lock: names of locked parts, such as ("img",); see trees.split_off.
  """
  rest, locked = trees.split_off(
    jax.eval_shape(
      lambda rng: init_params(model, rng, example), jax.random.key(0)
    ),
    lock,
    "config.lock",
  )
  return trees.join(
    rest,
    trees.map_named(
      lambda name, x: (
        x
        if name in ("t", "b")
        else jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.dtype))
      ),
      locked,
    ),
  )


def trained_part(params, lock):
  """The parameters without what is locked."""
  return trees.split_off(params, lock, "config.lock")[0]


def abstract_state(param_shapes, tx, mesh, table, lock=()):
  """A TrainState of ShapeDtypeStructs with shardings: what a step works on.

  Args:
    param_shapes: from the function of this name.
    tx: the optimizer.
    mesh: from sharding.make_mesh.
    table: rows (regex, split) for sharding.shard_params.
    lock: as in param_shapes.
  """
  shapes = jax.eval_shape(
    lambda params: new_state(params, tx, lock), param_shapes
  )
  of_params = sharding.shard_params(param_shapes, mesh, table)
  shardings = TrainState(
    step=NamedSharding(mesh, P()),
    params=of_params,
    opt_state=sharding.shard_like(
      shapes.opt_state, param_shapes, of_params, mesh
    ),
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def new_state(params, tx, lock=()):
  """The state before the first step; what is locked has no optimizer state."""
  return TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(trained_part(params, lock))
  )


def init_state(model, tx, seed, example, abstract, given=None, lock=()):
  """The state before the first step, made where its parts belong.

  Args:
    model, tx: the towers and the optimizer.
    seed: of the parameters. The same on any number of devices.
    example: dict(image=(H, W, C), text=(L,)), for its shapes.
    abstract: from abstract_state.
    given: {name: array} of parameters that do not start from scratch.
    lock: as in param_shapes.
  """
  given = given or {}
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  want = trees.flatten(abstract.params)

  @functools.partial(
    jax.jit,
    out_shardings={
      name: x.sharding for name, x in want.items() if name not in given
    },
  )
  def from_scratch():
    params = init_params(model, jax.random.key(seed), example)
    return {
      name: x.astype(want[name].dtype)
      for name, x in trees.flatten(params).items()
      if name not in given
    }

  params = {
    **from_scratch(),
    **{
      name: jax.device_put(x.astype(want[name].dtype), want[name].sharding)
      for name, x in given.items()
    },
  }
  return jax.jit(lambda p: new_state(p, tx, lock), out_shardings=shardings)(
    trees.unflatten(params)
  )
