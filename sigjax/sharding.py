"""The device mesh, how parameters are split over it, and batches onto it.

The mesh has two axes, "data" x "fsdp". A batch is always split over both. A
parameter is split over "fsdp" if the config's table says so; otherwise each
device holds all of it. Plain data parallelism is fsdp=1.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from sigjax import errors, trees

AXES = ("data", "fsdp")


REPLICATED = ((".*", "replicate"),)  # a table for shard_params


def make_mesh(
  *, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh with axes ("data", "fsdp") over all devices.

  Args:
    data, fsdp: devices along each axis; one of them may be -1, "the rest".
    devices: the devices to use; all of them if None.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  shape = [data, fsdp]
  if shape.count(-1) == 1:
    shape[shape.index(-1)] = n // -(data * fsdp)
  if shape[0] * shape[1] != n:
    raise errors.UserError(
      f"config.mesh is data={data}, fsdp={fsdp}, which does not come to the "
      f"{n} devices there are; set one of them to -1"
    )
  auto = (AxisType.Auto,) * 2
  mesh = jax.make_mesh(shape, AXES, devices=devices, axis_types=auto)
  return Mesh(by_process(mesh.devices), AXES, axis_types=auto)


def by_process(devices: np.ndarray) -> np.ndarray:
  """Returns devices reordered so that those of each process are consecutive.

  Process p loads the p-th part of each batch, and its embeddings have to come
  back as the p-th part of all. JAX's order over a pod may alternate between
  processes.
  """
  ordered = sorted(devices.flat, key=lambda device: device.process_index)
  return np.array(ordered).reshape(devices.shape)


# How a parameter is split: fn(shape, devices along fsdp) -> PartitionSpec.


def replicate(shape: Sequence[int], fsdp: int) -> P:
  """Each device holds the whole array."""
  del shape, fsdp
  return P()


def fsdp_largest(shape: Sequence[int], fsdp: int) -> P:
  """Splits the largest dimension that fsdp divides; replicates if none is."""
  sizes = [size if size % fsdp == 0 else 0 for size in shape]
  if fsdp == 1 or not any(sizes):
    return P()
  largest = int(np.argmax(sizes))
  return P(*("fsdp" if i == largest else None for i in range(len(shape))))


SPLITS = dict(replicate=replicate, fsdp=fsdp_largest)


def shard_params(shapes: Any, mesh: Mesh, table: Sequence = REPLICATED) -> Any:
  """Returns the NamedShardings of a parameter tree.

  Args:
    shapes: a tree of arrays or ShapeDtypeStructs.
    mesh: from make_mesh.
    table: rows (regex, name in SPLITS); the first match counts, and each
      parameter has to match a row.
  """

  def sharding(leaf, name):
    split = errors.pick(SPLITS, name, "the split in config.sharding")
    return NamedSharding(mesh, split(leaf.shape, mesh.shape["fsdp"]))

  names = trees.first_match(table, shapes, "config.sharding")
  return jax.tree.map(sharding, shapes, names)


def shard_like(shapes: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
  """Returns shardings for a tree with copies of parameters (Adam's moments).

  A leaf whose name ends in a parameter's name and that has its shape is split
  like it; others (counters, factored moments) are replicated.
  """
  params, shardings = trees.flatten(params), trees.flatten(shardings)

  def find(name, leaf):
    parts = name.split("/")
    for i in range(len(parts)):
      twin = "/".join(parts[i:])
      if twin in params and params[twin].shape == leaf.shape:
        return shardings[twin]
    return NamedSharding(mesh, P())

  return trees.map_named(find, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays split by rows over all devices."""
  return NamedSharding(mesh, P(AXES))


def check_batch_size(
  batch_size: int, mesh: Mesh, microbatches: int = 1
) -> None:
  """Raises UserError unless batch_size divides by devices x microbatches."""
  parts = mesh.size * microbatches
  if batch_size <= 0 or batch_size % parts:
    near = max(round(batch_size / parts), 1) * parts
    times = f" times {microbatches} microbatches" if microbatches > 1 else ""
    raise errors.UserError(
      f"config.batch_size is {batch_size}, which {mesh.size} devices{times} "
      f"do not divide; try {near}"
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays (B, ...) from each process's (B/processes, ...)."""
  put = jax.make_array_from_process_local_data
  return jax.tree.map(lambda x: put(batch_sharding(mesh), x), batch)


def abstract_batch(
  example: Mapping[str, Any], batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a batch (B, ...) of examples like this one, for compiling."""
  rows = batch_sharding(mesh)
  return {
    key: jax.ShapeDtypeStruct(
      (batch_size, *np.shape(x)), x.dtype, sharding=rows
    )
    for key, x in example.items()
  }


def on_each_device(
  fn: Callable, mesh: Mesh | None, whole: Sequence[int] = ()
) -> Callable:
  """Returns fn in a shard_map over all devices: arrays are split by rows.

  Args:
    fn: of trees of arrays (b, ...), or None; results have rows, too.
    mesh: the devices; None if they are not known: fn itself. In a shard_map
      over some of its axes, as in microbatches, the others are left to split.
    whole: the numbers of arguments that each device has all of. Gradients with
      respect to them are added up over the devices.
  """
  done = jax.sharding.get_abstract_mesh().manual_axes
  left = tuple(x for x in mesh.axis_names if x not in done) if mesh else ()
  if not left:
    return fn
  rows = P(left)

  def run(*args):
    return jax.shard_map(
      fn,
      mesh=None if done else mesh,
      in_specs=tuple(P() if i in whole else rows for i in range(len(args))),
      out_specs=rows,
      axis_names=set(left),
      check_vma=False,
    )(*args)

  return run


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Has XLA split the rows of an array over all devices, as batches are.

  Args:
    x: (n, ...), within a program. If the devices do not divide n, as for the
      one example of an initialisation, it stays as it is.
    mesh: the devices; None if they are not known. In a shard_map over some of
      its axes, as in microbatches, the others are left to split.
  """
  if mesh is None:
    return x
  outer = jax.sharding.get_abstract_mesh()
  left = tuple(a for a in mesh.axis_names if a not in outer.manual_axes)
  if not left or len(x) % math.prod(mesh.shape[a] for a in left):
    return x
  sharding = NamedSharding(outer if outer.manual_axes else mesh, P(left))
  return jax.lax.with_sharding_constraint(x, sharding)
