"""The device mesh, how parameters are split over it, and batches onto it.

The mesh has two axes: "data" x "fsdp". The batch is always split over both. The
parameters are split over "fsdp" where the config's table says so, else each
device holds them whole: plain data parallelism is fsdp=1.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from sigjax import errors, trees

AXES = ("data", "fsdp")


def make_mesh(*, data=-1, fsdp=1, devices=None):
  """Returns a mesh with axes ("data", "fsdp") over all devices.

  Args:
    data, fsdp: devices along each axis; one of them may be -1, "the rest".
    devices: the devices to use; all of them if None.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  known = {"data": data, "fsdp": fsdp}
  rest = [axis for axis, size in known.items() if size == -1]
  if len(rest) == 1:
    known[rest[0]] = n // (data * fsdp * -1)
  if known["data"] * known["fsdp"] != n:
    raise errors.UserError(
      f"config.mesh is data={data}, fsdp={fsdp}, which does not come to the "
      f"{n} devices there are; set one of them to -1"
    )
  mesh = jax.make_mesh(
    (known["data"], known["fsdp"]),
    AXES,
    devices=devices,
    axis_types=(AxisType.Auto,) * 2,
  )
  return jax.sharding.Mesh(
    by_process(mesh.devices), AXES, axis_types=mesh.axis_types
  )


def by_process(devices):
  """Returns an array of devices reordered, so that each process has a run.

  JAX's order over a whole pod may take turns between processes; but process p
  loads the p-th part of each batch, and its embeddings have to come back as the
  p-th part of all.
  """
  ordered = sorted(devices.flat, key=lambda device: device.process_index)
  return np.array(ordered).reshape(devices.shape)


# How a parameter is split: fn(shape, devices along fsdp) -> PartitionSpec.


def replicate(shape, fsdp):
  """Each device holds the whole array."""
  del shape, fsdp
  return P()


def fsdp_largest(shape, fsdp):
  """The largest dimension that fsdp divides is split; replicated if none is."""
  sizes = [size if size % fsdp == 0 else 0 for size in shape]
  if fsdp == 1 or not any(sizes):
    return P()
  largest = int(np.argmax(sizes))
  return P(*("fsdp" if i == largest else None for i in range(len(shape))))


SPLITS = dict(replicate=replicate, fsdp=fsdp_largest)


def shard_params(shapes, mesh, table=((".*", "replicate"),)):
  """Returns the tree of NamedShardings of a parameter tree.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    mesh: from make_mesh.
    table: rows (regex, name in SPLITS); the first match counts, every
      parameter has to be matched.
  """
  names = trees.first_match(table, shapes, "config.sharding")
  return jax.tree.map(
    lambda leaf, name: NamedSharding(
      mesh,
      errors.pick(SPLITS, name, "the split in config.sharding")(
        leaf.shape, mesh.shape["fsdp"]
      ),
    ),
    shapes,
    names,
  )


def shard_like(shapes, params, shardings, mesh):
  """Shardings for a tree that holds copies of the parameters (Adam's moments).

  A leaf whose name ends in a parameter's name and has its shape is split like
  it; anything else (counters, factored moments) is replicated.
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


def batch_sharding(mesh):
  """The leading dimension split over all devices."""
  return NamedSharding(mesh, P(AXES))


def check_batch_size(batch_size, mesh, microbatches=1):
  """A UserError unless each device gets as many examples in each microbatch."""
  parts = mesh.size * microbatches
  if batch_size <= 0 or batch_size % parts:
    near = max(round(batch_size / parts), 1) * parts
    times = f" times {microbatches} microbatches" if microbatches > 1 else ""
    raise errors.UserError(
      f"config.batch_size is {batch_size}, which {mesh.size} devices{times} "
      f"do not divide; try {near}"
    )


def put_batch(batch, mesh):
  """Process-local numpy rows (B/processes, ...) -> global arrays (B, ...)."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
