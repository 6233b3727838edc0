"""Attention of short sequences on TPUs: two Pallas kernels, there and back.

Logits and weights never leave the chip: a step of the grid holds all keys of
some images, and of their queries all, or as many as fit. So there is no running
softmax, as in flash attention; up to 1,024 tokens it is not needed.

Inputs and results are rows (B, L, W), heads side by side, as projections leave
and take them: no head is ever moved in memory. Inside, a head is the 128 or 256
lanes that hold it, with the lanes of its neighbours set to zero in one operand
of each product. Logits are (keys, queries): sums over keys are then sums over
registers, and each query's numbers are a row. `_ahead` has the next heads'
products under way during the softmax of this one, since products and
elementwise operations are of about equal length.

The softmax is in float32, with base 2 (the scale of the logits has log2(e) in
it); products are in the inputs' dtype and summed in float32. Weights
that are rounded to bfloat16 would bring nearly as much error as the rounded
result. So the forward kernel has a second product, of the values with what
rounding took from the weights.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sigjax import sharding

LANES = 128
LOG2_E = math.log2(math.e)
# Added to logits. A masked key counts as nothing beside any other, and a key of
# another image as nothing beside a masked one.
MASKED, FOREIGN = -1e30, -1e37
# Registers of logits in a step: more hide latencies, and compile long.
WORK = 800
# Bytes of VMEM: what a core has, and what a kernel may use without asking.
VMEM, GIVEN = 64 * 2**20, 16 * 2**20
SMALL_VMEM = {f"TPU v{n}": GIVEN for n in (2, 3, 4)}


class Plan(NamedTuple):
  """What one step of the grid does.

  Attributes:
    packed: sequences that are joined to one of about 128 tokens.
    images: joined sequences.
    width: lanes, which are whole heads.
    queries: of these sequences.
  """

  packed: int
  images: int
  width: int
  queries: int


def vmem_of(device: Any) -> int:
  """Returns the bytes of VMEM of a core; newer chips have 64 MiB or more."""
  return SMALL_VMEM.get(device.device_kind, VMEM)


def plan(
  batch: int, length: int, width: int, head: int, itemsize: int, vmem: int
) -> Plan:
  """Returns the plan for (batch, length, width) rows.

  Args:
    batch, length, width: of the rows.
    head: the width of a head.
    itemsize: bytes of a number.
    vmem: bytes that a step may need. If even its smallest plan needs more, that
      is returned.
  """
  divisor = lambda n, most: max(
    d for d in range(1, max(most, 1) + 1) if n % d == 0
  )
  # Joining is free if it moves no row to another place in its register.
  packed = divisor(batch, 1 if length % 16 else LANES // length)
  keys = packed * length
  # The fewest sequences that fill whole registers of 8 rows.
  least = 8 // math.gcd(keys, 8)
  if keys > 2 * LANES or batch // packed % least:
    least = 1
  unit = math.lcm(head, LANES)
  widths = [w for w in range(unit, width, unit) if width % w == 0] + [width]

  def plans() -> Iterator[Plan]:
    """Yields them from the fastest to the smallest."""
    for parts in range(1, -(-keys // LANES) + 1):
      queries = -(-keys // parts // LANES) * LANES if parts > 1 else keys
      work = least * -(-keys // 8) * -(-queries // LANES)  # of a head
      few = [w for w in widths if w // head * work <= WORK] or widths[:1]
      for lanes in reversed(few):
        most = WORK // (lanes // head * work)
        times = divisor(batch // packed // least, most)
        yield Plan(packed, least * times, lanes, queries)

  found = list(plans())
  fits = lambda it: memory(it, length, head, itemsize) <= vmem
  return next(filter(fits, found), found[-1])


def memory(of: Plan, length: int, head: int, itemsize: int) -> int:
  """Returns the bytes of VMEM that a step of the backward kernel needs.

  Args:
    of: the plan for sequences of `length` tokens.
    length: L.
    head: the width of a head.
    itemsize: bytes of a number.
  """
  packed, images, lanes, queries = of
  rows = lambda n: -(-n // 8) * 8
  keys = rows(packed * length)
  # Of keys: k, v and their gradients. Of queries: q, its gradient, that of the
  # result. Each twice, since the next step's are copied meanwhile.
  blocks = 2 * images * lanes * itemsize * (4 * keys + 3 * rows(queries))
  sums = 2 * images * lanes * keys * 4 if queries < packed * length else 0
  # Of the heads that share registers: gradients of keys and values, and k.T.
  shared = keys * min(math.lcm(head, LANES), lanes) * (2 * 4 + itemsize)
  # What the compiler keeps of logits and weights: 4 to 7 of them.
  return blocks + sums + shared + 8 * keys * rows(queries) * 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
  query: Float[Array, "B L W"],
  key: Float[Array, "B L W"],
  value: Float[Array, "B L W"],
  mask: Bool[Array, "B L"] | None,
  num_heads: int,
  mesh: Mesh,
  bias: Float[Array, "1 1 W"] | None = None,
) -> Float[Array, "B L W"]:
  """Attention of each token to the tokens of its row that the mask allows.

  Args:
    query, key, value: float32 or bfloat16, W = num_heads * head width.
    mask: which keys there are, at least one in a row; None for all.
    num_heads: heads, side by side.
    mesh: the devices; B is split over all of them. If they are CPUs, the
      kernels are interpreted, which is slow.
    bias: added to each query, in the inputs' dtype. The kernel sums its
      gradient, which would else be a pass over those of all queries.

  Returns:
    In the inputs' dtype.
  """
  return _attend_fwd(query, key, value, mask, num_heads, mesh, bias)[0]


def _attend_fwd(query, key, value, mask, num_heads, mesh, bias):
  shape, dtype = query.shape, query.dtype
  query, key, value = (x.reshape(-1, shape[2]) for x in (query, key, value))
  if bias is not None:  # the compiler puts this into the projection
    query = query + bias[0]
  query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
  allowed = None
  if mask is not None:
    allowed = jnp.where(mask[:, None, :], 0.0, MASKED)
  args = (query, key, value, allowed)
  bits, lse = _on(mesh, _forward, shape[1], num_heads, args)
  bits, lse = (checkpoint_name(x, "attended") for x in (bits, lse))
  out = lax.bitcast_convert_type(bits, dtype)
  return out.reshape(shape), (*args, lse, bias)


def _attend_bwd(num_heads, mesh, residuals, dout):
  query, key, value, allowed, lse, bias = residuals
  args = (query, key, value, allowed, lse, dout.reshape(query.shape))
  *grads, sums = _on(mesh, _backward, dout.shape[1], num_heads, args)
  dbias = None
  if bias is not None:
    dbias = jnp.sum(sums, 0, keepdims=True).astype(bias.dtype)
  return *(x.reshape(dout.shape) for x in grads), None, dbias


def _bits(dtype: Any) -> Any:
  """Returns the integers as which the kernel writes results that are kept.

  Of floats that it keeps for the backward pass, JAX makes a copy: a
  "reduce_precision", which other arrays have in the product they come from.
  """
  return jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


attend.defvjp(_attend_fwd, _attend_bwd)


def _on(
  mesh: Mesh,
  fn: Callable,
  length: int,
  num_heads: int,
  args: Sequence[Any],
) -> Any:
  """Calls fn with each device's share of args.

  The compiler cannot split a kernel over devices by itself.
  """
  device = mesh.devices.flat[0]
  fn = functools.partial(fn, length, num_heads, device)
  return sharding.on_each_device(fn, mesh)(*args)


def _forward(length, num_heads, device, query, key, value, mask):
  it = _Layout(query, length, num_heads, vmem_of(device))
  inputs = it.inputs(query, key, value, mask)
  out, lse = pl.pallas_call(
    functools.partial(_forward_kernel, it, mask is not None),
    grid=it.grid,
    in_specs=[block for _, block in inputs],
    out_specs=[it.tokens, it.per_query],
    out_shape=[
      jax.ShapeDtypeStruct(it.join(query).shape, _bits(query.dtype)),
      it.per_query_shape(jnp.int32),
    ],
    compiler_params=it.params("parallel"),
    interpret=device.platform == "cpu",
    name="attention_forward",
  )(*(it.join(x) for x, _ in inputs))
  return out.reshape(query.shape), lse


def _backward(length, num_heads, device, query, key, value, mask, lse, dout):
  it = _Layout(query, length, num_heads, vmem_of(device))
  inputs = it.inputs(query, key, value, mask)
  inputs += [(lse, it.per_query), (dout, it.tokens)]
  found = pl.pallas_call(
    functools.partial(_backward_kernel, it, mask is not None),
    grid=it.grid,
    in_specs=[block for _, block in inputs],
    out_specs=[it.tokens, it.rows, it.rows, it.sums],
    out_shape=[*[it.like(query)] * 3, it.sums_shape],
    # Over parts of the queries, gradients of keys and values add up.
    scratch_shapes=[it.total] * 2 if it.grid[2] > 1 else [],
    compiler_params=it.params("arbitrary"),
    interpret=device.platform == "cpu",
    name="attention_backward",
  )(*(it.join(x) for x, _ in inputs))
  *grads, sums = found
  return *(x.reshape(query.shape) for x in grads), sums


class _Layout:
  """The shapes and blocks that both kernels share, for one device's rows.

  Attributes:
    flat: whether tokens are rows (B L, W) for the kernels, too, so that the
      rows of a step are whole registers; else they are (B, L, W), for which the
      compiler pads and copies unless L is a multiple of 8.
    scale: of the logits.
  """

  def __init__(self, query: Array, length: int, num_heads: int, vmem: int):
    rows, width = query.shape
    batch, size = rows // length, query.dtype.itemsize
    self.length, self.head = length, width // num_heads
    self.scale = self.head**-0.5
    self.plan = plan(batch, length, width, self.head, size, vmem)
    self.memory = memory(self.plan, length, self.head, size)
    packed, n, w, queries = self.plan
    self.joined, self.keys = batch // packed, packed * length
    groups, heads = width // w, w // self.head
    self.grid = (self.joined // n, groups, pl.cdiv(self.keys, queries))
    self.flat = self.grid[2] == 1 and n * self.keys % 8 == 0
    # Blocks of queries, of keys, of the mask, and of a number for each query.
    if self.flat:
      self.rows = pl.BlockSpec((n * self.keys, w), lambda i, g, t: (i, g))
      self.tokens = self.rows
    else:
      self.rows = pl.BlockSpec((n, self.keys, w), lambda i, g, t: (i, 0, g))
      self.tokens = pl.BlockSpec((n, queries, w), lambda i, g, t: (i, t, g))
    self.mask = pl.BlockSpec((n, 1, self.keys), lambda i, g, t: (i, 0, 0))
    self.per_query = pl.BlockSpec(
      (n, None, heads, queries), lambda i, g, t: (i, g, 0, t)
    )
    self._shape = (self.joined, groups, heads, self.keys)
    # Of each step, over its queries.
    self.sums = pl.BlockSpec((None, 1, w), lambda i, g, t: (i, 0, g))
    shape = (self.joined // n, 1, width)
    self.sums_shape = jax.ShapeDtypeStruct(shape, jnp.float32)
    self.total = pltpu.VMEM((n, self.keys, w), jnp.float32)

  def inputs(self, query, key, value, mask) -> list[tuple[Array, Any]]:
    """Returns (array, its blocks) of what both kernels take first."""
    found = [(query, self.tokens), (key, self.rows), (value, self.rows)]
    return found if mask is None else [*found, (mask, self.mask)]

  def params(
    self, over_queries: Literal["parallel", "arbitrary"]
  ) -> pltpu.CompilerParams:
    """Returns the kernel's memory and its dimensions, "parallel" or not."""
    return pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", over_queries),
      vmem_limit_bytes=self.memory if self.memory > GIVEN else None,
    )

  def per_query_shape(self, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(self._shape, dtype)

  def like(self, x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(self.join(x).shape, x.dtype)

  def join(self, x: Array) -> Array:
    """Rows, or (B, 1, L), as the kernels take them; others as they are."""
    if x.ndim == 3:
      return x.reshape(self.joined, 1, self.keys)
    if x.ndim == 2 and not self.flat:
      return x.reshape(self.joined, self.keys, -1)
    return x

  def at(self, i: int, lanes: slice) -> tuple:
    """Returns where the tokens of sequence i are in a block of tokens."""
    if self.flat:
      return slice(i * self.keys, (i + 1) * self.keys), lanes
    return i, slice(None), lanes

  def heads(self) -> Iterator["_Head"]:
    """Yields the heads of a step."""
    _, n, width, _ = self.plan
    unit = math.lcm(self.head, LANES)
    unit = unit if width % unit == 0 else width
    for i in range(n):
      for start in range(0, width, unit):
        for j in range(0, unit, self.head):
          yield _Head(i, start, unit, j, self.head)

  def logits(self, key: Array, query: Array, bias: Array | None) -> Array:
    """Returns those of base 2, (keys, queries) in float32, of a head."""
    s = _dot(key, query, 1, 1) * (self.scale * LOG2_E)
    return s if bias is None else s + bias

  def logit_bias(self, mask: Any, i: int, queries: int) -> Array | None:
    """Returns what is added to the logits (keys, queries) of sequence i."""
    shape = (self.keys, queries)
    bias = None
    if mask is not None:
      bias = jnp.broadcast_to(mask[i], shape[::-1]).T
    if self.keys > self.length:
      token = lambda axis: lax.broadcasted_iota(jnp.int32, shape, axis)
      image = [lax.div(token(axis), self.length) for axis in (0, 1)]
      foreign = jnp.where(image[0] == image[1], 0.0, FOREIGN)
      bias = foreign if bias is None else bias + foreign
    return bias


class _Head(NamedTuple):
  """A head, in a unit: the fewest heads that fill whole registers.

  Attributes:
    image: of the step.
    start, unit: the lanes of the unit.
    at, size: the lanes of the head in the unit.
  """

  image: int
  start: int
  unit: int
  at: int
  size: int

  @property
  def lanes(self) -> slice:
    """The registers that hold it, which may hold its neighbours as well."""
    first = self.at // LANES * LANES
    last = -(-(self.at + self.size) // LANES) * LANES
    return slice(self.start + first, self.start + min(last, self.unit))

  @property
  def is_last(self) -> bool:
    return self.at + self.size == self.unit

  @property
  def units(self) -> slice:
    return slice(self.start, self.start + self.unit)

  def alone(self, x: Array) -> Array:
    """Returns x, (L, lanes), with zeros in place of the neighbours."""
    if x.shape[1] == self.size:
      return x
    at = self.start + self.at - self.lanes.start
    lane = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    return jnp.where((lane >= at) & (lane < at + self.size), x, 0)


def _ahead(fn: Callable, heads: Iterator[_Head], n: int) -> Iterator[Any]:
  """Yields (head, fn(head)); calls fn for n heads more than it has yielded."""
  queue = []
  for head in heads:
    queue.append((head, fn(head)))
    if len(queue) > n:
      yield queue.pop(0)
  yield from queue


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
  dims = (((x_axis,), (y_axis,)), ((), ()))
  return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _forward_kernel(it, masked, query, key, value, *refs):
  mask, *refs = refs if masked else (None, *refs)
  out, lse = refs
  _, n, _, queries = it.plan
  bias = [it.logit_bias(mask, i, queries) for i in range(n)]

  def logits(head):
    i, lanes = head.image, head.lanes
    at = it.at(i, lanes)
    return it.logits(key[at], head.alone(query[at]), bias[i])

  values, done = None, []
  for number, (head, s) in enumerate(_ahead(logits, it.heads(), 3)):
    i = head.image
    top = jnp.max(s, axis=0, keepdims=True)
    exact = jnp.exp2(s - top)
    e = exact.astype(value.dtype)
    if values is None:
      values = value[it.at(i, head.units)].T
    rows = values[head.at : head.at + head.size]
    # A row of ones: the product has the sum, too. (The compiler has 16 rows.)
    ones = jnp.ones((16, it.keys), rows.dtype)
    found = _dot(jnp.concatenate([rows, ones]), e, 1, 0)
    total = found[head.size : head.size + 1]
    found = found[: head.size]
    if e.dtype != exact.dtype:  # what rounding took from the weights
      lost = (exact - e.astype(exact.dtype)).astype(e.dtype)
      found += _dot(rows, lost, 1, 0)
    number %= lse.shape[1]
    lse[i, number : number + 1] = _as_bits(top + jnp.log2(total))
    done.append(found / total)
    if head.is_last:
      at = it.at(i, head.units)
      out[at] = _as_bits(jnp.concatenate(done).astype(query.dtype).T)
      values, done = None, []


def _backward_kernel(it, masked, query, key, value, *refs):
  mask, *refs = refs if masked else (None, *refs)
  lse, dout, dquery, dkey, dvalue, dbias, *sums = refs
  _, n, _, queries = it.plan
  bias = [it.logit_bias(mask, i, queries) for i in range(n)]
  # The last queries of a sequence may be fewer than a block has.
  left = it.keys - pl.program_id(2) * queries
  ragged = it.keys % queries

  def present(x, axis):
    if not ragged:
      return x
    shape = tuple(x.shape[i] if i == axis else 1 for i in range(2))
    return jnp.where(lax.broadcasted_iota(jnp.int32, shape, axis) < left, x, 0)

  def products(head):
    i, lanes = head.image, head.lanes
    at = it.at(i, lanes)
    q = present(head.alone(query[at]), 0)
    do = present(head.alone(dout[at]), 0)
    s = it.logits(key[at], q, bias[i])
    return q, do, s, _dot(value[at], do, 1, 1)

  keys, done, dk, dv = None, [], {}, {}
  for number, (head, (q, do, s, dp)) in enumerate(
    _ahead(products, it.heads(), 1)
  ):
    i = head.image
    number %= lse.shape[1]
    log_total = lax.bitcast_convert_type(lse[i, number : number + 1], s.dtype)
    p = present(jnp.exp2(s - log_total), 1)
    ds = p * (dp - jnp.sum(p * dp, axis=0, keepdims=True))
    p, ds = p.astype(dout.dtype), ds.astype(dout.dtype)
    for totals, x in ((dv, _dot(p, do, 1, 0)), (dk, _dot(ds, q, 1, 0))):
      first = head.lanes.start
      for lane in range(first, head.lanes.stop, LANES):
        part = x[:, lane - first : lane - first + LANES]
        totals[lane] = totals[lane] + part if lane in totals else part
    if keys is None:
      keys = key[it.at(i, head.units)].T
    found = _dot(keys[head.at : head.at + head.size], ds, 1, 0)
    done.append(found * it.scale)
    if head.is_last:
      at = it.at(i, head.units)
      dq = jnp.concatenate(done).astype(dquery.dtype).T
      dquery[at] = dq
      _add(dbias, i, head.units, jnp.sum(dq, 0, jnp.float32, keepdims=True))
      _finish(dkey, sums[:1], it, i, dk, it.scale)
      _finish(dvalue, sums[1:], it, i, dv, 1.0)
      keys, done, dk, dv = None, [], {}, {}


def _as_bits(x: Array) -> Array:
  return lax.bitcast_convert_type(x, _bits(x.dtype))


def _add(to: Any, i: int, lanes: slice, x: Array) -> None:
  """Adds x, (1, lanes), to the sums of a step, of its image i."""
  if i > 0:
    to[:, lanes] += x
    return

  @pl.when(pl.program_id(2) == 0)
  def _():
    to[:, lanes] = x

  @pl.when(pl.program_id(2) > 0)
  def _():
    to[:, lanes] += x


def _finish(to, sums, it, i, parts, scale):
  """Writes gradients {lane: (keys, LANES)}, or adds them to those before."""
  for lane, x in parts.items():
    at = it.at(i, slice(lane, lane + x.shape[1]))
    if not sums:
      to[at] = (x * scale).astype(to.dtype)
      continue
    (total,) = sums

    @pl.when(pl.program_id(2) == 0)
    def _(total=total, at=at, x=x):
      total[at] = x

    @pl.when(pl.program_id(2) > 0)
    def _(total=total, at=at, x=x):
      total[at] += x

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _(total=total, at=at):
      to[at] = (total[at] * scale).astype(to.dtype)
