"""Image embeddings that were computed before, in place of an image tower."""

from flax import linen as nn
from jaxtyping import Array, Float

from sigjax import errors


class Precomputed(nn.Module):
  """Replaces an image tower whose embeddings were computed before.

  Attributes:
    width: W of the embeddings.
    out_dim: the size of a dense layer "head" on them; None for no parameters.
    dtype: compute dtype.
  """

  width: int
  out_dim: int | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "B W"], train: bool = False
  ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
    """Returns z, (B, out_dim) or (B, W), and {"pre_logits": image}.

    Raises:
      UserError: the embeddings have another width.
    """
    del train
    if image.ndim != 2 or image.shape[1] != self.width:
      raise errors.UserError(
        f"the data's embeddings have shape {tuple(image.shape[1:])}, but "
        f"config.model.image.width is {self.width}"
      )
    out = {"pre_logits": image}
    if self.out_dim:
      image = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(
        image.astype(self.dtype)
      )
    return image, out
