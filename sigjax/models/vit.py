"""The image tower: a Vision Transformer (arXiv 2010.11929)."""

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from sigjax import errors
from sigjax.models import transformer


def sincos2d(height, width_in_patches, width):
  """Returns fixed sine-cosine positions, (1, P, width) float32.

  A quarter of the channels each for sin(x), cos(x), sin(y), cos(y), with
  wavelengths from 2 pi to 10,000 * 2 pi (MoCo v3, arXiv 2104.02057).
  """
  if width % 4:
    raise errors.UserError(
      f'posemb "sincos2d" needs a width divisible by 4, not {width}'
    )
  frequency = 10_000.0 ** -np.linspace(0, 1, width // 4)
  y, x = np.mgrid[:height, :width_in_patches].reshape(2, -1, 1) * frequency
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table.astype(np.float32)[None]


class ViT(nn.Module):
  """Images (B, H, W, C), values in [-1, 1], to one vector each.

  Attributes:
    variant: "B/16": sizes from transformer.VARIANTS and the patch size.
    width, depth, mlp_dim, num_heads, patch_size: instead of the variant's.
    pool_type: "map" attention pooling (released SigLIP models), "gap" the mean
      over patches, "tok" an extra learned token "cls" (AugReg ViTs).
    posemb: "learn" or "sincos2d".
    out_dim: the size of a dense layer "head" at the end; None for no head.
    dropout: rate while training.
    scan: keep the blocks stacked, see transformer.Encoder.
    remat: "none", "dots" or "full", see transformer.REMAT.
    dtype: compute dtype, see transformer.
  """

  variant: str | None = None
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  patch_size: int | None = None
  pool_type: str = "map"
  posemb: str = "learn"
  out_dim: int | None = None
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image, train=False):
    """Returns z and a dict of intermediates.

    z is (B, out_dim), or (B, width) without a head, in the compute dtype.
    Intermediates: "embedded" and "encoded" (B, P, width), with "cls" P + 1;
    "pre_logits" (B, width).

    H and W need not be multiples of the patch size: as in the released
    So400m/14 at 384 pixels, what is left on the right and below is not seen.

    Raises:
      UserError: an unknown variant, pool_type or posemb, or an image whose
        number of patches is not that of the parameters.
    """
    size = self._sizes()
    pool = errors.pick(
      {"map": self._map, "gap": self._gap, "tok": self._tok},
      self.pool_type,
      "pool_type",
    )
    positions = errors.pick(
      {"learn": self._learned, "sincos2d": sincos2d}, self.posemb, "posemb"
    )
    dropout = self.dropout if train else 0.0
    out = {}

    # Initialised by flax's default, LeCun's, which keeps the variance; Xavier's
    # would take p * p * width for the fan-out.
    patch = (self._patch(),) * 2
    x = nn.Conv(
      size.width,
      patch,
      strides=patch,
      padding="VALID",
      dtype=self.dtype,
      name="embedding",
    )(image)
    b, h, w, _ = x.shape
    if not h * w:
      raise errors.UserError(
        f"image {image.shape} is smaller than one patch {patch}"
      )
    table = jnp.asarray(positions(h, w, size.width), self.dtype)
    x = x.reshape(b, h * w, size.width) + table
    if self.pool_type == "tok":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, size.width))
      cls = jnp.broadcast_to(cls.astype(self.dtype), (b, 1, size.width))
      x = jnp.concatenate([cls, x], axis=1)
    x = out["embedded"] = nn.Dropout(dropout, deterministic=False)(x)

    x = out["encoded"] = transformer.Encoder(
      size.depth,
      size.mlp_dim,
      size.num_heads,
      dropout,
      self.scan,
      self.remat,
      self.dtype,
      name="Transformer",
    )(x)
    x = out["pre_logits"] = pool(x, size)
    if self.out_dim:
      x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
    return x, out

  def _learned(self, h, w, width):
    have = self.get_variable("params", "pos_embedding")
    if have is not None and have.shape[1] != h * w:
      raise errors.UserError(
        f"the image has {h} x {w} patches, but pos_embedding {have.shape} is "
        f"for {have.shape[1]}; load.load_params resamples it to `like`"
      )
    return self.param(
      "pos_embedding", nn.initializers.normal(width**-0.5), (1, h * w, width)
    )

  def _map(self, x, size):
    return transformer.MAPHead(
      size.mlp_dim, size.num_heads, self.dtype, name="MAPHead_0"
    )(x)

  def _gap(self, x, size):
    return jnp.mean(x, axis=1)

  def _tok(self, x, size):
    return x[:, 0]

  @nn.nowrap
  def _sizes(self):
    return transformer.sizes(self, (self.variant or "").partition("/")[0])

  @nn.nowrap
  def _patch(self):
    if self.patch_size:
      return self.patch_size
    patch = (self.variant or "").partition("/")[2]
    if not patch.isdecimal() or not int(patch):
      raise errors.UserError(
        f'image variant "{self.variant}" names no patch size: write one as '
        'in "B/16", or give patch_size'
      )
    return int(patch)

  @nn.nowrap
  def flops(self, height, width, channels=3):
    """Forward matmul FLOPs of one image of height x width pixels."""
    size, patch = self._sizes(), self._patch()
    patches = (height // patch) * (width // patch)
    total = 2 * patches * patch * patch * channels * size.width
    total += transformer.encoder_flops(
      size, patches + (self.pool_type == "tok")
    )
    if self.pool_type == "map":
      total += transformer.map_flops(size, patches)
    return total + 2 * size.width * (self.out_dim or 0)
