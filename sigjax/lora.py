"""Low-rank adapters (LoRA, arXiv 2106.09685), as a function of the parameters.

A kernel W (in, out) stays as it is. Two thin matrices are trained in its place,
A (in, r) and B (r, out), and the model sees W + A B. B starts at 0, so that the
first step sees W. Adapted are the kernels of attention and of the MLPs.

The models know nothing of this: the adapters of a kernel NAME are the leaves
lora/NAME/a and lora/NAME/b of the tree, and merge() gives the tree that the
model takes. Merged kernels have W's dtype; in bfloat16 a change of less than
1/256 of a number in W shows in the mean over the inputs alone.
"""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sigjax import errors, trees

KEY = "lora"  # of the adapters in the tree
TOWERS = ("img", "txt")
# (names of kernels, axes of W, axes that are inputs); scan adds an axis before.
_KERNELS = (
  (r"MultiHeadDotProductAttention_0/(query|key|value)/kernel", 3, 1),
  (r"MultiHeadDotProductAttention_0/out/kernel", 3, 2),
  (r"MlpBlock_0/Dense_[01]/kernel", 2, 1),
)


def _parts(name: str, shape: Sequence[int]) -> tuple[Any, Any, Any] | None:
  """Returns a kernel's shape as (layers, in, out); None: is not adapted."""
  for pattern, axes, inputs in _KERNELS:
    if re.search(f"/{pattern}$", name):
      first = len(shape) - axes
      at = first + inputs
      return tuple(shape[:first]), tuple(shape[first:at]), tuple(shape[at:])
  return None


def shapes(
  params: dict, *, rank: int, towers: Sequence[str] = TOWERS
) -> dict[str, Any]:
  """Returns the shapes of the adapters, {"lora": ..}, float32.

  Args:
    params: the parameters, or their shapes.
    rank: r.
    towers: the towers to adapt, of TOWERS.

  Raises:
    UserError: the rank is below 1, or a tower has no kernel to adapt.
  """
  if not isinstance(rank, int) or rank < 1:
    raise errors.UserError(
      f"config.lora.rank is {rank!r}, but has to be a number from 1"
    )
  found = {}
  for tower in towers:
    errors.pick(dict.fromkeys(TOWERS), tower, "config.lora.towers")
    before = len(found)
    for name, x in trees.flatten({tower: params.get(tower, {})}).items():
      if parts := _parts(name, x.shape):
        layers, inner, outer = parts
        for key, shape in (("a", (*inner, rank)), ("b", (rank, *outer))):
          found[f"{KEY}/{name}/{key}"] = jax.ShapeDtypeStruct(
            (*layers, *shape), jnp.float32
          )
    if len(found) == before:
      raise errors.UserError(
        f'config.lora.towers names "{tower}", which has no attention to adapt'
      )
  return trees.unflatten(found)


def init(key: Array, adapters: dict[str, Any]) -> dict[str, Any]:
  """Returns adapters to start from: A of variance 1 / in, B of zeros.

  Args:
    key: of jax.random.
    adapters: from shapes().
  """
  flat = trees.flatten(adapters)
  sizes = {k: math.prod(x.shape) for k, x in flat.items() if k.endswith("/a")}
  # One draw for all of them: XLA takes its time over each.
  draws = jax.random.normal(key, (sum(sizes.values()),), jnp.float32)
  found, at = {}, 0
  for name, x in flat.items():
    if name not in sizes:
      found[name] = jnp.zeros(x.shape, x.dtype)
      continue
    kernel = name.removeprefix(f"{KEY}/").removesuffix("/a")
    axes = next(n for p, _, n in _KERNELS if re.search(f"/{p}$", kernel))
    inner = math.prod(x.shape[-1 - axes : -1])
    draw = draws[at : at + sizes[name]].reshape(x.shape)
    found[name], at = draw * inner**-0.5, at + sizes[name]
  return trees.unflatten(found)


def merge(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters that the model takes: W + A B, in W's dtype.

  Args:
    params: with adapters, or without: then they are returned as they are.
  """
  if KEY not in params:
    return params
  flat = trees.flatten(params)
  out = {k: x for k, x in flat.items() if not k.startswith(f"{KEY}/")}
  for name, a in flat.items():
    if not name.startswith(f"{KEY}/") or not name.endswith("/a"):
      continue
    kernel = name.removeprefix(f"{KEY}/").removesuffix("/a")
    w, b = out[kernel], flat[name.removesuffix("/a") + "/b"]
    parts = _parts(kernel, w.shape)
    assert parts is not None
    layers, inner, outer = parts
    product = jnp.matmul(
      a.reshape(*layers, math.prod(inner), -1),
      b.reshape(*layers, -1, math.prod(outer)),
      precision="highest",
    )
    w32 = w.astype(jnp.float32) + product.reshape(w.shape)
    out[kernel] = w32.astype(w.dtype)
  return trees.unflatten(out)
