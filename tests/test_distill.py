"""Self-distillation and masked prediction, see terms/distill.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigjax import build, errors, prototypes, sharding, terms, trees
from sigjax import state as state_lib
from sigjax.models import two_towers

B, STEPS = 16, 3
TOWER = dict(width=16, depth=1, num_heads=2, mlp_dim=32)
MODEL: Any = dict(
  image=dict(TOWER, patch_size=8),
  text=dict(TOWER, vocab_size=20),
  out_dim=(None, 16),
)
SHAPES = dict(image=(16, 16, 3), text=(6,), local=(2, 8, 8, 3))
SHAPES["global"] = (16, 16, 3)
EXAMPLE: Any = {k: np.zeros(shape, np.float32) for k, shape in SHAPES.items()}
EXAMPLE["text"] = EXAMPLE["text"].astype(np.int32)
DISTILL: Any = dict(
  type="distill",
  prototypes=24,
  patch_prototypes=40,
  hidden=16,
  bottleneck=8,
  chunk=3,
)


def make_batch(seed):
  rng = np.random.default_rng(seed)
  batch: Any = {
    k: rng.normal(size=(B, *shape)).astype(np.float32)
    for k, shape in SHAPES.items()
  }
  batch["text"] = rng.integers(2, 20, (B, 6)).astype(np.int32)
  return batch


def make_term(model=None, span=(0, 10), **more):
  spans = {"self": terms.Span(*span)}
  towers = two_towers.TwoTowers(**{**MODEL, **(model or {})})
  (term,) = terms.make({"self": {**DISTILL, **more}}, towers, spans)
  return term


@functools.cache
def init_params():
  """Returns parameters far enough from zero that every part counts."""
  model = two_towers.TwoTowers(**MODEL)
  init = lambda: state_lib.init_params(
    model, jax.random.key(0), EXAMPLE, [make_term()]
  )
  grow = lambda name, x: x * (3 if name.startswith("distill/") else 1)
  return jax.device_get(jax.jit(lambda: trees.map_named(grow, init()))())


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def unit(x, axis):
  return x / np.sqrt((x * x).sum(axis, keepdims=True))


@pytest.mark.parametrize("devices", [None, 8])
def test_the_loss_is_the_formula(devices):
  """Value, centre sums and gradients, in chunks that do not divide the rows."""
  rng = np.random.default_rng(0)
  rows, views, width, k = 24, 3, 5, 7
  x, u = rng.normal(size=(rows, views, width)), rng.normal(size=(rows, width))
  p, q = rng.normal(size=(width, k)), rng.normal(size=(width, k))
  centre = rng.normal(size=k) / 4
  mesh = devices and sharding.make_mesh(data=4, fsdp=2)
  run = functools.partial(
    prototypes.distillation,
    temperature=0.2,
    teacher_temperature=0.1,
    chunk=5,
    mesh=mesh,
  )
  f32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
  fn = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4), has_aux=True))
  (got, seen), grads = fn(*f32(x, u, p, q, centre))

  cosines = unit(u, 1) @ unit(q, 0)
  target = softmax((cosines - centre) / 0.1)

  def whole(x, p):
    log_q = np.log(softmax(unit(x, 2) @ unit(p, 0) / 0.2))
    return -(target[:, None] * log_q).sum() / views

  np.testing.assert_allclose(got, whole(x, p), rtol=1e-5)
  np.testing.assert_allclose(seen, cosines.sum(0), rtol=1e-4, atol=1e-5)
  for i, at in ((0, (5, 2, 3)), (2, (4, 6))):
    args = [x.copy(), p.copy()]
    slopes = []
    for step in (1e-5, -1e-5):
      moved = [a.copy() for a in args]
      moved[i // 2][at] += step
      slopes.append(whole(*moved))
    want = (slopes[0] - slopes[1]) / 2e-5
    np.testing.assert_allclose(grads[i][at], want, rtol=1e-3, atol=1e-5)
  for i in (1, 3, 4):  # nothing of the teacher learns
    assert not np.any(grads[i])


def test_a_teacher_that_is_the_student_and_sees_the_same():
  """The loss is the entropy of its prototypes, and no gradient is left."""
  batch = make_batch(0)
  batch["local"] = batch["global"][:, None]
  params: Any = init_params()

  def loss(teacher_temperature, times=1.0):
    kind: Any = make_term(
      masks=0, temperature=0.1, teacher_temperature=teacher_temperature
    ).kind
    held = kind.hold(params)
    tower = jax.tree.map(lambda x: times * x, held["teacher"]["img"])
    held["teacher"]["img"] = tower
    keys = jax.random.split(jax.random.key(0), B)
    fn = lambda params: kind(params, held, {}, batch, keys)
    return jax.jit(jax.value_and_grad(fn, has_aux=True))(params)

  (got, sums), grads = loss(0.1)
  model = two_towers.TwoTowers(**MODEL)
  z: Any = model.apply({"params": params}, batch["global"], None)
  x = np.asarray(z[2]["img/pre_logits"], np.float64)
  own = params["distill"]["view"]
  for i in range(3):
    layer = own[f"Dense_{i}"]
    x = x @ layer["kernel"].astype(np.float64) + layer["bias"]
    if i < 2:
      x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  cosines = unit(x, 1) @ unit(own["prototypes"].astype(np.float64), 0)
  p = softmax(cosines / 0.1)
  np.testing.assert_allclose(got, -(p * np.log(p)).sum(), rtol=1e-4)
  np.testing.assert_allclose(sums["view"], cosines.sum(0), atol=2e-4)
  _, others = loss(0.05)
  assert optax.tree.norm(grads) < 1e-4 * optax.tree.norm(others)
  (_, others), _ = loss(0.1, times=1.5)  # it is the teacher that is asked
  assert np.abs(others["view"] - sums["view"]).max() > 0.1


def test_hidden_patches():
  """Half of them, others for each example, and only they are compared."""
  term = make_term(views=0)
  kind: Any = term.kind
  batch, params = make_batch(0), init_params()
  keys = jax.random.split(jax.random.key(0), B)
  places, mask = kind._draw(batch["global"], keys)
  assert (np.asarray(mask).sum(1) == 2).all()
  assert np.take_along_axis(np.asarray(mask), np.asarray(places), 1).all()
  assert len({tuple(row) for row in np.asarray(mask).tolist()}) > 2

  fn = jax.jit(
    lambda views: kind(
      params, term.kind.hold(params), {}, {"global": views}, keys
    )[0]
  )
  # The student sees none of what is hidden, the teacher does.
  tower = two_towers.image_tower(two_towers.TwoTowers(**MODEL))
  token = jnp.asarray(params["distill"]["token"])
  see = jax.jit(
    lambda views: tower.apply(
      {"params": params["img"]}, views, hidden=(mask, token)
    )[1]["encoded"]
  )
  views = batch["global"]
  changed = views.reshape(B, 2, 8, 2, 8, 3).swapaxes(2, 3).copy()
  changed = changed.reshape(B, 4, 8, 8, 3)
  changed[np.asarray(mask)] += 1.0
  changed = changed.reshape(B, 2, 2, 8, 8, 3).swapaxes(2, 3)
  changed = changed.reshape(views.shape)
  np.testing.assert_allclose(see(changed), see(views), atol=1e-6)
  assert abs(fn(changed) - fn(views)) > 1e-3


def test_the_teacher_follows():
  """An average after three steps by hand; at the last step it stands still."""
  kind = make_term(span=(2, 6), momentum=0.9).kind
  params: Any = init_params()
  held = kind.hold(params)
  teacher = np.asarray(params["img"]["embedding"]["kernel"], np.float64)
  centre = np.zeros(24)
  for i, step in enumerate((2, 3, 5)):
    params = jax.tree.map(lambda x: x + 1.0, params)
    means = {k: x + float(i) for k, x in kind.nothing().items()}
    held = kind.after(held, params, means, step)
    by = 0.1 * (1 + np.cos(np.pi * (step - 1) / 4)) / 2
    now = np.asarray(params["img"]["embedding"]["kernel"], np.float64)
    teacher += by * (now - teacher)
    centre += 0.1 * (i - centre)
  assert by == pytest.approx(0, abs=1e-12)
  got = held["teacher"]["img"]["embedding"]["kernel"]
  np.testing.assert_allclose(got, teacher, rtol=1e-5)
  np.testing.assert_allclose(held["centre"]["view"], centre, rtol=1e-6)
  assert "token" not in held["teacher"]["distill"]


@functools.cache
def run(data=1, fsdp=1, k=1, feed="device"):
  """Returns the state after some steps, and all metrics."""
  devices = jax.devices()[: data * fsdp]
  made = build.build(
    sharding.make_mesh(data=data, fsdp=fsdp, devices=devices),
    EXAMPLE,
    10,
    batch_size=B,
    model=MODEL,
    optim=dict(lr=1e-2, options=dict(eps=1e-3)),
    losses={"self": dict(DISTILL, momentum=0.5, weight=0.5)},
    sharding=((".*/bias", "replicate"), (".*", "fsdp")),
    microbatches=k,
    feed=feed,
  )
  state = jax.tree.map(
    lambda x, a: jax.device_put(jnp.asarray(x, a.dtype), a.sharding),
    state_lib.new_state(init_params(), made.tx, (), made.terms),
    made.state,
  )
  metrics = []
  for i in range(STEPS):
    state, found = made.train_step(state, make_batch(i))
    metrics.append(jax.device_get(found))
  kernel = state.held["distill"]["teacher"]["img"]["embedding"]["kernel"]
  assert kernel.sharding == state.params["img"]["embedding"]["kernel"].sharding
  return jax.device_get((state.params, state.held)), metrics


@pytest.mark.parametrize(
  "data, fsdp, k, feed",
  [(4, 2, 1, "device"), (2, 2, 4, "device"), (2, 1, 2, "host")],
)
def test_it_is_the_same_however_it_is_split(data, fsdp, k, feed):
  """The teacher and its centre, too."""
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
  jax.tree.map(close, run(data, fsdp, k, feed), run())


def test_what_learns():
  (params, held), metrics = run()
  start = init_params()
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
  for name, far in trees.flatten(moved["distill"]).items():
    assert far > 1e-4, name
  teacher = held["distill"]["teacher"]["img"]["embedding"]["kernel"]
  student = params["img"]["embedding"]["kernel"]
  assert np.abs(teacher - student).max() > 1e-4
  assert np.abs(held["distill"]["centre"]["patch"]).max() > 1e-3
  assert all(np.isfinite(m["self"]) and m["self"] > 0 for m in metrics)


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(views=0, masks=0), "nothing to compute"),
    (dict(momentum=2), "momentum is 2"),
    (dict(temperatur=1), 'has no key "temperatur"'),
  ],
)
def test_mistakes_are_one_line(change, says):
  with pytest.raises(errors.UserError, match=says):
    make_term(**change)


@pytest.mark.parametrize(
  "lacks, change, says",
  [
    ("global", {}, "needs examples with global and local"),
    ("local", {}, "op local_views"),
    ("", dict(hidden_share=0.1), "hides 0"),
  ],
)
def test_views_that_are_missing(lacks, change, says):
  example = {k: x for k, x in EXAMPLE.items() if k != lacks}
  model = two_towers.TwoTowers(**MODEL)
  with pytest.raises(errors.UserError, match=says):
    state_lib.param_shapes(model, example, (), [make_term(**change)])


def test_towers_without_pixels():
  with pytest.raises(errors.UserError, match='kind "precomputed"'):
    make_term(dict(image=dict(kind="precomputed", width=16)))
