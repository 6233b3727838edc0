"""Optimizers as optax chains: schedules and regex tables for their exceptions.

With u the direction that the optimizer proposes and s(step) the schedule,

    params -= s * (lr * lr_mult * u + wd * wd_mult * params)

The weight decay is decoupled from the learning rate, as in the SigLIP paper's
settings (lr 1e-3, wd 1e-4): it follows the schedule alone.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import optax

from sigjax import errors, trees

Schedule = Callable[[Any], Array]  # step -> multiplier or learning rate

# Schedules: fn(steps, ...) -> multiplier of a step. Steps are counted from the
# end of the warmup; `steps` is how many there are from there to the end.


def cosine(steps: int) -> Schedule:
  """Half a cosine from 1 to 0, the paper's schedule."""
  return lambda step: 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0, 1)))


def linear(steps: int) -> Schedule:
  """A straight line from 1 to 0."""
  return lambda step: jnp.clip(1 - step / steps, 0, 1)


def rsqrt(
  steps: int, timescale: int = 10_000, cooldown_steps: int = 0
) -> Schedule:
  """1/sqrt(1 + step/timescale), then a straight line to 0 at the end.

  For runs whose length may be extended: until the cooldown the schedule does
  not depend on it ("Scaling Vision Transformers", arXiv 2106.04560).
  """

  def multiplier(step):
    decay = 1 / jnp.sqrt(1 + jnp.maximum(step, 0) / timescale)
    if cooldown_steps:
      decay *= jnp.clip((steps - step) / cooldown_steps, 0, 1)
    return decay

  return multiplier


def constant(steps: int) -> Schedule:
  """1 throughout."""
  del steps
  return jnp.ones_like


SCHEDULES = dict(cosine=cosine, linear=linear, rsqrt=rsqrt, constant=constant)


def make_schedule(
  total_steps: int,
  *,
  name: str = "cosine",
  warmup_steps: int = 0,
  **options: Any,
) -> Schedule:
  """Returns fn(step) -> float32 multiplier in [0, 1] of lr and wd.

  Args:
    total_steps: the length of the training.
    name: one of SCHEDULES.
    warmup_steps: the multiplier first rises on a straight line from 0 to 1.
    **options: the schedule's own, such as timescale and cooldown_steps.
  """
  if warmup_steps > total_steps:
    raise errors.UserError(
      f"config.optim.schedule.warmup_steps is {warmup_steps}, but the "
      f"training has only {total_steps} steps"
    )
  make = errors.pick(SCHEDULES, name, "config.optim.schedule.name")
  steps = max(total_steps - warmup_steps, 1)
  decay = errors.call(make, options, "config.optim.schedule", steps)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    # The first step is step 0: it should already move.
    warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
    return warmup * decay(step - warmup_steps)

  return schedule


# Optimizers: fn(...) -> a transformation of gradients into a direction u.


def adamw(
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Adam's direction. b2 .95 is the paper's (figure 5: .999 spikes)."""
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def adafactor(
  b1: float = 0.9,
  decay_rate: float = 0.8,
  clip: float = 1.0,
  min_dim: int = 32,
  mu_dtype: str = "bfloat16",
) -> optax.GradientTransformation:
  """Adafactor as in "Scaling Vision Transformers": factored second moments.

  The first moment is kept (in mu_dtype), the step is not relative to the
  parameters' scale, and each array's update is clipped to an RMS of `clip`. For
  large towers: its state takes less than half the memory of AdamW's.
  """
  return optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_dim
    ),
    optax.clip_by_block_rms(clip),
    optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype)),
  )


def lion(
  b1: float = 0.9, b2: float = 0.99, mu_dtype: str | None = None
) -> optax.GradientTransformation:
  """Lion's direction: a sign, so lr and wd are about a tenth of AdamW's."""
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype)


# Coefficients of each step of Newton-Schulz, all five the same. Steps that are
# listed are a loop in optax, which compiles faster than five copies.
MUON_STEPS = ((3.4445, -4.775, 2.0315),) * 5


def muon(
  beta: float = 0.95,
  b1: float = 0.9,
  b2: float = 0.95,
  rms: float = 0.2,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Muon for the kernels of encoder blocks, Adam for everything else.

  A kernel's momentum is replaced by the nearest matrix whose singular values
  are all about 1 (arXiv 2502.16982). Heads are side by side in one matrix, as
  in the product that the kernel is used in. Embeddings, the head and the
  pooling, biases and scales, t and b follow Adam.

  Args:
    beta: decay of the momentum.
    b1, b2: Adam's.
    rms: of a kernel's direction. Adam's has about .2, so that lr and wd of
      AdamW fit.
    mu_dtype: of the momentum and of Adam's first moment.
  """
  return optax.contrib.muon(
    learning_rate=-1.0,  # the direction itself: optax takes its negative
    beta=beta,
    adam_b1=b1,
    adam_b2=b2,
    ns_coeffs=MUON_STEPS,
    consistent_rms=rms,
    mu_dtype=mu_dtype,
    muon_weight_dimension_numbers=_matrices,
  )


def _matrices(params: Any) -> Any:
  """Returns which axes of a kernel are summed over, and which are its outputs.

  None for an array that is not such a matrix. The layers of a scan are an axis
  in front.
  """

  def axes(name, array):
    found = re.search(r"/encoderblock(_\d+)?/.*/(\w+)/kernel$", name)
    if not found:
      return None
    first = array.ndim - (2 if found[2].startswith("Dense") else 3)
    rest = tuple(range(first, array.ndim))
    inputs = 2 if found[2] == "out" else 1  # (heads, D, W), or (W, heads, D)
    return optax.contrib.MuonDimensionNumbers(rest[:inputs], rest[inputs:])

  return trees.map_named(axes, params)


OPTIMIZERS = dict(adamw=adamw, adafactor=adafactor, lion=lion, muon=muon)


def make_optimizer(
  params: Any,
  total_steps: int,
  *,
  name: str = "adamw",
  lr: float = 1e-3,
  wd: float = 0.0,
  options: Mapping[str, Any] | None = None,
  schedule: Mapping[str, Any] | None = None,
  grad_clip_norm: float | None = None,
  lr_mults: Sequence = ((".*", 1.0),),
  wd_mults: Sequence = ((".*/kernel", 1.0), (".*", 0.0)),
) -> tuple[optax.GradientTransformation, Schedule]:
  """Builds the optimizer of a parameter tree; see the top of this file.

  Args:
    params: the parameters that are trained, or their shapes.
    total_steps: the length of the training.
    name: one of OPTIMIZERS.
    lr: learning rate at the top of the schedule.
    wd: decoupled weight decay per step at the top of the schedule.
    options: the optimizer's own arguments, such as dict(b2=0.95).
    schedule: arguments of make_schedule, such as dict(warmup_steps=1000).
    grad_clip_norm: gradients of a larger global norm are scaled down to it.
    lr_mults: rows (regex, multiple of lr); the first match counts.
    wd_mults: rows (regex, multiple of wd). By default only kernels decay.

  Returns:
    (tx, lr_fn): an optax transformation, and fn(step) -> learning rate.

  Raises:
    UserError: an unknown name or key, or a table without a row for a parameter.
  """
  multiplier = errors.call(
    make_schedule, schedule or {}, "config.optim.schedule", total_steps
  )
  make = errors.pick(OPTIMIZERS, name, "config.optim.name")
  direction = errors.call(make, options or {}, "config.optim.options")
  lr_mults = trees.first_match(lr_mults, params, "config.optim.lr_mults")
  wd_mults = trees.first_match(wd_mults, params, "config.optim.wd_mults")

  def step(u, p, lr_mult, wd_mult):
    return -(lr * lr_mult * u.astype(p.dtype) + wd * wd_mult * p)

  to_update = lambda u, p: jax.tree.map(step, u, p, lr_mults, wd_mults)
  clip = optax.identity()
  if grad_clip_norm:
    clip = optax.clip_by_global_norm(grad_clip_norm)
  tx = optax.chain(
    clip,
    direction,
    optax.stateless(to_update),
    optax.scale_by_schedule(multiplier),
  )

  def update(updates, state, params=None):
    # optax multiplies floats by integer counts, which JAX can be told to refuse
    # (the tests do).
    with jax.numpy_dtype_promotion("standard"):
      return tx.update(updates, state, params)

  lr_fn = lambda step: lr * multiplier(step)
  return optax.GradientTransformation(tx.init, update), lr_fn
