"""The Pallas kernels, interpreted, against float64 NumPy; and in a tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import build, init, sharding
from sigjax.models import attention_tpu, transformer, vit
from tools.aot import compiler


def numpy_attention(q, k, v, dout, mask, num_heads):
  """Returns the result and the gradients of q, k and v."""
  batch, length, width = q.shape
  scale = (width // num_heads) ** -0.5

  def heads(x):
    x = np.asarray(x, np.float64).reshape(batch, length, num_heads, -1)
    return x.swapaxes(1, 2)

  q, k, v, dout = map(heads, (q, k, v, dout))
  s = np.where(mask[:, None, None, :], q @ k.swapaxes(2, 3) * scale, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = dout @ v.swapaxes(2, 3)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
  found = p @ v, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
  return [x.swapaxes(1, 2).reshape(batch, length, width) for x in found]


@pytest.mark.parametrize(
  "batch, length, num_heads, head, masked, dtype",
  [
    (4, 196, 2, 64, False, "float32"),  # 2 fill whole registers
    (16, 16, 2, 64, False, "float32"),  # 8 sequences are joined
    (6, 64, 1, 72, True, "float32"),  # 2 are joined
    (2, 49, 2, 72, True, "float32"),  # a head over two registers
    (2, 260, 1, 128, True, "float32"),
    (4, 24, 2, 80, True, "float32"),
    (2, 40, 3, 88, False, "float32"),
    (2, 36, 4, 96, True, "float32"),
    (4, 196, 2, 64, True, "bfloat16"),
    (16, 16, 2, 64, False, "bfloat16"),
    (2, 260, 1, 72, True, "bfloat16"),
  ],
)
def test_against_numpy(batch, length, num_heads, head, masked, dtype):
  compare(batch, length, num_heads, head, masked, dtype)


def test_queries_in_parts(monkeypatch):
  """Where not all fit; the last part has 4 of 260."""
  monkeypatch.setattr(attention_tpu, "VMEM", 2**20)
  plan = attention_tpu.plan(1, 260, 128, 128, 4, attention_tpu.VMEM)
  assert plan.queries == 128
  compare(2, 260, 1, 128, True, "float32")


def compare(batch, length, num_heads, head, masked, dtype):
  rng = np.random.default_rng(0)
  shape = 4, batch, length, num_heads * head
  q, k, v, dout = jnp.asarray(rng.standard_normal(shape), dtype)
  mask = rng.random((batch, length)) < 0.6
  mask[:, length // 2] = True
  given = mask if masked else None
  mesh = sharding.make_mesh(devices=jax.devices()[:2])

  @jax.jit
  def run(*qkv):
    def fn(q, k, v, bias):
      return attention_tpu.attend(q, k, v, given, num_heads, mesh, bias)

    out, vjp = jax.vjp(fn, *qkv)
    return out, *vjp(dout)

  bias = jnp.asarray(rng.standard_normal((1, 1, shape[-1])), dtype)
  got = run(q, k, v, bias)
  allowed = mask if masked else np.ones_like(mask)
  biased = np.asarray(q, np.float64) + np.asarray(bias, np.float64)
  biased = biased.astype(q.dtype)  # queries, like keys, are of the dtype
  want = numpy_attention(biased, k, v, dout, allowed, num_heads)
  want.append(want[1].sum((0, 1), keepdims=True))
  # Rounding the result alone is off by 1.7e-3, rounded weights by 2.0e-3.
  tolerance = dict(float32=[1e-6] * 5, bfloat16=[1.8e-3, *[5e-3] * 4])[dtype]
  for x, y, limit in zip(got, want, tolerance):
    assert x.dtype == dtype
    error = np.linalg.norm(np.asarray(x, np.float64) - y)
    assert error < limit * np.linalg.norm(y)


@pytest.mark.parametrize(
  "topology, length, num_heads, head",
  [
    ("v4:2x2x1", 196, 2, 64),
    ("v4:2x2x1", 1024, 4, 64),  # queries in parts
    ("v5p:2x2x1", 49, 2, 72),
    ("v5p:2x2x1", 729, 16, 72),  # more VMEM than is given without asking
    ("v5e:2x2", 260, 1, 128),
    ("v6e:2x2", 16, 3, 64),  # joined; a register and a half
  ],
)
def test_compiled_for(topology, length, num_heads, head, tpu):
  mesh = sharding.make_mesh(devices=tpu(topology)[0])
  x = jax.ShapeDtypeStruct(
    (64, length, num_heads * head),
    jnp.bfloat16,
    sharding=sharding.batch_sharding(mesh),
  )
  mask = jax.ShapeDtypeStruct(
    (64, length), bool, sharding=sharding.batch_sharding(mesh)
  )

  def fn(q, k, v, mask):
    run = lambda *x: attention_tpu.attend(*x, mask, num_heads, mesh)
    out, vjp = jax.vjp(run, q, k, v)
    return vjp(out)

  compiled = jax.jit(fn).lower(x, x, x, mask).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_compiled_in_a_train_step(tpu):
  """Each tower has both kernels, and no rows move between devices."""
  tower = dict(depth=1, width=128, mlp_dim=128, num_heads=2, remat="attention")
  job = compiler.step_job(
    sharding.make_mesh(devices=tpu("v4:2x2x1")[0]),
    batch_size=32,
    model=dict(
      image=dict(tower, patch_size=8, pool_type="gap"),
      text=dict(tower, vocab_size=32),
      out_dim=(None, 128),
      dtype="bfloat16",
    ),
    optim=dict(lr=1e-3),
    total_steps=10,
    pp_image="decode|resize(32)",
    pp_text="tokenize(16)",
  )
  [program] = compiler.compile_job(job)
  text = program.text
  assert text.count('custom_call_target="tpu_custom_call"') == 4
  assert "all-to-all" not in text and "all-gather" not in text


def step_of(attention, microbatches=1, fsdp=1):
  """Returns the state and metrics after a step of a tiny model."""
  tower = dict(width=16, num_heads=2, mlp_dim=16, attention=attention)
  mesh = sharding.make_mesh(fsdp=fsdp)
  rng = np.random.default_rng(0)
  example = dict(
    image=rng.integers(0, 256, (16, 16, 3), np.uint8),
    text=rng.integers(0, 32, 16, np.int32),
  )
  batch = {
    k: np.stack([np.roll(x, i) for i in range(16)]) for k, x in example.items()
  }
  run = build.build(
    mesh,
    example,
    10,
    batch_size=16,
    microbatches=microbatches,
    model=dict(
      image=dict(tower, patch_size=4, depth=2, scan=True, remat="attention"),
      text=dict(tower, vocab_size=32, depth=1, remat="dots"),
      out_dim=(None, 16),
    ),
    optim=dict(name="adamw", lr=1e-3),
  )
  state = init.init_state(run.model, run.tx, 0, example, run.state)
  return jax.device_get(run.train_step(state, batch))


def test_a_train_step_on_eight_devices():
  """Kernels inside a scan, remat and microbatches, each device's rows alone."""
  state, metrics = step_of("pallas", microbatches=2, fsdp=2)
  want, wanted = step_of("xla")
  for key in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-5)
  # Adam's moments are those of the gradients. (Its update is not compared: of a
  # key's bias, whose gradient is 0, it makes 1 or -1.)
  for tree in state.opt_state, want.opt_state:
    assert len(jax.tree.leaves(tree)) > 20
  for x, y in zip(*map(jax.tree.leaves, (state.opt_state, want.opt_state))):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


def test_what_is_computed_again():
  """With "attention" and "dots", no kernel runs twice; with "full" one does."""
  mesh = sharding.make_mesh()
  image = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)

  def kernels(remat):
    tower = vit.ViT(
      width=32,
      depth=1,
      num_heads=2,
      patch_size=4,
      attention="pallas",
      remat=remat,
      mesh=mesh,
    )
    params = jax.eval_shape(tower.init, jax.random.key(0), image)
    loss = lambda params, image: tower.apply(params, image)[0].sum()
    return str(jax.make_jaxpr(jax.grad(loss))(params, image)).count(
      "name=attention_forward"
    )

  counts = {name: kernels(name) for name in transformer.REMAT}
  assert counts == dict(none=1, dots=1, attention=1, full=2, auto=1)
