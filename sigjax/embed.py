"""Embedding images or texts with a model that does not train."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from sigjax import sharding
from sigjax.models.two_towers import TwoTowers


def make_embed(
  model: TwoTowers, mesh: Mesh
) -> Callable[..., tuple[Array | None, Array | None]]:
  """Builds embed(params, image, text) -> (zimg, ztxt), (B, E) unit rows.

  image is (B, H, W, C) and text (B, L), this process's rows, or None: then the
  tower is not run and its result is None. Rows are split over all devices.
  """

  @jax.jit
  def embed(params, image, text):
    out: Any = model.apply({"params": params}, image, text)
    return out[:2]

  def put_and_embed(params, image=None, text=None):
    return embed(params, *sharding.put_batch((image, text), mesh))

  return put_and_embed
