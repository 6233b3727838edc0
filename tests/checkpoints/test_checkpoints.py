"""Checkpoints: what is saved is what is read, and faults are named."""

import json
import os
import pathlib
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
from sigjax.runtime import identity
from sigjax.weights import fetch, known, npz, vocabulary

PARAMS = {"img": {"kernel": jnp.arange(64.0).reshape(8, 8)}, "t": jnp.ones(1)}
FSDP = ((".*", "fsdp"),)
RUN = identity.of_run(
  data={"digest": "ab12", "records": 40},
  tokenizer="cd34",
  pp="decode|" + "resize(16)|" * 20 + "value_range(-1,1)",
  model={"image": {"width": 32}, "out_dim": (None, 32)},
)
ABOUT = {"config": {"seed": 7, "evals": {}}, "identity": RUN}


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
  saved = save_lib.Checkpoints(tmp_path).open()
  assert saved.newest() is None
  saved.save(3, state, {"step": 3}, ABOUT)
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
  saved = save_lib.Checkpoints(tmp_path, keep=2, keep_every_steps=4).open()
  for step in range(1, 8):
    saved.save(step, state, {}, ABOUT)
    saved.wait()
  saved.close()
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"4", "6", "7"}


def test_what_was_not_finished_does_not_count(tmp_path):
  state, abstract = make_state()
  saved = save_lib.Checkpoints(tmp_path).open()
  saved.save(1, state, {}, ABOUT)
  saved.close()
  # A run killed while saving leaves its part under a temporary name.
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
  saved = save_lib.Checkpoints(tmp_path).open()
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
  saved = save_lib.Checkpoints(tmp_path).open()
  saved.save(1, make_state()[0], {}, ABOUT)
  saved.wait()
  with pytest.raises(errors.UserError, match=message):
    restore.read(tmp_path, make_state(params, **options)[1])
  assert saved.newest() == 1  # nothing is lost
  saved.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
  saved = save_lib.Checkpoints(tmp_path).open()
  saved.save(1, make_state()[0], {}, ABOUT)
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
      state = make_state()[0].replace(step=jnp.int32(step))
      saved.save(step, state, {"step": step}, ABOUT)


def restored(tmp_path, **options):
  """Returns (the step a run would go on from, or None; its Checkpoints)."""
  saved = save_lib.Checkpoints(tmp_path, **options)
  found = saved.restore_newest(make_state()[1])
  with saved:
    pass
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
def test_any_damaged_file_is_noticed(tmp_path, harm):
  """Each file of a checkpoint in turn, but for two in which nothing is."""
  save(tmp_path, 1)
  folder = tmp_path / "checkpoints/1"
  paths = [path for path in folder.rglob("*") if path.is_file()]
  assert len(paths) > 10 and manifest.fault(folder) == ""
  for path in paths:
    data = path.read_bytes()
    path.unlink() if harm is None else path.write_bytes(harm(data))
    name = path.relative_to(folder).as_posix()
    fault = manifest.fault(folder)
    if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
      assert fault == ""
    elif name == "manifest.json":
      assert fault
    else:
      assert fault.startswith(name)
      parts = [manifest.fault(folder, i, 3) for i in range(3)]
      assert sorted(parts) == ["", "", fault]  # one of three hosts has it
    path.write_bytes(data)
  assert manifest.fault(folder) == ""


@pytest.mark.parametrize("name", ["params/manifest.ocdbt", "about/metadata"])
def test_a_damaged_one_is_set_aside(tmp_path, caplog, name):
  save(tmp_path, 1, 2)
  path = tmp_path / "checkpoints/2" / name
  path.write_bytes(flipped(path.read_bytes()))
  assert restored(tmp_path)[0] == 1
  assert f"checkpoints/2 is damaged ({name} was altered)" in caplog.text
  assert (tmp_path / "checkpoints/2.damaged").exists()


def test_all_files_are_on_disk_before_a_checkpoint_has_its_name(
  tmp_path, monkeypatch
):
  """After a power cut none of them may turn out to be empty."""
  synced, real = set(), os.fsync
  monkeypatch.setattr(
    os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real(fd))
  )
  save(tmp_path, 1)
  folder = tmp_path / "checkpoints/1"
  listed = [
    path
    for path in folder.rglob("*")
    if path.is_file()
    and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
  ]
  assert len(listed) > 10
  assert {p.stat().st_ino for p in listed} <= synced


def test_what_a_run_was_is_kept_with_its_checkpoint(tmp_path):
  save(tmp_path, 1, 2)
  for path in (tmp_path, tmp_path / "checkpoints/1"):
    assert restore.read_about(path) == ABOUT
  # Another command has written another config beside it.
  (tmp_path / "config.json").write_text('{"seed": 8}')
  assert restore.read_about(tmp_path)["config"]["seed"] == 7
  path = tmp_path / "checkpoints/2/about/metadata"
  path.write_bytes(path.read_bytes().replace(b"7", b"8"))
  with pytest.raises(
    errors.UserError, match="2 is damaged .about/metadata was"
  ):
    restore.read_about(tmp_path)
  with pytest.raises(errors.UserError, match="no checkpoint .*3; there are: 1"):
    restore.read_about(tmp_path / "checkpoints/3")


def test_of_an_older_checkpoint_the_workdirs_config_is_used(tmp_path):
  save(tmp_path, 1)
  folder = tmp_path / "checkpoints/1"
  shutil.rmtree(folder / "about")
  manifest.write(folder)
  with pytest.raises(errors.UserError, match="it has no config.json"):
    restore.read_about(tmp_path)
  (tmp_path / "config.json").write_text("")
  with pytest.raises(errors.UserError, match="config.json cannot be read"):
    restore.read_about(tmp_path)
  (tmp_path / "config.json").write_text('{"seed": 9}')
  want = {"config": {"seed": 9}, "identity": {}}
  assert restore.read_about(tmp_path) == want
  saved = save_lib.Checkpoints(tmp_path)
  assert saved.restore_newest(make_state()[1], dict(RUN, pp="x"))


def test_an_older_name_in_a_config_is_read(tmp_path):
  save(tmp_path, 1)
  folder = tmp_path / "checkpoints/1"
  shutil.rmtree(folder / "about")
  manifest.write(folder)
  for old, new in ((None, 0), (96, 96)):
    config = {"model": {"text": {"variant": "B", "embed_rank": old}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = restore.read_about(tmp_path)["config"]["model"]["text"]
    assert found == {"variant": "B", "bottleneck": new}


def test_a_run_of_another_identity_is_not_resumed(tmp_path, caplog):
  save(tmp_path, 1)
  abstract = make_state()[1]

  def refused(**other):
    with pytest.raises(errors.UserError) as e:
      restore.read(tmp_path, abstract, dict(RUN, **other))
    saved = save_lib.Checkpoints(tmp_path)
    with pytest.raises(errors.UserError, match="with another identity"):
      saved.restore_newest(abstract, dict(RUN, **other))
    return str(e.value)

  assert refused(data={"digest": "ef56", "records": 40}) == (
    f"{tmp_path}/checkpoints/1 is of a run with another identity: data.digest "
    'was "ab12", now it is "ef56". Undo this to resume, or give another '
    f'--workdir, where config.init=dict(path="{tmp_path}/checkpoints/1") '
    "starts from these weights"
  )
  assert 'tokenizer was "cd34", now it is "x"' in refused(tokenizer="x")
  assert "config.model.image.width was 32, now it is 64" in refused(
    model={"image": {"width": 64}, "out_dim": [None, 32]}
  )
  text = refused(pp=RUN["pp"].replace("value_range(-1,1)", "flip"))
  assert 'value_range(-1,1)", now it is "' not in text
  assert '|value_range(-1,1)", now it is ..' in text and '|flip"' in text
  # The same one, also where a newer version knows more of it.
  saved = save_lib.Checkpoints(tmp_path)
  assert saved.restore_newest(abstract, {**RUN, "more": 1})


def test_when_all_are_damaged_nothing_starts_anew(tmp_path):
  save(tmp_path, 1, 2)
  for path in (tmp_path / "checkpoints").glob("*/data/metadata"):
    path.write_bytes(b"{}")
  for _ in range(2):
    with pytest.raises(
      errors.UserError,
      match=(r"no undamaged checkpoint \(there are: 1, 2\)"),
    ):
      restored(tmp_path)
  folder = tmp_path / "checkpoints"
  for step in "12":  # nor where they were set aside
    (folder / step).rename(folder / f"{step}.damaged")
  with pytest.raises(errors.UserError, match="are: 1.damaged, 2.damaged"):
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
  saved = save_lib.Checkpoints(tmp_path, keep=1).open()
  saved.save(1, state, {}, ABOUT)
  saved.check(1)
  full_disk(True)
  saved.save(2, state, {}, ABOUT)
  while not saved.failed():
    time.sleep(0.01)
  saved.wait()
  saved.save(3, state, {}, ABOUT)
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
  saved.save(4, state, {}, ABOUT)
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
  saved = save_lib.Checkpoints(tmp_path).open()
  monkeypatch.setattr(
    saved._checkpointer,
    "save",
    lambda *_, **__: os.open(tmp_path / "none/none", os.O_RDONLY),
  )
  saved.save(1, make_state()[0], {}, ABOUT)
  assert saved.failed()
  saved.close()
  assert "step 1 could not be saved: No such file or directory" in caplog.text


TEXT = {
  "img": {"kernel": np.ones((2, 3), np.float32)},
  "txt": {
    "Embed_0": {"embedding": np.ones((5, 3), np.float32)},
    "head": np.ones(3, np.float32),
  },
}
SHAPES = jax.eval_shape(lambda: TEXT)


def no_network(*args):
  raise errors.UserError("no network")


def test_the_tokenizer_beside_a_file(tmp_path):
  npz.save_params(tmp_path / "params.npz", TEXT)
  file = tmp_path / "tokenizer.model"
  read = lambda sha: restore.read_init(
    SHAPES, tmp_path / "params.npz", tokenizer_sha=sha
  )
  assert len(read("any")) == 3
  file.write_bytes(b"theirs")
  assert len(read(identity.sha256(file))) == 3
  with pytest.raises(errors.UserError, match=f'tokenizer=dict.path="{file}"'):
    read("another")


@pytest.mark.parametrize("recorded", [True, False])
def test_embeddings_of_another_tokenizer_are_refused(tmp_path, recorded):
  """Whether the checkpoint says which one it was, or the file beside it."""
  (tmp_path / "tokenizer.model").write_bytes(b"theirs")
  theirs = identity.sha256(tmp_path / "tokenizer.model")
  known_as = {"identity": dict(RUN, tokenizer=theirs)} if recorded else {}
  with save_lib.Checkpoints(tmp_path) as saved:
    saved.save(1, make_state(TEXT, ((".*", "replicate"),))[0], {}, known_as)
  if recorded:
    (tmp_path / "tokenizer.model").unlink()

  def read(sha, shapes=SHAPES, **options):
    return restore.read_init(shapes, tmp_path, tokenizer_sha=sha, **options)

  assert len(read(theirs)) == len(read(None)) == 3
  with pytest.raises(errors.UserError) as e:
    read("another")
  assert str(e.value) == (
    f"config.init.path={tmp_path} was trained with another tokenizer, so its "
    "token embeddings mean other tokens; take that one with "
    f'config.tokenizer=dict(path="{tmp_path}/tokenizer.model"), or train new '
    'embeddings with config.init.dont_load=("txt/Embed_0/.*",)'
  )
  left = read("another", dont_load=("txt/Embed_0/.*",))
  assert set(left) == {"img/kernel", "txt/head"}
  # Without tokens there is nothing to mistake.
  assert read("another", {"img": SHAPES["img"]}, dont_load=("txt/.*",))


def test_a_released_text_tower_with_another_tokenizer(
  tmp_path, monkeypatch, caplog
):
  """Refused, as far as it can be known."""
  monkeypatch.setattr(fetch, "_download", no_network)
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path))
  file = pathlib.Path(fetch.cached(vocabulary.NAMES["c4_en"]))
  npz.save_params(fetch.cached(known.get("siglip/b16_256").url), TEXT)
  want = "siglip/b16_256 was trained with the tokenizer c4_en; whether this run"

  def said(sha, path="siglip/b16_256", shapes=SHAPES, **options):
    caplog.clear()
    restore.read_init(shapes, path, tokenizer_sha=sha, **options)
    return want in caplog.text

  def refused(sha):
    with pytest.raises(errors.UserError, match="another token.*path=.c4_en"):
      said(sha)

  assert said("another")
  gemma = pathlib.Path(fetch.cached(vocabulary.NAMES["gemma"]))
  for name in file, gemma:
    name.parent.mkdir(parents=True, exist_ok=True)
  gemma.write_bytes(b"gemma")
  refused(identity.sha256(gemma))
  assert said("another")
  file.write_bytes(b"c4_en")
  refused("another")
  assert not said(identity.sha256(file))
  assert not said("another", dont_load=["txt/Embed_0/.*"])
  assert not said("another", "siglip/b16_256:img", SHAPES, into="img")
