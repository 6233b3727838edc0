"""The captioning decoder of SigLIP 2 (arXiv 2502.14786), as in LocCa and CapPa.

Pre-norm blocks (LocCa, arXiv 2403.19596): self-attention, cross-attention to
the image tower's patches before pooling, MLP; no attention has a bias. Inputs
are the caption's tokens, shifted right. An example is predicted token by token,
under a causal mask, or in parallel (CapPa, arXiv 2306.07915): all inputs are
one mask token, and there is no mask.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sigjax import errors
from sigjax.models import attention, transformer

START = 0  # the input before the first token; in texts it is padding at most
END = 1  # the id that ends every text, see data/example/tokenizer.py


class EncDecBlock(nn.Module):
  """(B, L, W): x + self(norm(x)), x + cross(norm(x), patches), x + MLP.

  With `place`, see Decoder.
  """

  mlp_dim: int
  num_heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L W"],
    encoded: Float[Array, "B M V"],
    allowed: Bool[Array, "B L L"],
    mask: Bool[Array, "B M"] | None,
    place: Array | None = None,
  ) -> tuple[Array, None]:
    # Few queries: no other way than XLA's.
    attend = functools.partial(
      attention.MultiHeadDotProductAttention,
      self.num_heads,
      self.dtype,
      bias=False,
    )
    norm = lambda i: transformer.LayerNorm(name=f"LayerNorm{i}")
    # LayerNorm is float32, the residual stream is not.
    x = x + attend(name="SelfAttn")(norm(1)(x), mask=allowed, place=place)
    # With a cache, x is (N, 1, W): several texts of an image are queries of it.
    y = norm(2)(x).reshape(encoded.shape[0], -1, x.shape[2])
    y = attend(name="CrossAttn")(y, encoded, mask, place=place)
    x = x + y.reshape(x.shape)
    mlp = transformer.MlpBlock(self.mlp_dim, dtype=self.dtype, name="MLP")
    return x + mlp(norm(3)(x)), None  # as nn.scan expects


class Logits(nn.Module):
  """The last layer's parameters: kernel (W, V) and bias (V,), zero at first."""

  vocab_size: int

  @nn.compact
  def __call__(self, width: int) -> tuple[Array, Array]:
    zeros = nn.initializers.zeros
    kernel = self.param("kernel", zeros, (width, self.vocab_size))
    return kernel, self.param("bias", zeros, (self.vocab_size,))


class Decoder(nn.Module):
  """Captions (B, L), int32 in [0, vocab_size), from patches (B, M, ..).

  Attributes:
    size: width, depth, MLP and heads.
    vocab_size: V. The mask token of parallel prediction is id V.
    scan, remat, dtype: as in vit.ViT.
  """

  size: transformer.Sizes
  vocab_size: int
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    encoded: Float[Array, "B M D"],
    text: Int[Array, "B L"],
    parallel: Bool[Array, " B"],
    mask: Bool[Array, "B M"] | None = None,
    place: Array | None = None,
  ) -> tuple[Float[Array, "B L W"], Float[Array, "W V"], Float[Array, " V"]]:
    """Returns the features of each token and the logits layer.

    The logits of token l are features[:, l] @ kernel + bias: they are of all
    tokens (B, L, V) at once only if the caller makes them.

    Args:
      encoded: the image tower's patches before pooling; no gradient is stopped.
      text: the tokens to predict.
      parallel: which examples are predicted in parallel, the others causally.
      mask: which patches there are; None: all.
      place: () int32; with the collection "cache", which the first call makes.
        Calls are of the places 0, 1, .., and text (N, 1) is what comes before,
        in N texts, N / B of each image in turn. They are predicted causally.

    Returns:
      features (B, L, W) float32; kernel (W, V) and bias (V,), as stored.

    Raises:
      UserError: an unknown remat.
    """
    width, length = self.size.width, text.shape[1]
    if place is None:
      inputs = jnp.pad(text[:, :-1], ((0, 0), (1, 0)), constant_values=START)
      inputs = jnp.where(parallel[:, None], self.vocab_size, inputs)
      causal = jnp.tril(jnp.ones((1, length, length), bool))
      allowed = causal | parallel[:, None, None]
    else:
      inputs = text
      length = self.get_variable("params", "pos_embedding").shape[1]
      allowed = jnp.arange(length) <= place
      allowed = jnp.broadcast_to(allowed[None], (text.shape[0], length))

    # As in the text tower: an embedding has norm 1, and is float32 until all
    # is added.
    init = nn.initializers.normal(width**-0.5)
    rows = self.vocab_size + 1
    embed = nn.Embed(rows, width, name="EmbedTargets", embedding_init=init)
    positions = self.param(
      "pos_embedding", nn.initializers.normal(0.01), (1, length, width)
    )
    if place is not None:
      positions = jax.lax.dynamic_slice_in_dim(positions, place, 1, axis=1)
    x = embed(inputs).astype(jnp.float32) + positions.astype(jnp.float32)

    name = "EncDecBlock" if self.scan else "EncDecBlock{}"
    stack = transformer.Stack(
      EncDecBlock, self.size.depth, name, self.scan, self.remat
    )
    args = self.size.mlp_dim, self.size.num_heads, self.dtype
    x = transformer.apply_blocks(
      stack, args, x.astype(self.dtype), encoded, allowed, mask, place
    )
    x = transformer.LayerNorm(name="LayerNorm")(x)
    return x, *Logits(self.vocab_size, name="LogitsDense")(width)


def of_params(params: Mapping[str, Any], dtype: str = "float32") -> Decoder:
  """Returns the decoder of some parameters, whose sizes they tell.

  Args:
    params: of a Decoder, its blocks stacked or not.
    dtype: compute dtype.

  Raises:
    UserError: they are not of a decoder.
  """
  blocks = [name for name in params if name.startswith("EncDecBlock")]
  try:
    block = params[blocks[0]]
    kernel = block["SelfAttn"]["query"]["kernel"]  # (.., W, N, H)
    scan = blocks == ["EncDecBlock"]
    size = transformer.Sizes(
      kernel.shape[-3],
      kernel.shape[0] if scan else len(blocks),
      block["MLP"]["Dense_0"]["kernel"].shape[-1],
      kernel.shape[-2],
    )
    vocab_size = params["LogitsDense"]["bias"].shape[0]
  except (IndexError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"these are no parameters of a captioning decoder: there is no {e}"
    ) from None
  return Decoder(size, vocab_size, scan, dtype=dtype)
