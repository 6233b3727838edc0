"""Checkpoints: what is saved is what is read, and faults are named."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import checkpoint
from sigjax import errors
from sigjax import optim
from sigjax import sharding
from sigjax import step as step_lib

PARAMS = {"img": {"kernel": jnp.arange(64.0).reshape(8, 8)}, "t": jnp.ones(1)}
FSDP = ((".*", "fsdp"),)


def make_state(params=PARAMS, table=FSDP, **options):
  tx, _ = optim.make_optimizer(params, 10, **options)
  mesh = sharding.make_mesh(data=1, fsdp=8)
  abstract = step_lib.abstract_state(params, tx, mesh, table)
  state = step_lib.new_state(params, tx).replace(step=jnp.int32(3))
  state = jax.tree.map(
      lambda x, a: jax.device_put(x, a.sharding), state, abstract)
  return state, abstract


def test_round_trip(tmp_path):
  state, abstract = make_state()
  saved = checkpoint.Checkpoints(tmp_path)
  assert saved.newest() is None
  saved.save(3, state, {"step": 3})
  saved.close()
  got, data = checkpoint.read(tmp_path, abstract)
  assert data == {"step": 3}
  assert jax.tree.structure(got) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, got, state)
  assert got.params["img"]["kernel"].sharding.spec == (
      state.params["img"]["kernel"].sharding.spec)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/3"):
    params = checkpoint.read_params(path, one)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_the_newest_few_and_every_kth_are_kept(tmp_path):
  state, _ = make_state()
  saved = checkpoint.Checkpoints(tmp_path, keep=2, keep_every_steps=4)
  for step in range(1, 8):
    saved.save(step, state, {})
    saved.wait()
  saved.close()
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"4", "6", "7"}


def test_what_was_not_finished_does_not_count(tmp_path):
  state, abstract = make_state()
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, state, {})
  saved.close()
  # A run killed while saving leaves its part under a temporary name.
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
  saved = checkpoint.Checkpoints(tmp_path)
  assert saved.newest() == 1
  saved.restore(1, abstract)
  saved.close()


@pytest.mark.parametrize("params, options, message", [
    ({"img": {"kernel": jnp.ones((8, 9))}, "t": jnp.ones(1)}, {},
     r"another model.*shape of img/kernel is \(8, 8\), not \(8, 9\)"),
    ({"image": {"kernel": jnp.ones((8, 8))}, "t": jnp.ones(1)}, {},
     "another model.*missing image/kernel"),
    (PARAMS, dict(name="lion"), "another optimizer.*left over opt_state"),
])
def test_another_model_is_named(tmp_path, params, options, message):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, make_state()[0], {})
  saved.wait()
  with pytest.raises(errors.UserError, match=message):
    saved.restore(1, make_state(params, **options)[1])
  assert saved.newest() == 1  # nothing is lost
  saved.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, make_state()[0], {})
  saved.close()
  for path in (tmp_path / "checkpoints/1/params").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(errors.UserError, match="checkpoints/1"):
    checkpoint.read(tmp_path, make_state()[1])


def test_no_checkpoint(tmp_path):
  with pytest.raises(errors.UserError, match="has no checkpoints; train"):
    checkpoint.open_step(tmp_path)
  assert not list(tmp_path.iterdir())  # looking creates nothing
