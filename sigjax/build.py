"""From sections of a config to what a run is made of: model, step and state.

Used by train.py and by the tools that compile or time the very same step.
"""

from typing import Any, NamedTuple

import jax

from sigjax import errors, losses
from sigjax import optim as optim_lib
from sigjax import sharding as sharding_lib
from sigjax import state as state_lib
from sigjax import step as step_lib
from sigjax.models import two_towers


class Built(NamedTuple):
  """A run's parts.

  model: a TwoTowers; tx: the optimizer of what is trained.
  train_step: see step.make_train_step.
  shapes: of the parameters, see state.param_shapes.
  state: the abstract train state, see state.abstract_state.
  flops: matmul FLOPs of training per example, the loss left out.
  """

  model: Any
  tx: Any
  train_step: Any
  shapes: dict
  state: state_lib.TrainState
  flops: int


def build(
  mesh,
  example,
  total_steps,
  *,
  batch_size,
  model,
  optim,
  loss=None,
  sharding=((".*", "replicate"),),
  lock=(),
  microbatches=1,
  feed="device",
  seed=0,
):
  """Builds the parts of a run; the keywords are sections of a config.

  Args:
    mesh: from sharding.make_mesh.
    example: dict(image=, text=), one preprocessed example, for its shapes.
    total_steps: the length of the training.
    batch_size, model, optim, loss, sharding, lock, microbatches, feed, seed:
      see train.main; durations in optim are in steps.

  Returns:
    A Built.
  """
  sharding_lib.check_batch_size(batch_size, mesh, microbatches)
  model = errors.call(two_towers.TwoTowers, model, "config.model")
  for tower, section in (("img", "image"), ("txt", "text")):
    if tower in lock and getattr(model, section).get("dropout"):
      raise errors.UserError(
        f"config.model.{section} has dropout, but it is locked: set it to 0"
      )
  shapes = state_lib.param_shapes(model, example, lock)
  trained = state_lib.trained_part(shapes, lock)
  tx, lr_fn = errors.call(
    optim_lib.make_optimizer, optim, "config.optim", trained, total_steps
  )
  train_step = step_lib.make_train_step(
    model,
    tx,
    lr_fn,
    losses.make(mesh, sharding_lib.AXES, **(loss or {})),
    mesh,
    seed=seed,
    lock=lock,
    microbatches=microbatches,
    feed=feed,
  )
  forward = two_towers.flops(
    model, (1, *example["image"].shape), (1, *example["text"].shape)
  )
  return Built(
    model,
    tx,
    train_step,
    shapes,
    state_lib.abstract_state(shapes, tx, mesh, sharding, lock),
    # Backwards it is twice the forward pass, if anything is trained.
    sum(
      n * (3 if jax.tree.leaves(trained.get(tower, {})) else 1)
      for tower, n in forward.items()
    ),
  )
