"""The text tower: the same encoder over tokens, without a mask.

Padding and end-of-sequence are the same token and the tower sees both; the
last position is always end-of-sequence, which "last" pooling reads
(SigLIP, arXiv 2303.15343).
"""

from flax import linen as nn
import jax.numpy as jnp

from sigjax import errors
from sigjax.models import transformer


class TextTransformer(nn.Module):
  """Tokens (B, L), int32 in [0, vocab_size), to one vector each.

  L is the length that the tower is initialised with, and no other.

  Attributes:
    variant: "B": sizes from transformer.VARIANTS.
    width, depth, mlp_dim, num_heads: instead of the variant's.
    vocab_size: rows of the embedding table.
    embed_rank: K factors the table into (vocab_size, K) times (K, width), for
      large vocabularies (mSigLIP: K = 96 of width 768). None: not factored.
    pool_type: "last" position (released models), "map" or "gap" as in vit.
    out_dim: the size of a dense layer "head" at the end; None for no head.
    dropout, scan, remat, dtype: as in vit.ViT.
  """

  variant: str | None = None
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  vocab_size: int = 32_000
  embed_rank: int | None = None
  pool_type: str = "last"
  out_dim: int | None = None
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, text, train=False):
    """Returns z and a dict of intermediates.

    z is (B, out_dim), or (B, width) without a head, in the compute dtype.
    Intermediates: "embedded" and "encoded" (B, L, width), "pre_logits"
    (B, width). A token outside of the vocabulary makes z NaN.

    Raises:
      UserError: an unknown variant or pool_type, or a text that is shorter or
        longer than the parameters are for.
    """
    size = transformer.sizes(self, self.variant)
    pool = errors.pick(
      {"last": self._last, "map": self._map, "gap": self._gap},
      self.pool_type,
      "pool_type",
    )
    dropout = self.dropout if train else 0.0
    out = {}

    x = self._embed(text, size.width)
    x = x + self._positions(text.shape[1], size.width)
    x = x.astype(self.dtype)
    x = out["embedded"] = nn.Dropout(dropout, deterministic=False)(x)
    x = out["encoded"] = transformer.Encoder(
      size.depth,
      size.mlp_dim,
      size.num_heads,
      dropout,
      self.scan,
      self.remat,
      self.dtype,
      name="Encoder_0",
    )(x)
    x = out["pre_logits"] = pool(x, size)
    if self.out_dim:
      # Not zeros, as in a classifier: the embedding would have no direction.
      x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
    return x, out

  def _embed(self, text, width):
    # Rows of norm 1, whatever the width. Looked up in float32: the table is
    # not cast as a whole, and the gradients of a token that occurs often, as
    # padding does, are not summed in bfloat16.
    rank = self.embed_rank or width
    x = nn.Embed(
      self.vocab_size,
      rank,
      name="Embed_0",
      embedding_init=nn.initializers.normal(rank**-0.5),
    )(text)
    if self.embed_rank:
      x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="embed_proj")(
        x
      )
    return x.astype(jnp.float32)

  def _positions(self, length, width):
    have = self.get_variable("params", "pos_embedding")
    if have is not None and have.shape[1] != length:
      raise errors.UserError(
        f"the text has {length} tokens, but pos_embedding {have.shape} is "
        f"for {have.shape[1]}: tokenize to length {have.shape[1]}"
      )
    return self.param(
      "pos_embedding", nn.initializers.normal(0.01), (1, length, width)
    )

  def _last(self, x, size):
    return x[:, -1]

  def _map(self, x, size):
    return transformer.MAPHead(
      size.mlp_dim, size.num_heads, self.dtype, name="MAPHead_0"
    )(x)

  def _gap(self, x, size):
    return jnp.mean(x, axis=1)

  @nn.nowrap
  def flops(self, length):
    """Forward matmul FLOPs of one text of `length` tokens."""
    size = transformer.sizes(self, self.variant)
    total = transformer.encoder_flops(size, length)
    total += 2 * length * (self.embed_rank or 0) * size.width
    if self.pool_type == "map":
      total += transformer.map_flops(size, length)
    return total + 2 * size.width * (self.out_dim or 0)
