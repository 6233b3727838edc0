"""The mesh, and how parameters and batches lie on it."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sigjax import errors, sharding, trees

PARAMS = {
  "a": {"kernel": np.zeros((6, 16)), "bias": np.zeros(6)},
  "t": np.zeros(1),
}


@pytest.mark.parametrize(
  "kwargs, shape",
  [
    ({}, (8, 1)),
    (dict(fsdp=8, data=1), (1, 8)),
    (dict(fsdp=2), (4, 2)),
    (dict(data=2, fsdp=-1), (2, 4)),
  ],
)
def test_mesh(kwargs, shape):
  mesh = sharding.make_mesh(**kwargs)
  assert mesh.axis_names == ("data", "fsdp")
  assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
  "kwargs",
  [dict(data=3), dict(data=2, fsdp=2), dict(fsdp=3), dict(data=-1, fsdp=-1)],
)
def test_a_mesh_that_does_not_come_out_even(kwargs):
  with pytest.raises(errors.UserError, match="8 devices"):
    sharding.make_mesh(**kwargs)


def test_param_shardings():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  got = trees.flatten(
    sharding.shard_params(
      PARAMS, mesh, ((".*bias", "replicate"), (".*", "fsdp"))
    )
  )
  assert {k: s.spec for k, s in got.items()} == {
    "a/bias": P(),
    "a/kernel": P(None, "fsdp"),
    "t": P(),
  }
  with pytest.raises(errors.UserError, match='"fdsp" is not known'):
    sharding.shard_params(PARAMS, mesh, ((".*", "fdsp"),))


def test_moments_lie_where_their_parameters_are():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  own = sharding.shard_params(PARAMS, mesh, ((".*", "fsdp"),))
  state = {
    "mu": PARAMS,
    "count": np.zeros(()),
    "factored": {"a": {"kernel": np.zeros(16)}},
  }
  got = trees.flatten(sharding.shard_like(state, PARAMS, own, mesh))
  assert got["mu/a/kernel"].spec == P(None, "fsdp")
  assert got["count"].spec == got["factored/a/kernel"].spec == P()


def test_put_batch():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  x = np.arange(32.0).reshape(16, 2)
  placed = sharding.put_batch({"x": x}, mesh)["x"]
  np.testing.assert_array_equal(placed, x)
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize("size, near", [(12, 16), (0, 8), (3, 8)])
def test_batch_size(size, near):
  mesh = sharding.make_mesh()
  sharding.check_batch_size(16, mesh)
  with pytest.raises(
    errors.UserError, match=f"config.batch_size is {size}.*try {near}"
  ):
    sharding.check_batch_size(size, mesh)


def test_a_sharded_array_holds_its_part_only():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  kernel = {"kernel": jnp.zeros((64, 16))}
  own = sharding.shard_params(kernel, mesh, ((".*", "fsdp"),))
  placed = jax.device_put(kernel, own)["kernel"]
  assert {s.data.shape for s in placed.addressable_shards} == {(8, 16)}


def test_rows_are_split_within_a_program():
  """Over all devices; in a shard_map over some axes, over the others."""
  mesh = sharding.make_mesh(data=4, fsdp=2)
  fn = functools.partial(sharding.split_rows, mesh=mesh)
  whole = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P()))
  assert jax.jit(fn)(whole).sharding.spec == P(("data", "fsdp"))
  assert jax.jit(fn)(whole[:12]).sharding.spec == P()  # 8 do not divide 12
  inner = jax.shard_map(
    fn, mesh=mesh, in_specs=P(), out_specs=P("data"), axis_names={"data"}
  )
  text = jax.jit(inner).lower(whole).as_text()
  assert text.count("sdy.sharding_constraint") == 1
