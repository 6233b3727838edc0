"""The captioning loss of SigLIP 2 (arXiv 2502.14786, LocCa arXiv 2403.19596).

A decoder reads the image tower's patches before pooling and predicts the
caption: one token after the other, or, for a share of the examples, all of them
in parallel (CapPa, arXiv 2306.07915).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sigjax import crossentropy, errors, terms
from sigjax.models import decoder, two_towers
from sigjax.models.text import TextTransformer
from sigjax.models.transformer import Sizes
from sigjax.models.two_towers import TwoTowers


def token_weights(
  text: Int[Array, "B L"], per_token: bool
) -> Float[Array, "B L"]:
  """Returns what each token counts, float32: 0 after the first id 1.

  Args:
    text: rows that end in 1 and are then filled up, with 1 or 0.
    per_token: whether the weights of an example add up to 1.
  """
  ends = (text == decoder.END).astype(jnp.int32)
  counts = (jnp.cumsum(ends, axis=1) == ends).astype(jnp.float32)
  if per_token:
    counts /= jnp.sum(counts, axis=1, keepdims=True)
  return counts


class Caption(terms.Kind):
  """The cross-entropy of captions: type="caption".

  The sizes that are not given are those of the text tower, the depth half of
  its. Compute dtype, scan and remat are the text tower's.

  Args:
    what: see terms.Kind.
    model: the towers.
    span: not used.
    width, depth, mlp_dim, num_heads: of the decoder.
    parallel: the probability with which an example is predicted in parallel;
      0: none, as at evaluation.
    per_token: True: an example's loss is the mean over its tokens; False: their
      sum, with which long captions count more. The papers do not say.
      Padding counts for nothing.
    text: the feature to predict: "text", or another of the examples, such as
      "target" of the op regions.
    chunk: of how many tokens a device holds logits at a time, see
      crossentropy.py.

  Raises:
    UserError: images were embedded before, so that there are no patches; or an
      argument is out of its range.
  """

  part = "dec"

  def __init__(
    self,
    what: str,
    model: TwoTowers,
    span: terms.Span,
    *,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    parallel: float = 0.5,
    per_token: bool = True,
    text: str = "text",
    chunk: int = 512,
  ):
    del span
    if model.image.get("kind") == "precomputed":
      raise errors.UserError(
        f"{what} reads an image tower's patches, but config.model.image.kind "
        'is "precomputed": take an image tower, which may be locked'
      )
    if not 0 <= parallel <= 1:
      raise errors.UserError(
        f"{what}.parallel is {parallel}, but has to be a probability"
      )
    if chunk < 1:
      raise errors.UserError(f"{what}.chunk is {chunk}, but has to be from 1")
    tower = two_towers.text_tower(model)
    assert isinstance(tower, TextTransformer)
    base = tower.sizes()
    size = Sizes(
      width or base.width,
      depth or max(base.depth // 2, 1),
      mlp_dim or (4 * width if width else base.mlp_dim),
      num_heads or base.num_heads,
    )
    if size.width % size.num_heads:
      raise errors.UserError(
        f"{what}: width {size.width} is not a multiple of num_heads "
        f"{size.num_heads}"
      )
    self.decoder = decoder.Decoder(
      size, tower.vocab_size, tower.scan, tower.remat, model.dtype
    )
    self._text = text
    self._what, self._dtype, self._mesh = what, model.dtype, model.mesh
    self._parallel, self._per_token, self._chunk = parallel, per_token, chunk

  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    if self._text not in batch:
      raise errors.UserError(
        f'{self._what} predicts "{self._text}", which config.pp does not keep'
      )
    text = batch[self._text]
    if text.shape[1] < 2:
      raise errors.UserError(
        f"{self._what} needs texts of at least 2 tokens, but tokenize in "
        f"config.pp makes {text.shape[1]}"
      )
    patches = out["img/encoded"]
    variables: Any = self.decoder.init(
      key, jnp.zeros(patches.shape, patches.dtype), text, jnp.zeros(1, bool)
    )
    return variables["params"]

  def __call__(
    self,
    params: dict,
    held: dict,
    out: Mapping[str, Array],
    batch: Mapping,
    keys: Array,
  ) -> tuple[Float[Array, ""], dict]:
    del held
    text = batch[self._text]
    draw = lambda key: jax.random.bernoulli(key, self._parallel)
    found: Any = self.decoder.apply(
      {"params": params[self.part]},
      out["img/encoded"],
      text,
      jax.vmap(draw)(keys),
      out.get("img/mask"),
    )
    features, kernel, bias = found
    total = crossentropy.cross_entropy(
      features.astype(self._dtype).reshape(-1, features.shape[2]),
      kernel,
      bias,
      text.ravel(),
      token_weights(text, self._per_token).ravel(),
      chunk=self._chunk,
      mesh=self._mesh,
    )
    return total, {}

  def hits(
    self, params: dict, out: Mapping[str, Array], text: Int[Array, "B L"]
  ) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
    """Returns how many tokens are predicted, of how many, of which vocabulary.

    Each given those before it; the most likely one has to be right. Tokens
    count up to the end of the text.
    """
    found: Any = self.decoder.apply(
      {"params": params[self.part]},
      out["img/encoded"],
      text,
      jnp.zeros(len(text), bool),
      out.get("img/mask"),
    )
    x, kernel, bias = found
    logits = x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, None]
    there = token_weights(text, per_token=False) > 0
    right = there & (jnp.argmax(logits, axis=2) == text)
    count = lambda mask: jnp.sum(mask, axis=1, dtype=jnp.int32)
    words = jnp.full(len(text), self.decoder.vocab_size, jnp.int32)
    return count(right), count(there), words

  def flops(self, out: Mapping[str, Any], batch: Mapping) -> int:
    (width, depth, mlp_dim, _), words = (
      self.decoder.size,
      self.decoder.vocab_size,
    )
    length, (_, patches, patch) = (
      batch[self._text].shape[1],
      out["img/encoded"].shape,
    )
    # Query, key, value and output, then weights and their sum of values.
    own = 4 * length * width * width + 2 * length * length * width
    cross = 2 * length * width * width + 2 * patches * patch * width
    cross += 2 * length * patches * width
    block = own + cross + 2 * length * width * mlp_dim
    return 6 * (depth * block + length * width * words)
