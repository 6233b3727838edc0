"""Embedding images or texts with a model that does not train."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sigjax import sharding
from sigjax.models import two_towers, vit
from sigjax.models.two_towers import TwoTowers

if TYPE_CHECKING:
  from sigjax.terms import Term


def make_embed(
  model: TwoTowers, mesh: Mesh
) -> Callable[..., tuple[Array | None, Array | None, Array | None]]:
  """Builds embed(params, image, text) -> (zimg, ztxt, features).

  image is (B, ...), as its tower takes it, and text (B, L). They are this
  process's rows, or None: then the tower is not run and its result is None.
  Rows are split over all devices. The towers compute in model.dtype, as in
  training.

  zimg and ztxt are (B, E) unit rows. features are (B, W), the image tower's
  output before its head, not normalised. All are float32.
  """

  model = model.clone(mesh=mesh)

  @jax.jit
  def embed(params, image, text):
    found: Any = model.apply({"params": params}, image, text)
    zimg, ztxt, out = found
    features = None
    if image is not None:
      features = out["img/pre_logits"].astype(jnp.float32)
    return zimg, ztxt, features

  def put_and_embed(params, image=None, text=None):
    return embed(params, *sharding.put_batch((image, text), mesh))

  return put_and_embed


def others(
  model: TwoTowers, mesh: Mesh, terms: "Sequence[Term]" = ()
) -> dict[str, Callable[..., Any]]:
  """Builds {name: fn(params, image, text) -> arrays (B, ..)} for evaluations.

  "patches": the image tower's patches before pooling (B, P, W) float32, and the
  share of each patch's pixels that are not white (B, P). For a ViT of images.

  "captions": how many tokens of the text the decoder predicts given those
  before, (B,) int32; how many there are, (B,); and the size of the vocabulary,
  (B,). For a model with a term of type "caption".

  Args:
    model: the towers.
    mesh: the devices.
    terms: the losses beside the pair loss.
  """
  model = model.clone(mesh=mesh)
  found = {}
  tower = two_towers.image_tower(model)
  if isinstance(tower, vit.ViT):
    side, cls = tower.patch(), tower.pool_type == "tok"

    def patches(params, image, text):
      out: Any = model.apply({"params": params}, image, None)
      x = out[2]["img/encoded"].astype(jnp.float32)
      ink = jnp.min(vit.pixels(image), axis=3) < 0.9
      rows, columns = (n // side for n in ink.shape[1:])
      ink = ink[:, : rows * side, : columns * side]
      cut = ink.reshape(-1, rows, side, columns, side).astype(jnp.float32)
      share = jnp.mean(cut, axis=(2, 4)).reshape(len(ink), -1)
      return (x[:, 1:] if cls else x), share

    found["patches"] = patches
  for term in terms:
    if hits := getattr(term.kind, "hits", None):

      def captions(params, image, text, hits=hits):
        out: Any = model.apply({"params": params}, image, None)
        return hits(params, out[2], text)

      found["captions"] = captions

  def put_and_run(fn):
    fn = jax.jit(fn)
    return lambda params, image=None, text=None: fn(
      params, *sharding.put_batch((image, text), mesh)
    )

  return {name: put_and_run(fn) for name, fn in found.items()}
