"""From sections of a config to the parts of a run: model, step and state.

Used by train.py, and by the tools that compile or time the same step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
import optax

from sigjax import errors, losses
from sigjax import optim as optim_lib
from sigjax import sharding as sharding_lib
from sigjax import state as state_lib
from sigjax import step as step_lib
from sigjax.models.two_towers import TwoTowers


class Built(NamedTuple):
  """The parts of a run."""

  model: TwoTowers
  tx: optax.GradientTransformation  # of what is trained
  train_step: step_lib.TrainStep
  state: state_lib.TrainState  # abstract, see state.abstract_state


def build(
  mesh: Mesh,
  example: Mapping[str, Any],
  total_steps: int,
  *,
  batch_size: int,
  model: Mapping[str, Any],
  optim: Mapping[str, Any],
  loss: Mapping[str, Any] | None = None,
  sharding: Sequence = sharding_lib.REPLICATED,
  lock: Sequence[str] = (),
  microbatches: int = 1,
  feed: str = "device",
  seed: int = 0,
) -> Built:
  """Builds the parts of a run; the keywords are sections of a config.

  Args:
    mesh: from sharding.make_mesh.
    example: dict(image=, text=), one preprocessed example, for its shapes.
    total_steps: the length of the training.
    batch_size, model, optim, loss, sharding, lock, microbatches, feed, seed:
      see train.main; durations in optim are in steps.

  Raises:
    UserError: a section that its function refuses, a batch size that does not
      divide, or dropout in a locked tower.
  """
  sharding_lib.check_batch_size(batch_size, mesh, microbatches)
  towers = errors.call(TwoTowers, model, "config.model")
  for tower, section in (("img", "image"), ("txt", "text")):
    if tower in lock and getattr(towers, section).get("dropout"):
      raise errors.UserError(
        f"config.model.{section} has dropout, but it is locked: set it to 0"
      )
  shapes = state_lib.param_shapes(towers, example, lock)
  trained, _ = state_lib.split_params(shapes, lock)
  tx, lr_fn = errors.call(
    optim_lib.make_optimizer, optim, "config.optim", trained, total_steps
  )
  loss_fn = losses.make(mesh, sharding_lib.AXES, **(loss or {}))
  options: Any = dict(seed=seed, microbatches=microbatches, feed=feed)
  make_step = step_lib.make_train_step
  train_step = make_step(towers, tx, lr_fn, loss_fn, mesh, **options)
  state = state_lib.abstract_state(shapes, tx, mesh, sharding, lock)
  return Built(towers, tx, train_step, state)
