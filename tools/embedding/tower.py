"""The image tower of a config by itself, with the weights it starts from."""

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from sigjax import errors, sharding, trees
from sigjax.checkpoints import restore
from sigjax.models import two_towers


class Tower:
  """The image tower that a config describes.

  Args:
    image: an example of its input, (H, W, C).
    model: the section of the config.
    init: the section of the config; names the weights.
    devices: all devices of this process if None.

  Attributes:
    mesh: the devices, on one axis.
    blank: an image of zeros, (H, W, C).
    checksum: SHA-256 of the architecture, the compute dtype and the weights.
    width: E, the length of an embedding.

  Raises:
    UserError: the config has no image tower or names no weights for it, or the
      weights do not fit.
  """

  mesh: jax.sharding.Mesh
  blank: np.ndarray
  checksum: str
  width: int

  def __init__(
    self,
    image: np.ndarray,
    *,
    model: Mapping[str, Any],
    init: Mapping[str, Any] | None = None,
    devices: Sequence[Any] | None = None,
  ):
    if model["image"].get("kind", "vit") == "precomputed":
      raise errors.UserError(
        "config.model.image is precomputed, so there is no image tower to run: "
        "give the config without embeddings="
      )
    if not init or init.get("into") == "txt":
      raise errors.UserError(
        "config.init names no weights for the image tower, and embeddings of "
        "random weights are useless: set config.init.path"
      )
    # Embeddings depend neither on the bias nor on the temperature.
    no_bias = dict(model, bias="none", bias_init=0.0)
    towers = errors.call(two_towers.TwoTowers, no_bias, "config.model")
    self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
    shapes = jax.eval_shape(
      two_towers.image_tower(towers).init, jax.random.key(0), image[None]
    )
    params: dict[str, Any] = {
      "img": _weights(shapes["params"], towers.dtype, init)
    }
    self.checksum = _checksum(towers, params)
    self.blank = np.zeros_like(image)
    params["t"] = jnp.zeros(1)
    self._params = jax.device_put(
      params, jax.sharding.NamedSharding(self.mesh, jax.P())
    )
    self._apply = jax.jit(lambda p, x: towers.apply({"params": p}, x, None)[0])
    self.width = jax.eval_shape(self._apply, params, image[None]).shape[1]

  def __call__(
    self, images: Float[np.ndarray, "B H W C"]
  ) -> Float[Array, "B E"]:
    """Returns float32 unit rows on the devices; does not wait for them."""
    return self._apply(self._params, sharding.put_batch(images, self.mesh))


def _weights(shapes, dtype, init):
  """Reads the image tower's weights, in the compute dtype."""
  if init.get("into") is None:
    # The weights hold both towers. Only the image tower is needed.
    init = dict(
      init, dont_load=(*init.get("dont_load", ()), "txt/.*", "t", "b", "r")
    )
  given = errors.call(restore.read_init, init, "config.init", {"img": shapes})
  return jax.tree.map(
    lambda x: np.asarray(x, jnp.dtype(dtype)), trees.unflatten(given)["img"]
  )


def _checksum(towers, params):
  """Returns the SHA-256 of architecture, compute dtype and weights."""
  about = json.dumps(
    [dict(towers.image), towers.out_dim[0], towers.dtype],
    sort_keys=True,
    default=list,
  )
  digest = hashlib.sha256(about.encode())
  for name, x in sorted(trees.flatten(params).items()):
    digest.update(f"{name} {x.dtype} {x.shape}".encode())
    digest.update(np.asarray(x).tobytes())
  return digest.hexdigest()
