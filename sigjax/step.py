"""One step of training, and embedding: pure functions.

B is the global batch, D the number of devices, b = B/D, k the number of
microbatches, E the width of the embeddings.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from sigjax import errors, losses, sharding, trees
from sigjax import state as state_lib


def make_train_step(
  model,
  tx,
  lr_fn,
  loss_fn,
  mesh,
  *,
  seed=0,
  lock=(),
  microbatches=1,
  feed="device",
):
  """Builds train_step(state, batch) -> (state, metrics).

  The batch is dict(image=(B, H, W, C) float32, text=(B, L) int32), this
  process's rows as numpy. With microbatches=k the towers only ever see B/k
  examples at a time, while the loss is over all B x B pairs: first all
  embeddings, then the loss and its gradients with respect to them, then each
  microbatch's towers once more, pulling those gradients back. Same gradients,
  one more forward. The state given is used up (donated).

  Args:
    model: TwoTowers.
    tx, lr_fn: from optim.make_optimizer.
    loss_fn: fn(zimg, ztxt, t, b) -> scalar, over the mesh.
    mesh: from sharding.make_mesh.
    seed: of the dropout masks; step and microbatch are folded in.
    lock: parts of the parameters that stay as they are: no gradients, no
      optimizer state; see trees.split_off.
    microbatches: k; has to divide b.
    feed: "device": the whole batch is put on the devices, and the step is one
      program. "host": the batch stays on the host, from where one microbatch at
      a time is put on the devices, twice.

  Returns:
    train_step; its metrics are float32 scalars: loss, t, b, pos_logit and
    neg_logit (means over the B and the B*B - B pairs), the global norms
    grad_norm, update_norm and param_norm of what is trained, and lr. With feed
    "device" it has an
    attribute `program`, the jitted function of (state, global batch).
  """
  step = _Step(model, tx, lr_fn, loss_fn, mesh, seed, tuple(lock), microbatches)
  if errors.pick({"device": False, "host": True}, feed, "config.feed"):
    return step.fed_from_host()
  program = jax.jit(
    step.one_batch if microbatches == 1 else step.many_batches, donate_argnums=0
  )

  def train_step(state, batch):
    return program(state, sharding.put_batch(batch, mesh))

  train_step.program = program
  return train_step


class _Step(NamedTuple):
  """The parts of a step; the arguments are those of make_train_step."""

  model: nn.Module
  tx: optax.GradientTransformation
  lr_fn: Callable
  loss_fn: Callable
  mesh: jax.sharding.Mesh
  seed: int
  lock: tuple
  k: int

  def split_off(self, params):
    return trees.split_off(params, self.lock, "config.lock")

  def towers(self, trained, state, part, i):
    """Embeddings of microbatch i: its zimg and ztxt, (B/k, E)."""
    _, locked = self.split_off(state.params)
    rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
    zimg, ztxt, _ = self.model.apply(
      {"params": trees.join(trained, locked)},
      part["image"],
      part["text"],
      train=True,
      rngs={"dropout": jax.random.fold_in(rng, i)},
    )
    return zimg, ztxt

  def pair_loss(self, trained, state, zimg, ztxt):
    _, locked = self.split_off(state.params)
    return self.loss_fn(
      zimg, ztxt, *temperature_and_bias(self.model, trees.join(trained, locked))
    )

  def update(self, state, z, loss, grads):
    """The end of every step: from gradients to new state and metrics."""
    trained, locked = self.split_off(state.params)
    updates, opt_state = self.tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    t, b = temperature_and_bias(self.model, state.params)
    stats = losses.logit_stats(*z, t, b)
    metrics = dict(
      loss=loss,
      t=t,
      b=b,
      pos_logit=stats["pos"],
      neg_logit=stats["neg"],
      grad_norm=optax.tree.norm(grads),
      update_norm=optax.tree.norm(updates),
      param_norm=optax.tree.norm(trained),
      lr=self.lr_fn(state.step),
    )
    return state_lib.TrainState(
      state.step + 1, trees.join(trained, locked), opt_state
    ), metrics

  def one_batch(self, state, batch):
    """A step without microbatches."""

    def fn(trained):
      z = self.towers(trained, state, batch, 0)
      return self.pair_loss(trained, state, *z), z

    (loss, z), grads = jax.value_and_grad(fn, has_aux=True)(
      self.split_off(state.params)[0]
    )
    return self.update(state, z, loss, grads)

  # The three parts of a step in microbatches.

  def embed(self, state, part, i):
    return self.towers(self.split_off(state.params)[0], state, part, i)

  def loss_and_gradients(self, state, z):
    """From all embeddings, (k, B/k, E), to the gradients by them, likewise."""
    z = jax.tree.map(lambda x: merge(x, self.mesh), z)
    loss, (grads, *dz) = jax.value_and_grad(self.pair_loss, (0, 2, 3))(
      self.split_off(state.params)[0], state, *z
    )
    dz = jax.tree.map(lambda x: split(x, self.k, self.mesh), tuple(dz))
    return z, loss, grads, dz

  def pull_back(self, state, part, i, dz, grads):
    """Adds the parameters' gradients through microbatch i."""
    _, vjp = jax.vjp(
      lambda p: self.towers(p, state, part, i), self.split_off(state.params)[0]
    )
    return jax.tree.map(jnp.add, grads, vjp(dz)[0])

  def many_batches(self, state, batch):
    """A step in microbatches, as one program."""
    parts = jax.tree.map(lambda x: split(x, self.k, self.mesh), batch)
    numbers = jnp.arange(self.k)
    _, z = jax.lax.scan(
      lambda _, xs: (None, self.embed(state, *xs)), None, (parts, numbers)
    )
    z, loss, grads, dz = self.loss_and_gradients(state, z)
    grads, _ = jax.lax.scan(
      lambda grads, xs: (self.pull_back(state, *xs, grads), None),
      grads,
      (parts, numbers, dz),
    )
    return self.update(state, z, loss, grads)

  def fed_from_host(self):
    """many_batches, as one program for each part of it."""
    embed, loss_and_gradients = map(
      jax.jit, (self.embed, self.loss_and_gradients)
    )
    stack = jax.jit(lambda *z: jax.tree.map(lambda *x: jnp.stack(x), *z))

    @functools.partial(jax.jit, donate_argnums=4)
    def pull_back(state, part, i, dz, grads):
      grads = self.pull_back(
        state, part, i, jax.tree.map(lambda x: x[i], dz), grads
      )
      # The second is there to wait for: the sums themselves are given on.
      return grads, min(jax.tree.leaves(grads), key=jnp.size) + 0

    update = jax.jit(self.update, donate_argnums=(0, 3))

    def train_step(state, batch):
      devices = self.mesh.size // jax.process_count()
      parts = jax.tree.map(
        lambda x: x.reshape(devices, self.k, -1, *x.shape[1:]), batch
      )

      def part(i):  # the same rows as split's
        rows = jax.tree.map(lambda x: x[:, i].reshape(-1, *x.shape[3:]), parts)
        return sharding.put_batch(rows, self.mesh)

      # Waiting for the one before keeps two microbatches on the devices, no
      # more: one that is worked on, one that is on its way.
      z = []
      for i in range(self.k):
        z.append(embed(state, part(i), i))
        jax.block_until_ready(z[i - 1])
      z, loss, grads, dz = loss_and_gradients(state, stack(*z))
      before = loss
      for i in range(self.k):
        grads, done = pull_back(state, part(i), i, dz, grads)
        jax.block_until_ready(before)
        before = done
      return update(state, z, loss, grads)

    return train_step


def make_embed(model, mesh):
  """Builds embed(params, image, text) -> (zimg, ztxt), (B, E) unit rows.

  image (B, H, W, C) or None, text (B, L) or None; what is None stays None, and
  its tower is not run. Rows are split over all devices.
  """

  @jax.jit
  def embed(params, image, text):
    zimg, ztxt, _ = model.apply({"params": params}, image, text)
    return zimg, ztxt

  def put_and_embed(params, image=None, text=None):
    return embed(params, *sharding.put_batch((image, text), mesh))

  return put_and_embed


def temperature_and_bias(model, params):
  """The scalars t = exp(t') and b, of shape ()."""
  _, _, out = model.apply({"params": params}, None, None)
  return out["t"].reshape(()), out["b"].reshape(())


def split(x, k, mesh):
  """(B, ...) -> (k, B/k, ...): each device cuts its own rows, none moves."""
  devices, rest = mesh.size, x.shape[1:]
  x = x.reshape(devices, k, -1, *rest).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(
    x.reshape(k, -1, *rest), NamedSharding(mesh, P(None, sharding.AXES))
  )


def merge(x, mesh):
  """(k, B/k, ...) -> (B, ...): the inverse of split."""
  devices, (k, _, *rest) = mesh.size, x.shape
  x = x.reshape(k, devices, -1, *rest).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(
    x.reshape(-1, *rest), sharding.batch_sharding(mesh)
  )
