"""Greedy and beam search, against loops and sums without a cache."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import decode, errors
from sigjax.models import decoder, transformer

SIZE = transformer.Sizes(width=8, depth=2, mlp_dim=16, num_heads=2)
B, M, L, V = 3, 4, 4, 5
END = 1


def make_params(scan, end=0.0):
  """Returns random parameters; `end` is added to the end's logit."""
  model = decoder.Decoder(SIZE, V, scan)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros((1, M, 6), np.float32),
    np.zeros((1, L), np.int32),
    np.zeros(1, bool),
  )["params"]
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.9).astype(np.float32), shapes
  )
  for layer, n in ("LogitsDense", V), ("LayerNorm", 8):  # or one token wins
    params[layer]["bias"] = np.zeros(n, np.float32)
  params["EmbedTargets"]["embedding"] *= 4  # the texts decide much
  params["LogitsDense"]["bias"][END] += end
  return params


PATCHES = np.random.default_rng(1).normal(size=(B, M, 6), scale=9)
PATCHES = PATCHES.astype(np.float32)
# One patch of the last image is padding.
MASK = np.arange(M)[None] < np.array([[M], [M], [M - 1]])


@functools.partial(jax.jit, static_argnums=0)
def logits(scan, params, patches, text, mask):
  """Returns (n, L, V) of whole texts, as in training: without a cache."""
  model = decoder.Decoder(SIZE, V, scan)
  found: Any = model.apply(
    {"params": params}, patches, text, np.zeros(len(text), bool), mask
  )
  x, kernel, bias = found
  return jax.nn.log_softmax(x @ kernel + bias[None, None])


def log_p_of(scan, params, image, texts):
  """Returns (n, L, V) of texts of an image, filled up with END."""
  rows = [[*t, *[END] * (L - len(t))] for t in texts]
  n = 128  # for one compilation
  text = np.full((n, L), END, np.int32)
  text[: len(rows)] = rows
  patches = np.repeat(PATCHES[image : image + 1], n, 0)
  mask = np.repeat(MASK[image : image + 1], n, 0)
  return np.asarray(logits(scan, params, patches, text, mask), np.float64)[
    : len(rows)
  ]


def search(params, *args, vocab=None):
  found = decode.captions("float32", params, PATCHES, MASK, *args, vocab)
  return [
    (tuple(row[:n].tolist()), p) for row, n, p in zip(*map(np.asarray, found))
  ]


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_is_a_loop_without_a_cache(scan):
  params = make_params(scan)
  got = search(params, 1, 1.0)
  for image, (tokens, log_p) in enumerate(got):
    text, total = [], 0.0
    while END not in text:
      step = log_p_of(scan, params, image, [text])[0, len(text)]
      best = END if len(text) == L - 1 else int(step.argmax())
      text.append(best)
      total += step[best]
    assert tokens == tuple(text)
    assert log_p == pytest.approx(total, abs=1e-4)
  assert len({tokens for tokens, _ in got}) > 1  # images differ


@functools.cache
def all_texts():
  """Returns every text of at most L tokens."""
  others = [i for i in range(V) if i != END]
  return [
    (*text, END)
    for n in range(L)
    for text in itertools.product(others, repeat=n)
  ]


@pytest.mark.parametrize("power, end", [(0.0, 0.0), (1.0, 0.0), (0.6, -3.0)])
def test_a_wide_beam_finds_the_best_of_all_texts(power, end):
  params = make_params(False, end)
  texts = all_texts()
  counts = np.array([len(t) for t in texts])
  got = search(params, (V - 1) ** (L - 1), power)
  for image, (tokens, log_p) in enumerate(got):
    each = log_p_of(False, params, image, texts)
    sums = np.array(
      [sum(p[i, t] for i, t in enumerate(text)) for p, text in zip(each, texts)]
    )
    best = int(np.argmax(sums / counts**power))
    assert tokens == texts[best]
    assert log_p == pytest.approx(sums[best], abs=1e-4)


def beams_without_a_cache(scan, params, image, beams, power):
  live, best = [((), 0.0)], ((), -np.inf, -np.inf)
  for place in range(L):
    more = []
    each = log_p_of(scan, params, image, [text for text, _ in live])[:, place]
    for (text, log_p), step in zip(live, each):
      score = (log_p + step[END]) / (place + 1) ** power
      if score > best[2]:
        best = (*text, END), log_p + step[END], score
      if place < L - 1:
        more += [((*text, t), log_p + step[t]) for t in range(V) if t != END]
    live = sorted(more, key=lambda x: -x[1])[:beams]
  return best[:2]


@pytest.mark.parametrize("scan, beams, end", [(False, 2, -2.0), (True, 3, 1.0)])
def test_a_narrow_beam_is_a_search_without_a_cache(scan, beams, end):
  params = make_params(scan, end)
  got = search(params, beams, 1.0)
  for image, (tokens, log_p) in enumerate(got):
    want = beams_without_a_cache(scan, params, image, beams, 1.0)
    assert tokens == want[0]
    assert log_p == pytest.approx(want[1], abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_where_texts_end(beams):
  """At once, or never: then the last place is the end."""
  assert {t for t, _ in search(make_params(False, 50.0), beams, 1.0)} == {(1,)}
  never = make_params(False, -50.0)
  assert all(
    len(t) == L and t.index(END) == L - 1 for t, _ in search(never, beams, 1.0)
  )
  # Ids that are no pieces of the tokenizer are not written.
  never["LogitsDense"]["bias"][V - 1] += 50
  written = lambda vocab: {
    i for t, _ in search(never, beams, 1.0, vocab=vocab) for i in t[:-1]
  }
  assert written(None) == {V - 1}
  assert V - 1 not in written(V - 1)


def test_cached_steps_are_the_whole_text():
  """Each step's numbers, also in bfloat16."""
  params, text = make_params(True), np.array([[2, 3, 0, 4]] * B, np.int32)
  want = logits(True, params, PATCHES, text, MASK)
  for dtype, atol in ("float32", 1e-5), ("bfloat16", 0.2):
    there = jnp.asarray(PATCHES), jnp.asarray(MASK)
    prompt = decode.of_params(params, *there, dtype=dtype)
    cache, last = {}, np.full(B, decoder.START, np.int32)
    step = jax.jit(prompt.log_p)
    for place in range(L - 1):  # the last place is END's
      got, cache = step(last, place, cache)
      np.testing.assert_allclose(got, want[:, place], atol=atol)
      last = text[:, place]


def test_sizes_are_those_of_the_parameters():
  for scan in (False, True):
    found = decoder.of_params(make_params(scan))
    assert (found.size, found.vocab_size, found.scan) == (SIZE, V, scan)
  with pytest.raises(errors.UserError, match="no parameters of a captioning"):
    decoder.of_params({"EncDecBlock0": {}})
