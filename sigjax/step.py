"""The train state, one step of training, and embedding: pure functions.

B is the global batch, D the number of devices, b = B/D, k the number of
microbatches, E the width of the embeddings.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from sigjax import errors
from sigjax import losses
from sigjax import sharding
from sigjax import trees


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # int32 (), steps done
  params: dict  # {"img": .., "txt": .., "t": (1,), "b": (1,)}, float32
  opt_state: optax.OptState


def init_params(model, rng, example):
  """Parameters from scratch, for examples like this dict(image=, text=)."""
  batch = {k: jnp.asarray(example[k])[None] for k in ("image", "text")}
  return model.init(rng, **batch)["params"]


def param_shapes(model, example):
  """The tree of ShapeDtypeStructs of init_params."""
  return jax.eval_shape(
      lambda rng: init_params(model, rng, example), jax.random.key(0))


def abstract_state(param_shapes, tx, mesh, table):
  """A TrainState of ShapeDtypeStructs with shardings: what a step works on.

  Args:
    param_shapes: eval_shape of init_params.
    tx: the optimizer.
    mesh: from sharding.make_mesh.
    table: rows (regex, split) for sharding.shard_params.
  """
  shapes = jax.eval_shape(lambda params: new_state(params, tx), param_shapes)
  of_params = sharding.shard_params(param_shapes, mesh, table)
  shardings = TrainState(
      step=NamedSharding(mesh, P()), params=of_params,
      opt_state=sharding.shard_like(
          shapes.opt_state, param_shapes, of_params, mesh))
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)


def new_state(params, tx):
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def init_state(model, tx, seed, example, abstract, given=None):
  """The state before the first step, made where its parts belong.

  Args:
    model, tx: the towers and the optimizer.
    seed: of the parameters. The same on any number of devices.
    example: dict(image=(H, W, C), text=(L,)), for its shapes.
    abstract: from abstract_state.
    given: {name: array} of parameters that do not start from scratch.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract)

  @functools.partial(jax.jit, out_shardings=shardings.params)
  def from_scratch():
    return init_params(model, jax.random.key(seed), example)

  params = trees.map_named(
      lambda name, own, to: jax.device_put((given or {}).get(name, own), to),
      from_scratch(), shardings.params)
  return jax.jit(lambda p: new_state(p, tx), out_shardings=shardings)(params)


def make_train_step(model, tx, lr_fn, loss_fn, mesh, *, seed=0, frozen=None,
                    microbatches=1, feed="device"):
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
    frozen: tree of bool like the parameters; True gets no gradient.
    microbatches: k; has to divide b.
    feed: "device": the whole batch is put on the devices, and the step is one
      program. "host": the batch stays on the host, from where one microbatch at
      a time is put on the devices, twice.

  Returns:
    train_step; its metrics are float32 scalars: loss, t, b, pos_logit and
    neg_logit (means over the B and the B*B - B pairs), the global norms
    grad_norm, update_norm and param_norm, and lr. With feed "device" it has an
    attribute `program`, the jitted function of (state, global batch).
  """
  step = _Step(model, tx, lr_fn, loss_fn, mesh, seed, frozen, microbatches)
  if errors.pick({"device": False, "host": True}, feed, "config.feed"):
    return step.fed_from_host()
  program = jax.jit(
      step.one_batch if microbatches == 1 else step.many_batches,
      donate_argnums=0)

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
  frozen: dict | None
  k: int

  def thaw(self, params):
    # Where a gradient stops, XLA drops the whole backward pass behind it.
    return params if self.frozen is None else jax.tree.map(
        lambda p, f: jax.lax.stop_gradient(p) if f else p, params, self.frozen)

  def towers(self, params, state, part, i):
    """Embeddings of microbatch i: its zimg and ztxt, (B/k, E)."""
    rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
    zimg, ztxt, _ = self.model.apply(
        {"params": self.thaw(params)}, part["image"], part["text"], train=True,
        rngs={"dropout": jax.random.fold_in(rng, i)})
    return zimg, ztxt

  def pair_loss(self, params, zimg, ztxt):
    return self.loss_fn(
        zimg, ztxt, *temperature_and_bias(self.model, self.thaw(params)))

  def update(self, state, z, loss, grads):
    """The end of every step: from gradients to new state and metrics."""
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    t, b = temperature_and_bias(self.model, state.params)
    stats = losses.logit_stats(*z, t, b)
    metrics = dict(
        loss=loss, t=t, b=b, pos_logit=stats["pos"], neg_logit=stats["neg"],
        grad_norm=optax.tree.norm(grads), update_norm=optax.tree.norm(updates),
        param_norm=optax.tree.norm(params), lr=self.lr_fn(state.step))
    return TrainState(state.step + 1, params, opt_state), metrics

  def one_batch(self, state, batch):
    """A step without microbatches."""
    def fn(params):
      z = self.towers(params, state, batch, 0)
      return self.pair_loss(params, *z), z
    (loss, z), grads = jax.value_and_grad(fn, has_aux=True)(state.params)
    return self.update(state, z, loss, grads)

  # The three parts of a step in microbatches.

  def embed(self, state, part, i):
    return self.towers(state.params, state, part, i)

  def loss_and_gradients(self, state, z):
    """From all embeddings, (k, B/k, E), to the gradients by them, likewise."""
    z = jax.tree.map(lambda x: merge(x, self.mesh), z)
    loss, (grads, *dz) = jax.value_and_grad(self.pair_loss, (0, 1, 2))(
        state.params, *z)
    dz = jax.tree.map(lambda x: split(x, self.k, self.mesh), tuple(dz))
    return z, loss, grads, dz

  def pull_back(self, state, part, i, dz, grads):
    """Adds the parameters' gradients through microbatch i."""
    _, vjp = jax.vjp(lambda p: self.towers(p, state, part, i), state.params)
    return jax.tree.map(jnp.add, grads, vjp(dz)[0])

  def many_batches(self, state, batch):
    """A step in microbatches, as one program."""
    parts = jax.tree.map(lambda x: split(x, self.k, self.mesh), batch)
    numbers = jnp.arange(self.k)
    _, z = jax.lax.scan(
        lambda _, xs: (None, self.embed(state, *xs)), None, (parts, numbers))
    z, loss, grads, dz = self.loss_and_gradients(state, z)
    grads, _ = jax.lax.scan(
        lambda grads, xs: (self.pull_back(state, *xs, grads), None),
        grads, (parts, numbers, dz))
    return self.update(state, z, loss, grads)

  def fed_from_host(self):
    """many_batches, as one program for each part of it."""
    embed, loss_and_gradients = map(jax.jit, (
        self.embed, self.loss_and_gradients))
    stack = jax.jit(lambda *z: jax.tree.map(lambda *x: jnp.stack(x), *z))

    @functools.partial(jax.jit, donate_argnums=4)
    def pull_back(state, part, i, dz, grads):
      grads = self.pull_back(
          state, part, i, jax.tree.map(lambda x: x[i], dz), grads)
      return grads, grads["t"] + 0  # to wait for: the sums are given on
    update = jax.jit(self.update, donate_argnums=(0, 3))

    def train_step(state, batch):
      devices = self.mesh.size // jax.process_count()
      parts = jax.tree.map(
          lambda x: x.reshape(devices, self.k, -1, *x.shape[1:]), batch)

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
      x.reshape(k, -1, *rest), NamedSharding(mesh, P(None, sharding.AXES)))


def merge(x, mesh):
  """(k, B/k, ...) -> (B, ...): the inverse of split."""
  devices, (k, _, *rest) = mesh.size, x.shape
  x = x.reshape(k, devices, -1, *rest).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(
      x.reshape(-1, *rest), sharding.batch_sharding(mesh))
