"""Optimizers as optax chains: schedules and regex tables for their exceptions.

With u the direction an optimizer proposes and s(step) the schedule in [0, 1],

    params -= s * (lr * lr_mult * u + wd * wd_mult * params)

The weight decay is decoupled from the learning rate, as in the SigLIP paper's
settings (lr 1e-3, wd 1e-4): it follows the schedule alone.
"""

import jax
import jax.numpy as jnp
import optax

from sigjax import errors, trees

# Schedules: fn(steps, ...) -> multiplier of the step, without its warmup. The
# argument is the step counted from the end of the warmup, `steps` the number
# of steps from there to the end of training.


def cosine(steps):
  """Half a cosine from 1 to 0, the paper's schedule."""
  return lambda step: 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0, 1)))


def linear(steps):
  """A straight line from 1 to 0."""
  return lambda step: jnp.clip(1 - step / steps, 0, 1)


def rsqrt(steps, timescale=10_000, cooldown_steps=0):
  """1/sqrt(1 + step/timescale), then a straight line to 0 at the end."""

  def multiplier(step):
    decay = 1 / jnp.sqrt(1 + jnp.maximum(step, 0) / timescale)
    if cooldown_steps:
      decay *= jnp.clip((steps - step) / cooldown_steps, 0, 1)
    return decay

  return multiplier


def constant(steps):
  """1 throughout."""
  del steps
  return jnp.ones_like


SCHEDULES = dict(cosine=cosine, linear=linear, rsqrt=rsqrt, constant=constant)


def make_schedule(total_steps, *, name="cosine", warmup_steps=0, **options):
  """Returns fn(step) -> float32 multiplier in [0, 1] of lr and wd.

  Args:
    total_steps: length of the training.
    name: one of SCHEDULES; its own arguments go into options.
    warmup_steps: the multiplier rises on a straight line from 0 to 1.
    **options: for instance timescale and cooldown_steps of rsqrt.
  """
  if warmup_steps > total_steps:
    raise errors.UserError(
      f"config.optim.schedule.warmup_steps is {warmup_steps}, but the "
      f"training has only {total_steps} steps"
    )
  decay = errors.call(
    errors.pick(SCHEDULES, name, "config.optim.schedule.name"),
    options,
    "config.optim.schedule",
    max(total_steps - warmup_steps, 1),
  )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    # The first step is step 0: it should already move.
    warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
    return warmup * decay(step - warmup_steps)

  return schedule


# Optimizers: fn(...) -> a transformation of gradients into a direction u.


def adamw(b1=0.9, b2=0.95, eps=1e-8, mu_dtype=None):
  """Adam's direction. b2 .95 is the paper's (figure 5: .999 spikes)."""
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def adafactor(
  b1=0.9, decay_rate=0.8, clip=1.0, min_dim=32, mu_dtype="bfloat16"
):
  """Adafactor as in "Scaling Vision Transformers": factored second moments.

  The first moment is kept (in mu_dtype), the step is not relative to the
  parameters' scale, and each array's update is clipped to an RMS of `clip`.
  """
  return optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_dim
    ),
    optax.clip_by_block_rms(clip),
    optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype)),
  )


def lion(b1=0.9, b2=0.99, mu_dtype=None):
  """Lion's direction: a sign, so lr and wd are about a tenth of AdamW's."""
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype)


OPTIMIZERS = dict(adamw=adamw, adafactor=adafactor, lion=lion)


def make_optimizer(
  params,
  total_steps,
  *,
  name="adamw",
  lr=1e-3,
  wd=0.0,
  options=None,
  schedule=None,
  grad_clip_norm=None,
  lr_mults=((".*", 1.0),),
  wd_mults=((".*/kernel", 1.0), (".*", 0.0)),
):
  """Builds the optimizer of a parameter tree; see the top of this file.

  Args:
    params: the parameters that are trained, or their shapes.
    total_steps: length of the training.
    name: one of OPTIMIZERS; options are its own arguments.
    lr: learning rate at the schedule's top.
    wd: decoupled weight decay per step at the schedule's top.
    options: dict for the optimizer, such as dict(b2=0.95).
    schedule: dict for make_schedule, such as dict(warmup_steps=1000).
    grad_clip_norm: global norm to which larger gradients are scaled down.
    lr_mults: rows (regex, multiple of lr), the first match counts.
    wd_mults: rows (regex, multiple of wd). By default kernels alone decay.

  Returns:
    (tx, lr_fn): an optax transformation, and fn(step) -> learning rate.

  Raises:
    UserError: an unknown name or key, or a table without a row for a parameter.
  """
  multiplier = errors.call(
    make_schedule, schedule or {}, "config.optim.schedule", total_steps
  )
  direction = errors.call(
    errors.pick(OPTIMIZERS, name, "config.optim.name"),
    options or {},
    "config.optim.options",
  )
  lr_mults = trees.first_match(lr_mults, params, "config.optim.lr_mults")
  wd_mults = trees.first_match(wd_mults, params, "config.optim.wd_mults")

  def to_update(updates, params):
    return jax.tree.map(
      lambda u, p, l, w: -(lr * l * u.astype(p.dtype) + wd * w * p),
      updates,
      params,
      lr_mults,
      wd_mults,
    )

  tx = optax.chain(
    optax.clip_by_global_norm(grad_clip_norm)
    if grad_clip_norm
    else optax.identity(),
    direction,
    optax.stateless(to_update),
    optax.scale_by_schedule(multiplier),
  )

  def update(grads, state, params):
    # optax multiplies floats by integer counts, which JAX can be told to refuse
    # (and is, in our tests).
    with jax.numpy_dtype_promotion("standard"):
      return tx.update(grads, state, params)

  return (
    optax.GradientTransformation(tx.init, update),
    lambda step: lr * multiplier(step),
  )
