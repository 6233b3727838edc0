"""What the two towers share: sizes, encoder blocks, attention pooling.

Parameter names, initialisers and numerics follow the released checkpoints:
pre-norm blocks (ViT, arXiv 2010.11929), GELU by its tanh approximation,
LayerNorm with epsilon 1e-6. Attention sees all tokens, unless a mask, (B, L),
says which ones there are.

Precision: parameters are float32. Matrix products and the residual stream run
in the compute dtype; LayerNorm, softmax and GELU always in float32.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sigjax import errors, sharding
from sigjax.models import attention


class Sizes(NamedTuple):
  """Sizes of a tower: W, blocks, hidden width of the MLPs, attention heads."""

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

# GELU's tanh is that of _SLOPE * (x + _CUBIC * x**3).
_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715

# What the backward pass keeps in memory; the rest is computed again. "dots"
# keeps the outputs of dense layers and of attention, but not its weights;
# "attention" what goes into attention and what comes out, 4 numbers a token and
# channel instead of 10.
_policies = jax.checkpoint_policies
_dots = _policies.dots_with_no_batch_dims_saveable
_names = _policies.save_only_these_names
REMAT = {
  "none": _policies.everything_saveable,
  "dots": _policies.save_from_both_policies(_dots, _names("attended")),
  "attention": _names("qkv", "attended"),
  "full": _policies.nothing_saveable,
}
# Training replaces it, see remat.py; without gradients all are the same.
REMAT["auto"] = REMAT["none"]


def sizes(tower: nn.Module, variant: str | None) -> Sizes:
  """Returns the sizes of a tower: its own fields, or else the variant's.

  Without a variant, width, depth and num_heads are needed; mlp_dim is 4 * width
  by default.

  Raises:
    UserError: an unknown variant, a missing size, or a width that num_heads
      does not divide.
  """
  base = errors.pick(VARIANTS, variant, "variant")._asdict() if variant else {}
  got = {k: getattr(tower, k) or base.get(k, 0) for k in Sizes._fields}
  got["mlp_dim"] = got["mlp_dim"] or 4 * got["width"]
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


def patch(variant: str | None, given: int | None) -> int:
  """Returns the side of a patch: the one given, or else that of "B/16".

  Raises:
    UserError: there is none.
  """
  if given:
    return given
  side = (variant or "").partition("/")[2]
  if not side.isdecimal() or not int(side):
    raise errors.UserError(
      f'image variant "{variant}" names no patch size: write one as in '
      '"B/16", or give patch_size'
    )
  return int(side)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis; epsilon 1e-6.

  Always in float32, also where x, or the scale and bias of a locked tower, are
  in another compute dtype (flax's own promotes implicitly). The variance is
  E[x^2] - E[x]^2, so that x is read once for both, as in flax and in the
  training of the released weights.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
    x = x.astype(jnp.float32)
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    mean = jnp.mean(x, axis=-1, keepdims=True)
    squares = jnp.mean(x * x, axis=-1, keepdims=True)
    # Rounding may make the difference of a constant row negative.
    variance = jnp.maximum(squares - mean * mean, 0)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
    # Broadcast explicitly: JAX can be told to refuse implicit rank promotion.
    scale, bias = (
      p.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
      for p in (scale, bias)
    )
    return x * scale + bias


@jax.custom_vjp
def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """GELU by its tanh approximation (arXiv 1606.08415), of float32 or bfloat16.

  It and its gradient are computed in float32: in bfloat16 the constants would
  be rounded, too. The gradient is written out, in 14 operations instead of the
  20 of automatic differentiation. On TPU v4 they take as long as the matrix
  product that XLA fuses them into.
  """
  return _gelu_fwd(x)[0]


def _gelu_tanh(y):
  return jnp.tanh(y * (_SLOPE + _SLOPE * _CUBIC * (y * y)))


def _gelu_fwd(x):
  y = x.astype(jnp.float32)
  t = _gelu_tanh(y)
  return (y * (0.5 + 0.5 * t)).astype(x.dtype), x


def _gelu_bwd(x, dout):
  y = x.astype(jnp.float32)
  t = _gelu_tanh(y)
  inner = y * (0.5 * _SLOPE + 1.5 * _SLOPE * _CUBIC * (y * y))
  slope = (0.5 + 0.5 * t) + (1 - t * t) * inner
  return ((dout.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


class MlpBlock(nn.Module):
  """Two dense layers with a GELU between them, on the last axis."""

  mlp_dim: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
    dense = functools.partial(
      nn.Dense,
      dtype=self.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    width = x.shape[-1]
    x = gelu(dense(self.mlp_dim)(x))
    x = nn.Dropout(self.dropout, deterministic=False)(x)
    return dense(width)(x)


class EncoderBlock(nn.Module):
  """Rows (B L, W): x + attention(norm(x)), then x + MLP(norm(x))."""

  length: int  # L
  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  way: attention.Way = attention.Way()

  @nn.compact
  def __call__(
    self, x: Float[Array, "N W"], mask: Bool[Array, "B L"] | None = None
  ) -> tuple[Array, None]:
    # Said in each block, or XLA gathers rows rather than the kernels that
    # fsdp splits.
    x = sharding.split_rows(x, self.way.mesh)
    drop = nn.Dropout(self.dropout, deterministic=False)
    attend = attention.MultiHeadDotProductAttention(
      self.num_heads, self.dtype, self.way
    )
    x = x + drop(attend(LayerNorm()(x), mask=mask, length=self.length))
    mlp = MlpBlock(self.mlp_dim, self.dropout, self.dtype)
    x = x + drop(mlp(LayerNorm()(x)))
    return x, None  # nn.scan expects a carry and an output of each layer


class Stack(NamedTuple):
  """Blocks on top of each other; `name` has {} for the number without scan."""

  block: type[nn.Module]  # of (x, *others) -> (x, None)
  depth: int
  name: str
  scan: bool
  remat: str


def apply_blocks(
  stack: Stack, args: tuple, x: Float[Array, "... W"], *others: Any
) -> Float[Array, "... W"]:
  """Runs x through blocks; for use inside a module, which then owns them.

  Args:
    stack: the blocks.
    args: of their constructor.
    x: the residual stream.
    *others: what each block gets beside it.

  Raises:
    UserError: an unknown remat.
  """
  policy = errors.pick(REMAT, stack.remat, "remat")
  block = stack.block
  if stack.remat not in ("none", "auto"):
    # In a scan, XLA cannot merge the recomputation with the first one.
    block = nn.remat(block, policy=policy, prevent_cse=not stack.scan)
  if not stack.scan:
    for i in range(stack.depth):
      x, _ = block(*args, name=stack.name.format(i))(x, *others)
    return x
  scanned = nn.scan(
    block,
    variable_axes={"params": 0, "cache": 0},
    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
    length=stack.depth,
    split_rngs={"params": True, "dropout": True},
  )
  return scanned(*args, name=stack.name)(x, *others)[0]


class Encoder(nn.Module):
  """A stack of blocks and a last LayerNorm: (B, L, W) -> float32 (B, L, W).

  With scan, all blocks are one block whose parameters have a leading layer
  axis; compiling then takes the time of one block, whatever the depth.

  A dropout rate above 0 is always applied: a tower passes 0 when it does not
  train, so that no layer below it needs a `train` argument.
  """

  size: Sizes
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"
  way: attention.Way = attention.Way()

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L W"], mask: Bool[Array, "B L"] | None = None
  ) -> Float[Array, "B L W"]:
    # Rows: of (B, L, W), a TPU pads each L to a multiple of 8 or puts L first,
    # and copies where an op needs the other.
    size, shape = self.size, x.shape
    args = (size.mlp_dim, size.num_heads, self.dropout, self.dtype, self.way)
    x = x.astype(self.dtype).reshape(-1, shape[2])
    name = "encoderblock" if self.scan else "encoderblock_{}"
    stack = Stack(EncoderBlock, size.depth, name, self.scan, self.remat)
    x = apply_blocks(stack, (shape[1], *args), x, mask)
    return LayerNorm(name="encoder_norm")(x).reshape(shape)


class MAPHead(nn.Module):
  """Pools by the attention of one learned probe: (B, L, W) -> (B, W).

  From Set Transformer (arXiv 1810.00825), as used by ScalingViT
  (arXiv 2106.04560).
  """

  mlp_dim: int
  num_heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L W"], mask: Bool[Array, "B L"] | None = None
  ) -> Float[Array, "B W"]:
    probe = self.param(
      "probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])
    )
    attend = attention.AttentionOfOneQuery(
      self.num_heads, self.dtype, name="MultiHeadDotProductAttention_0"
    )
    x = attend(probe[0], x, mask)
    return x + MlpBlock(self.mlp_dim, dtype=self.dtype)(LayerNorm()(x))


def pool(
  kind: str,
  allowed: tuple[str, ...],
  x: Float[Array, "B L W"],
  size: Sizes,
  dtype: str,
  mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B W"]:
  """Pools tokens; for use inside a tower, which then owns the parameters.

  Args:
    kind: "map": attention pooling; "gap": the mean; "last": the last token;
      "tok": the first token, which a ViT's "cls" is. One of `allowed`.
    mask: which tokens there are, for "map" and "gap".
  """
  there = None if mask is None else mask[..., None]
  fns = dict(
    map=lambda: MAPHead(size.mlp_dim, size.num_heads, dtype, name="MAPHead_0")(
      x, mask
    ),
    gap=lambda: jnp.mean(x, axis=1, where=there),
    last=lambda: x[:, -1],
    tok=lambda: x[:, 0],
  )
  return errors.pick({k: fns[k] for k in allowed}, kind, "pool_type")()
