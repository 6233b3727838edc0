"""Checkpoints in buckets: complete or not there, whatever fails."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import ABOUT, RUN, flipped, make_state

from sigjax import errors
from sigjax.checkpoints import layout, manifest, restore
from sigjax.checkpoints import save as save_lib
from sigjax.runtime import bucket, lock

WRITES = ("PUT", "POST")
MARK = "commit_success.txt"


@pytest.fixture(params=["gs", "s3"])
def run(request, server):
  """Returns a workdir in a bucket."""
  del server
  return bucket.Path(f"{request.param}://bucket/run")


@pytest.fixture
def gs_run(server):
  """Returns one, where both kinds do the same."""
  del server
  return bucket.Path("gs://bucket/run")


def save(run, *steps, **options):
  with save_lib.Checkpoints(run, **options) as saved:
    for step in steps:
      state = make_state()[0].replace(step=jnp.int32(step))
      saved.save(step, state, {"step": step}, ABOUT)
    saved.check(steps[-1])


def restored(run):
  """Returns the step that a run would go on from."""
  saved = save_lib.Checkpoints(run)
  state, data = saved.restore_newest(make_state()[1], RUN)
  with saved:
    pass
  assert data == {"step": int(state.step)}
  return int(state.step)


def test_what_is_saved_is_read(run, server):
  save(run, 2, 3, 4, keep=1, keep_every_steps=2)
  state, abstract = make_state()
  got, data = restore.read(run, abstract, RUN)
  assert data == {"step": 4} and int(got.step) == 4
  jax.tree.map(np.testing.assert_array_equal, got.params, state.params)
  assert restore.read_about(run / "checkpoints/2") == ABOUT
  assert layout.steps(run / "checkpoints") == [2, 4]
  assert not [name for name in server.names() if "/checkpoints/3/" in name]
  assert restore.is_run(str(run)) and not restore.is_run(f"{run}0")
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = restore.read_params(str(run / "checkpoints/2"), one)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  with pytest.raises(errors.UserError, match="no checkpoint .*5; there are: 2"):
    restore.checkpoint_of(run / "checkpoints/5")
  with pytest.raises(errors.UserError, match="run0 has no checkpoints; train"):
    restore.checkpoint_of(f"{run}0")


def test_one_is_complete_when_its_last_object_is_there(run, server):
  """A kill between any two requests leaves no half checkpoint that counts."""
  seen = []
  server.fail = lambda method, name: (
    seen.append(name.removeprefix("bucket/run/checkpoints/2/"))
    if method in WRITES
    else None
  )
  save(run, 2)
  server.fail = lambda method, name: None
  assert seen[-1] == MARK and seen.count(MARK) == 1
  assert {"manifest.json", "params/manifest.ocdbt", "rest/_METADATA"} < {*seen}
  assert manifest.fault(run / "checkpoints/2") == ""
  # What a kill before the last request leaves is swept away.
  (run / "checkpoints/2" / MARK).unlink()
  assert layout.steps(run / "checkpoints") == []
  with pytest.raises(errors.UserError, match="run has no complete checkpoint"):
    restore.read(run, None)
  with save_lib.Checkpoints(run):
    assert not (run / "checkpoints/2").exists()


def test_a_deletion_begins_with_the_mark_of_a_complete_one(gs_run, server):
  save(gs_run, 1)
  deleted = []
  server.fail = lambda method, name: (
    deleted.append(name.split("/", 4)[-1]) if method == "DELETE" else None
  )
  (gs_run / "checkpoints/1").rmtree()
  before = deleted[: deleted.index(MARK)]
  assert "params/manifest.ocdbt" in deleted and server.names() == []
  assert not any("/" in name for name in before)


def test_a_damaged_one_is_set_aside(gs_run, caplog):
  save(gs_run, 1, 2)
  name = "params/manifest.ocdbt"
  path = gs_run / "checkpoints/2" / name
  path.write_bytes(flipped(path.read_bytes()))
  assert restored(gs_run) == 1
  assert f"checkpoints/2 is damaged ({name} was altered)" in caplog.text
  assert (gs_run / "checkpoints/2.damaged/manifest.json").exists()
  assert layout.steps(gs_run / "checkpoints") == [1]
  save(gs_run, 2)
  assert restored(gs_run) == 2


def test_a_put_that_fails(run, server, caplog):
  """It is logged, leaves nothing, and the next save succeeds."""
  with save_lib.Checkpoints(run) as saved:
    server.fail = lambda method, name: (
      403 if "/2/params/" in name and method in WRITES else None
    )
    saved.save(2, make_state()[0], {"step": 2}, ABOUT)
    while not saved.failed():
      time.sleep(0.01)
    saved.wait()
    assert "step 2 could not be saved: access is denied (403)" in caplog.text
    saved.save(3, make_state()[0], {"step": 3}, ABOUT)
    saved.check(3)
    with pytest.raises(
      errors.UserError,
      match="step 4 could not be saved .*newest checkpoint, .*/checkpoints/3",
    ):
      saved.check(4)
  assert layout.steps(run / "checkpoints") == [3]
  assert not [name for name in server.names() if "/checkpoints/2/" in name]


def test_a_bucket_that_does_not_answer_for_a_while(gs_run, server, caplog):
  """That is no damage; what cannot be tidied up is left for later."""
  save(gs_run, 1)
  server.fail = lambda method, name: 503 if "/1/rest/" in name else None
  with pytest.raises(errors.UserError, match="1/rest/.*: All 2 retry attempts"):
    save_lib.Checkpoints(gs_run).restore_newest(make_state()[1])
  server.fail = lambda method, name: 503 if method == "DELETE" else None
  save(gs_run, 2, keep=1)
  assert "it is left there for now" in caplog.text
  server.fail = lambda method, name: None
  save(gs_run, 3, keep=1)
  assert layout.steps(gs_run / "checkpoints") == [3]


def test_a_listing_that_lags(gs_run, server, monkeypatch):
  """What a listing does not show yet is neither lost nor swept away."""
  monkeypatch.setattr(bucket, "LISTED_S", 1)
  server.lag_s = 0.05
  with lock.hold(gs_run):
    assert bucket.lagging
    save(gs_run, 1)
    assert restored(gs_run) == 1
  assert manifest.fault(gs_run / "checkpoints/1") == ""
  listed = json.loads((gs_run / "checkpoints/1/manifest.json").read_text())
  others = {"_CHECKPOINT_METADATA", MARK, "manifest.json"}
  names = {name.split("/", 4)[4] for name in server.names("bucket/run/check")}
  assert listed["sha256_and_size"].keys() == names - others
  # Where that was not noticed, a save fails, and says so.
  bucket.lagging.clear()
  server.lag_s = 5
  with pytest.raises(errors.UserError, match="step 2 could not be saved"):
    save(gs_run, 2)
