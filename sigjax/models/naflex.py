"""The image tower for images of any aspect ratio, NaFlex (arXiv 2502.14786).

An image comes as its patches, each with its row and column. Nothing but the
patches of the same image is seen: padding is masked in every attention and in
the pooling. Positions are a table of 16 x 16, resized to each image's own grid.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Real

from sigjax import errors
from sigjax.models import attention, transformer, vit


def positions(
  table: Float[Array, "R R W"],
  places: Int[Array, "B L 2"],
  mask: Bool[Array, "B L"],
) -> Float[Array, "B L W"]:
  """Reads positions for the patches of images, each with a grid of its own.

  The result is that of resizing the table to the grid (bilinear, antialiased,
  half-pixel centres) and reading it at the patch's row and column. A resized
  table is never made: both axes are weighted separately, by triangles about the
  patch's centre, so that all grids are one program.

  Args:
    table: float32.
    places: row and column of each patch. The grid of an image is the largest
      ones + 1.
    mask: which patches there are; others have any position.
  """
  places = jnp.where(mask[..., None], places, 0).astype(jnp.float32)
  grid = jnp.max(places, axis=1, keepdims=True) + 1
  side = table.shape[0]
  scale = side / grid  # (B, 1, 2) rows of it for a patch
  centre = (places + 0.5) * scale - 0.5
  # Where there are fewer patches than rows, all rows count (antialiasing).
  reach = jnp.maximum(scale, 1.0)
  rows = jnp.arange(side, dtype=jnp.float32).reshape(1, 1, 1, side)
  distance = jnp.abs(rows - centre[..., None]) / reach[..., None]
  weights = jnp.maximum(1.0 - distance, 0.0)
  weights /= jnp.sum(weights, axis=-1, keepdims=True)
  both = weights[:, :, 0, :, None] * weights[:, :, 1, None, :]
  return jnp.einsum(
    "blyx,yxw->blw", both, table, precision=jax.lax.Precision.HIGHEST
  )


class NaFlex(nn.Module):
  """Patches of images, (B, L, 3 p^2 + 2), to one vector each.

  Each row is a patch, (p, p, 3) in row-major order, then its row and its column
  in the image, from 0. Rows of padding have column -1. int16 pixels are 0..255,
  as the op resize_to_patches makes them; floats are in [-1, 1].

  Attributes:
    variant: "B/16": sizes from transformer.VARIANTS and the patch size.
    width, depth, mlp_dim, num_heads, patch_size: instead of the variant's.
    pool_type: "map" attention pooling (released models), "gap" the mean.
    out_dim, dropout, scan, remat, attention, dtype, mesh: as in vit.ViT.
  """

  variant: str | None = None
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  patch_size: int | None = None
  pool_type: str = "map"
  out_dim: int | None = None
  dropout: float = 0.0
  scan: bool = False
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self, image: Real[Array, "B L D"], train: bool = False
  ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
    """Returns z and a dict of intermediates.

    z is (B, out_dim), or (B, width) without a head, in the compute dtype.
    Intermediates: "embedded" and "encoded" (B, L, width), with any values at
    the padding; "mask" (B, L), which patches there are; "pre_logits"
    (B, width).

    Raises:
      UserError: an unknown variant or pool_type, or other images than patches
        of this size.
    """
    size, patch = self.sizes(), self.patch()
    dropout = self.dropout if train else 0.0
    out = {}

    if image.ndim != 3 or image.shape[2] != 3 * patch * patch + 2:
      raise errors.UserError(
        f"image tower NaFlex takes patches, (length, {3 * patch * patch + 2}), "
        f"not images of shape {tuple(image.shape[1:])}; the op "
        f"resize_to_patches(length, {patch}) makes them"
      )
    pixels, places = image[..., :-2], image[..., -2:].astype(jnp.int32)
    mask = out["mask"] = places[..., 1] >= 0
    embed = nn.Dense(size.width, dtype=self.dtype, name="embedding")
    x = embed(vit.pixels(pixels))
    init = nn.initializers.normal(size.width**-0.5)
    table = self.param("pos_embedding", init, (16, 16, size.width))
    table = table.astype(jnp.float32)
    x = x + positions(table, places, mask).astype(self.dtype)
    x = out["embedded"] = nn.Dropout(dropout, deterministic=False)(x)

    way = attention.Way(self.attention, self.mesh)
    encoder = transformer.Encoder(
      size, dropout, self.scan, self.remat, self.dtype, way, name="Transformer"
    )
    x = out["encoded"] = encoder(x, mask)
    pools = "map", "gap"
    x = transformer.pool(self.pool_type, pools, x, size, self.dtype, mask)
    out["pre_logits"] = x
    if self.out_dim:
      x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
    return x, out

  @nn.nowrap
  def sizes(self) -> transformer.Sizes:
    """Returns the tower's sizes; the variant fills in what is not given."""
    return transformer.sizes(self, (self.variant or "").partition("/")[0])

  @nn.nowrap
  def patch(self) -> int:
    """Returns the side of a patch in pixels."""
    return transformer.patch(self.variant, self.patch_size)
