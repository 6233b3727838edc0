"""A step in microbatches that wait on the host, config.feed = "host".

For batches whose images do not fit on the devices: one microbatch at a time is
put there, twice.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sigjax import sharding
from sigjax.state import TrainState
from sigjax.step import Batch, Step, like_before


def make_train_step(
  step: Step, mesh: Mesh, state: TrainState | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
  """Returns step.in_microbatches as one program for each of its parts.

  The arguments are those of step.make_train_step.
  """
  embed = jax.jit(step.embed)
  loss_and_gradients = jax.jit(step.loss_and_gradients)
  stack = jax.jit(lambda *z: jax.tree.map(lambda *x: jnp.stack(x), *z))

  @functools.partial(jax.jit, donate_argnums=4)
  def pull_back(state, part, i, dz, own):
    dz = jax.tree.map(lambda x: x[i], dz)
    own = step.pull_back(state, part, i, dz, own)
    # The second result is one to wait for: the gradients are donated.
    return own, min(jax.tree.leaves(own), key=jnp.size) + 0

  @functools.partial(
    jax.jit, donate_argnums=(0, 3), out_shardings=like_before(state)
  )
  def update(state, z, loss, grads, own):
    return step.update(state, z, loss, *step.add_up(grads, own))

  def train_step(state: TrainState, batch: Batch):
    devices = mesh.size // jax.process_count()
    cut = lambda x: x.reshape(devices, step.k, -1, *x.shape[1:])
    parts = jax.tree.map(cut, batch)

    def part(i):  # the same rows as split's
      rows = lambda x: x[:, i].reshape(-1, *x.shape[3:])
      return sharding.put_batch(jax.tree.map(rows, parts), mesh)

    # Waiting for the microbatch before keeps two on the devices: one that is
    # computed, and one that is being copied.
    z = []
    for i in range(step.k):
      z.append(embed(state, part(i), i))
      jax.block_until_ready(z[i - 1])
    groups = sharding.put_batch(batch.get("group"), mesh)
    z, loss, grads, dz = loss_and_gradients(state, stack(*z), groups)
    own, before = None, loss
    for i in range(step.k):
      own, done = pull_back(state, part(i), i, dz, own)
      jax.block_until_ready(before)
      before = done
    return update(state, z, loss, grads, own)

  return train_step
