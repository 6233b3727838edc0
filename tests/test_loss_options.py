"""Several positives and chosen negatives, against float64 NumPy.

`reference` sorts all pairs and spells every gradient out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, losses, negatives, softmax

B, E = 24, 16
T, BIAS = 10.0, -5.0
KEY = jax.random.key(3)


@functools.cache
def embeddings():
  """Rows of multiples of 1/8: all cosines are exact, and many are equal."""
  rng = np.random.default_rng(0)
  zimg = rng.integers(-2, 3, (B, E))
  ztxt = zimg + rng.integers(-1, 2, (B, E))
  zimg[7], ztxt[7] = zimg[2], ztxt[2]  # a pair that is there twice
  return np.float32(zimg) / 8, np.float32(ztxt) / 8


def groups_of(distinct=False):
  """(B, 2): images 1, 5, 20 are one, and texts 3, 20."""
  groups = np.arange(2 * B, dtype=np.int32).reshape(B, 2)
  if not distinct:
    groups[[5, 20], 0] = groups[1, 0]
    groups[20, 1] = groups[3, 1]
  return groups


def true_pairs():
  pairs = np.eye(B, dtype=bool)
  for rows in ((1, 5, 20), (3, 20)):
    pairs[np.ix_(rows, rows)] = True
  return pairs


def keep(which, share, cosine, candidates):
  """Weights of the candidates, of which round(share * N) are kept."""
  if which == "random":
    draw, rows = jax.random.key_data(KEY), jnp.arange(B, dtype=jnp.uint32)
    key = np.int64(negatives.KEYS[which](draw, rows, rows, None))
  else:
    key = cosine if which == "hardest" else -cosine
  excluded = B * (B - 1) - candidates.sum()
  n = max(round(share * B * (B - 1)) - round(share * excluded), 1)
  nth = np.sort(key[candidates])[-n]
  tied, beyond = candidates & (key == nth), candidates & (key > nth)
  weight = beyond + tied * (n - beyond.sum()) / tied.sum()
  assert abs(weight.sum() - n) < 1e-9
  assert which == "random" or tied.sum() > 1  # so ties are tested
  return weight


def reference(positives=None, which=None, share=1.0):
  """Returns the loss and its gradients by zimg, ztxt, t, b; all float64."""
  zimg, ztxt = map(np.float64, embeddings())
  cosine = np.einsum("ie,je->ij", zimg, ztxt)
  positive = true_pairs() if positives == "all" else np.eye(B, dtype=bool)
  candidates = ~true_pairs() if positives else ~positive
  weight = candidates * 1.0
  if which:
    weight = keep(which, share, cosine, candidates)
  weight = np.where(positive, 1.0, weight)
  label = np.where(positive, 1.0, -1.0)
  score = label * (T * cosine + BIAS)
  slope = -label / (1 + np.exp(score)) / B * weight
  loss = np.sum(weight * np.log1p(np.exp(-score))) / B
  grads = T * slope @ ztxt, T * slope.T @ zimg, np.sum(slope * cosine)
  return loss, (*grads, np.sum(slope))


def reference_softmax(positives):
  zimg, ztxt = map(np.float64, embeddings())
  cosine = np.einsum("ie,je->ij", zimg, ztxt)
  p = np.exp(T * cosine)
  positive = np.eye(B)
  if positives == "mask":
    p *= ~true_pairs() | np.eye(B, dtype=bool)
  else:
    positive = true_pairs() * 1.0
  target = (
    positive / positive.sum(1, keepdims=True),
    positive / positive.sum(0),
  )
  soft = (p / p.sum(1, keepdims=True), p / p.sum(0))
  logs = np.log(np.where(p > 0, p, 1.0))
  loss = 0.0
  for q, total in zip(target, (p.sum(1, keepdims=True), p.sum(0))):
    loss -= np.sum(q * (logs - np.log(total))) / B / 2
  slope = (soft[0] + soft[1] - target[0] - target[1]) / 2 / B
  return loss, (T * slope @ ztxt, T * slope.T @ zimg, np.sum(slope * cosine), 0)


def mesh_of(devices):
  return jax.sharding.Mesh(np.array(jax.devices()[:devices]), "data")


def grads_of(loss, *args, **options):
  fn = jax.value_and_grad(functools.partial(loss, **options), (0, 1, 2, 3))
  return jax.jit(fn)(*args)


def arguments(groups=None, key=None) -> Any:
  scalars = jnp.float32(T), jnp.float32(BIAS)
  return *map(jnp.asarray, embeddings()), *scalars, groups, key


def assert_close(got, want, rtol=3e-6):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    error = np.linalg.norm(np.float64(x) - y) / (np.linalg.norm(y) or 1.0)
    assert error <= rtol, f"relative error {error:.1e}"


CASES = [
  ("mask", None, 1.0),
  ("all", None, 1.0),
  (None, "hardest", 1 / 16),
  (None, "hardest", 0.5),
  (None, "easiest", 1 / 16),
  (None, "random", 1 / 16),
  (None, "random", 1.0),
  ("all", "hardest", 1 / 4),
  ("mask", "random", 1 / 4),
]
LAYOUTS = [
  (4, {"direction": "both"}),
  (1, {"tile": 5}),
  (8, {"tile": 2}),
  (2, {"tile": 7, "comm": "all_gather"}),
]


def of_case(positives, which, share):
  args = arguments(groups_of() if positives else None, KEY)
  section = which and dict(share=share, which=which)
  return args, dict(positives=positives, negatives=section)


@pytest.mark.parametrize("positives, which, share", CASES)
def test_plain(positives, which, share):
  args, options = of_case(positives, which, share)
  got = grads_of(losses.sigmoid_loss, *args, **options)
  assert_close(got, reference(positives, which, share), 1e-5)


# All cases on one layout, and two of them on the others.
@pytest.mark.parametrize(
  "case, layout",
  [(case, LAYOUTS[0]) for case in CASES]
  + [(case, layout) for case in CASES[-2:] for layout in LAYOUTS[1:]],
  ids=str,
)
def test_ring(case, layout):
  devices, more = layout
  args, options = of_case(*case)
  options |= dict(more, mesh=mesh_of(devices))
  got = grads_of(losses.ring_sigmoid_loss, *args, **options)
  assert_close(got, reference(*case))


@pytest.mark.parametrize("positives", ["mask", "all"])
def test_softmax(positives):
  args = arguments(groups_of())[:5]
  want = reference_softmax(positives)
  plain = grads_of(softmax.softmax_loss, *args, positives=positives)
  assert_close(plain, want, 5e-6)
  options = dict(mesh=mesh_of(4), tile=4, positives=positives)
  assert_close(
    grads_of(softmax.ring_softmax_loss, *args, **options), want, 5e-6
  )


@pytest.mark.parametrize("positives", ["mask", "all"])
def test_groups_of_one_change_no_bit(positives):
  options = dict(mesh=mesh_of(4), tile=4)
  loss = losses.ring_sigmoid_loss
  want = grads_of(loss, *arguments(), **options)
  args = arguments(groups_of(distinct=True))
  got = grads_of(loss, *args, positives=positives, **options)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("positives", ["mask", "all"])
def test_the_order_of_the_batch_does_not_matter(positives):
  order = np.random.default_rng(1).permutation(B)
  zimg, ztxt, t, b, groups, _ = arguments(groups_of())
  args = zimg[order], ztxt[order], t, b, groups[order]
  options = dict(mesh=mesh_of(4), tile=4, positives=positives)
  loss, (dzimg, *_) = grads_of(losses.ring_sigmoid_loss, *args, **options)
  want, (want_dzimg, *_) = reference(positives)
  assert_close((loss, dzimg), (want, want_dzimg[order]))


def test_random_masks():
  """Each key draws another, of the same size, with all pairs equally likely."""
  rows = jnp.arange(B, dtype=jnp.uint32)
  eye = jnp.eye(B, dtype=bool)
  draw = jax.jit(
    lambda key: negatives.weights(
      negatives.Negatives(1 / 4, "random"),
      jax.random.key_data(key),
      jnp.zeros((B, B)),
      eye,
      None,
    )
  )
  masks = np.stack([draw(jax.random.key(i)) for i in range(400)])
  assert (masks.sum((1, 2)) == B + B * (B - 1) // 4).all()
  often = masks.mean(0)
  off = ~np.eye(B, dtype=bool)
  # 400 draws: a standard deviation of .022, and 552 pairs.
  assert (often[~off] == 1).all() and (abs(often[off] - 1 / 4) < 0.1).all()
  assert abs(often[off].std() - 0.0217) < 0.003
  assert abs(often.mean(0) - often.mean()).max() < 0.02
  key = negatives.KEYS["random"](jax.random.key_data(KEY), rows, rows, None)
  assert len(np.unique(key)) == B * B


def test_nan_is_never_silent():
  args, options = of_case("mask", "easiest", 1 / 16)
  args = args[0].at[B - 1, 3].set(jnp.nan), *args[1:]
  options["mesh"] = mesh_of(2)
  loss, grads = grads_of(losses.ring_sigmoid_loss, *args, **options)
  assert np.isnan(loss) and np.isnan(grads[1]).any(axis=1).all()


def test_counts_of_a_million_rows():
  """n of a batch whose pairs fit no int32, and of the most it may have."""
  B = 1 << 20
  pairs = B * (B - 1)
  for share in (1.0, 1 / 16, 1e-6, 1 / pairs):
    for excluded in (0, 3 * B, pairs - 5, pairs):
      words = divmod(pairs - excluded, negatives.WORD)
      high, low = negatives._wanted(share, B, tuple(map(np.uint32, words)))
      n = int(high) * negatives.WORD + int(low)
      less = round(share * excluded)
      want = max(round(share * pairs) - less, 1)
      assert abs(n - want) <= 1e-7 * less + 1, (share, excluded)
      if excluded == 0:
        assert n == want
  sizes = jax.eval_shape(
    lambda z: losses.ring_sigmoid_loss(
      z, z, 1.0, 0.0, mesh=mesh_of(2), negatives=dict(share=1, which="hardest")
    ),
    jax.ShapeDtypeStruct((B, 8), jnp.float32),
  )
  assert sizes.shape == ()


@pytest.mark.parametrize(
  "says, change",
  [
    ('positives "al".*mean "all"', dict(positives="al")),
    ('batch has no "group".*config.pp', dict(positives="mask")),
    ('"group" that positives None', dict(groups=groups_of())),
    (r"\(24, G\)", dict(positives="all", groups=groups_of()[0])),
    (r"\(24, G\)", dict(positives="all", groups=groups_of()[:9])),
    ("negatives needs: which", dict(negatives=dict(share=1))),
    ('"shar".*"share"', dict(negatives=dict(shar=1, which="random"))),
    ('which "hard".*"hardest"', dict(negatives=dict(share=1, which="hard"))),
    ("at most 1", dict(negatives=dict(share=1.5, which="hardest"))),
    ("above 0", dict(negatives=dict(share=float("nan"), which="hardest"))),
    ("a number, not 1/2", dict(negatives=dict(share="1/2", which="hardest"))),
    ("none of the 552", dict(negatives=dict(share=1e-4, which="hardest"))),
    ("need a key", dict(negatives=dict(share=0.5, which="random"))),
  ],
  ids=str,
)
def test_bad_options(says, change):
  z = map(jnp.asarray, embeddings())
  args = [*z, jnp.float32(T), jnp.float32(BIAS)]
  for loss in (
    losses.sigmoid_loss,
    functools.partial(losses.ring_sigmoid_loss, mesh=mesh_of(2)),
  ):
    with pytest.raises(errors.UserError, match=says) as e:
      jax.eval_shape(functools.partial(loss, *args, **change))
    assert "\n" not in str(e.value)


def test_softmax_takes_no_negatives():
  section = dict(share=0.5, which="random")
  with pytest.raises(errors.UserError, match='no key "negatives"'):
    losses.make(mesh_of(2), ("data",), name="softmax", negatives=section)


def test_memory_grows_with_b():
  def temp(b):
    mesh = mesh_of(2)
    rows, whole = (jax.NamedSharding(mesh, x) for x in (jax.P("data"), jax.P()))
    like = lambda s, d, to: jax.ShapeDtypeStruct(s, d, sharding=to)
    z = like((2 * b, E), jnp.float32, rows)
    groups = like((2 * b, 2), jnp.int32, rows)
    scalar = like((), jnp.float32, whole)
    loss = functools.partial(
      losses.ring_sigmoid_loss,
      mesh=mesh,
      tile=64,
      positives="mask",
      negatives=dict(share=0.5, which="hardest"),
    )
    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    low = grad.lower(z, z, scalar, scalar, groups, KEY)
    memory: Any = low.compile().memory_analysis()
    return memory.temp_size_in_bytes

  small, large = temp(1024), temp(4096)
  assert large < 4.5 * small  # 16 times if a b x b array were kept
  assert large < 4096 * 4096  # a quarter of one such array
