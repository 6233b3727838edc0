"""Both towers, and the temperature and bias of the sigmoid loss."""

from collections.abc import Mapping
import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sigjax import errors
from sigjax.models import vit
from sigjax.models.text import TextTransformer


class TwoTowers(nn.Module):
  """Image and text towers that end in unit vectors of the same space.

  Attributes:
    image: keyword arguments of vit.ViT, except out_dim, dtype and mesh; with
      kind="naflex" those of naflex.NaFlex, with kind="precomputed" those of
      precomputed.Precomputed.
    text: keyword arguments of text.TextTransformer, except the same.
    out_dim: sizes of the towers' heads, E or None each. Released models have
      none on the image: the width of that tower is E.
    temperature_init: exp(t') at the start (SigLIP, section 3.2: 10).
    bias: what b is: "learned"; "none": 0 (table 4); "relative": b = -t * r with
      a learned r (arXiv 2509.18552), so that logits are t * (cosine - r); or a
      number, which stays.
    bias_init: b at the start, if something is learned: a number or, in
      of_config alone, "auto".
    dtype: of every matrix product and the residual stream of both towers;
      "bfloat16" on accelerators. Parameters and results are float32.
    mesh: the devices, over all of which batches are split; None if they are not
      known. The attention of both towers depends on it, see attention.Way.
  """

  image: Mapping[str, Any]
  text: Mapping[str, Any]
  out_dim: tuple[int | None, int | None] = (None, 768)
  temperature_init: float = 10.0
  bias: str | float = "learned"
  bias_init: float | str = -10.0
  dtype: str = "float32"
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self, image: Array | None, text: Array | None, train: bool = False
  ) -> tuple[Array | None, Array | None, dict[str, Array]]:
    """Embeds images and texts.

    Args:
      image: (B, H, W, C), floats in [-1, 1], or uint8, which stand for them;
        patches (B, L, 3 p^2 + 2) as of naflex.NaFlex; precomputed (B, W); or
        None to leave this tower out.
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
    out = {"t": jnp.exp(t)}
    out["b"] = self._bias(out["t"])

    zimg = ztxt = None
    if image is not None:
      tower = image_tower(self, name="img", parent=self)
      zimg = _unit("img", tower(image, train), out)
    if text is not None:
      tower = text_tower(self, name="txt", parent=self)
      ztxt = _unit("txt", tower(text, train), out)
    return zimg, ztxt, out

  def _bias(self, t: Array) -> Array:
    """Returns b, (1,); t is the temperature itself."""
    start = nn.initializers.constant
    if self.bias == "learned":
      return self.param("b", start(float(self.bias_init)), (1,))
    if self.bias == "relative":
      r = -float(self.bias_init) / self.temperature_init
      return -t * self.param("r", start(r), (1,))
    return jnp.full(1, 0.0 if self.bias == "none" else float(self.bias))


def of_config(
  model: Mapping[str, Any],
  batch_size: int | None = None,
  mesh: Mesh | None = None,
) -> TwoTowers:
  """Returns the TwoTowers of config.model, all its values resolved.

  Args:
    model: the section. bias_init "auto" is logit(1 / B) = -log(B - 1), with
      which an untrained model is right on average. None, of an earlier version,
      is bias "none".
    batch_size: B; None where parameters are given, so that none starts.
    mesh: see TwoTowers.

  Raises:
    UserError: a wrong key, or a wrong bias.
  """
  towers = errors.call(TwoTowers, model, "config.model", mesh=mesh)
  if towers.bias_init is None:
    return towers.clone(bias="none", bias_init=0.0)
  if towers.bias_init == "auto":
    if batch_size is not None and batch_size < 2:
      raise errors.UserError(
        'config.model.bias_init "auto" needs a config.batch_size of at least 2'
      )
    auto = -math.log(batch_size - 1) if batch_size else 0.0
    towers = towers.clone(bias_init=auto)
  if not _is_number(towers.bias_init):
    raise errors.UserError(
      'config.model.bias_init has to be a number or "auto", not '
      f"{towers.bias_init!r}"
    )
  if not _is_number(towers.bias):
    errors.pick(BIASES, towers.bias, "config.model.bias")
  return towers


# The choices of config.model.bias beside numbers.
BIASES = dict.fromkeys(("learned", "none", "relative"))


def _is_number(x: object) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def _naflex() -> type[nn.Module]:
  from sigjax.models import naflex

  return naflex.NaFlex


def _precomputed() -> type[nn.Module]:
  from sigjax.models import precomputed

  return precomputed.Precomputed


# The choices of config.model.image.kind; each is imported when it is named.
IMAGE_TOWERS = {
  "vit": lambda: vit.ViT,
  "naflex": _naflex,
  "precomputed": _precomputed,
}


def image_tower(model: TwoTowers, **kwargs: Any) -> nn.Module:
  """Returns the image tower of a TwoTowers; kwargs: name and parent, if any."""
  options = dict(model.image)
  kind = options.pop("kind", "vit")
  tower = errors.pick(IMAGE_TOWERS, kind, "config.model.image.kind")()
  more = dict(kwargs, out_dim=model.out_dim[0], dtype=model.dtype)
  if kind != "precomputed":  # it has no attention
    more["mesh"] = model.mesh
  return errors.call(tower, options, "model.image", **more)


def text_tower(model: TwoTowers, **kwargs: Any) -> nn.Module:
  """Returns the TextTransformer of a TwoTowers, as image_tower does."""
  more = dict(kwargs, out_dim=model.out_dim[1], dtype=model.dtype)
  more["mesh"] = model.mesh
  return errors.call(TextTransformer, model.text, "model.text", **more)


def _unit(name, result, out):
  """Returns a tower's z as float32 unit vectors; adds what it has to out."""
  z, tower_out = result
  z = z.astype(jnp.float32)
  norm = jnp.linalg.norm(z, axis=1, keepdims=True)
  out[f"{name}/norm"] = norm
  out.update({f"{name}/{key}": value for key, value in tower_out.items()})
  return z / (norm + 1e-8)
