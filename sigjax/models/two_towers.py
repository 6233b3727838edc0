"""Both towers, and the temperature and bias of the sigmoid loss."""

from collections.abc import Mapping
import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from sigjax import errors
from sigjax.models import vit
from sigjax.models.text import TextTransformer


class TwoTowers(nn.Module):
  """Image and text towers that end in unit vectors of the same space.

  Attributes:
    image: keyword arguments of vit.ViT, except out_dim and dtype; with
      kind="precomputed" those of precomputed.Precomputed.
    text: keyword arguments of text.TextTransformer, except out_dim and dtype.
    out_dim: sizes of the towers' heads, E or None each. Released models have
      none on the image: the width of that tower is E.
    temperature_init: exp(t') at the start (SigLIP, section 3.2: 10).
    bias_init: b at the start; None for a loss without b (table 4).
    dtype: of every matrix product and the residual stream of both towers;
      "bfloat16" on accelerators. Parameters and results are float32.
  """

  image: Mapping[str, Any]
  text: Mapping[str, Any]
  out_dim: tuple[int | None, int | None] = (None, 768)
  temperature_init: float = 10.0
  bias_init: float | None = -10.0
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Array | None, text: Array | None, train: bool = False
  ) -> tuple[Array | None, Array | None, dict[str, Array]]:
    """Embeds images and texts.

    Args:
      image: (B, H, W, C), floats in [-1, 1] or uint8, which is mapped to that;
        precomputed (B, W); or None to leave this tower out.
      text: (B, L) int32, or None to leave this tower out.
      train: applies dropout, from the rng "dropout".

    Returns:
      zimg, ztxt: (B, E) float32 of unit norm; None for a tower left out.
      out: "t" (1,) the temperature itself, not its logarithm; "b" (1,);
        "img/norm" and "txt/norm" (B, 1) before normalisation; "img/..." and
        "txt/..." the towers' intermediates.

    Raises:
      UserError: a key in `image` or `text` that their tower does not take.
    """
    t = self.param(
      "t", nn.initializers.constant(math.log(self.temperature_init)), (1,)
    )
    out = {"t": jnp.exp(t), "b": jnp.zeros(1)}
    if self.bias_init is not None:
      out["b"] = self.param("b", nn.initializers.constant(self.bias_init), (1,))

    zimg = ztxt = None
    if image is not None:
      if image.dtype == jnp.uint8:  # a quarter of the memory until here
        image = image.astype(jnp.float32) * (2 / 255) - 1
      tower = image_tower(self, name="img", parent=self)
      zimg = _unit("img", tower(image, train), out)
    if text is not None:
      tower = text_tower(self, name="txt", parent=self)
      ztxt = _unit("txt", tower(text, train), out)
    return zimg, ztxt, out


def _precomputed() -> type[nn.Module]:
  from sigjax.models import precomputed

  return precomputed.Precomputed


# The choices of config.model.image.kind; each is imported when it is named.
IMAGE_TOWERS = {"vit": lambda: vit.ViT, "precomputed": _precomputed}


def image_tower(model: TwoTowers, **kwargs: Any) -> nn.Module:
  """Returns the image tower of a TwoTowers; kwargs: name and parent, if any."""
  options = dict(model.image)
  kind = options.pop("kind", "vit")
  tower = errors.pick(IMAGE_TOWERS, kind, "config.model.image.kind")()
  more = dict(out_dim=model.out_dim[0], dtype=model.dtype, **kwargs)
  return errors.call(tower, options, "model.image", **more)


def text_tower(model: TwoTowers, **kwargs: Any) -> nn.Module:
  """Returns the TextTransformer of a TwoTowers, as image_tower does."""
  more = dict(out_dim=model.out_dim[1], dtype=model.dtype, **kwargs)
  return errors.call(TextTransformer, model.text, "model.text", **more)


def _unit(name, result, out):
  """Returns a tower's z as float32 unit vectors; adds what it has to out."""
  z, tower_out = result
  z = z.astype(jnp.float32)
  norm = jnp.linalg.norm(z, axis=1, keepdims=True)
  out[f"{name}/norm"] = norm
  out.update({f"{name}/{key}": value for key, value in tower_out.items()})
  return z / (norm + 1e-8)
