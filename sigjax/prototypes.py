"""Self-distillation between views: cross-entropy over prototypes (DINO, iBOT).

A vector is compared with K prototypes by cosine. The student's softmax over
them is to match the teacher's, whose logits are centred and sharper
(arXiv 2104.14294). With K = 65,536 and 8 views, the logits of an example are
2 MiB in float32, so there are those of `chunk` examples at a time. The backward
pass computes them once more: the product is small beside the towers.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sigjax import losses, sharding

F32 = jnp.float32


def distillation(
  student: Float[Array, "R N D"],
  teacher: Float[Array, "R D"],
  prototypes: Float[Array, "D K"],
  of_teacher: Float[Array, "D K"],
  centre: Float[Array, " K"],
  *,
  temperature: float = 0.1,
  teacher_temperature: float = 0.04,
  chunk: int = 256,
  mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, " K"]]:
  """Returns the sum of cross-entropies, and the sum of the teacher's logits.

  With unit vectors s and p, and u and q of the teacher, the loss of row r is
  the mean over n of the cross-entropy between

    softmax((u_r @ q - centre) / teacher_temperature) and
    softmax(s_rn @ p / temperature).

  Args:
    student: N vectors for each row. bfloat16 is multiplied as it is, float32 in
      full float32. Gradients flow into them and the prototypes alone.
    teacher: a vector for each row.
    prototypes, of_teacher: columns, of any norm: they are made unit vectors.
    centre: subtracted from the teacher's logits (cosines); float32.
    temperature, teacher_temperature: DINO's, by default.
    chunk: of how many rows a device holds logits at a time.
    mesh: the devices, over all of which rows are split; None if not known.

  Returns:
    float32 () and, for the running centre, (K,): sums over the rows.
  """
  fn = functools.partial(_share, temperature, teacher_temperature, chunk)
  run: Callable = sharding.on_each_device(fn, mesh, whole=(2, 3, 4))
  teacher, of_teacher, centre = lax.stop_gradient((teacher, of_teacher, centre))
  value, seen = run(student, teacher, prototypes, of_teacher, centre)
  return jnp.sum(value), jnp.sum(lax.stop_gradient(seen), axis=0)


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
  """Returns float32 unit vectors along an axis; zero stays zero."""
  x = x.astype(F32)
  squares = jnp.sum(x * x, axis=axis, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(squares, 1e-24))


def _share(
  temperature,
  teacher_temperature,
  chunk,
  student,
  teacher,
  prototypes,
  of_teacher,
  centre,
):
  """Returns (loss (1,), teacher's logits (1, K)), sums over a device's rows."""
  rows, views, width = student.shape
  chunk = min(chunk, rows)
  pad = -rows % chunk
  cut = lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(
    -1, chunk, *x.shape[1:]
  )
  there = cut(jnp.ones(rows, F32))
  columns = unit(prototypes, 0).astype(student.dtype)
  theirs = unit(of_teacher, 0).astype(teacher.dtype)

  @jax.checkpoint
  def visit(sums, part):
    x, u, here = part
    x, u = (unit(y).astype(y.dtype) for y in (x, u))
    cosines = losses.dot(u, theirs)
    target = jax.nn.softmax((cosines - centre[None]) / teacher_temperature)
    logits = losses.dot(x.reshape(-1, width), columns) / temperature
    log_p = jax.nn.log_softmax(logits).reshape(chunk, views, -1)
    each = -jnp.sum(target[:, None] * log_p, axis=(1, 2)) / views
    value = jnp.sum(here * each)
    seen = jnp.sum(lax.stop_gradient(here[:, None] * cosines), axis=0)
    return (sums[0] + value, sums[1] + seen), None

  start = jnp.zeros((), F32), jnp.zeros(columns.shape[1], F32)
  parts = cut(student), cut(teacher), there
  (value, seen), _ = lax.scan(visit, start, parts)
  return value[None], seen[None]
