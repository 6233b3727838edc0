"""A step that chooses its examples, see curate.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_program import lines, params

from sigjax import curate, errors, sharding, train

N, E = 64, 8  # of the super-batch


def units(rng, *shape):
  z = rng.normal(size=shape)
  return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def softplus(x):
  return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def all_losses(s):
  """Returns the sigmoid losses of all pairs, (N, N) float64."""
  logits = s.t * s.zimg.astype(np.float64) @ s.ztxt.astype(np.float64).T + s.b
  own = np.eye(len(logits), dtype=bool)
  return np.where(own, softplus(-logits), softplus(logits))


def make(seed, t, b):
  rng = np.random.default_rng(seed)
  return curate.Scores(units(rng, N, E), units(rng, N, E), t, b)


@functools.cache
def chosen(devices, chunks, seed=0):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  models = make(1, 5.0, -3.0), make(2, 8.0, -4.0)
  on_devices = jax.tree.map(jnp.float32, models)
  fn = jax.jit(
    lambda *models: curate.choose(
      *models, jax.random.key(seed), mesh, N // 2, chunks
    )
  )
  return models, *jax.device_get(fn(*on_devices))


@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_drawn_is_the_formula(devices):
  """Whole matrices of all pairs, and the same noise."""
  (learner, teacher), drawn, more = chosen(devices, 2)
  score = all_losses(learner) - all_losses(teacher)
  own, size = N // devices, N // 2 // devices // 2
  taken, rows = [], []
  for chunk in range(2):
    odds = np.diag(score) + sum(score[:, j] + score[j] for j in taken if chunk)
    new = []
    for device in range(devices):
      key = jax.random.fold_in(jax.random.key(0), device)
      noise = jax.random.gumbel(jax.random.fold_in(key, chunk), (own,))
      mine = np.arange(device * own, (device + 1) * own)
      logits = np.where(np.isin(mine, taken), -np.inf, odds[mine] + noise)
      new.append(np.argsort(-logits)[:size])
    rows.append(np.array(new))
    taken += [d * own + i for d, found in enumerate(new) for i in found]
  want = np.concatenate(rows, axis=1).ravel()
  np.testing.assert_array_equal(drawn, want)
  gain = np.diag(score)[taken].mean() - np.diag(score).mean()
  assert more == pytest.approx(gain, rel=1e-3)


def test_each_row_is_drawn_once():
  _, drawn, _ = chosen(4, 8)
  for mine in drawn.reshape(4, -1):
    assert len(set(mine.tolist())) == N // 2 // 4
  assert not np.array_equal(drawn, chosen(4, 8, seed=1)[1])


def test_rows_stay_on_their_device():
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  batch = dict(x=np.arange(N), y=np.arange(2 * N).reshape(N, 2))
  drawn = chosen(4, 2)[1]
  put = functools.partial(sharding.put_batch, mesh=mesh)
  got = jax.jit(functools.partial(curate.take, mesh=mesh))(
    put(batch), put(drawn)
  )
  want = (drawn.reshape(4, -1) + np.arange(4)[:, None] * (N // 4)).ravel()
  np.testing.assert_array_equal(got["x"], want)
  np.testing.assert_array_equal(got["y"], batch["y"][want])


def test_a_run_chooses_what_is_to_be_learned(tmp_path, tiny_config, caplog):
  """Taught by a run that has learned; and resumed bit for bit."""
  config = dict(tiny_config, batch_size=8, evals={}, checkpoints={})
  train.main(tmp_path / "teacher", **dict(config, total_steps=40))
  teacher = dict(
    path=str(tmp_path / "teacher"), model=config["model"], chunks=1
  )
  config.update(
    total_steps=6,
    microbatches=1,
    curate=teacher,
    tokenizer=dict(path=str(tmp_path / "teacher/tokenizer.model")),
    checkpoints=dict(every_steps=3, keep=None),
  )
  train.main(tmp_path / "a", **config)
  logged = lines(tmp_path / "a")
  assert np.mean([x["to_learn"] for x in logged]) > 0
  source = str(tmp_path / "a/checkpoints/3")
  train.main(tmp_path / "b", **config, resume=source)
  a, b = params(tmp_path / "a"), params(tmp_path / "b")
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(of=1), "curate.of is 1"),
    (dict(chunks=3), "chunks is 3, of which the 4 examples of a device"),
    (dict(feed="host"), 'config.feed "host" is not for it'),
  ],
)
def test_mistakes_are_one_line(change, says):
  feed = change.pop("feed", "device")
  settings = curate.Settings("x", {}, **{"chunks": 4, **change})
  with pytest.raises(errors.UserError, match=says):
    settings.check(32, sharding.make_mesh(), feed)
