"""Embedding images or texts with a model that does not train."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sigjax import sharding
from sigjax.models.two_towers import TwoTowers


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
