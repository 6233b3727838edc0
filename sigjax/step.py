"""One training step, with exact microbatches.

B is the global batch, D the number of devices, b = B/D, k the number of
microbatches, E the width of the embeddings.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
import optax

from sigjax import errors, losses, sharding
from sigjax.models.two_towers import TwoTowers
from sigjax.state import TrainState

if TYPE_CHECKING:
  from sigjax.terms import Term

Metrics = dict[str, Float[Array, ""]]
Shares = tuple[Metrics, dict[str, Any]]  # of the terms, by name
Result = tuple[TrainState, Metrics]
Batch = dict[str, Any]  # see make_train_step


class TrainStep(NamedTuple):
  """A step, called as step(state, batch) -> (state, metrics).

  The batch is this process's rows, as NumPy. The state is donated.
  """

  run: Callable[[TrainState, Batch], Result]
  program: Any  # jitted, of (state, global batch); None with feed "host"

  def __call__(self, state: TrainState, batch: Batch) -> Result:
    return self.run(state, batch)


def make_train_step(
  model: TwoTowers,
  tx: optax.GradientTransformation,
  lr_fn: Callable[[Array], Array],
  loss_fn: losses.Loss,
  mesh: Mesh,
  *,
  terms: "Sequence[Term]" = (),
  seed: int = 0,
  microbatches: int = 1,
  feed: str = "device",
  state: TrainState | None = None,
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
    terms: losses beside loss_fn, from terms.make. In microbatches they are
      computed in the second pass.
    seed: of dropout, of random negatives and of what terms draw; step and
      microbatch are folded in.
    microbatches: k; has to divide b.
    feed: "device": the whole batch is put on the devices and the step is one
      program. "host": one microbatch at a time is put on the devices, twice,
      for batches whose images do not fit.
    state: from state.abstract_state: after each step, the state is split over
      the devices like this. With None XLA chooses, and a state that comes back
      split in another way has the step compiled a second time.

  Returns:
    A TrainStep. Its batch is dict(image=(B, H, W, C) uint8 or float32,
    text=(B, L) int32), for a loss with positives group=(B, G) int32, and what
    the terms read. Its
    metrics are float32 scalars: loss (loss_fn's), t, b, pos_logit and neg_logit
    (means over the B and the B * (B - 1) pairs on and off the diagonal),
    grad_norm, update_norm and param_norm (global, of what is trained), lr, and
    each term by its name, the mean over the B examples without its weight.
  """
  step = Step(model, tx, lr_fn, loss_fn, mesh, seed, microbatches, terms)
  if errors.pick({"device": False, "host": True}, feed, "config.feed"):
    from sigjax import host_feed  # few runs need it

    return TrainStep(host_feed.make_train_step(step, mesh, state), None)
  fn = step.whole_batch if microbatches == 1 else step.in_microbatches
  out = like_before(state)
  program = jax.jit(fn, donate_argnums=0, out_shardings=out)
  run = lambda state, batch: program(state, sharding.put_batch(batch, mesh))
  return TrainStep(run, program)


def like_before(state: TrainState | None) -> Any:
  """Returns out_shardings of a step: see `state` of make_train_step."""
  if state is None:
    return None
  return jax.tree.map(lambda x: x.sharding, state), None


class Step(NamedTuple):
  """The parts of a step; the fields are arguments of make_train_step."""

  model: TwoTowers
  tx: optax.GradientTransformation
  lr_fn: Callable
  loss_fn: losses.Loss
  mesh: Mesh
  seed: int
  k: int
  terms: "Sequence[Term]" = ()

  def key(self, state: TrainState, *more: Any) -> Array:
    """Returns the key of a step and, within it, of `more` numbers."""
    key = jax.random.key(self.seed)
    for number in (state.step, *more):
      key = jax.random.fold_in(key, number)
    return key

  def towers(
    self, trained: dict, state: TrainState, part: Batch, key: Array
  ) -> tuple[tuple[Array, Array], Callable[..., Shares]]:
    """Runs the towers over n examples.

    Returns:
      (zimg, ztxt), (n, E) each; and fn(places, B) -> ({term: the sum of these
      examples' losses / B}, {term: its other sums / B}), where places (n,) are
      their rows in the batch.
    """
    params = state.replace(trained=trained).params
    found: Any = self.model.apply(
      {"params": params},
      part["image"],
      part["text"],
      train=True,
      rngs={"dropout": key},
    )
    zimg, ztxt, out = found

    def shares(places, B):
      args = params, state.held, out, part, self.key(state), places
      found = {term.name: term.total(*args) for term in self.terms}
      share = lambda i: {name: sums[i] for name, sums in found.items()}
      return jax.tree.map(lambda x: x / B, (share(0), share(1)))

    return (zimg, ztxt), shares

  def weights(self) -> Metrics:
    """Returns each term's weight."""
    return {term.name: jnp.float32(term.weight) for term in self.terms}

  def places(self, B: int, i: Any) -> Array | None:
    """Returns the rows of microbatch i in the batch, (B/k,), for the terms."""
    return split(jnp.arange(B), self.k, self.mesh)[i] if self.terms else None

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
    self, state: TrainState, z: Any, loss: Array, grads: dict, shares: Shares
  ) -> Result:
    """The end of each step: from gradients to the new state and metrics."""
    updates, opt_state = self.tx.update(grads, state.opt_state, state.trained)
    trained: Any = optax.apply_updates(state.trained, updates)
    t, b = temperature_and_bias(self.model, state.params)
    (zimg, ztxt), (beside, means) = z, shares
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
      **beside,
    )
    new = dict(step=state.step + 1, trained=trained, opt_state=opt_state)
    new["held"] = self.held_after(state, trained, means)
    return state.replace(**new), metrics

  def held_after(self, state: TrainState, trained: dict, means: dict) -> dict:
    """Returns what the terms hold after this step."""
    params = state.replace(trained=trained).params
    return {
      term.kind.part: term.kind.after(
        state.held[term.kind.part], params, means[term.name], state.step
      )
      for term in self.terms
      if term.kind.part in state.held
    }

  def whole_batch(self, state: TrainState, batch: Batch) -> Result:
    """A step without microbatches."""
    B, weights = len(batch["text"]), self.weights()

    # XLA alone sums whole gradients over all devices, then cuts them. In a
    # shard_map over "data", devices of "fsdp" get their part first.
    apart = min(self.mesh.shape.values()) > 1

    def towers(trained, state, batch, places):
      if apart:
        z, shares_of = self.part_of_towers(trained, state, batch, 0)
      else:
        key = self.key(state, 0)
        z, shares_of = self.towers(trained, state, batch, key)
      return z, jax.tree.map(lambda x: x[None], shares_of(places, B))

    specs = P(), P(), P("data"), P("data")
    run = self.on_data(towers, specs) if apart else towers

    def fn(trained):
      (zimg, ztxt), rows = run(trained, state, batch, self.places(B, 0))
      loss = self.pair_loss(trained, state, zimg, ztxt, batch.get("group"))
      shares = jax.tree.map(lambda x: jnp.sum(x, 0), rows)
      beside, _ = shares
      total = sum((weights[name] * x for name, x in beside.items()), loss)
      return total, ((zimg, ztxt), loss, shares)

    grad = jax.value_and_grad(fn, has_aux=True)
    (_, (z, loss, shares)), grads = grad(state.trained)
    return self.update(state, z, loss, grads, shares)

  # Microbatches. The towers run in a shard_map over the mesh axis "data", so
  # that gradients stay on the devices that computed them until those of all
  # microbatches are added up. These are `own`: arrays (data, ...), split over
  # their first axis, with the terms' shares of the loss. Over "fsdp" they are
  # reduced in each microbatch, since no device has the memory for more than its
  # share.

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
  ) -> tuple[tuple[Array, Array], Callable[..., Shares]]:
    """Runs the towers over this place's rows of microbatch i, in on_data."""
    # Each place draws a dropout of its own.
    key = self.key(state, i, jax.lax.axis_index("data"))
    return self.towers(trained, state, part, key)

  def embed(
    self, state: TrainState, part: Batch, i: Any
  ) -> tuple[Array, Array]:
    """Returns zimg and ztxt of microbatch i, (B/k, E) each."""

    def fn(state, part, i):
      return self.part_of_towers(state.trained, state, part, i)[0]

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
    self, state: TrainState, part: Batch, i: Any, dz: Any, own: Any
  ) -> Any:
    """Adds to `own`, None at first, what microbatch i brings.

    `own` is (the gradients through the towers and terms, the terms' shares).
    """
    B = len(part["text"]) * self.k

    def fn(state, part, i, places, dz, own):
      def run(trained):
        z, shares_of = self.part_of_towers(trained, state, part, i)
        beside, sums = shares_of(places, B)
        return (z, beside), sums

      (_, beside), pull, sums = jax.vjp(run, state.trained, has_aux=True)
      (grads,) = pull((dz, self.weights()))
      new = jax.tree.map(lambda x: x[None], (grads, (beside, sums)))
      return new if own is None else jax.tree.map(jnp.add, own, new)

    specs = P(), P("data"), P(), P("data"), P("data"), P("data")
    return self.on_data(fn, specs)(state, part, i, self.places(B, i), dz, own)

  def add_up(self, grads: dict, own: Any) -> tuple[dict, Shares]:
    """Adds all of `own` to grads: the one reduction over "data"."""
    through, shares = own
    add = lambda x, rows: x + jnp.sum(rows, 0)
    sums = jax.tree.map(lambda rows: jnp.sum(rows, 0), shares)
    return jax.tree.map(add, grads, through), sums

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
    sums = {term.name: term.kind.nothing() for term in self.terms}
    own = jax.tree.map(zeros, (state.trained, (self.weights(), sums)))
    own, _ = jax.lax.scan(add, own, (parts, numbers, dz))
    return self.update(state, z, loss, *self.add_up(grads, own))


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
