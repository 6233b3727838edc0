"""The image tower: a Vision Transformer (arXiv 2010.11929)."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Real
import numpy as np

from sigjax import errors
from sigjax.models import attention, transformer


def sincos2d(
  height: int, width_in_patches: int, width: int
) -> Float[np.ndarray, "1 P W"]:
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


def resized_positions(
  table: Float[Array, "1 P W"], grid: tuple[int, int]
) -> Float[Array, "1 Q W"]:
  """Resamples learned positions, of a square grid, to another grid.

  Bilinear; patches are areas (half-pixel centres). Shrinking averages over all
  old positions (antialiased), as resizing an image does. Differentiable.

  Args:
    table: float32.
    grid: rows and columns.
  """
  side = math.isqrt(table.shape[1])
  if side * side != table.shape[1] or (side, side) == grid:
    return table
  squares = table.reshape(side, side, -1)
  squares = jax.image.resize(squares, (*grid, table.shape[2]), "linear")
  return squares.reshape(1, grid[0] * grid[1], -1)


def resized_kernel(
  kernel: Float[Array, "p p C W"], side: int
) -> Float[Array, "q q C W"]:
  """Resamples the kernel of the patch embedding to patches of another side.

  So that, as far as possible, a patch that is resized (bilinear, antialiased)
  has the same embedding (FlexiViT, arXiv 2212.08013): with larger patches it is
  exactly the same, with smaller ones by least squares.

  Args:
    kernel: float32.
    side: q, pixels.
  """
  old = kernel.shape[0]
  if side == old:
    return kernel
  with jax.ensure_compile_time_eval():  # depends on the sides alone
    basis = jnp.eye(old * old, dtype=jnp.float32).reshape(-1, old, old)
    resize = jax.image.resize(basis, (old * old, side, side), "linear")
    resize = np.asarray(resize, np.float64).reshape(old * old, -1)
  solve = jnp.asarray(np.linalg.pinv(resize), jnp.float32)  # (q q, p p)
  flat = kernel.reshape(old * old, -1)
  out = jnp.matmul(solve, flat, precision=jax.lax.Precision.HIGHEST)
  return out.reshape(side, side, *kernel.shape[2:])


def pixels(image: Real[Array, "..."]) -> Float[Array, "..."]:
  """Maps whole numbers, 0 to 255, to [-1, 1]; floats stay as they are."""
  if not jnp.issubdtype(image.dtype, jnp.integer):
    return image
  return image.astype(jnp.float32) * (2 / 255) - 1


def cut(image: Real[Array, "B H W C"], side: int) -> Real[Array, "B h w D"]:
  """Cuts images into rows of h x w patches, D = side * side * C.

  What is left on the right and at the bottom is dropped.

  Raises:
    UserError: the image is smaller than one patch.
  """
  b, height, width, c = image.shape
  h, w = height // side, width // side
  if not h * w:
    raise errors.UserError(
      f"image {image.shape} is smaller than one patch {(side, side)}"
    )
  image = image[:, : h * side, : w * side]
  image = image.reshape(b, h, side, w, side, c)
  return image.swapaxes(2, 3).reshape(b, h, w, -1)


class PatchEmbedding(nn.Module):
  """A dense layer on patches, with the parameters of flax's Conv.

  A product of rows takes less time than a convolution on CPUs; and patches are
  cut while a pixel is still a byte.
  """

  width: int
  side: int
  dtype: str

  @nn.compact
  def __call__(
    self, image: Real[Array, "B H W C"]
  ) -> Float[Array, "B h w width"]:
    # flax's default initialiser, LeCun's, keeps the variance; Xavier's would
    # take side * side * width for the fan-out.
    shape = (self.side, self.side, image.shape[-1], self.width)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    cast = lambda a: jnp.asarray(a, self.dtype)  # parameters may be NumPy's
    x = cast(pixels(cut(image, self.side)))
    flat = cast(kernel).reshape(-1, self.width)
    return x @ flat + cast(bias).reshape(1, 1, 1, -1)


class ViT(nn.Module):
  """Images (B, H, W, C) to one vector each: uint8, or floats in [-1, 1].

  Attributes:
    variant: "B/16": sizes from transformer.VARIANTS and the patch size.
    width, depth, mlp_dim, num_heads, patch_size: instead of the variant's.
    pool_type: "map" attention pooling (released SigLIP models), "gap" the mean
      over patches, "tok" an extra learned token "cls" (AugReg ViTs).
    posemb: "learn", as in all released models, or "sincos2d", fixed, for towers
      from scratch that see other resolutions later.
    out_dim: the size of a dense layer "head" at the end; None for no head.
    dropout: rate while training.
    scan: keep the blocks stacked, see transformer.Encoder.
    remat: "none", "dots", "attention" or "full", see transformer.REMAT; "auto"
      is the first of these with which the training step fits, see remat.py.
    attention: how the blocks compute it: "pallas" on TPUs, "cudnn" on GPUs,
      "xla" anywhere, or "auto", see attention.choose.
    dtype: compute dtype, see transformer.
    mesh: the devices, see attention.Way.
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
  attention: str = "auto"
  dtype: str = "float32"
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self,
    image: Real[Array, "B H W C"],
    train: bool = False,
    hidden: tuple[Bool[Array, "B P"], Float[Array, " W"]] | None = None,
  ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
    """Returns z and a dict of intermediates.

    hidden: (which patches are hidden, the vector that takes their place), for
    masked prediction. Positions are added to it, too.

    z is (B, out_dim), or (B, width) without a head, in the compute dtype.
    Intermediates: "embedded" and "encoded" (B, P, width), with "cls" P + 1;
    "pre_logits" (B, width).

    H and W need not be multiples of the patch size: the rest on the right and
    at the bottom is not seen, as in the released So400m/14 at 384 pixels.

    Raises:
      UserError: an unknown variant, pool_type or posemb, or an image whose
        number of patches is not that of the parameters.
    """
    size = self.sizes()
    tables = {"learn": self._learned, "sincos2d": sincos2d}
    positions = errors.pick(tables, self.posemb, "posemb")
    dropout = self.dropout if train else 0.0
    out = {}

    embed = PatchEmbedding(
      size.width, self.patch(), self.dtype, name="embedding"
    )
    x = embed(image)
    b, h, w, _ = x.shape
    table = jnp.asarray(positions(h, w, size.width), self.dtype)
    x = x.reshape(b, h * w, size.width)
    if hidden is not None:
      mask, token = hidden
      token = token.astype(x.dtype).reshape(1, 1, -1)
      x = jnp.where(mask[..., None], token, x)
    x = x + table
    if self.pool_type == "tok":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, size.width))
      cls = jnp.broadcast_to(cls.astype(self.dtype), (b, 1, size.width))
      x = jnp.concatenate([cls, x], axis=1)
    x = out["embedded"] = nn.Dropout(dropout, deterministic=False)(x)

    way = attention.Way(self.attention, self.mesh)
    encoder = transformer.Encoder(
      size, dropout, self.scan, self.remat, self.dtype, way, name="Transformer"
    )
    x = out["encoded"] = encoder(x)
    pools = "map", "gap", "tok"
    x = transformer.pool(self.pool_type, pools, x, size, self.dtype)
    out["pre_logits"] = x
    if self.out_dim:
      x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
    return x, out

  def _learned(self, h, w, width):
    have = self.get_variable("params", "pos_embedding")
    if have is not None and have.shape[1] != h * w:
      raise errors.UserError(
        f"the image has {h} x {w} patches, but pos_embedding {have.shape} is "
        f"for {have.shape[1]}: resize all images alike (pp and pp_image), or "
        "resample it by npz.load_params(like=)"
      )
    init = nn.initializers.normal(width**-0.5)
    return self.param("pos_embedding", init, (1, h * w, width))

  @nn.nowrap
  def sizes(self) -> transformer.Sizes:
    """Returns the tower's sizes; the variant fills in what is not given."""
    return transformer.sizes(self, (self.variant or "").partition("/")[0])

  @nn.nowrap
  def patch(self) -> int:
    """Returns the side of a patch in pixels."""
    return transformer.patch(self.variant, self.patch_size)
