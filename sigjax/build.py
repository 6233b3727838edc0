"""From sections of a config to the parts of a run: model, step and state.

Used by train.py, and by the tools that compile or time the same step.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
import numpy as np
import optax

from sigjax import errors
from sigjax import losses as losses_lib
from sigjax import optim as optim_lib
from sigjax import sharding as sharding_lib
from sigjax import state as state_lib
from sigjax import step as step_lib
from sigjax.models import two_towers

if TYPE_CHECKING:
  from sigjax.terms import Term


class Built(NamedTuple):
  """The parts of a run."""

  model: two_towers.TwoTowers
  tx: optax.GradientTransformation  # of what is trained
  train_step: step_lib.TrainStep
  state: state_lib.TrainState  # abstract, see state.abstract_state
  lock: Sequence[str]  # config.lock, and what config.lora locks
  terms: "Sequence[Term]"  # of config.losses


def build(
  mesh: Mesh,
  example: Mapping[str, Any],
  total_steps: int,
  *,
  batch_size: int,
  model: Mapping[str, Any],
  optim: Mapping[str, Any],
  loss: Mapping[str, Any] | None = None,
  losses: Mapping[str, Mapping[str, Any]] | None = None,
  since: Mapping[str, int] = MappingProxyType({}),
  sharding: Sequence = sharding_lib.REPLICATED,
  lock: Sequence[str] = (),
  lora: Mapping[str, Any] | None = None,
  microbatches: int = 1,
  feed: str = "device",
  seed: int = 0,
) -> Built:
  """Builds the parts of a run; the keywords are sections of a config.

  Args:
    mesh: from sharding.make_mesh.
    example: dict(image=, text=) and, for a loss with positives, group=: one
      preprocessed example, for its shapes.
    total_steps: the length of the training.
    batch_size, model, optim, loss, losses, sharding, lock, lora, microbatches,
      feed, seed: see train.main; durations in optim are in steps.
    since: {name in losses: the steps that are done when it begins}.

  Raises:
    UserError: a section that its function refuses, a batch size that does not
      divide, or dropout in a locked tower.
  """
  given: dict[str, Any] = dict(locals())
  if "auto" in (model[tower].get("remat") for tower in ("image", "text")):
    from sigjax import remat  # few runs leave it open

    make = lambda model: build(**{**given, "model": model})
    batch = sharding_lib.abstract_batch(example, batch_size, mesh)
    return remat.fastest(make, model, batch)
  sharding_lib.check_batch_size(batch_size, mesh, microbatches)
  towers = two_towers.of_config(model, batch_size, mesh)
  for tower, section in (("img", "image"), ("txt", "text")):
    if tower in lock and getattr(towers, section).get("dropout"):
      raise errors.UserError(
        f"config.model.{section} has dropout, but it is locked: set it to 0"
      )
  if lora:
    lock = _locked_by_lora(lock, **lora)
  terms: Sequence[Term] = ()
  if losses:
    from sigjax import terms as terms_lib  # few runs have any

    spans = {
      name: terms_lib.Span(since.get(name, 0), total_steps) for name in losses
    }
    terms = terms_lib.make(losses, towers, spans)
    for term in terms:
      terms_lib.check_lock(term, lock)
  shapes = state_lib.param_shapes(towers, example, lock, terms)
  if lora:
    from sigjax import lora as lora_lib  # few runs have adapters

    adapters = errors.call(lora_lib.shapes, lora, "config.lora", shapes)
    shapes = {**shapes, **adapters}
  trained, _ = state_lib.split_params(shapes, lock)
  tx, lr_fn = errors.call(
    optim_lib.make_optimizer, optim, "config.optim", trained, total_steps
  )
  loss_fn = losses_lib.make(mesh, sharding_lib.AXES, **(loss or {}))
  _check_loss(loss_fn, batch_size, example.get("group"))
  state = state_lib.abstract_state(shapes, tx, mesh, sharding, lock, terms)
  options: Any = dict(
    terms=terms, seed=seed, microbatches=microbatches, feed=feed, state=state
  )
  make_step = step_lib.make_train_step
  train_step = make_step(towers, tx, lr_fn, loss_fn, mesh, **options)
  return Built(towers, tx, train_step, state, lock, terms)


def _locked_by_lora(
  lock: Sequence[str],
  towers: Sequence[str] = ("img", "txt"),
  **others: Any,
) -> Sequence[str]:
  """Returns what is locked if these towers are adapted."""
  del others
  for tower in towers:
    if named := [name for name in lock if name.split("/")[0] == tower]:
      raise errors.UserError(
        f'config.lora adapts "{tower}", but config.lock locks "{named[0]}"; '
        "take it out of one"
      )
  return (*lock, *towers)


def _check_loss(
  loss_fn: losses_lib.Loss, batch_size: int, group: Array | None
) -> None:
  """Traces the loss: a wrong value in its section fails before the first step.

  The parameters may take minutes to read, and the step minutes to compile.
  """
  like = jax.ShapeDtypeStruct
  z = like((batch_size, 1), jnp.float32)
  groups = None
  if group is not None:
    groups = like((batch_size, *np.shape(group)), group.dtype)
  fn = lambda zimg, ztxt, groups: loss_fn(
    zimg, ztxt, 1.0, 0.0, groups=groups, key=jax.random.key(0)
  )
  jax.eval_shape(fn, z, z, groups)
