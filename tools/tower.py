"""A locked image tower by itself, for tools.embed and tools.predict."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from sigjax import errors, sharding, trees
from sigjax.checkpoints import restore
from sigjax.models import two_towers


class Tower:
  """The image tower that a config describes.

  Args:
    image: an example of its input, (H, W, C).
    model, init: sections of the config.
    devices: all of this process if None.

  Attributes:
    blank: an image of zeros.
    checksum: SHA-256 of its architecture, compute dtype and weights.
    width: of its embeddings.

  Raises:
    UserError: the config names no weights, or they do not fit.
  """

  def __init__(self, image, *, model, init=None, devices=None):
    if model["image"].get("kind", "vit") == "precomputed":
      raise errors.UserError(
        "config.model.image is precomputed: give the config that has the "
        "tower itself, the one without embeddings="
      )
    if not init or init.get("into") == "txt":
      raise errors.UserError(
        "config.init names no weights of the image tower, and embeddings of "
        "one at random are worth nothing; set config.init.path"
      )
    model = errors.call(two_towers.TwoTowers, model, "config.model")
    self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
    shapes = jax.eval_shape(
      two_towers.image_tower(model).init, jax.random.key(0), image[None]
    )
    params = {"img": self._weights(shapes["params"], model.dtype, init)}
    about = json.dumps(
      [dict(model.image), model.out_dim[0], model.dtype],
      sort_keys=True,
      default=list,
    )
    digest = hashlib.sha256(about.encode())
    for name, x in sorted(trees.flatten(params).items()):
      digest.update(f"{name} {x.dtype} {x.shape}".encode())
      digest.update(np.asarray(x).tobytes())
    self.checksum = digest.hexdigest()
    self.blank = np.zeros_like(image)
    if model.bias_init is not None:
      params["b"] = jnp.zeros(1)
    params["t"] = jnp.zeros(1)
    self._params = jax.device_put(
      params, jax.sharding.NamedSharding(self.mesh, jax.P())
    )
    self._apply = jax.jit(lambda p, x: model.apply({"params": p}, x, None)[0])
    self.width = jax.eval_shape(self._apply, params, image[None]).shape[1]

  @staticmethod
  def _weights(shapes, dtype, init):
    if init.get("into") is None:  # of a file of both towers, one is enough
      init = dict(
        init, dont_load=(*init.get("dont_load", ()), "txt/.*", "t", "b")
      )
    given = errors.call(restore.read_init, init, "config.init", {"img": shapes})
    return jax.tree.map(
      lambda x: np.asarray(x, jnp.dtype(dtype)), trees.unflatten(given)["img"]
    )

  def __call__(self, images):
    """(B, H, W, C) numpy -> (B, E) unit rows, float32, on the devices."""
    return self._apply(self._params, sharding.put_batch(images, self.mesh))
