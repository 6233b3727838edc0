"""Checkpoints: what is saved is what is read, and faults are named."""

import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, optim, sharding
from sigjax import state as state_lib
from sigjax.checkpoints import manifest, restore
from sigjax.checkpoints import save as save_lib

PARAMS = {"img": {"kernel": jnp.arange(64.0).reshape(8, 8)}, "t": jnp.ones(1)}
FSDP = ((".*", "fsdp"),)


def make_state(params=PARAMS, table=FSDP, **options):
  tx, _ = optim.make_optimizer(params, 10, **options)
  mesh = sharding.make_mesh(data=1, fsdp=8)
  abstract = state_lib.abstract_state(params, tx, mesh, table)
  state = state_lib.new_state(params, tx).replace(step=jnp.int32(3))
  state = jax.tree.map(
    lambda x, a: jax.device_put(x, a.sharding), state, abstract
  )
  return state, abstract


def test_round_trip(tmp_path):
  state, abstract = make_state()
  saved = save_lib.Checkpoints(tmp_path)
  assert saved.newest() is None
  saved.save(3, state, {"step": 3})
  saved.close()
  got, data = restore.read(tmp_path, abstract)
  assert data == {"step": 3}
  assert jax.tree.structure(got) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, got, state)
  assert got.params["img"]["kernel"].sharding.spec == (
    state.params["img"]["kernel"].sharding.spec
  )
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/3"):
    params = restore.read_params(path, one)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_the_newest_few_and_every_kth_are_kept(tmp_path):
  state, _ = make_state()
  saved = save_lib.Checkpoints(tmp_path, keep=2, keep_every_steps=4)
  for step in range(1, 8):
    saved.save(step, state, {})
    saved.wait()
  saved.close()
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"4", "6", "7"}


def test_what_was_not_finished_does_not_count(tmp_path):
  state, abstract = make_state()
  saved = save_lib.Checkpoints(tmp_path)
  saved.save(1, state, {})
  saved.close()
  # A run killed while saving leaves its part under a temporary name.
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
  saved = save_lib.Checkpoints(tmp_path)
  assert saved.newest() == 1
  restore.read(tmp_path, abstract)
  saved.close()


@pytest.mark.parametrize(
  "params, options, message",
  [
    (
      {"img": {"kernel": jnp.ones((8, 9))}, "t": jnp.ones(1)},
      {},
      r"another model.*shape of img/kernel is \(8, 8\), not \(8, 9\)",
    ),
    (
      {"image": {"kernel": jnp.ones((8, 8))}, "t": jnp.ones(1)},
      {},
      "another model.*missing image/kernel",
    ),
    (PARAMS, dict(name="lion"), "another optimizer.*left over opt_state"),
  ],
)
def test_another_model_is_named(tmp_path, params, options, message):
  saved = save_lib.Checkpoints(tmp_path)
  saved.save(1, make_state()[0], {})
  saved.wait()
  with pytest.raises(errors.UserError, match=message):
    restore.read(tmp_path, make_state(params, **options)[1])
  assert saved.newest() == 1  # nothing is lost
  saved.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
  saved = save_lib.Checkpoints(tmp_path)
  saved.save(1, make_state()[0], {})
  saved.close()
  for path in (tmp_path / "checkpoints/1/params").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(errors.UserError, match="checkpoints/1"):
    restore.read(tmp_path, make_state()[1])


def test_no_checkpoint(tmp_path):
  with pytest.raises(errors.UserError, match="has no checkpoints; train"):
    restore.checkpoint_of(tmp_path)
  assert not list(tmp_path.iterdir())  # looking creates nothing


def save(tmp_path, *steps, **options):
  """A workdir with these steps, as of a run that ended well."""
  with save_lib.Checkpoints(tmp_path, **options) as saved:
    for step in steps:
      saved.save(
        step, make_state()[0].replace(step=jnp.int32(step)), {"step": step}
      )


def restored(tmp_path, **options):
  """Returns (the step a run would go on from, or None; its Checkpoints)."""
  with save_lib.Checkpoints(tmp_path, **options) as saved:
    found = saved.restore_newest(make_state()[1])
  return found and int(found[0].step), saved


def flipped(data):
  return (
    data[: len(data) // 2]
    + bytes([data[len(data) // 2] ^ 1])
    + data[len(data) // 2 + 1 :]
  )


@pytest.mark.parametrize(
  "harm", [flipped, lambda data: data[:-1], lambda data: b"", None]
)
def test_any_damaged_file_is_noticed(tmp_path, caplog, harm):
  """Each file of a checkpoint in turn: named, set aside, the one before used."""
  folder = tmp_path / "checkpoints"
  save(tmp_path, 1, 2)
  names = [
    p.relative_to(folder / "1")
    for p in (folder / "1").rglob("*")
    if p.is_file()
  ]
  assert len(names) > 10
  unneeded = set()
  for name in names:
    caplog.clear()
    (shutil.rmtree(folder / "2"), shutil.copytree(folder / "1", folder / "2"))
    path = folder / "2" / name
    path.unlink() if harm is None else path.write_bytes(harm(path.read_bytes()))
    step, _ = restored(tmp_path)
    if (folder / "2.damaged").exists():
      assert step == 1
      assert f"{folder}/2 is damaged (" in caplog.text
      # A list that names another sum for a file has that file set aside.
      assert name.as_posix() in caplog.text or name.name == "manifest.json"
      (folder / "2.damaged").rename(folder / "2")
    else:
      unneeded.add(name.as_posix())
      assert int(step) == 1  # what it says, being a copy
  # Two in which nothing is, and the list of all, when it is not there at all.
  assert unneeded - {"manifest.json"} == {
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
  }
  assert ("manifest.json" in unneeded) == (harm is None)


def test_when_all_are_damaged_nothing_starts_anew(tmp_path):
  save(tmp_path, 1, 2)
  for path in (tmp_path / "checkpoints").glob("*/data/metadata"):
    path.write_bytes(b"{}")
  for _ in range(2):
    with pytest.raises(
      errors.UserError,
      match=(r"no undamaged checkpoint \(there are: 1.damaged, 2.damaged\)"),
    ):
      restored(tmp_path)
  for read in (restore.read, restore.read_params):
    with pytest.raises(errors.UserError, match="has no complete checkpoint"):
      read(tmp_path, None)


def test_reading_alone_renames_nothing(tmp_path, caplog):
  save(tmp_path, 1, 2)
  path = tmp_path / "checkpoints/2/data/metadata"
  path.write_bytes(b"{}")
  assert restored(tmp_path, read_only=True)[0] == 1
  assert "checkpoints/2 is damaged (data/metadata has 2 bytes" in caplog.text
  assert path.exists()
  for read in (restore.read, restore.read_params):
    with pytest.raises(
      errors.UserError,
      match=(
        r"2 is damaged \(data/metadata has 2 bytes, not .*delete this folder"
      ),
    ):
      read(tmp_path, None)


def test_one_without_a_manifest_is_used_but_said(tmp_path, caplog):
  """Of an older version: what was renamed to its name is complete."""
  save(tmp_path, 1)
  (tmp_path / "checkpoints/1/manifest.json").unlink()
  assert restored(tmp_path)[0] == 1
  assert "1 was written without a manifest.json" in caplog.text


@pytest.fixture
def full_disk():
  """full_disk(True): no file may grow beyond 1000 bytes, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def set_to(full):
    resource.setrlimit(
      resource.RLIMIT_FSIZE, (1000 if full else before[0], before[1])
    )

  yield set_to
  set_to(False)


def test_a_save_that_fails_is_logged_and_the_next_one_succeeds(
  tmp_path, caplog, full_disk
):
  """Even of keep=1, the old one stays until a new one is there."""
  folder = tmp_path / "checkpoints"
  state, abstract = make_state()
  saved = save_lib.Checkpoints(tmp_path, keep=1)
  saved.save(1, state, {})
  saved.check(1)
  full_disk(True)
  saved.save(2, state, {})
  while not saved.failed():
    time.sleep(0.01)
  saved.wait()
  saved.save(3, state, {})
  with pytest.raises(
    errors.UserError,
    match=(
      r"step 3 could not be saved \(File too large\); the same command resumes "
      f"from the newest checkpoint, {folder}/1"
    ),
  ):
    saved.check(3)
  full_disk(False)
  assert "step 2 could not be saved: File too large" in caplog.text
  assert saved.newest() == 1
  restore.read(tmp_path, abstract)
  saved.save(4, state, {})
  saved.check(4)
  assert not saved.failed()
  saved.close()
  assert [p.name for p in folder.iterdir()] == ["4"]
  assert restored(tmp_path)[0] == 3  # make_state's, whole


def test_a_save_is_whole_before_it_has_its_name(tmp_path, monkeypatch):
  """The moment before the new name: all is there, and the old one, too."""
  folder = tmp_path / "checkpoints"
  save(tmp_path, 1, keep=1)
  seen = []

  def write(path):
    real(path)
    seen.append(
      (manifest.fault(path), sorted(p.name for p in folder.iterdir()))
    )

  real = manifest.write
  monkeypatch.setattr(manifest, "write", write)
  save(tmp_path, 2, keep=1)
  ((fault, names),) = seen
  assert not fault and names[0] == "1" and names[1].startswith("2.orbax")
  assert [p.name for p in folder.iterdir()] == ["2"]


def test_keep_is_checked(tmp_path):
  with pytest.raises(errors.UserError, match="config.checkpoints.keep is 0"):
    save_lib.Checkpoints(tmp_path, keep=0)
  save(tmp_path, 1, 2, 3, keep=None)
  assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_save_that_cannot_begin_is_logged(tmp_path, caplog, monkeypatch):
  saved = save_lib.Checkpoints(tmp_path)
  monkeypatch.setattr(
    saved._checkpointer,
    "save",
    lambda *_, **__: os.open(tmp_path / "none/none", os.O_RDONLY),
  )
  saved.save(1, make_state()[0], {})
  assert saved.failed()
  saved.close()
  assert "step 1 could not be saved: No such file or directory" in caplog.text
