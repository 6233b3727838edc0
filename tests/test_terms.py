"""Losses beside the pair loss: the same numbers however a batch is split."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigjax import build, errors, losses, sharding, terms, trees
from sigjax import state as state_lib
from sigjax.models import two_towers
from sigjax.terms import caption

B, V = 32, 20
SPLIT = ((".*/bias", "replicate"), (".*", "fsdp"))
TOWER = dict(width=16, depth=1, num_heads=2, mlp_dim=32)
MODEL: Any = dict(
  image=dict(TOWER, patch_size=8),
  text=dict(TOWER, vocab_size=V),
  out_dim=(None, 16),
)
EXAMPLE = dict(
  image=np.zeros((16, 16, 3), np.float32), text=np.zeros(6, np.int32)
)
CAPTION: Any = dict(type="caption", weight=0.5, depth=1)


def make_batch(seed):
  """Returns texts of 1 to 6 tokens, their end included."""
  rng = np.random.default_rng(seed)
  text = rng.integers(2, V, (B, 6)).astype(np.int32)
  text[np.arange(6)[None] >= rng.integers(0, 6, (B, 1))] = 1
  image = rng.normal(size=(B, 16, 16, 3)).astype(np.float32)
  return dict(image=image, text=text)


@functools.cache
def init_params():
  """Returns parameters whose logits layer is not zero any more."""
  model = two_towers.TwoTowers(**MODEL)
  made = terms.make({"words": dict(CAPTION)}, model)
  params = jax.device_get(
    jax.jit(
      lambda: state_lib.init_params(model, jax.random.key(0), EXAMPLE, made)
    )()
  )
  assert not np.any(params["dec"]["LogitsDense"]["kernel"])
  draw = np.random.default_rng(1).normal(size=(16, V))
  params["dec"]["LogitsDense"]["kernel"] = draw.astype(np.float32)
  return params


@functools.cache
def run(data=1, fsdp=1, k=1, feed="device", lock=(), beside=True, **more):
  """Returns the parameters and the metrics after two steps."""
  devices = jax.devices()[: data * fsdp]
  made = build.build(
    sharding.make_mesh(data=data, fsdp=fsdp, devices=devices),
    EXAMPLE,
    10,
    batch_size=B,
    model=MODEL,
    optim=dict(lr=1e-2, options=dict(eps=1e-3)),
    losses={"words": {**CAPTION, **more}} if beside else {},
    sharding=SPLIT,
    lock=lock,
    microbatches=k,
    feed=feed,
  )
  params = dict(init_params())
  if not beside:
    del params["dec"]
  state = jax.tree.map(
    lambda x, a: jax.device_put(jnp.asarray(x, a.dtype), a.sharding),
    state_lib.new_state(params, made.tx, lock),
    made.state,
  )
  metrics = []
  for i in range(2):
    state, found = made.train_step(state, make_batch(i))
    metrics.append(jax.device_get(found))
  return jax.device_get(state.params), metrics


def assert_close(got, want, rtol=2e-5, atol=3e-6):
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(close, got, want)


def whole_loss(params, batch):
  """The pair loss and the captions', with all logits at once."""
  model = two_towers.TwoTowers(**MODEL)
  zimg, ztxt, out = model.apply({"params": params}, **batch)
  pairs = losses.sigmoid_loss(zimg, ztxt, out["t"][0], out["b"][0])
  (term,) = terms.make({"words": CAPTION}, model)
  kind: Any = term.kind
  text = batch["text"]
  x, kernel, bias = kind.decoder.apply(
    {"params": params["dec"]}, out["img/encoded"], text, jnp.zeros(B, bool)
  )
  log_p = jax.nn.log_softmax(x @ kernel + bias[None, None])
  found = jnp.take_along_axis(log_p, text[..., None], axis=2)[..., 0]
  each = []
  for i, row in enumerate(text):
    end = [*row, 1].index(1) + 1
    each.append(-jnp.mean(found[i, :end]))
  words = sum(each) / B
  return pairs + 0.5 * words, (pairs, words)


def test_a_step_is_the_formula():
  """Metrics, and the size of all gradients, against one plain function."""
  whole = functools.partial(whole_loss, batch=make_batch(0))
  grad = jax.jit(jax.value_and_grad(whole, has_aux=True))
  (_, (pairs, words)), grads = grad(init_params())
  _, (metrics, _) = run(parallel=0.0)
  assert metrics["loss"] == pytest.approx(float(pairs), rel=1e-5)
  assert metrics["words"] == pytest.approx(float(words), rel=1e-5)
  norm = float(optax.tree.norm(grads))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  alone = float(optax.tree.norm({**grads, "dec": {}}))
  assert alone < 0.99 * norm  # the decoder's are in it
  _, (without, _) = run(beside=False)
  assert without["loss"] == pytest.approx(float(pairs), rel=1e-6)
  of_pairs = without["grad_norm"]  # the towers also learn from captions
  assert abs(of_pairs - alone) > 1e-3 * alone


@pytest.mark.parametrize(
  "k, data, fsdp, feed",
  [(4, 4, 2, "device"), (4, 2, 1, "host"), (1, 4, 2, "device")],
)
def test_it_is_the_same_however_it_is_split(k, data, fsdp, feed):
  """Which examples are predicted in parallel, too."""
  assert_close(run(data, fsdp, k, feed), run())


def test_some_examples_of_a_batch_are_predicted_in_parallel():
  words = lambda p: np.array([m["words"] for m in run(parallel=p)[1]])
  some = words(0.5)
  assert np.abs(some - words(0.0)).min() > 1e-4
  assert np.abs(some - words(1.0)).min() > 1e-4


def test_a_locked_tower_stays_as_it_is():
  """The decoder learns from its patches all the same."""
  params, metrics = run(lock=("img",), k=2)
  start = init_params()
  for name, x in trees.flatten(start["img"]).items():
    np.testing.assert_array_equal(trees.flatten(params["img"])[name], x)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
  cross = moved["dec"]["EncDecBlock0"]["CrossAttn"]
  assert min(jax.tree.leaves(cross)) > 1e-4
  assert metrics[0]["words"] == pytest.approx(run()[1][0]["words"], rel=1e-5)


def test_what_a_token_counts():
  """Up to the end of the text; however the rest is filled up."""
  text = np.array([[5, 1, 1, 1], [5, 6, 7, 1], [5, 1, 0, 0], [1, 0, 0, 0]])
  counts = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
  np.testing.assert_array_equal(caption.token_weights(text, False), counts)
  share = counts / counts.sum(1, keepdims=True)
  np.testing.assert_allclose(caption.token_weights(text, True), share)


def test_patches_that_are_padding_are_not_seen():
  """Of NaFlex."""
  (term,) = terms.make({"words": CAPTION}, two_towers.TwoTowers(**MODEL))
  rng = np.random.default_rng(0)
  batch, mask = make_batch(0), np.arange(5)[None] < np.full((B, 1), 4)
  patches = rng.normal(size=(B, 5, 16)).astype(np.float32)
  fn = jax.jit(
    lambda patches: term.total(
      init_params(),
      {},
      {"img/encoded": patches, "img/mask": jnp.asarray(mask)},
      batch,
      jax.random.key(0),
      jnp.arange(B),
    )[0]
  )
  changed = np.where(mask[..., None], patches, 7)
  assert fn(patches) == fn(changed) != fn(changed + 1)


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(words=dict(type="captions")), '"captions" is not known'),
    (dict(words=dict()), "config.losses.words.type"),
    (dict(words=dict(CAPTION, chunks=3)), 'losses.words has no key "chunks"'),
    (dict(words=dict(CAPTION, weight=-1)), "words.weight is -1"),
    (dict(words=dict(CAPTION, parallel=2)), "parallel is 2"),
    (dict(words=dict(CAPTION, chunk=0)), "chunk is 0"),
    (dict(words=dict(CAPTION, num_heads=3)), "width 16 is not a multiple"),
    (dict(grad_norm=CAPTION), "a metric is called so"),
    (dict(one=CAPTION, two=CAPTION), "parameters as config.losses.one"),
  ],
)
def test_mistakes_are_one_line(change, says):
  with pytest.raises(errors.UserError, match=says) as e:
    terms.make(change, two_towers.TwoTowers(**MODEL))
  assert "\n" not in str(e.value)


def test_another_text_may_be_the_target():
  """And it has to be there."""
  model = two_towers.TwoTowers(**MODEL)
  (term,) = terms.make({"words": dict(CAPTION, text="target")}, model)
  batch: Any = make_batch(0)
  batch["target"] = make_batch(1)["text"]
  patches = np.ones((B, 4, 16), np.float32)
  value = lambda term, batch: term.total(
    init_params(),
    {},
    {"img/encoded": patches},
    batch,
    jax.random.key(0),
    jnp.arange(B),
  )[0]
  (plain,) = terms.make({"words": CAPTION}, model)
  want = value(plain, dict(batch, text=batch["target"]))
  assert value(term, batch) == want != value(plain, batch)
  with pytest.raises(errors.UserError, match='predicts "target", which'):
    state_lib.param_shapes(model, EXAMPLE, (), [term])


@pytest.mark.parametrize(
  "image, length, says",
  [
    (dict(kind="precomputed", width=16), 6, 'image.kind is "precomputed"'),
    (MODEL["image"], 1, "texts of at least 2 tokens"),
  ],
)
def test_towers_that_cannot_be_captioned(image, length, says):
  model = two_towers.TwoTowers(**{**MODEL, "image": image})
  example = dict(EXAMPLE, text=np.zeros(length, np.int32))
  with pytest.raises(errors.UserError, match=says):
    made = terms.make({"words": CAPTION}, model)
    state_lib.param_shapes(model, example, (), made)
