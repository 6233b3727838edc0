"""One training step, with exact microbatches.

B is the global batch, D the number of devices, b = B/D, k the number of
microbatches, E the width of the embeddings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
import optax

from sigjax import errors, losses, sharding
from sigjax.models.two_towers import TwoTowers
from sigjax.state import TrainState

Metrics = dict[str, Float[Array, ""]]
Result = tuple[TrainState, Metrics]
Batch = dict[str, Any]  # see make_train_step


class TrainStep(NamedTuple):
  """A step, called as step(state, batch) -> (state, metrics).

  The batch is this process's rows, as NumPy. The state is donated.
  """

  run: Callable[[TrainState, Batch], Result]
  program: Any  # jitted, of (state, global batch); None with feed "host"

  def __call__(self, state: TrainState, batch: Batch):
    return self.run(state, batch)


def make_train_step(
  model: TwoTowers,
  tx: optax.GradientTransformation,
  lr_fn: Callable[[Array], Array],
  loss_fn: losses.Loss,
  mesh: Mesh,
  *,
  seed: int = 0,
  microbatches: int = 1,
  feed: str = "device",
) -> TrainStep:
  """Builds a training step.

  With k microbatches the towers see B/k examples at a time, while the loss is
  still over all B x B pairs: first all embeddings, then the loss and its
  gradients with respect to them, then each microbatch's towers once more, to
  pull those gradients back. The gradients are the same; the price is one more
  forward pass.

  Args:
    model: TwoTowers.
    tx, lr_fn: from optim.make_optimizer.
    loss_fn: fn(zimg, ztxt, t, b, groups=, key=) -> scalar, over the mesh;
      groups are the batch's "group" or None, key is another one each step.
    mesh: from sharding.make_mesh.
    seed: of dropout and of random negatives; step and microbatch are folded
      in.
    microbatches: k; has to divide b.
    feed: "device": the whole batch is put on the devices and the step is one
      program. "host": one microbatch at a time is put on the devices, twice,
      for batches whose images do not fit.

  Returns:
    A TrainStep. Its batch is dict(image=(B, H, W, C) uint8 or float32,
    text=(B, L) int32) and, for a loss with positives, group=(B, G) int32. Its
    metrics are float32 scalars: loss, t, b, pos_logit and neg_logit (means over
    the B and the B * (B - 1) pairs on and off the diagonal), grad_norm,
    update_norm and param_norm (global, of what is trained), and lr.
  """
  step = Step(model, tx, lr_fn, loss_fn, mesh, seed, microbatches)
  if errors.pick({"device": False, "host": True}, feed, "config.feed"):
    from sigjax import host_feed  # few runs need it

    return TrainStep(host_feed.make_train_step(step, mesh), None)
  fn = step.whole_batch if microbatches == 1 else step.in_microbatches
  program = jax.jit(fn, donate_argnums=0)
  run = lambda state, batch: program(state, sharding.put_batch(batch, mesh))
  return TrainStep(run, program)


class Step(NamedTuple):
  """The parts of a step; the fields are arguments of make_train_step."""

  model: TwoTowers
  tx: optax.GradientTransformation
  lr_fn: Callable
  loss_fn: losses.Loss
  mesh: Mesh
  seed: int
  k: int

  def key(self, state: TrainState, *more: Any) -> Array:
    """Returns the key of a step and, within it, of `more` numbers."""
    key = jax.random.key(self.seed)
    for number in (state.step, *more):
      key = jax.random.fold_in(key, number)
    return key

  def towers(
    self, trained: dict, state: TrainState, part: Batch, key: Array
  ) -> tuple[Array, Array]:
    """Returns zimg and ztxt of these examples, (n, E) each; key: of dropout."""
    out: Any = self.model.apply(
      {"params": state.replace(trained=trained).params},
      part["image"],
      part["text"],
      train=True,
      rngs={"dropout": key},
    )
    return out[:2]

  def pair_loss(
    self,
    trained: dict,
    state: TrainState,
    zimg: Array,
    ztxt: Array,
    groups: Array | None,
  ) -> Array:
    t, b = temperature_and_bias(
      self.model, state.replace(trained=trained).params
    )
    return self.loss_fn(zimg, ztxt, t, b, groups=groups, key=self.key(state))

  def update(
    self, state: TrainState, z: Any, loss: Array, grads: dict
  ) -> Result:
    """The end of each step: from gradients to the new state and metrics."""
    updates, opt_state = self.tx.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    t, b = temperature_and_bias(self.model, state.params)
    zimg, ztxt = z
    stats = losses.logit_stats(zimg, ztxt, t, b)
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
    new = dict(step=state.step + 1, trained=trained, opt_state=opt_state)
    return state.replace(**new), metrics

  def whole_batch(self, state: TrainState, batch: Batch) -> Result:
    """A step without microbatches."""

    def fn(trained):
      z = self.towers(trained, state, batch, self.key(state, 0))
      return self.pair_loss(trained, state, *z, batch.get("group")), z

    grad = jax.value_and_grad(fn, has_aux=True)
    (loss, z), grads = grad(state.trained)
    return self.update(state, z, loss, grads)

  # Microbatches. The towers run in a shard_map over the mesh axis "data", so
  # that gradients stay on the devices that computed them until those of all
  # microbatches are added up. These are `own`: arrays (data, ...), split over
  # their first axis. Over "fsdp" they are reduced in each microbatch, since no
  # device has the memory for more than its share.

  def on_data(self, fn: Callable, in_specs: Any) -> Callable:
    """Returns fn in a shard_map over "data"; it returns rows."""
    return jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=P("data"),
      axis_names={"data"},
      # Checked, JAX would sum the gradients over "data" in each microbatch.
      check_vma=False,
    )

  def part_of_towers(
    self, trained: dict, state: TrainState, part: Batch, i: Any
  ) -> tuple[Array, Array]:
    """Returns this place's rows of microbatch i, for use in on_data."""
    # Each place draws a dropout of its own.
    key = self.key(state, i, jax.lax.axis_index("data"))
    return self.towers(trained, state, part, key)

  def embed(
    self, state: TrainState, part: Batch, i: Any
  ) -> tuple[Array, Array]:
    """Returns zimg and ztxt of microbatch i, (B/k, E) each."""
    fn = lambda state, *rest: self.part_of_towers(state.trained, state, *rest)
    return self.on_data(fn, (P(), P("data"), P()))(state, part, i)

  def loss_and_gradients(
    self, state: TrainState, z: Any, groups: Array | None
  ) -> Any:
    """Returns the loss and the gradients with respect to all embeddings.

    z, and the gradients with respect to it, are (k, B/k, E) each; groups are
    those of the whole batch, (B, G).
    """
    z = jax.tree.map(lambda x: merge(x, self.mesh), z)
    grad = jax.value_and_grad(self.pair_loss, (0, 2, 3))
    loss, (grads, *dz) = grad(state.trained, state, *z, groups)
    dz = jax.tree.map(lambda x: split(x, self.k, self.mesh), tuple(dz))
    return z, loss, grads, dz

  def pull_back(
    self, state: TrainState, part: Batch, i: Any, dz: Any, own: dict | None
  ) -> dict:
    """Adds to `own`, None at first, the gradients through microbatch i."""

    def fn(state, part, i, dz, own):
      embed = lambda trained: self.part_of_towers(trained, state, part, i)
      (grads,) = jax.vjp(embed, state.trained)[1](dz)
      grads = jax.tree.map(lambda x: x[None], grads)
      return grads if own is None else jax.tree.map(jnp.add, own, grads)

    specs = P(), P("data"), P(), P("data"), P("data")
    return self.on_data(fn, specs)(state, part, i, dz, own)

  def add_up(self, grads: dict, own: dict) -> dict:
    """Adds all of `own` to grads: the one reduction over "data"."""
    return jax.tree.map(lambda x, rows: x + jnp.sum(rows, 0), grads, own)

  def in_microbatches(self, state: TrainState, batch: Batch) -> Result:
    """A step in microbatches, as one program."""
    parts = jax.tree.map(lambda x: split(x, self.k, self.mesh), batch)
    numbers = jnp.arange(self.k)
    embed = lambda _, xs: (None, self.embed(state, *xs))
    _, z = jax.lax.scan(embed, None, (parts, numbers))
    z, loss, grads, dz = self.loss_and_gradients(state, z, batch.get("group"))

    def add(own, xs):
      part, i, dz = xs
      return self.pull_back(state, part, i, dz, own), None

    zeros = lambda x: jnp.zeros((self.mesh.shape["data"], *x.shape), x.dtype)
    own = jax.tree.map(zeros, state.trained)
    own, _ = jax.lax.scan(add, own, (parts, numbers, dz))
    return self.update(state, z, loss, self.add_up(grads, own))


def temperature_and_bias(model: TwoTowers, params: dict) -> tuple[Array, Array]:
  """Returns t = exp(t') and b, of shape ()."""
  out: Any = model.apply({"params": params}, None, None)
  t, b = out[2]["t"], out[2]["b"]
  return t.reshape(()), b.reshape(())


def split(x: Array, k: int, mesh: Mesh) -> Array:
  """(B, ...) -> (k, B/k, ...); each device cuts its own rows, none moves."""
  cut = x.reshape(mesh.size, k, -1, *x.shape[1:]).swapaxes(0, 1)
  spec = NamedSharding(mesh, P(None, sharding.AXES))
  return jax.lax.with_sharding_constraint(
    cut.reshape(k, -1, *x.shape[1:]), spec
  )


def merge(x: Array, mesh: Mesh) -> Array:
  """(k, B/k, ...) -> (B, ...): the inverse of split."""
  k, _, *rest = x.shape
  whole = x.reshape(k, mesh.size, -1, *rest).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(
    whole.reshape(-1, *rest), sharding.batch_sharding(mesh)
  )
