"""Times value and gradients of the losses, for tools.benchmark."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
import numpy as np

from sigjax import errors, losses
from sigjax import sharding as sharding_lib
from sigjax import softmax as softmax_lib
from tools.bench import timing


def loss(
  devices: Sequence[Any],
  *,
  batch_sizes: Sequence[int] = (1024, 4096),
  width: int = 512,
  dtype: str = "float32",
  tiles: Sequence[int] = (512, 1024),
  rounds: int = 15,
) -> list[timing.Row]:
  """Returns a row for each variant of the losses at each batch size.

  Args:
    devices: the devices to use.
    batch_sizes: batch sizes B, over all devices.
    width: E, the length of embeddings.
    dtype: the dtype of embeddings.
    tiles: tile sizes of the ring.
    rounds: how often each variant is timed.
  """
  mesh = sharding_lib.make_mesh(devices=devices)
  rows, whole = sharding_lib.batch_sharding(mesh), NamedSharding(mesh, P())
  scalars = [jax.device_put(np.float32(x), whole) for x in (10, -10)]
  variants = loss_variants(mesh, tiles)
  cases, temp = {}, {}
  for B in batch_sizes:
    if B % mesh.size:
      raise errors.UserError(
        f"--batch_sizes: {B} does not divide over {mesh.size} devices"
      )
    z = np.random.default_rng(0).normal(size=(2, B, width))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    args = [jax.device_put(x.astype(jnp.dtype(dtype)), rows) for x in z]
    for key, fn in variants.items():
      fn = jax.jit(
        jax.value_and_grad(fn, argnums=(0, 1, 2, 3)),
        out_shardings=(whole, (rows, rows, whole, whole)),
      )
      fn, temp[B, key] = timing.build(fn, devices, *args, *scalars)
      cases[B, key] = fn and functools.partial(
        timing.timed, fn, *args, *scalars
      )

  times = timing.interleave(cases, rounds)
  median = {
    case: None if x is None else np.median(x) for case, x in times.items()
  }
  ratio = lambda x, y: None if None in (x, y) else x / y
  return [
    dict(
      variant=name,
      tile=tile,
      batch_size=B,
      width=width,
      dtype=dtype,
      **timing.spread(x, "ms"),
      vs_naive=ratio(median[B, (name, tile)], median[B, ("naive", None)]),
      vs_remat=ratio(median[B, (name, tile)], median[B, ("remat ring", None)]),
      temp_mib=temp[B, (name, tile)],
    )
    for (B, (name, tile)), x in times.items()
  ]


def loss_variants(
  mesh: jax.sharding.Mesh, tiles: Sequence[int]
) -> dict[tuple[str, int | None], Callable[..., Array]]:
  """Returns {(name, tile): loss(zimg, ztxt, t, b)}.

  The plain ring has all the tiles, its variants only the last one.
  """
  on = functools.partial
  ring = on(losses.ring_sigmoid_loss, mesh=mesh, axes=sharding_lib.AXES)
  softmax = on(softmax_lib.ring_softmax_loss, mesh=mesh, axes=sharding_lib.AXES)
  last = tiles[-1]
  return {
    ("naive", None): losses.sigmoid_loss,
    ("remat ring", None): on(remat_ring_loss, mesh=mesh),
    **{("ring", tile): on(ring, tile=tile) for tile in tiles},
    ("ring both", last): on(ring, tile=last, direction="both"),
    ("all_gather", last): on(ring, tile=last, comm="all_gather"),
    ("softmax naive", None): softmax_lib.softmax_loss,
    ("softmax ring", last): on(softmax, tile=last),
  }


def remat_ring_loss(
  zimg: Float[Array, "B E"],
  ztxt: Float[Array, "B E"],
  t: Float[Array, ""],
  b: Float[Array, ""],
  *,
  mesh: jax.sharding.Mesh,
  axes: Sequence[str] = sharding_lib.AXES,
) -> Float[Array, ""]:
  """Returns sigmoid_loss, computed on a ring as it is usually written.

  This is the baseline. It computes one b x b block of logits at a time, and JAX
  differentiates it. jax.checkpoint avoids storing the blocks, but computes each
  of them twice.
  """

  @jax.checkpoint
  def block(zimg, ztxt, t, b, labels):
    exact = lax.Precision.HIGHEST if zimg.dtype == jnp.float32 else None
    logits = (
      jnp.dot(zimg, ztxt.T, precision=exact, preferred_element_type=jnp.float32)
      * t
      + b
    )
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits))

  def share(zimg, ztxt, t, b):
    own = 2 * jnp.eye(len(zimg)) - 1
    perm = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    def step(carry, _):
      ztxt, total = carry
      ztxt = lax.ppermute(ztxt, axes, perm)
      return (ztxt, total + block(zimg, ztxt, t, b, -1)), None

    (_, total), _ = lax.scan(
      step, (ztxt, block(zimg, ztxt, t, b, own)), length=mesh.size - 1
    )
    return lax.psum(total, axes)

  total = jax.shard_map(
    share, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P()
  )(zimg, ztxt, t, b)
  return total / len(zimg)
