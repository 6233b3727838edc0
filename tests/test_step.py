"""One step: the same numbers however it is split up."""

from contextlib import nullcontext
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigjax import build, errors, init, losses, optim, sharding, trees
from sigjax import embed as embed_lib
from sigjax import state as state_lib
from sigjax import step as step_lib
from sigjax.models import two_towers
from tools.aot import hlo

B = 16
SPLIT = ((".*/bias", "replicate"), (".*", "fsdp"))
TOWER = dict(width=16, depth=1, num_heads=2, mlp_dim=32)
EXAMPLE = dict(
  image=np.zeros((16, 16, 3), np.float32), text=np.zeros(6, np.int32)
)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  return dict(
    image=rng.normal(size=(B, 16, 16, 3)).astype(np.float32),
    text=rng.integers(0, 20, (B, 6)).astype(np.int32),
  )


def make_model(dropout=0.0, remat="none", **kwargs):
  more = dict(TOWER, dropout=dropout, remat=remat)
  return two_towers.TwoTowers(
    image=dict(more, patch_size=8),
    text=dict(more, vocab_size=20),
    out_dim=(None, 16),
    **kwargs,
  )


@functools.cache
def init_params():
  """Parameters from scratch, made once: compiling this takes seconds."""
  return jax.device_get(
    jax.jit(
      lambda: state_lib.init_params(make_model(), jax.random.key(0), EXAMPLE)
    )()
  )


def run(
  steps=3,
  data=8,
  fsdp=1,
  devices=8,
  table=((".*", "replicate"),),
  microbatches=1,
  feed="device",
  dropout=0.0,
  lock=(),
  loss=types.MappingProxyType({}),
  group=None,
  dtype="float32",
  remat="none",
):
  """Trains some steps; returns the parameters, metrics, and the state."""
  model = make_model(dropout, dtype=dtype, remat=remat)
  mesh = sharding.make_mesh(
    data=data, fsdp=fsdp, devices=jax.devices()[:devices]
  )
  shapes = state_lib.param_shapes(model, EXAMPLE, lock)
  tx, lr_fn = optim.make_optimizer(
    state_lib.split_params(shapes, lock)[0],
    10,
    lr=1e-2,
    wd=1e-3,
    options=dict(eps=1e-3),
    grad_clip_norm=1.0,
  )
  abstract = state_lib.abstract_state(shapes, tx, mesh, table, lock)
  state = jax.tree.map(
    lambda x, a: jax.device_put(jnp.asarray(x, a.dtype), a.sharding),
    state_lib.new_state(init_params(), tx, lock),
    abstract,
  )
  loss_fn = losses.make(mesh, sharding.AXES, **loss)
  step = step_lib.make_train_step(
    model,
    tx,
    lr_fn,
    loss_fn,
    mesh,
    microbatches=microbatches,
    feed=feed,
    state=abstract,
  )
  for i in range(steps):
    more = {} if group is None else {"group": group}
    state, metrics = step(state, {**make_batch(i), **more})
  # Split as before, or the second step would be another program.
  alike = jax.tree.map(lambda x, a: x.sharding == a.sharding, state, abstract)
  assert all(jax.tree.leaves(alike))
  assert step.program is None or step.program._cache_size() == 1
  return jax.device_get(state.params), jax.device_get(metrics), state


@pytest.fixture(scope="module")
def one_device():
  return run(data=1, devices=1)


def assert_close(got, want, rtol=2e-5, atol=2e-6):
  """Compares the parameters and the metrics of two runs."""
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(close, tuple(got[:2]), tuple(want[:2]))


@pytest.mark.parametrize("data, fsdp", [(2, 1), (8, 1), (1, 4), (2, 4)])
def test_any_mesh_gives_the_same_numbers(one_device, data, fsdp):
  got = run(data=data, fsdp=fsdp, devices=data * fsdp, table=SPLIT)
  assert_close(got, one_device)
  if fsdp > 1:  # and it is really split, moments too
    for name, leaf in trees.flatten(got[2]).items():
      if "Dense_0/kernel" in name:
        part = leaf.addressable_shards[0].data.size
        assert part == leaf.size // fsdp, name


def test_three_steps_are_the_formula(one_device):
  """Metrics and parameters against the reference loss, and AdamW by hand."""
  model = make_model()

  def loss(params, batch):
    zimg, ztxt, out = model.apply(
      {"params": params}, batch["image"], batch["text"]
    )
    logits = zimg @ ztxt.T * out["t"][0] + out["b"][0]
    value = losses.sigmoid_loss(zimg, ztxt, out["t"][0], out["b"][0])
    return value, (logits, out["t"][0], out["b"][0])

  gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
  params = trees.flatten(init_params())
  first = {k: np.zeros(x.shape) for k, x in params.items()}
  second = {k: np.zeros(x.shape) for k, x in params.items()}
  for i in range(3):
    (value, (logits, t, b)), grads = gradients(
      trees.unflatten(params), make_batch(i)
    )
    grads = {k: np.float64(x) for k, x in trees.flatten(grads).items()}
    norm = np.sqrt(sum(np.sum(x**2) for x in grads.values()))
    rate = (1 + np.cos(np.pi * i / 10)) / 2
    for k, x in grads.items():
      x = x / max(norm, 1)
      first[k] = 0.9 * first[k] + 0.1 * x
      second[k] = 0.95 * second[k] + 0.05 * x**2
      u = first[k] / (1 - 0.9 ** (i + 1))
      u /= np.sqrt(second[k] / (1 - 0.95 ** (i + 1))) + 1e-3
      decay = 1e-3 * params[k] * k.endswith("/kernel")
      params[k] = np.float32(params[k] - rate * (1e-2 * u + decay))
  right = np.eye(B, dtype=bool)
  got, metrics, state = one_device
  assert state.step == 3
  for key, want in dict(
    loss=value,
    t=t,
    b=b,
    grad_norm=norm,
    pos_logit=np.asarray(logits)[right].mean(),
    neg_logit=np.asarray(logits)[~right].mean(),
    lr=1e-2 * rate,
  ).items():
    assert metrics[key] == pytest.approx(float(want), rel=1e-5), key
  for name, want in params.items():
    np.testing.assert_allclose(
      trees.flatten(got)[name], want, atol=2e-5, err_msg=name
    )


@pytest.mark.parametrize(
  "k, data, fsdp, feed",
  [
    (2, 8, 1, "device"),
    (8, 2, 1, "device"),
    (4, 2, 1, "host"),
    (4, 1, 4, "device"),
    (2, 2, 4, "device"),
    (2, 2, 2, "host"),
  ],
)
def test_microbatches_change_nothing(one_device, k, data, fsdp, feed):
  mesh = dict(data=data, fsdp=fsdp, devices=data * fsdp, table=SPLIT)
  got = run(**mesh, microbatches=k, feed=feed)
  assert_close(got, one_device)


def program(k, fsdp=1):
  """Returns a step in k microbatches, as compiled for eight devices."""
  model = two_towers.TwoTowers(
    image=dict(kind="precomputed", width=16),
    text=dict(TOWER, vocab_size=20),
    out_dim=(None, 16),
  )
  mesh = sharding.make_mesh(fsdp=fsdp)
  batch = dict(
    image=np.zeros((32, 16), np.float32), text=np.zeros((32, 6), np.int32)
  )
  example = {name: x[0] for name, x in batch.items()}
  tx = optax.sgd(1.0)
  loss_fn = losses.make(mesh, sharding.AXES)
  step = step_lib.make_train_step(
    model, tx, lambda s: 0.0, loss_fn, mesh, microbatches=k
  )
  shapes = state_lib.param_shapes(model, example)
  state = state_lib.abstract_state(shapes, tx, mesh, SPLIT)
  batch = sharding.put_batch(batch, mesh)
  return hlo.Program(step.program.lower(state, batch).compile().as_text())


def reductions(found):
  return [c for c in found.collectives() if c.kind == "all-reduce"]


def test_gradients_are_reduced_once_a_step():
  """In no loop, and as many bytes whatever k."""
  two, four = reductions(program(2)), reductions(program(4))
  assert {c.times for c in two + four} == {1}
  sent = sum(c.sent for c in two)
  assert sent == sum(c.sent for c in four)


def test_with_fsdp_gradients_are_cut_before_all_devices_have_them():
  """Kernels are summed over 4 devices, then their quarters over 2."""
  found = program(1, fsdp=4)
  kernel = TOWER["width"] * TOWER["mlp_dim"] * 4
  largest = {8: 0, 4: 0, 2: 0}
  for op in found.computations[found._entry]:
    if op.op == "all-reduce":
      sizes = [size for _, size in hlo.arrays(op.type)]
      n = found._group_size(op)
      largest[n] = max(largest[n], *sizes)
  assert largest[8] < kernel == largest[4] == 4 * largest[2]


def test_microbatches_of_softmax():
  loss = dict(name="softmax")
  assert_close(run(loss=loss, microbatches=2), run(loss=loss))


def test_groups_and_random_negatives_with_microbatches():
  loss = dict(positives="all", negatives=dict(share=0.25, which="random"))
  group = np.arange(B, dtype=np.int32)[:, None] // 3
  both = dict(steps=2, loss=loss, group=group)
  whole = run(data=1, devices=1, **both)
  for feed in ("device", "host"):
    got = run(data=4, devices=4, microbatches=2, feed=feed, **both)
    assert_close(got, whole)


@pytest.mark.parametrize(
  "group, loss, says",
  [
    (None, dict(positives="mask"), 'no "group": add group'),
    ([0], dict(positives="mask"), None),
    ([0], {}, '"group" that positives None does not use'),
    (None, dict(negatives=dict(share=1e-3, which="random")), "none of the 240"),
    (None, dict(tile=0), "tile"),
  ],
)
def test_the_loss_is_refused_before_the_first_step(group, loss, says):
  model = make_model()
  example = dict(EXAMPLE)
  if group:
    example["group"] = np.array(group, np.int32)
  with pytest.raises(errors.UserError, match=says) if says else nullcontext():
    build.build(
      sharding.make_mesh(),
      example,
      10,
      batch_size=B,
      model=dict(image=model.image, text=model.text, bias_init="auto"),
      optim={},
      loss=loss,
    )


def test_each_step_draws_other_negatives():
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  negatives = dict(share=0.25, which="random")
  loss = losses.make(mesh, sharding.AXES, negatives=negatives)
  tx = optax.identity()
  step = step_lib.Step(make_model(), tx, lambda s: 0.0, loss, mesh, 0, 1)
  state = state_lib.new_state(init_params(), tx)
  z = np.random.default_rng(0).normal(size=(2, B, 8)).astype(np.float32)
  fn = jax.jit(
    lambda i: step.pair_loss(state.trained, state.replace(step=i), *z, None)
  )
  assert abs(fn(0) - fn(1)) > 1e-3 and fn(0) == fn(0)


def test_init_does_not_depend_on_the_mesh():
  model = make_model()
  tx = optax.identity()
  mesh = sharding.make_mesh(data=2, fsdp=4)
  abstract = state_lib.abstract_state(
    state_lib.param_shapes(model, EXAMPLE), tx, mesh, ((".*", "fsdp"),)
  )
  state = init.init_state(model, tx, 0, EXAMPLE, abstract)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    state.params,
    init_params(),
  )
  kernel = state.params["txt"]["head"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  # What is given is taken, the rest starts from scratch.
  state = init.init_state(
    model, tx, 0, EXAMPLE, abstract, {"t": np.full(1, 0.5, np.float32)}
  )
  assert state.params["t"] == 0.5 and state.params["b"] == -10


def test_dropout_is_drawn_anew():
  """For each microbatch and each step; nothing else changes between them."""
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])

  def apart(zimg, ztxt, *_, **__):  # those of two equal microbatches
    return sum(
      jnp.sum(jnp.abs(z[: B // 2] - z[B // 2 :])) for z in (zimg, ztxt)
    )

  tx = optax.sgd(0.0)
  half = {k: x[: B // 2] for k, x in make_batch().items()}
  twice = {k: np.concatenate([x, x]) for k, x in half.items()}

  def two_steps(dropout):
    step = step_lib.make_train_step(
      make_model(dropout), tx, lambda s: 0.0, apart, mesh, microbatches=2
    )
    state, found = state_lib.new_state(init_params(), tx), []
    for _ in range(2):
      state, metrics = step(state, twice)
      found.append(float(metrics["loss"]))
    return found

  assert two_steps(0.0) == pytest.approx([0, 0], abs=1e-4)
  before, after = two_steps(0.5)
  assert min(before, after) > 1 and abs(before - after) > 1e-3


def test_dropout_is_the_same_in_both_passes():
  """A step of exact accumulation is the gradient of one function of params.

  With dropout redrawn in the second pass it would not be: the derivative along
  the update would disagree with the change of the loss.
  """
  model = make_model(dropout=0.5)
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  params = init_params()
  loss_fn = functools.partial(
    losses.ring_sigmoid_loss, mesh=mesh, axes=sharding.AXES
  )

  def loss_and_norm(params):
    tx = optax.sgd(1.0)
    step = step_lib.make_train_step(
      model, tx, lambda s: 0.0, loss_fn, mesh, microbatches=4
    ).program
    state = state_lib.new_state(params, tx)
    new, metrics = step(state, make_batch())
    grads = jax.tree.map(lambda a, b: a - b, params, new.params)
    return metrics["loss"], grads

  loss_and_norm = jax.jit(loss_and_norm)
  _, grads = loss_and_norm(params)
  norm = float(optax.tree.norm(grads))
  ahead = lambda s: float(
    loss_and_norm(jax.tree.map(lambda p, g: p + s * g / norm, params, grads))[0]
  )
  h = 2e-2
  assert (ahead(h) - ahead(-h)) / (2 * h) == pytest.approx(norm, rel=2e-2)


@pytest.mark.parametrize("k, feed", [(1, "device"), (2, "device"), (2, "host")])
def test_a_locked_tower_stays_as_it_is(k, feed):
  params, metrics, state = run(
    lock=("img", "t"), microbatches=k, feed=feed, dtype="bfloat16"
  )
  start = init_params()
  for name, was in trees.flatten(start["img"]).items():
    now = trees.flatten(params["img"])[name]
    assert now.dtype == jnp.bfloat16, name
    np.testing.assert_array_equal(now, was.astype(jnp.bfloat16), name)
  assert (
    np.abs(
      params["txt"]["head"]["kernel"] - start["txt"]["head"]["kernel"]
    ).max()
    > 1e-3
  )
  assert np.isfinite(metrics["grad_norm"])
  assert params["t"].dtype == np.float32 and params["t"] == start["t"]
  # Two moments of what is trained, and nothing of what is locked.
  names = trees.flatten(state.opt_state)
  assert not [n for n in names if "/img/" in n or n.endswith("/t")]
  trained = sum(x.size for x in jax.tree.leaves(start["txt"])) + 1
  assert sum(x.size for x in names.values() if x.ndim) == 2 * trained


def test_locked_gradients_are_those_of_the_others():
  """What is trained gets the gradients it had when all was trained."""

  def grads(lock):
    model, loss = make_model(), losses.sigmoid_loss
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    step = step_lib.make_train_step(
      model, optax.sgd(1.0), lambda s: 0.0, loss, mesh
    ).program
    new, metrics = step(
      state_lib.new_state(init_params(), optax.sgd(1.0), lock), make_batch()
    )
    return jax.tree.map(lambda a, b: a - b, init_params(), new.params), metrics

  free, _ = grads(())
  locked, metrics = grads(("img",))
  assert_close((locked["txt"], {}), (free["txt"], {}))
  assert metrics["grad_norm"] == pytest.approx(
    float(optax.tree.norm({k: v for k, v in free.items() if k != "img"})),
    rel=1e-5,
  )


@pytest.mark.parametrize(
  "lock, text",
  [
    (("image",), 'names "image", which is no part'),
    (("txt/Embed0",), 'did you mean "txt/Embed_0"'),
    (("im",), "no part"),
  ],
)
def test_what_cannot_be_locked(lock, text):
  with pytest.raises(errors.UserError, match=re.escape(text)):
    state_lib.param_shapes(make_model(), EXAMPLE, lock)


def test_embed_runs_one_tower():
  model = make_model()
  mesh = sharding.make_mesh()
  params = init_params()
  embed, batch = embed_lib.make_embed(model, mesh), make_batch()
  zimg, none, features = embed(params, image=batch["image"])
  assert none is None
  want, ztxt, out = model.apply({"params": params}, **batch)
  np.testing.assert_allclose(zimg, want, atol=1e-6)
  np.testing.assert_allclose(features, out["img/pre_logits"], atol=1e-6)
  np.testing.assert_allclose(
    embed(params, text=batch["text"])[1], ztxt, atol=1e-6
  )


def test_split_and_merge():
  mesh = sharding.make_mesh()
  x = jnp.arange(32).reshape(16, 2)
  parts = step_lib.split(x, 2, mesh)
  assert parts.shape == (2, 8, 2)
  # Device 0 holds rows 0 and 1: one goes into each microbatch.
  np.testing.assert_array_equal(parts[:, 0, 0], [0, 2])
  np.testing.assert_array_equal(step_lib.merge(parts, mesh), x)
