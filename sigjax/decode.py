"""Writing captions with a decoder: greedily, or by beam search.

Token after token, in one loop on the device. The keys and values of each block
are kept: of self-attention those of the tokens until now, of cross-attention
those of the patches, which are projected once.

A caption ends with the id 1, as every text does (data/example/tokenizer.py). It
has at most L tokens, that end included: at the last place there is no other
choice, as in the texts that were cut for training.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sigjax import losses, trees
from sigjax.models import decoder as decoder_lib
from sigjax.models.decoder import END, Decoder


class Captions(NamedTuple):
  """A caption of each of B images.

  Attributes:
    tokens: up to the end, which fills the rest.
    count: tokens, the end included, from 1 to L.
    log_p: the logarithm of the caption's probability, the sum over its tokens.
  """

  tokens: Int[Array, "B L"]
  count: Int[Array, " B"]
  log_p: Float[Array, " B"]


class Prompt(NamedTuple):
  """What captions are written about, and with.

  Attributes:
    decoder: the decoder, without remat.
    params: its parameters.
    encoded: the image tower's patches before pooling, (B, M, D).
    mask: which patches there are, (B, M); None: all.
    vocab: how many ids are tokens of texts, the first ones; None: all that the
      decoder has. Others are never written.
  """

  decoder: Decoder
  params: Mapping[str, Any]
  encoded: Float[Array, "B M D"]
  mask: Bool[Array, "B M"] | None = None
  vocab: int | None = None

  @property
  def length(self) -> int:
    """L, for which the decoder was trained."""
    return self.params["pos_embedding"].shape[1]

  def log_p(
    self, last: Int[Array, " N"], place: Any, cache: Any
  ) -> tuple[Float[Array, "N V"], Any]:
    """Returns the log-probabilities of the tokens at a place, and the cache.

    Args:
      last: the tokens before it in N texts, N / B of each image in turn.
      place: its number.
      cache: what the call for the place before returned; at place 0 {}.
    """
    (x, kernel, bias), kept = self.decoder.apply(
      {"params": self.params, **cache},
      self.encoded,
      last[:, None],
      None,
      self.mask,
      jnp.asarray(place, jnp.int32),
      mutable=["cache"],
    )
    x = x[:, 0].astype(self.decoder.dtype)  # as in the loss
    logits = losses.dot(x, kernel.astype(x.dtype))
    logits += bias.astype(jnp.float32)[None]
    log_p = jax.nn.log_softmax(logits)
    ids = jnp.arange(log_p.shape[1])[None]
    log_p = jnp.where(ids < (self.vocab or log_p.shape[1]), log_p, -jnp.inf)
    # At the last place nothing but the end is possible.
    last_place = jnp.asarray(place) == self.length - 1
    log_p = jnp.where(last_place & (ids != END), -jnp.inf, log_p)
    return log_p, kept


def of_params(
  params: Mapping[str, Any],
  encoded: Float[Array, "B M D"],
  mask: Bool[Array, "B M"] | None = None,
  *,
  dtype: str = "float32",
  vocab: int | None = None,
) -> Prompt:
  """Returns the Prompt of a decoder's parameters; see there.

  Raises:
    UserError: they are not of a decoder.
  """
  decoder = decoder_lib.of_params(params, dtype)
  return Prompt(decoder, params, encoded, mask, vocab)


def greedy(prompt: Prompt) -> Captions:
  """Writes the most probable token at each place."""
  B, L = prompt.encoded.shape[0], prompt.length

  def write(place, last, done, found, cache):
    log_p, cache = prompt.log_p(last, place, cache)
    best = jnp.where(done, END, jnp.argmax(log_p, axis=1).astype(jnp.int32))
    gain = jnp.where(done, 0.0, jnp.max(log_p, axis=1))
    tokens = found.tokens.at[:, place].set(best)
    count = found.count + jnp.where(done, 0, 1)
    found = Captions(tokens, count, found.log_p + gain)
    return place + 1, best, done | (best == END), found, cache

  start = Captions(
    jnp.full((B, L), END, jnp.int32),
    jnp.zeros(B, jnp.int32),
    jnp.zeros(B, jnp.float32),
  )
  first = jnp.full(B, decoder_lib.START, jnp.int32)
  # The first call, which makes the cache, is before the loop.
  carry = write(jnp.int32(0), first, jnp.zeros(B, bool), start, {})
  carry = jax.lax.while_loop(
    lambda carry: (carry[0] < L) & ~jnp.all(carry[2]),
    lambda carry: write(*carry),
    carry,
  )
  return carry[3]


class _Beams(NamedTuple):
  """The state of a beam search; K texts of each image are written."""

  place: Int[Array, ""]
  cache: Any
  tokens: Int[Array, "B K L"]  # without an end until `place`
  log_p: Float[Array, "B K"]  # -inf: no text
  best: Captions  # of those that ended
  score: Float[Array, " B"]  # of `best`


def beam_search(
  prompt: Prompt, beams: int, length_power: float = 1.0
) -> Captions:
  """Writes the caption of the best score among those that a search meets.

  The score of a caption of n tokens, the end included, is log_p / n **
  length_power. With 0 that is its probability, by which short captions are
  ahead; with 1 the mean over tokens.

  At each place the K most probable texts that go on are kept, K = beams. Texts
  that end there are compared by their score and take the place of none of them.
  An image's search is over when none that goes on can become better.

  Args:
    prompt: what captions are about.
    beams: K, from 1.
    length_power: see above, from 0.
  """
  B, L, K = prompt.encoded.shape[0], prompt.length, beams

  def normalised(log_p, count):
    return log_p / jnp.asarray(count, jnp.float32) ** length_power

  def write(state):
    place = state.place
    # The first call, without a cache, is of one text for each image.
    width = K if state.cache else 1
    last = (
      state.tokens[:, :, place - 1].reshape(-1)
      if state.cache
      else jnp.full(B, decoder_lib.START, jnp.int32)
    )
    log_p, cache = prompt.log_p(last, place, state.cache)
    log_p = log_p.reshape(B, width, -1) + state.log_p[:, :width, None]

    # Those that end here.
    ended = log_p[:, :, END]
    which = jnp.argmax(ended, axis=1)
    ended = jnp.max(ended, axis=1)
    texts = jnp.take_along_axis(state.tokens, which[:, None, None], axis=1)
    score = normalised(ended, place + 1)
    better = score > state.score
    best = Captions(
      jnp.where(better[:, None], texts[:, 0], state.best.tokens),
      jnp.where(better, place + 1, state.best.count),
      jnp.where(better, ended, state.best.log_p),
    )

    # Those that go on.
    log_p = log_p.at[:, :, END].set(-jnp.inf)
    V = log_p.shape[2]
    log_p = log_p.reshape(B, -1)
    if log_p.shape[1] < K:
      pad = ((0, 0), (0, K - log_p.shape[1]))
      log_p = jnp.pad(log_p, pad, constant_values=-jnp.inf)
    log_p, at = jax.lax.top_k(log_p, K)
    from_, token = jnp.minimum(at // V, width - 1), at % V
    tokens = jnp.take_along_axis(state.tokens, from_[:, :, None], axis=1)
    # The rest of a row is END, which it is when a text ends.
    tokens = tokens.at[:, :, place].set(token)
    rows = (jnp.arange(B)[:, None] * width + from_).reshape(-1)
    cache = _taken(cache, rows)
    score = jnp.maximum(score, state.score)
    return _Beams(place + 1, cache, tokens, log_p, best, score)

  def goes_on(state):
    # Scores are at most 0, and longer texts are divided by more: no text that
    # goes on will be better than if it had L tokens and no further loss.
    bound = normalised(jnp.max(state.log_p, axis=1), L)
    return (state.place < L) & jnp.any(bound > state.score)

  state = _Beams(
    jnp.int32(0),
    {},
    jnp.full((B, K, L), END, jnp.int32),
    jnp.zeros((B, K), jnp.float32),
    Captions(
      jnp.full((B, L), END, jnp.int32),
      jnp.ones(B, jnp.int32),
      jnp.full(B, -jnp.inf, jnp.float32),
    ),
    jnp.full(B, -jnp.inf, jnp.float32),
  )
  state = jax.lax.while_loop(goes_on, write, write(state))
  return state.best


def _taken(cache: Any, rows: Int[Array, " N"]) -> Any:
  """Returns the cache of texts that go on from `rows`; images stay."""

  def taken(name, x):
    if "/SelfAttn/" not in name:
      return x
    return jnp.take(x, rows, axis=x.ndim - 3)  # blocks may be stacked

  return trees.map_named(taken, cache)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def captions(
  dtype: str,
  params: Mapping[str, Any],
  encoded: Float[Array, "B M D"],
  mask: Bool[Array, "B M"] | None,
  beams: int = 1,
  length_power: float = 1.0,
  vocab: int | None = None,
) -> Captions:
  """Writes captions, greedily with one beam; the arguments are those above."""
  prompt = of_params(params, encoded, mask, dtype=dtype, vocab=vocab)
  if beams == 1:
    return greedy(prompt)
  return beam_search(prompt, beams, length_power)
