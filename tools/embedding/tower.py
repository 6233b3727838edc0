"""An image tower by itself, with its weights."""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import importlib.util
import io
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from PIL import Image

from sigjax import errors, sharding, trees
from sigjax.checkpoints import restore
from sigjax.data.example import preprocess
from sigjax.models import two_towers
from sigjax.runtime import files
from sigjax.weights import known


class Tower:
  """An image tower on some devices.

  Args:
    apply: fn(params, images (B, H, W, C)) -> embeddings (B, E).
    params: its weights.
    pp_image: the preprocessing of its images.
    checksum: a text that tells it from other towers.
    made_by: what opens it again, as JSON: {"weights": of open_tower} or
      {"config": {"model": .., "init": ..} of of_config}.
    devices: all devices of this process if None.

  Attributes:
    pp_image, checksum, made_by: the same.
    mesh: the devices, on one axis.
    blank: a black image, preprocessed, (H, W, C).
    width: E, the length of an embedding.
  """

  pp_image: str
  checksum: str
  made_by: dict[str, Any]
  mesh: jax.sharding.Mesh
  blank: np.ndarray
  width: int

  def __init__(
    self,
    apply: Callable[[Any, Any], Array],
    params: Any,
    pp_image: str,
    checksum: str,
    made_by: Mapping[str, Any],
    devices: Sequence[Any] | None = None,
  ):
    self.pp_image, self.checksum = pp_image, checksum
    self.made_by = dict(made_by)
    self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
    self.blank = blank(pp_image)
    self._params = jax.device_put(
      params, jax.sharding.NamedSharding(self.mesh, jax.P())
    )
    self._apply = jax.jit(apply)
    self.width = jax.eval_shape(apply, params, self.blank[None]).shape[1]

  def __call__(
    self, images: Float[np.ndarray, "B H W C"]
  ) -> Float[Array, "B E"]:
    """Returns float32 rows on the devices; does not wait for them."""
    return self._apply(self._params, sharding.put_batch(images, self.mesh))


def of_config(
  pp_image: str,
  *,
  model: Mapping[str, Any],
  init: Mapping[str, Any] | None = None,
  devices: Sequence[Any] | None = None,
) -> Tower:
  """Returns the image tower of a config, with the weights it starts from.

  Its embeddings are unit rows. The checksum is a SHA-256 of the architecture,
  the compute dtype and the weights.

  Args:
    pp_image: the preprocessing of its images.
    model: the section of the config.
    init: the section of the config; names the weights.
    devices: all devices of this process if None.

  Raises:
    UserError: the config has no image tower or names no weights for it, or the
      weights do not fit.
  """
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
  shapes = jax.eval_shape(
    two_towers.image_tower(towers).init,
    jax.random.key(0),
    blank(pp_image)[None],
  )
  params: dict[str, Any] = {
    "img": _weights(shapes["params"], towers.dtype, init)
  }
  checksum = checksum_of(towers, params)
  params["t"] = jnp.zeros(1)
  return Tower(
    lambda p, x: towers.apply({"params": p}, x, None)[0],
    params,
    pp_image,
    checksum,
    dict(config=dict(model=dict(model), init=dict(init))),
    devices,
  )


def open_tower(
  weights: str | os.PathLike[str], devices: Sequence[Any] | None = None
) -> Tower:
  """Returns the image tower of what --weights names.

  Args:
    weights: the name of a released model; a workdir or a checkpoint of one; a
      folder that tools.convert_from_hf wrote, or its .npz file; or a Python
      file with a function get_tower() -> (apply, params, pp_image, checksum) of
      Tower, such as examples/efficientnet_lite0.py.
    devices: all devices of this process if None.

  Raises:
    UserError: it names no image tower, or nothing says how images are prepared.
  """
  path = files.path(weights)
  if path.suffix == ".py":
    return _of_program(path, devices)
  if str(weights) in known.KNOWN:
    it = known.get(str(weights))
    init: dict[str, Any] = dict(path=str(weights))
    if it.tokenizer is None:  # an image tower alone, with a classifier
      init.update(into="img", dont_load=["head/.*"])
    pp_image, model = known.pp_image(str(weights)), it.model
  else:
    if (path / "params.npz").is_file():
      path = path / "params.npz"
    init = dict(path=str(path.absolute()))
    if restore.is_run(path):
      config = restore.read_about(path)["config"]
    else:
      config = _read_config(path)
    pp_image, model = config["pp_image"], config["model"]
  if not isinstance(model, Mapping):
    raise errors.UserError(f"{weights}: its model is not known")
  return of_config(pp_image, model=model, init=init, devices=devices)


def _read_config(path: files.Path) -> dict[str, Any]:
  """Returns the config.json beside a .npz file."""
  file = path.parent / "config.json"
  try:
    config = json.loads(file.read_text())
  except (OSError, ValueError):
    config = {}
  if path.suffix != ".npz" or not {"model", "pp_image"} <= set(config):
    raise errors.UserError(
      f"{path} names no image tower: give a released model's name, a workdir, "
      "a .npz file with the config.json that tools.convert_from_hf writes "
      "beside it, or a Python file with get_tower()"
    )
  return config


def _of_program(path: files.Path, devices: Sequence[Any] | None) -> Tower:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if not path.is_file() or spec is None or spec.loader is None:
    raise errors.UserError(f"there is no file {path}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_tower"):
    raise errors.UserError(f"{path} has no function get_tower()")
  made_by = dict(weights=str(path.absolute()))
  apply, params, pp_image, checksum = module.get_tower()
  return Tower(apply, params, pp_image, checksum, made_by, devices)


def blank(pp_image: str) -> np.ndarray:
  """Returns a black image of 512 x 512 pixels, preprocessed."""
  file = io.BytesIO()
  Image.new("RGB", (512, 512)).save(file, "PNG")
  fn = preprocess.parse(pp_image)
  example = fn({"image": file.getvalue()}, np.random.default_rng(0))
  return np.asarray(example["image"])


def _weights(shapes, dtype, init):
  """Reads the image tower's weights, in the compute dtype."""
  if init.get("into") is None:
    # The weights hold both towers, and more. Only the image tower is needed.
    init = dict(init, dont_load=(*init.get("dont_load", ()), "(?!img/).*"))
  given = errors.call(restore.read_init, init, "config.init", {"img": shapes})
  return jax.tree.map(
    lambda x: np.asarray(x, jnp.dtype(dtype)), trees.unflatten(given)["img"]
  )


def checksum_of(towers: two_towers.TwoTowers, params: Any) -> str:
  """Returns the SHA-256 of the image tower in `params`.

  Args:
    towers: architecture and compute dtype.
    params: {"img": its weights}.
  """
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
