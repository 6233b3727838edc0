"""Active curation: a step chooses its examples out of more (ACID, JEST).

Of a super-batch, B are trained on: those that the model has not learned yet and
a teacher has (SigLIP 2, arXiv 2502.14786; ACID, arXiv 2411.18674). What is to
be learned of a pair is the model's sigmoid loss minus the teacher's. Examples
are drawn in chunks. A chunk's odds depend on its pairs with what is drawn
already, so that the batch is hard as a whole (JEST, arXiv 2406.17711).

Each device chooses among its own rows: no image moves.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sigjax import errors, losses, sharding
from sigjax import state as state_lib
from sigjax import step as step_lib
from sigjax.models import two_towers
from sigjax.models.two_towers import TwoTowers

F32 = jnp.float32


class Scores(NamedTuple):
  """What a model says of pairs: z are (.., E) unit rows, t and b are ()."""

  zimg: Float[Array, "N E"]
  ztxt: Float[Array, "N E"]
  t: Float[Array, ""]
  b: Float[Array, ""]

  def at(self, rows: Any) -> "Scores":
    """Returns the scores of some rows."""
    return self._replace(zimg=self.zimg[rows], ztxt=self.ztxt[rows])


def own_loss(s: Scores) -> Float[Array, " N"]:
  """Returns the sigmoid loss of each image with its text."""
  cosines = jnp.sum(s.zimg * s.ztxt, axis=1)
  return jax.nn.softplus(-(s.t * cosines + s.b))


def losses_with(s: Scores, others: Scores) -> Float[Array, " N"]:
  """Returns the sum of a pair's sigmoid losses with other pairs, both ways."""
  loss = lambda x, y: jax.nn.softplus(s.t * losses.dot(x, y.T) + s.b)
  both = loss(s.zimg, others.ztxt) + loss(s.ztxt, others.zimg)
  return jnp.sum(both, axis=1)


def choose(
  learner: Scores,
  teacher: Scores,
  key: Array,
  mesh: Mesh,
  keep: int,
  chunks: int,
) -> tuple[Int[Array, " B"], Float[Array, ""]]:
  """Draws the rows to train on; of each device as many.

  Args:
    learner, teacher: of the N rows of the super-batch, split over all devices.
    key: of jax.random.
    mesh: the devices.
    keep: B.
    chunks: how many draws there are; B / devices has to be a multiple.

  Returns:
    The rows' numbers on their device, in the order in which they were drawn;
    and by how much more there is to be learned of them than of all, the mean.
  """
  size = keep // mesh.size // chunks

  def local(learner, teacher):
    device = lax.axis_index(sharding.AXES)
    own = own_loss(learner) - own_loss(teacher)
    rows = jnp.arange(len(own))

    def draw(carry, i):
      odds, taken = carry
      noise = jax.random.gumbel(
        jax.random.fold_in(jax.random.fold_in(key, device), i), odds.shape
      )
      # The largest of logits + Gumbel noise: drawn without replacement.
      _, new = lax.top_k(jnp.where(taken, -jnp.inf, odds + noise), size)
      found = []
      for model in (learner, teacher):
        everyones = [
          lax.all_gather(z, sharding.AXES, tiled=True)
          for z in (model.zimg[new], model.ztxt[new])
        ]
        drawn = model._replace(zimg=everyones[0], ztxt=everyones[1])
        found.append(losses_with(model, drawn))
      taken |= jnp.any(rows[:, None] == new[None], axis=1)
      return (odds + found[0] - found[1], taken), new

    start = own, jnp.zeros(len(own), bool)
    _, drawn = lax.scan(draw, start, jnp.arange(chunks))
    drawn = drawn.ravel()
    more = jnp.mean(own[drawn]) - jnp.mean(own)
    return drawn, more[None]

  one: Any = P()
  split: Any = P(sharding.AXES)
  of = Scores(split, split, one, one)
  drawn, more = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(of, of),
    out_specs=P(sharding.AXES),
    check_vma=False,
  )(learner, teacher)
  return drawn, jnp.mean(more)


def take(batch: Any, drawn: Int[Array, " B"], mesh: Mesh) -> Any:
  """Returns rows of a batch, by their numbers on their device."""
  fn = lambda rows, batch: jax.tree.map(lambda x: x[rows], batch)
  return sharding.on_each_device(fn, mesh)(drawn, batch)


class Curator:
  """Chooses what a step trains on.

  Args:
    model: that learns.
    teacher, params: a model that has learned, and its parameters.
    mesh: the devices.
    batch_size: B.
    pieces: in how many pieces the towers see a super-batch.
    chunks: see choose.
    seed: of the draws; the step is folded in.
  """

  def __init__(
    self,
    model: TwoTowers,
    teacher: TwoTowers,
    params: Any,
    mesh: Mesh,
    batch_size: int,
    pieces: int,
    chunks: int,
    seed: int,
  ):
    def scores(model: TwoTowers, params: Any, batch: Mapping) -> Scores:
      cut = lambda x: step_lib.split(x, pieces, mesh)
      parts = cut(batch["image"]), cut(batch["text"])

      def embed(part):
        found: Any = model.apply({"params": params}, *part)
        return found[:2]

      zimg, ztxt = (step_lib.merge(x, mesh) for x in lax.map(embed, parts))
      t, b = step_lib.temperature_and_bias(model, params)
      return Scores(zimg, ztxt, t, b)

    def select(state, params, batch):
      key = jax.random.key(seed)
      for number in (state.step, 0x41434944):
        key = jax.random.fold_in(key, number)
      drawn, more = choose(
        scores(model, state.params, batch),
        scores(teacher, params, batch),
        key,
        mesh,
        batch_size,
        chunks,
      )
      return take(batch, drawn, mesh), more

    self._select = jax.jit(select)
    self._params, self._mesh = params, mesh

  def __call__(self, state: Any, batch: Any) -> tuple[Any, Float[Array, ""]]:
    """Returns the rows to train on, on the devices.

    Args:
      state: the train state.
      batch: this process's rows of the super-batch, as NumPy.

    Returns:
      The batch (B, ..); and how much more of it is to be learned, see choose.
    """
    batch = sharding.put_batch(batch, self._mesh)
    return self._select(state, self._params, batch)


def teacher(
  settings: "Settings", example: Mapping, mesh: Mesh
) -> tuple[TwoTowers, dict]:
  """Returns the teacher's towers, and the shapes of its parameters.

  Args:
    settings: the section config.curate.
    example: dict(image=, text=), for its shapes.
    mesh: the devices.
  """
  towers = two_towers.of_config(settings.model, mesh=mesh)
  seen = {key: example[key] for key in ("image", "text")}
  return towers, state_lib.param_shapes(towers, seen)


class Settings(NamedTuple):
  """The section config.curate.

  Attributes:
    path: the teacher's weights, as of restore.read_init.
    model: its towers, like config.model. They see the same images and texts.
    of: a batch is chosen out of so many times as many examples.
    chunks: in how many draws.
  """

  path: str
  model: Mapping[str, Any]
  of: int = 2
  chunks: int = 16

  def check(self, batch_size: int, mesh: Mesh, feed: str) -> None:
    """Raises UserError if it does not fit the rest of the config."""
    own = batch_size // mesh.size
    if self.of < 2:
      raise errors.UserError(
        f"config.curate.of is {self.of}: a batch is to be chosen out of at "
        "least 2 times as many examples"
      )
    if self.chunks < 1 or own % self.chunks:
      raise errors.UserError(
        f"config.curate.chunks is {self.chunks}, of which the {own} examples "
        "of a device have to be a multiple"
      )
    if feed != "device":
      raise errors.UserError(
        f'config.curate chooses on the devices: config.feed "{feed}" is not '
        'for it, take "device"'
      )
