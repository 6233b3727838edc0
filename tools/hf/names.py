"""The names of arrays in Hugging Face's SigLIP files, and in ours.

transformers' SiglipModel, and Siglip2Model of NaFlex, which embeds patches by a
dense layer instead of a convolution, have the same names. They store dense
weights as (out, in), with the heads of attention merged, and stack query, key
and value of the pooling head in one array.
"""

from collections.abc import Iterable, Mapping
import math
from typing import Any

import jax
import numpy as np

from sigjax import errors, trees

# How an array differs; see _to_theirs. An int is the number of input axes of a
# dense kernel.
Kind = str | int
# (our name, their name, kind). Rows with the same `theirs` are parts of that
# array, stacked along its first axis.
Row = tuple[str, str, Kind]


def _dense(ours: str, theirs: str, inputs: int = 1) -> list[Row]:
  return [
    (f"{ours}/kernel", f"{theirs}.weight", inputs),
    (f"{ours}/bias", f"{theirs}.bias", "vector"),
  ]


def _norm(ours: str, theirs: str) -> list[Row]:
  return [
    (f"{ours}/scale", f"{theirs}.weight", "vector"),
    (f"{ours}/bias", f"{theirs}.bias", "vector"),
  ]


def _mlp(ours: str, theirs: str) -> list[Row]:
  return _dense(f"{ours}/MlpBlock_0/Dense_0", f"{theirs}.mlp.fc1") + _dense(
    f"{ours}/MlpBlock_0/Dense_1", f"{theirs}.mlp.fc2"
  )


def _encoder(ours: str, theirs: str, depth: int, last: str) -> list[Row]:
  rows = _norm(f"{ours}/encoder_norm", f"{theirs}.{last}")
  for i in range(depth):
    block, layer = f"{ours}/encoderblock_{i}", f"{theirs}.encoder.layers.{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    rows += _norm(f"{block}/LayerNorm_0", f"{layer}.layer_norm1")
    for part in "query", "key", "value":
      rows += _dense(f"{attention}/{part}", f"{layer}.self_attn.{part[0]}_proj")
    rows += _dense(f"{attention}/out", f"{layer}.self_attn.out_proj", 2)
    rows += _norm(f"{block}/LayerNorm_1", f"{layer}.layer_norm2")
    rows += _mlp(block, layer)
  return rows


def _pooling(ours: str, theirs: str) -> list[Row]:
  attention = f"{ours}/MultiHeadDotProductAttention_0"
  rows: list[Row] = [(f"{ours}/probe", f"{theirs}.probe", "same")]
  for part in "query", "key", "value":
    rows += [
      (f"{attention}/{part}/kernel", f"{theirs}.attention.in_proj_weight", 1),
      (
        f"{attention}/{part}/bias",
        f"{theirs}.attention.in_proj_bias",
        "vector",
      ),
    ]
  rows += _dense(f"{attention}/out", f"{theirs}.attention.out_proj", 2)
  return (
    rows
    + _norm(f"{ours}/LayerNorm_0", f"{theirs}.layernorm")
    + _mlp(ours, theirs)
  )


def _rows(ours: Mapping[str, Any]) -> list[Row]:
  """Returns the rows of all arrays of a model, ours by name."""
  image, text = "vision_model", "text_model"
  image_depth, text_depth = depth(ours, "img"), depth(ours, "txt")
  kernel = ours.get("img/embedding/kernel")
  is_naflex = kernel is not None and len(kernel.shape) == 2
  return [
    ("t", "logit_scale", "same"),
    ("b", "logit_bias", "same"),
    (
      "img/embedding/kernel",
      f"{image}.embeddings.patch_embedding.weight",
      1 if is_naflex else "conv",
    ),
    (
      "img/embedding/bias",
      f"{image}.embeddings.patch_embedding.bias",
      "vector",
    ),
    (
      "img/pos_embedding",
      f"{image}.embeddings.position_embedding.weight",
      "table",
    ),
    *_encoder("img/Transformer", image, image_depth, "post_layernorm"),
    *_pooling("img/MAPHead_0", f"{image}.head"),
    (
      "txt/Embed_0/embedding",
      f"{text}.embeddings.token_embedding.weight",
      "table",
    ),
    (
      "txt/pos_embedding",
      f"{text}.embeddings.position_embedding.weight",
      "table",
    ),
    *_encoder("txt/Encoder_0", text, text_depth, "final_layer_norm"),
    *_dense("txt/head", f"{text}.head"),
  ]


def _to_theirs(kind: Kind, x: Any) -> Any:
  """Returns our array in their layout."""
  if kind == "same":
    return x
  if kind == "vector":  # (heads, hd) or (W,) -> (W,)
    return x.reshape(-1)
  if kind == "table":  # (1, P, W), (R, R, W) or (V, W) -> rows
    return x.reshape(-1, x.shape[-1])
  if kind == "conv":  # (p, p, 3, W) -> (W, 3, p, p)
    return x.transpose(3, 2, 0, 1)
  # A dense kernel whose first `kind` axes are inputs -> (out, in).
  assert isinstance(kind, int)
  return x.reshape(math.prod(x.shape[:kind]), -1).T


def _to_ours(kind: Kind, y: Any, shape: tuple[int, ...]) -> Any:
  """Returns their array in our layout: the inverse of _to_theirs."""
  if kind == "conv":
    return y.transpose(2, 3, 1, 0)
  return (y.T if isinstance(kind, int) else y).reshape(shape)


def to_theirs(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns {their name: array} from {our name: array}, all float32.

  Raises:
    UserError: arrays are missing, or SiglipModel does not have them.
  """
  rows = _rows(ours)
  names = {row[0]: ours.get(row[0]) for row in rows}
  wrong = sorted(set(names) ^ set(ours))
  if wrong:
    raise errors.UserError(
      f"transformers' SiglipModel differs in {len(wrong)} arrays: "
      f"{', '.join(wrong)}"
    )
  parts = {}
  for name, theirs, kind in rows:
    parts.setdefault(theirs, []).append(_to_theirs(kind, ours[name]))
  # safetensors ignores strides and writes the memory as it is.
  return {
    name: np.ascontiguousarray(np.concatenate(x)) for name, x in parts.items()
  }


def to_ours(
  theirs: Mapping[str, np.ndarray],
  like: Mapping[str, jax.ShapeDtypeStruct],
  what: object,
) -> dict[str, np.ndarray]:
  """Returns {our name: array} from {their name: array}.

  Args:
    theirs: arrays of any float type.
    like: our {name: ShapeDtypeStruct}, with unstacked blocks.
    what: the name of the folder, for messages.

  Returns:
    float32 arrays.

  Raises:
    UserError: arrays are missing, left over or of another shape. All of them
      are listed.
  """
  rows = _rows(like)
  parts = {}
  for name, their, kind in rows:
    parts.setdefault(their, []).append((name, kind))
  want = {}
  for their, group in parts.items():
    # Only the shapes are computed.
    blocks = [
      jax.eval_shape(lambda x, k=kind: _to_theirs(k, x), like[name])
      for name, kind in group
    ]
    rest = blocks[0].shape[1:]
    want[their] = jax.ShapeDtypeStruct(
      (sum(block.shape[0] for block in blocks), *rest), np.float32
    )
  # Old versions of transformers also stored the positions 0, 1, ...
  theirs = {k: v for k, v in theirs.items() if not k.endswith(".position_ids")}
  lines = trees.difference(want, theirs)
  if lines:
    lines[0] = (
      f"{what} does not fit its config.json in {len(lines)} arrays: {lines[0]}"
    )
    raise errors.UserError("\n  ".join(lines))
  return {
    name: np.asarray(_to_ours(kind, part, like[name].shape), np.float32)
    for their, group in parts.items()
    for (name, kind), part in zip(group, np.split(theirs[their], len(group)))
  }


def depth(names: Iterable[str], tower: str) -> int:
  """Returns the number of unstacked blocks of a tower, "img" or "txt"."""
  blocks = [
    name.split("/encoderblock_")[1]
    for name in names
    if name.startswith(f"{tower}/") and "/encoderblock_" in name
  ]
  return 1 + max((int(block.split("/")[0]) for block in blocks), default=-1)
