"""The losses against float64 NumPy, and what they may cost.

`reference` spells every pair's gradient out, unlike anything in losses.py.
"""

import functools
import re

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import losses, ring, softmax

B, E = 48, 16  # 48 texts are 6 on each of 8 devices: tiles of 4 come out uneven
T, BIAS = 10.0, -5.0


def reference(kind, zimg, ztxt, t, b):
  """Loss and its gradients by zimg, ztxt, t, b; all float64."""
  zimg, ztxt = np.float64(zimg), np.float64(ztxt)
  n = len(zimg)
  cosine = np.einsum("ie,je->ij", zimg, ztxt)
  if kind == "sigmoid":
    label = np.where(np.arange(n)[:, None] == np.arange(n), 1.0, -1.0)
    score = label * (t * cosine + b)
    loss = np.sum(np.log1p(np.exp(-score))) / n
    slope = -label / (1 + np.exp(score)) / n
  else:
    p = np.exp(t * cosine)
    by_image, by_text = p / p.sum(1, keepdims=True), p / p.sum(0)
    loss = -np.mean(np.log(np.diag(by_image)) + np.log(np.diag(by_text))) / 2
    slope = ((by_image + by_text) / 2 - np.eye(n)) / n
  return loss, (
    t * slope @ ztxt,
    t * slope.T @ zimg,
    np.sum(slope * cosine),
    np.sum(slope) if kind == "sigmoid" else 0.0,
  )


def embeddings(dtype=jnp.float32, n=B, seed=0):
  rng = np.random.default_rng(seed)
  zimg = rng.normal(size=(n, E))
  ztxt = zimg + rng.normal(size=(n, E))
  return [
    jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), dtype)
    for z in (zimg, ztxt)
  ]


def mesh_of(**axes):
  shape = tuple(axes.values())
  devices = np.reshape(jax.devices()[: np.prod(shape)], shape)
  return jax.sharding.Mesh(devices, tuple(axes))


def scalars():
  return jnp.float32(T), jnp.float32(BIAS)


def grads_of(loss, **options):
  return jax.jit(
    jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2, 3))
  )


def assert_close(got, want, rtol):
  got, want = np.float64(got), np.float64(want)
  assert got.shape == want.shape
  error = np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)
  assert error <= rtol, f"relative error {error:.1e}"


def check(kind, z, rtol, loss=None, **options):
  loss = loss or losses.LOSSES[kind]()
  loss_value, grads = grads_of(loss, **options)(*z, *scalars())
  want, want_grads = reference(kind, *z, T, BIAS)
  assert_close(loss_value, want, 1e-6)
  for x, want_x, given in zip(grads, want_grads, (*z, *scalars())):
    assert x.dtype == given.dtype
    assert_close(x, want_x, rtol)


@pytest.mark.parametrize(
  "kind,loss",
  [("sigmoid", losses.sigmoid_loss), ("softmax", softmax.softmax_loss)],
)
def test_plain_losses(kind, loss):
  check(kind, embeddings(), 3e-6, loss)


def test_value_where_training_begins():
  # With no cosines the loss is 10 for the positive and log1p(exp(-10)) per
  # pair: the figure a first step should log.
  eye = jnp.eye(2 * B, dtype=jnp.float32)
  loss = losses.sigmoid_loss(
    eye[:B], eye[B:], jnp.float32(10), jnp.float32(-10)
  )
  assert_close(loss, 10 + B * np.log1p(np.exp(-10)), 1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"tile": 4},
    {"tile": 5, "direction": "both"},
    {"tile": 7, "comm": "all_gather"},
  ],
  ids=str,
)
def test_ring_sigmoid(devices, options):
  check("sigmoid", embeddings(), 1e-6, mesh=mesh_of(data=devices), **options)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_ring_sigmoid_bfloat16(devices):
  check(
    "sigmoid",
    embeddings(jnp.bfloat16),
    1e-2,
    mesh=mesh_of(data=devices),
    tile=4,
  )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_ring_softmax(devices):
  # One rounding of a log-sum-exp of about 8 per tile costs some accuracy.
  check(
    "softmax",
    embeddings(),
    5e-6,
    mesh=mesh_of(data=devices),
    tile=4,
    direction="both" if devices == 4 else "forward",
  )


def test_ring_softmax_bfloat16():
  check("softmax", embeddings(jnp.bfloat16), 1e-2, mesh=mesh_of(data=2))


@pytest.mark.parametrize(
  "options", [{}, {"direction": "both"}, {"comm": "all_gather"}], ids=str
)
def test_several_axes_make_one_ring(options):
  mesh = mesh_of(data=2, model=2, fsdp=2)
  check(
    "sigmoid", embeddings(), 1e-6, mesh=mesh, axes=("data", "fsdp"), **options
  )


@pytest.mark.parametrize("options", [{}, {"direction": "both"}], ids=str)
def test_devices_may_be_in_any_order_on_the_ring(options, monkeypatch):
  monkeypatch.setattr(ring, "order", lambda devices: (2, 0, 3, 1))
  mesh = mesh_of(data=4)
  check("sigmoid", embeddings(), 1e-6, mesh=mesh, tile=5, **options)
  low = lowered(all_grads, mesh=mesh, tile=5, **options)
  pairs = "[[2, 0], [0, 3], [3, 1], [1, 2]]"
  assert f"source_target_pairs = dense<{pairs}>" in low.as_text()


def test_value_alone_is_the_same():
  mesh = mesh_of(data=4)
  for kind, pick in losses.LOSSES.items():
    loss = pick()
    got = jax.jit(functools.partial(loss, mesh=mesh, tile=5))(
      *embeddings(), *scalars()
    )
    assert_close(got, reference(kind, *embeddings(), T, BIAS)[0], 1e-6)


def test_under_scan_and_remat():
  # Two batches in one scan, weighted, so that the cotangent is not 1.
  loss = functools.partial(losses.ring_sigmoid_loss, mesh=mesh_of(data=4))
  batches = [jnp.stack(z) for z in zip(embeddings(), embeddings(seed=1))]

  @jax.jit
  @jax.grad
  def grad(t):
    step = lambda total, z: (total * 3 + loss(*z, t, jnp.float32(BIAS)), None)
    return jax.lax.scan(jax.checkpoint(step), jnp.float32(0), tuple(batches))[0]

  first, second = (
    reference("sigmoid", *embeddings(seed=s), T, BIAS)[1][2] for s in (0, 1)
  )
  assert_close(grad(jnp.float32(T)), 3 * first + second, 1e-6)


def test_any_scalars_and_lists_do():
  dzimg, dt = jax.grad(losses.ring_sigmoid_loss, argnums=(0, 2))(
    *embeddings(),
    jnp.bfloat16(T),
    int(BIAS),
    mesh=mesh_of(data=2),
    axes=["data"],
  )
  want = reference("sigmoid", *embeddings(), T, BIAS)[1]
  assert_close(dzimg, want[0], 1e-6)
  assert dt.dtype == jnp.bfloat16
  assert_close(dt, want[2], 1e-2)


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_never_silent(kind, which):
  z = embeddings()
  z[which] = z[which].at[B - 1, 3].set(jnp.nan)
  grads_of_loss = grads_of(losses.LOSSES[kind](), mesh=mesh_of(data=4), tile=5)
  loss_value, grads = grads_of_loss(*z, *scalars())
  assert np.isnan(loss_value)
  # Each embedding on the other side met the one with the NaN.
  assert np.isnan(grads[1 - which]).any(axis=1).all()
  assert np.isnan(grads[2])


def test_a_good_positive_still_has_a_gradient_in_bfloat16():
  # sigmoid(10) rounds to 1 in bfloat16; the gradient of 4.5e-5 must survive.
  eye = jnp.eye(8, dtype=jnp.bfloat16)
  _, grads = grads_of(losses.ring_sigmoid_loss, mesh=mesh_of(data=2))(
    eye, eye, jnp.float32(20), jnp.float32(-10)
  )
  want = reference("sigmoid", eye, eye, 20.0, -10.0)[1]
  assert_close(jnp.diag(grads[0]), np.diag(want[0]), 1e-2)


def test_extreme_logits_stay_finite():
  z = jnp.sign(embeddings()[0])  # rows of length 4: logits up to 118 * 16
  for pick in losses.LOSSES.values():
    loss = pick()
    loss_value, grads = grads_of(loss, mesh=mesh_of(data=2), tile=5)(
      z, -z, jnp.float32(118), jnp.float32(-12)
    )
    assert np.isfinite(loss_value)
    assert all(np.isfinite(x).all() for x in grads)


@pytest.mark.parametrize(
  "says,change",
  [
    (r"^zimg has to be \(B, E\)", {"zimg": jnp.zeros((B, E, 1))}),
    (r"^ztxt has to be \(B, E\)", {"ztxt": jnp.zeros(B)}),
    ("^ztxt is .*zimg is", {"ztxt": jnp.zeros((B, E + 1))}),
    ("^ztxt is .*zimg is", {"ztxt": jnp.zeros((2 * B, E))}),
    ("^ztxt is .*zimg is", {"ztxt": jnp.zeros((B, E), jnp.bfloat16)}),
    (
      "^zimg has to be .*bfloat16 or float32",
      {"zimg": jnp.zeros((B, E), jnp.int32)},
    ),
    (
      "zimg: 47 rows",
      {"zimg": jnp.zeros((B - 1, E)), "ztxt": jnp.zeros((B - 1, E))},
    ),
    ("zimg: 0 rows", {"zimg": jnp.zeros((0, E)), "ztxt": jnp.zeros((0, E))}),
    ("^t has", {"t": jnp.ones(1)}),
    ("^b has", {"b": jnp.ones(1)}),
    ("tile", {"tile": 0}),
    ("tile", {"tile": 1.5}),
    ("direction", {"direction": "backward"}),
    ('comm "rings".*mean "ring"', {"comm": "rings"}),
    ('axes.*"dta".*mean "data"', {"axes": ("dta",)}),
  ],
)
def test_bad_input(says, change):
  zimg, ztxt = embeddings()
  args = (
    dict(
      zimg=zimg,
      ztxt=ztxt,
      t=jnp.float32(T),
      b=jnp.float32(BIAS),
      mesh=mesh_of(data=2),
    )
    | change
  )
  with pytest.raises(ValueError, match=says):
    jax.eval_shape(lambda: losses.ring_sigmoid_loss(**args))


# --- What it costs ------------------------------------------------------------


def matmul_flops(jaxpr):
  """FLOPs of the matrix products of a jaxpr, for one device, loops counted."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += (
        2
        * np.prod(eqn.outvars[0].aval.shape)
        * np.prod([shape[i] for i in contract])
      )
    assert eqn.primitive.name != "while", "a loop of unknown length"
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for inner in core.jaxprs_in_params(eqn.params):
      total += times * matmul_flops(inner)
  return total


def lowered(fn, n=B, width=E, dtype=jnp.float32, mesh=None, **options):
  mesh = mesh or mesh_of(data=8)
  rows, whole = (jax.NamedSharding(mesh, x) for x in (jax.P("data"), jax.P()))
  z = jax.ShapeDtypeStruct((n, width), dtype, sharding=rows)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  loss = functools.partial(losses.ring_sigmoid_loss, mesh=mesh, **options)
  return jax.jit(fn(loss)).lower(z, z, scalar, scalar)


def all_grads(loss):
  return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


def value(loss):
  return loss


@pytest.mark.parametrize(
  "options",
  [{"tile": 4}, {"direction": "both", "tile": 5}, {"comm": "all_gather"}],
  ids=str,
)
@pytest.mark.parametrize("fn,products", [(all_grads, 3), (value, 1)])
def test_three_products_per_block_and_one_for_the_value(fn, products, options):
  loss = functools.partial(
    losses.ring_sigmoid_loss, mesh=mesh_of(data=8), **options
  )
  jaxpr = jax.make_jaxpr(fn(loss))(*embeddings(), *scalars())
  assert matmul_flops(jaxpr.jaxpr) == products * 2 * B * B * E / 8


@pytest.mark.parametrize("fn,products", [(all_grads, 4), (value, 1)])
def test_four_products_for_softmax(fn, products):
  loss = functools.partial(
    softmax.ring_softmax_loss, mesh=mesh_of(data=8), tile=4
  )
  jaxpr = jax.make_jaxpr(fn(loss))(*embeddings(), *scalars())
  assert matmul_flops(jaxpr.jaxpr) == products * 2 * B * B * E / 8


def collectives(text):
  return {
    name: text.count(f" {name}(")
    for name in (
      "collective-permute",
      "all-gather",
      "reduce-scatter",
      "all-to-all",
    )
  }


def test_the_ring_only_permutes():
  # Own block: texts; in the loop: sums and texts; at last: the sums.
  got = collectives(lowered(all_grads).compile().as_text())
  assert got == {
    "collective-permute": 4,
    "all-gather": 0,
    "reduce-scatter": 0,
    "all-to-all": 0,
  }


def test_both_directions_are_used():
  text = lowered(all_grads, direction="both").compile().as_text()
  assert collectives(text)["collective-permute"] == 8
  first_hops = set(re.findall(r"source_target_pairs={({\d,\d})", text))
  assert first_hops == {"{0,1}", "{0,7}"}


def test_all_gather_gathers_once():
  low = lowered(all_grads, comm="all_gather")
  assert low.as_text().count('"stablehlo.reduce_scatter"') == 1
  got = collectives(low.compile().as_text())
  assert got["all-gather"] == 1 and got["collective-permute"] == 0


def test_auto_gathers_below_256_texts_on_a_device():
  few = lowered(all_grads, n=8 * 255, comm="auto").as_text()
  many = lowered(all_grads, n=8 * 256, comm="auto").as_text()
  assert "all_gather" in few and "collective_permute" not in few
  assert "all_gather" not in many and "collective_permute" in many


@pytest.mark.parametrize("options", [{}, {"direction": "both"}], ids=str)
def test_memory_grows_with_b_and_not_with_b_times_b(options):
  def temp(b):
    low = lowered(all_grads, n=2 * b, mesh=mesh_of(data=2), tile=64, **options)
    return low.compile().memory_analysis().temp_size_in_bytes

  small, large = temp(1024), temp(4096)
  assert large < 4.5 * small  # 16 times if a b x b array were kept
  assert large < 4096 * 4096  # a quarter of one such array
  # Twice: sums by image, sums by text, sums on their way; and the texts.
  assert large < 4096 * E * 4 * 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_is_not_rounded_before_it_is_multiplied(dtype):
  text = lowered(all_grads, dtype=dtype).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  assert len(dots) == 6  # own block and in the loop
  for dot in dots:
    assert ("HIGHEST" in dot) == (dtype == jnp.float32)


@pytest.mark.parametrize("options", [{}, {"direction": "both"}], ids=str)
def test_tpu_sends_texts_and_sums_while_it_computes(options, tpu):
  """By the schedule of the real TPU compiler, which needs no TPU."""
  devices, _ = tpu("v4:2x2x1")
  compiled = lowered(
    all_grads,
    n=131072,
    width=1024,
    dtype=jnp.bfloat16,
    mesh=jax.sharding.Mesh(devices, "data"),
    tile=1024,
    **options,
  ).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  assert memory <= (580 if options else 840) * 2**20
  flying, texts, waited = {}, 0, 0
  for line in compiled.as_text().splitlines():
    if "collective-permute-start(" in line:
      flying[line.split()[0]] = 0
    elif " while(" in line:
      flying = {name: n + 1 for name, n in flying.items()}
    elif "collective-permute-done(" in line:
      name = line.split("collective-permute-done(")[1].split(")")[0]
      if "= bf16[" in line:
        texts += 1
        assert flying[name] >= 1, "texts are waited for"
      else:
        waited += not flying[name]
  assert texts == (4 if options else 2)
  assert waited <= (2 if options else 1), "sums are waited for but at last"


# --- logit_stats --------------------------------------------------------------


def test_logit_stats():
  zimg, ztxt = embeddings()
  logits = T * np.float64(zimg) @ np.float64(ztxt).T + BIAS
  off = ~np.eye(B, dtype=bool)
  got = jax.jit(losses.logit_stats)(zimg, ztxt, *scalars())
  assert_close(got["pos"], logits[~off].mean(), 1e-6)
  assert_close(got["neg"], logits[off].mean(), 1e-6)


def test_logit_stats_have_no_gradient():
  grad = jax.grad(
    lambda t: losses.logit_stats(*embeddings(), t, jnp.float32(BIAS))["pos"]
  )(jnp.float32(T))
  assert grad == 0


def test_logit_stats_of_one_pair():
  got = losses.logit_stats(*embeddings(n=1), *scalars())
  assert np.isfinite(got["pos"]) and not np.isfinite(got["neg"])


def test_logit_stats_of_a_batch_whose_square_is_no_int32():
  z = jax.ShapeDtypeStruct((2**20, 8), jnp.float32)
  jax.eval_shape(losses.logit_stats, z, z, 10.0, -10.0)
