"""The text tower: the same encoder over tokens, without a mask.

Padding and end-of-sequence are the same token and the tower sees both; the
last position is always end-of-sequence, which "last" pooling reads
(SigLIP, arXiv 2303.15343).
"""

from flax import linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sigjax import errors
from sigjax.models import attention, transformer


class TextTransformer(nn.Module):
  """Tokens (B, L), int32 in [0, vocab_size), to one vector each.

  Attributes:
    variant: "B": sizes from transformer.VARIANTS.
    width, depth, mlp_dim, num_heads: instead of the variant's.
    vocab_size: rows of the embedding table.
    bottleneck: K factors the table into (vocab_size, K) times (K, width), for
      large vocabularies (mSigLIP, SigLIP section 4.3: K = 96 of width 768). 0:
      not factored.
    pool_type: "last" position (released models), "map" or "gap" as in vit.
    out_dim: the size of a dense layer "head" at the end; None for no head.
    dropout, scan, remat, attention, dtype, mesh: as in vit.ViT.
  """

  variant: str | None = None
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  vocab_size: int = 32_000
  bottleneck: int = 0
  pool_type: str = "last"
  out_dim: int | None = None
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self, text: Int[Array, "B L"], train: bool = False
  ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
    """Returns z and a dict of intermediates.

    z is (B, out_dim), or (B, width) without a head, in the compute dtype.
    Intermediates: "embedded" and "encoded" (B, L, width), "pre_logits"
    (B, width). A token outside of the vocabulary makes z NaN.

    Raises:
      UserError: an unknown variant or pool_type, or texts of another length
        than the parameters are for.
    """
    size = self.sizes()
    dropout = self.dropout if train else 0.0
    out = {}

    x = self._embed(text, size.width)
    x = x + self._positions(text.shape[1], size.width)
    x = x.astype(self.dtype)
    x = out["embedded"] = nn.Dropout(dropout, deterministic=False)(x)
    way = attention.Way(self.attention, self.mesh)
    encoder = transformer.Encoder(
      size, dropout, self.scan, self.remat, self.dtype, way, name="Encoder_0"
    )
    x = out["encoded"] = encoder(x)
    pools = "last", "map", "gap"
    x = transformer.pool(self.pool_type, pools, x, size, self.dtype)
    out["pre_logits"] = x
    if self.out_dim:
      # Not zeros, as in a classifier: the embedding would have no direction.
      x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
    return x, out

  def _embed(self, text, width):
    # A token's embedding has norm 1 at first, whatever the width: numbers of
    # variance 1 / width, which the projection of a bottleneck keeps. Rows are
    # looked up in float32: the table is not cast as a whole, and the gradients
    # of a frequent token, such as padding, are not summed in bfloat16.
    init = nn.initializers.normal(width**-0.5)
    size = self.bottleneck or width
    embed = nn.Embed(self.vocab_size, size, name="Embed_0", embedding_init=init)
    x = embed(text)
    if self.bottleneck:
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
    init = nn.initializers.normal(0.01)
    return self.param("pos_embedding", init, (1, length, width))

  @nn.nowrap
  def sizes(self) -> transformer.Sizes:
    """Returns the tower's sizes; the variant fills in what is not given."""
    return transformer.sizes(self, self.variant)
