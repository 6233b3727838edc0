"""Low-rank adapters: against float64, and as a run that is resumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, lora, losses, train, trees
from sigjax.checkpoints import restore
from sigjax.models import two_towers
from sigjax.weights import npz

ONE = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def model_and_params(scan):
  tower = dict(width=12, depth=1 + scan, num_heads=3, mlp_dim=20, scan=scan)
  model = two_towers.TwoTowers(
    image=dict(tower, patch_size=4, pool_type="map"),
    text=dict(tower, vocab_size=30),
    out_dim=(None, 12),
  )
  batch = dict(
    image=jax.random.normal(jax.random.key(1), (4, 8, 8, 3)),
    text=jax.random.randint(jax.random.key(2), (4, 5), 0, 30),
  )
  params = jax.jit(model.init)(jax.random.key(0), **batch)["params"]
  return model, params, batch


def by_hand(name, w, a, b):
  """Returns W + A B in float64, layer by layer; axes told by the name."""
  inputs = 2 if "/out/" in name else 1
  layers = w.ndim - (3 if "Attention" in name else 2)
  w, a, b = (np.asarray(x, np.float64) for x in (w, a, b))
  if layers:
    return np.stack([by_hand(name, *x) for x in zip(w, a, b)])
  assert w.ndim == a.ndim - 1 + b.ndim - 1 and a.ndim == inputs + 1
  return w + np.tensordot(a, b, axes=1)


@pytest.mark.parametrize("scan", [False, True])
def test_merged_kernels_and_gradients(scan):
  model, params, batch = model_and_params(scan)
  adapters = lora.init(jax.random.key(3), lora.shapes(params, rank=2))
  flat = trees.flatten(adapters)
  # Attention and MLP: of each block, or of the stack, and of the pooling.
  assert len(flat) == 2 * 6 * 3
  start = lora.merge({**params, **adapters})
  jax.tree.map(np.testing.assert_array_equal, start, params)

  noise = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(noise.normal(size=x.shape, scale=0.1), jnp.float32),
    adapters,
  )
  flat = trees.flatten(adapters)
  got = trees.flatten(lora.merge({**params, **adapters}))
  for name, w in trees.flatten(params).items():
    want = w
    if f"lora/{name}/a" in flat:
      want = by_hand(name, w, flat[f"lora/{name}/a"], flat[f"lora/{name}/b"])
      assert np.abs(want - w).max() > 1e-3
    np.testing.assert_allclose(got[name], want, atol=1e-6)

  # The chain rule: dA = dW B^T and dB = A^T dW, from whole gradients.
  def loss(params):
    zimg, ztxt, out = model.apply({"params": params}, **batch)
    return losses.sigmoid_loss(zimg, ztxt, out["t"][0], out["b"][0])

  thin_loss = lambda x: loss(lora.merge({**params, **x}))
  merged = lora.merge({**params, **adapters})
  whole, thin = jax.jit(
    lambda w, x: (jax.grad(loss)(w), jax.grad(thin_loss)(x))
  )(merged, adapters)
  whole = trees.flatten(whole)
  for name, da in trees.flatten(thin).items():
    if not name.endswith("/a"):
      continue
    kernel = name.removeprefix("lora/").removesuffix("/a")
    a, b = flat[name], flat[name[:-1] + "b"]
    db = trees.flatten(thin)[name[:-1] + "b"]
    axes = 3 if "Attention" in kernel else 2
    for layer in np.ndindex(*whole[kernel].shape[:-axes]):
      dw = np.asarray(whole[kernel][layer], np.float64)
      x, y = (np.asarray(v[layer], np.float64) for v in (a, b))
      dw = dw.reshape(x.size // 2, -1)
      x, y = x.reshape(-1, 2), y.reshape(2, -1)
      np.testing.assert_allclose(
        np.reshape(da[layer], x.shape), dw @ y.T, atol=1e-6
      )
      np.testing.assert_allclose(
        np.reshape(db[layer], y.shape), x.T @ dw, atol=1e-6
      )


def test_a_run_with_adapters(tmp_path, tiny_config):
  """From a file of weights, in microbatches; read again, and by tools."""
  params = jax.jit(two_towers.TwoTowers(**tiny_config["model"]).init)(
    jax.random.key(1), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32)
  )["params"]
  npz.save_params(tmp_path / "old.npz", params)
  old = trees.flatten(params)
  config = dict(
    tiny_config,
    total_steps=2,
    microbatches=3,
    eval_first=True,
    evals={"retrieval": dict(tiny_config["evals"]["retrieval"])},
    lora=dict(rank=2),
    init=dict(path=str(tmp_path / "old.npz")),
  )
  config["optim"] = dict(config["optim"], wd_mults=((".*", 0.0),))
  rows = errors.call(train.main, config, "config", tmp_path / "new")
  # What the weights are worth without training, and what it brings.
  lines = (tmp_path / "new/metrics.jsonl").read_text().splitlines()
  first = json.loads(lines[0])
  assert first["step"] == 0 and "retrieval/text->image recall@1" in first
  (tmp_path / "new/config.json").write_text(json.dumps(config))
  found = tmp_path / "new/checkpoints/2"
  with restore.ocp.StandardCheckpointer() as reader:
    stored = trees.flatten(reader.restore(found / "params"))
  for name, x in old.items():  # what is trained is beside it
    if name not in ("t", "b"):
      np.testing.assert_array_equal(stored[name], x)
  assert any(np.abs(x).max() > 0 for k, x in stored.items() if k[-2:] == "/b")
  merged = trees.flatten(restore.read_params(tmp_path / "new", ONE))
  assert set(merged) == set(old)
  name = "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
  want = by_hand(
    name, old[name], stored[f"lora/{name}/a"], stored[f"lora/{name}/b"]
  )
  np.testing.assert_allclose(merged[name], want, atol=1e-6)
  assert np.abs(merged[name] - old[name]).max() > 1e-5

  # The state of the checkpoint is read again, adapters and all.
  again = errors.call(
    train.main, config, "config", tmp_path / "new", eval_only=True
  )
  assert again == rows


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(lora=dict(rank=0)), "config.lora.rank is 0"),
    (dict(lora=dict(rank=2), lock=("img/head",)), 'locks "img/head"'),
    (dict(lora=dict(rank=2, towers=("image",))), 'did you mean "img"'),
    (dict(lora=dict(ranks=2)), "ranks"),
  ],
)
def test_mistakes(tmp_path, tiny_config, change, says):
  config = dict(tiny_config, evals={}, **change)
  config["model"] = dict(config["model"], out_dim=(16, 16))
  with pytest.raises(errors.UserError, match=says):
    errors.call(train.main, config, "config", tmp_path)


def test_no_attention_to_adapt():
  with pytest.raises(errors.UserError, match="has no attention to adapt"):
    lora.shapes({"img": {"head": {"kernel": np.zeros((3, 4))}}}, rank=1)
