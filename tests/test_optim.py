"""Optimizers against plain float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigjax import errors, optim, trees

RNG = np.random.default_rng(0)
PARAMS = {
  "img": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
  "txt": {"kernel": RNG.normal(size=(2, 5)), "bias": RNG.normal(size=5)},
}
GRADS = [
  jax.tree.map(lambda p: RNG.normal(size=p.shape), PARAMS) for _ in range(6)
]
F32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(total=10, **kwargs):
  params = F32(PARAMS)
  tx, lr_fn = optim.make_optimizer(params, total, **kwargs)
  state = tx.init(params)
  for grads in GRADS:
    updates, state = tx.update(F32(grads), state, params)
    params = optax.apply_updates(params, updates)
  return params, state, lr_fn


def close(got, want, rtol=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
    got,
    want,
  )


def numpy_run(direction, lr, wd, multiplier, clip=None):
  """The rule of optim's docstring; kernels alone decay."""
  flat = lambda tree: {(a, b): x for a in tree for b, x in tree[a].items()}
  params = {k: v.copy() for k, v in flat(PARAMS).items()}
  memory = {k: {} for k in params}
  for step, grads in enumerate(map(flat, GRADS)):
    if clip:
      norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
      grads = {k: g * min(1, clip / norm) for k, g in grads.items()}
    for k, g in grads.items():
      decay = wd * params[k] if k[1] == "kernel" else 0
      params[k] = params[k] - multiplier(step) * (
        lr * direction(g, memory[k], step + 1) + decay
      )
  return {a: {b: params[a, b] for b in PARAMS[a]} for a in PARAMS}


def adam(g, memory, n, b1=0.9, b2=0.95):
  memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
  memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g**2
  m, v = memory["m"] / (1 - b1**n), memory["v"] / (1 - b2**n)
  return m / (np.sqrt(v) + 1e-8)


def nadam(g, memory, n, b1=0.9, b2=0.95):
  adam(g, memory, n, b1, b2)
  m = b1 * memory["m"] / (1 - b1 ** (n + 1)) + (1 - b1) * g / (1 - b1**n)
  return m / (np.sqrt(memory["v"] / (1 - b2**n)) + 1e-8)


def lion(g, memory, n, b1=0.9, b2=0.99):
  del n
  m = memory.get("m", 0)
  memory["m"] = b2 * m + (1 - b2) * g
  return np.sign(b1 * m + (1 - b1) * g)


def cosine(step, total=10, warmup=2):
  if step < warmup:
    return (step + 1) / warmup
  return (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize("name, direction", [("adamw", adam), ("lion", lion)])
def test_optimizer_is_the_rule(name, direction):
  got, _, lr_fn = run(
    name=name,
    lr=0.1,
    wd=0.01,
    grad_clip_norm=2.0,
    schedule=dict(name="cosine", warmup_steps=2),
  )
  close(got, numpy_run(direction, 0.1, 0.01, cosine, clip=2.0))
  np.testing.assert_allclose(
    [lr_fn(s) for s in range(10)],
    [0.1 * cosine(s) for s in range(10)],
    rtol=1e-5,
    atol=1e-9,
  )


def muon(g, memory, n, beta=0.95):
  """Nesterov's momentum with singular values near 1, and an RMS of about .2."""
  memory["m"] = beta * memory.get("m", 0) + (1 - beta) * g
  m = beta * memory["m"] / (1 - beta ** (n + 1))  # Nesterov: of the next step
  m += (1 - beta) * g / (1 - beta**n)
  u, values, v = np.linalg.svd(m, full_matrices=False)
  values /= np.linalg.norm(values)
  for _ in range(5):  # Newton and Schulz, with the coefficients of K. Jordan
    values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
  return 0.2 * np.sqrt(max(g.shape)) * (u * values) @ v


@pytest.mark.parametrize("scan", [False, True])
def test_muon_makes_the_blocks_kernels_orthogonal(scan):
  # The kernels of a block, as (inputs, outputs) of the product they are for.
  W, H, D, M = 32, 2, 16, 48
  heads, name = "MultiHeadDotProductAttention_0", "txt/Transformer/encoderblock"
  shapes = {
    f"{heads}/query/kernel": ((W, H, D), (W, H * D)),
    f"{heads}/out/kernel": ((H, D, W), (H * D, W)),
    "MlpBlock_0/Dense_0/kernel": ((W, M), (W, M)),
    "MlpBlock_0/Dense_1/kernel": ((M, W), (M, W)),
  }
  rng = np.random.default_rng(1)
  normal = lambda shape: rng.normal(size=(2, *shape) if scan else shape)
  block = name if scan else f"{name}_3"
  flat = {f"{block}/{key}": shape for key, (shape, _) in shapes.items()}
  flat |= {"txt/head/kernel": (W, W), f"{block}/{heads}/query/bias": (H, D)}
  grads = [
    trees.unflatten({k: normal(s) for k, s in flat.items()}) for _ in range(3)
  ]
  params = F32(jax.tree.map(np.zeros_like, grads[0]))
  direction, memory = optim.muon(), {}
  state, update = direction.init(params), jax.jit(direction.update)
  for n, g in enumerate(grads, start=1):
    with jax.numpy_dtype_promotion("standard"):  # as in make_optimizer
      u, state = update(F32(g), state, params)
    got, given = trees.flatten(u), trees.flatten(g)
    for key, (_, matrix) in shapes.items():
      layers = 2 if scan else 1
      a = np.reshape(got[f"{block}/{key}"], (layers, *matrix))
      b = np.reshape(given[f"{block}/{key}"], (layers, *matrix))
      for i in range(layers):
        want = muon(b[i], memory.setdefault((key, i), {}), n)
        np.testing.assert_allclose(a[i], want, rtol=1e-3, atol=1e-4)
    # Everything else is Adam's.
    for key in ("txt/head/kernel", f"{block}/{heads}/query/bias"):
      want = nadam(given[key], memory.setdefault(key, {}), n)
      np.testing.assert_allclose(got[key], want, rtol=1e-4, atol=1e-5)


def test_adafactor_factors_and_descends():
  target = jnp.asarray(RNG.normal(size=(64, 48)), jnp.float32)
  params = {"kernel": jnp.zeros_like(target)}
  tx, _ = optim.make_optimizer(
    params, 300, name="adafactor", lr=0.05, wd_mults=((".*", 0.0),)
  )
  state = tx.init(params)
  sizes = [x.size for x in jax.tree.leaves(state) if x.size > 1]
  assert sorted(sizes) == [48, 64, 64 * 48]  # two factors, one first moment

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p: p - target, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(300):
    params, state = step(params, state)
  error = jnp.abs(params["kernel"] - target).mean() / jnp.abs(target).mean()
  assert error < 0.02


def test_lr_mults_and_wd_mults():
  table = (("img/.*", 0.5), (".*", 1.0))
  half, _, _ = run(
    lr=0.1,
    lr_mults=table,
    wd_mults=((".*", 0.0),),
    schedule=dict(name="constant"),
  )
  full, _, _ = run(
    lr=0.1, wd_mults=((".*", 0.0),), schedule=dict(name="constant")
  )
  close(half["txt"], full["txt"])
  # Adam's direction does not depend on the parameters, so it is just halved.
  jax.tree.map(
    lambda h, f, p: np.testing.assert_allclose(
      h - p, 0.5 * (f - p), rtol=1e-4, atol=1e-6
    ),
    half["img"],
    full["img"],
    PARAMS["img"],
  )


@pytest.mark.parametrize(
  "options, points",
  [
    (dict(name="linear", warmup_steps=2), {0: 0.5, 1: 1, 2: 1, 6: 0.5, 10: 0}),
    (
      dict(name="rsqrt", timescale=3, cooldown_steps=2),
      {0: 1, 3: 0.5**0.5, 8: (3 / 11) ** 0.5, 9: 0.5**2, 10: 0},
    ),
    (dict(name="cosine"), {0: 1, 5: 0.5, 10: 0, 11: 0}),
  ],
)
def test_schedules(options, points):
  schedule = optim.make_schedule(10, **options)
  for step, value in points.items():
    assert float(schedule(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(name="adam"), 'config.optim.name "adam" is not known'),
    (dict(options=dict(beta2=0.9)), 'config.optim.options has no key "beta2"'),
    (dict(schedule=dict(name="cos")), '(did you mean "cosine"?)'),
    (dict(schedule=dict(warmup=3)), 'has no key "warmup"'),
    (dict(schedule=dict(warmup_steps=11)), "warmup_steps is 11"),
    (dict(wd_mults=((".*/kernel", 1.0),)), "wd_mults has no row for 2"),
    (dict(lr_mults=(("image/.*", 0.1), (".*", 1))), "matches no parameter"),
  ],
)
def test_mistakes_are_named(kwargs, message):
  with pytest.raises(errors.UserError) as e:
    optim.make_optimizer(F32(PARAMS), 10, **kwargs)
  assert message in str(e.value)
