"""What the two towers share: sizes, encoder blocks, attention pooling.

Parameter names, initialisers and numerics follow the released checkpoints:
pre-norm blocks (ViT, arXiv 2010.11929), GELU by its tanh approximation,
LayerNorm with epsilon 1e-6, no attention mask.

Precision: parameters are float32. Matrix products and the residual stream run
in the compute dtype; LayerNorm and softmax always in float32.
"""

import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sigjax import errors


class Sizes(NamedTuple):
  width: int
  depth: int
  mlp_dim: int
  num_heads: int


VARIANTS = {
  "mu": Sizes(32, 1, 128, 2),
  "Ti": Sizes(192, 12, 768, 3),
  "S": Sizes(384, 12, 1536, 6),
  "M": Sizes(512, 12, 2048, 8),
  "B": Sizes(768, 12, 3072, 12),
  "L": Sizes(1024, 24, 4096, 16),
  "So400m": Sizes(1152, 27, 4304, 16),
  "H": Sizes(1280, 32, 5120, 16),
  "g": Sizes(1408, 40, 6144, 16),
  "g-opt": Sizes(1536, 40, 6144, 16),
  "G": Sizes(1664, 48, 8192, 16),
}

# What the backward pass finds in memory and what it computes again. "dots"
# keeps the outputs of the dense layers and recomputes the rest, among it the
# attention weights.
REMAT = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def sizes(tower, variant):
  """Returns the Sizes of a tower: the variant's, where it has none itself.

  Without a variant, width, depth and num_heads are needed, and mlp_dim is
  4 * width if not given.

  Raises:
    UserError: an unknown variant, a missing size, or a width that num_heads
      does not divide.
  """
  base = Sizes(None, None, None, None)
  if variant:
    base = errors.pick(VARIANTS, variant, "variant")
  got = {k: getattr(tower, k) or v for k, v in base._asdict().items()}
  got["mlp_dim"] = got["mlp_dim"] or 4 * (got["width"] or 0)
  for key, value in got.items():
    if not value:
      raise errors.UserError(
        f'{type(tower).__name__} needs a variant (such as "B") or {key}'
      )
  if got["width"] % got["num_heads"]:
    raise errors.UserError(
      f"width {got['width']} is not a multiple of num_heads {got['num_heads']}"
    )
  return Sizes(**got)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis; epsilon 1e-6.

  In float32 whatever the dtypes of x and of the stored scale and bias, which
  for a locked tower is the compute dtype (flax's own promotes implicitly).
  """

  @nn.compact
  def __call__(self, x):
    x = x.astype(jnp.float32)
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    last = (1,) * (x.ndim - 1) + (-1,)
    return x * scale.astype(x.dtype).reshape(last) + bias.astype(
      x.dtype
    ).reshape(last)


def attend(query, key, value):
  """Attention of (B, L, heads, hd) over (B, M, heads, hd), without a mask.

  flax's own function, asked for a float32 softmax, also computes the weighted
  sum of bfloat16 values in float32; here both products keep the inputs' dtype.
  """
  dtype = query.dtype
  logits = jnp.einsum("blhd,bmhd->bhlm", query * query.shape[-1] ** -0.5, key)
  weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(dtype)
  return jnp.einsum("bhlm,bmhd->blhd", weights, value)


def attention(num_heads, dtype):
  """Returns the multi-head attention layer: layer(x) or layer(query, keys)."""
  return nn.MultiHeadDotProductAttention(
    num_heads,
    dtype=dtype,
    attention_fn=attend,
    kernel_init=nn.initializers.xavier_uniform(),
  )


class MlpBlock(nn.Module):
  """Two dense layers with a GELU between, on the last axis."""

  mlp_dim: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(
      nn.Dense,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    width = x.shape[-1]
    x = nn.gelu(dense(self.mlp_dim)(x), approximate=True)
    x = nn.Dropout(self.dropout, deterministic=False)(x)
    return dense(width)(x)


class EncoderBlock(nn.Module):
  """x + attention, then x + MLP, each of the normalised x. (B, L, W)."""

  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    drop = nn.Dropout(self.dropout, deterministic=False)
    x = x + drop(attention(self.num_heads, self.dtype)(LayerNorm()(x)))
    mlp = MlpBlock(self.mlp_dim, self.dropout, self.dtype)
    x = x + drop(mlp(LayerNorm()(x)))
    return x, None  # nn.scan wants the carry, and an output per layer.


class Encoder(nn.Module):
  """A stack of blocks and a last LayerNorm: (B, L, W) -> float32 (B, L, W).

  With scan, the blocks are one block whose parameters have a leading layer
  axis: compiling takes the time of one block, whatever the depth.

  dropout is a rate that is applied whenever it is not 0; a tower passes 0 when
  it does not train, which saves every layer below a `train` argument.
  """

  depth: int
  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    block = EncoderBlock
    policy = errors.pick(REMAT, self.remat, "remat")
    if self.remat != "none":
      # Inside of a scan nothing can merge the recomputation with the original.
      block = nn.remat(block, policy=policy, prevent_cse=not self.scan)
    args = (self.mlp_dim, self.num_heads, self.dropout, self.dtype)
    x = x.astype(self.dtype)
    if self.scan:
      stack = nn.scan(
        block,
        variable_axes={"params": 0},
        length=self.depth,
        split_rngs={"params": True, "dropout": True},
      )
      x, _ = stack(*args, name="encoderblock")(x)
    else:
      for i in range(self.depth):
        x, _ = block(*args, name=f"encoderblock_{i}")(x)
    return LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
  """Pools by attention of one learned probe: (B, L, W) -> (B, W).

  From Set Transformer (arXiv 1810.00825), as used by ScalingViT
  (arXiv 2106.04560).
  """

  mlp_dim: int
  num_heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    probe = self.param(
      "probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])
    )
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
    x = attention(self.num_heads, self.dtype)(probe, x)
    x = x + MlpBlock(self.mlp_dim, dtype=self.dtype)(LayerNorm()(x))
    return x[:, 0]


def encoder_flops(size, length):
  """Matmul FLOPs of one example through an Encoder, a multiply-add being 2."""
  width, depth, mlp_dim, _ = size
  per_token = 4 * width * width + 2 * width * mlp_dim + 2 * length * width
  return 2 * depth * length * per_token


def map_flops(size, length):
  """Matmul FLOPs of one example through a MAPHead."""
  width, _, mlp_dim, _ = size
  keys_values = 2 * length * width * width + 2 * length * width
  return 2 * (keys_values + 2 * width * width + 2 * width * mlp_dim)
