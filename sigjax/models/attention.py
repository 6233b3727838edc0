"""Multi-head attention of both towers, and the ways of computing it."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sigjax import errors, sharding

# Rows of all heads side by side, (B, L, W), and the mask of keys -> the same.
# Masks that differ between queries, (B, L, M), are for XLA's way alone.
Rows = Float[Array, "B L W"]
Mask = Bool[Array, "B M"] | Bool[Array, "B L M"] | None


def attend(
  query: Float[Array, "B L N H"],
  key: Float[Array, "B M N H"],
  value: Float[Array, "B M N H"],
  mask: Bool[Array, "B 1 _ M"] | None = None,
) -> Float[Array, "B L N H"]:
  """Attention of N heads of width H to the keys that the mask allows, or all.

  The softmax is in float32, both products in the inputs' dtype. (With a float32
  softmax, flax's own function computes the second product in float32, too.)
  """
  logits = jnp.einsum("blhd,bmhd->bhlm", query * query.shape[-1] ** -0.5, key)
  return jnp.einsum("bhlm,bmhd->blhd", weights_of(logits, mask), value)


def weights_of(
  logits: Float[Array, "B N *L M"], mask: Bool[Array, "B 1 *_ M"] | None
) -> Float[Array, "B N *L M"]:
  """The softmax over the keys that the mask allows, or all: in float32, and
  returned in the logits' dtype."""
  dtype, logits = logits.dtype, logits.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits).astype(dtype)


class Way(NamedTuple):
  """How attention is computed, and where.

  Attributes:
    name: "auto", "xla", "pallas" or "cudnn".
    mesh: the devices, over all of which batches are split; None: unknown, and
      XLA computes it, whatever the name is.
  """

  name: str = "auto"
  mesh: Mesh | None = None


class Case(NamedTuple):
  """What a way may be able to compute, or not.

  Attributes:
    heads: their number.
    head: the width of one.
    dtype: compute dtype.
    length: tokens, L.
    masked: whether there is a mask.
  """

  heads: int
  head: int
  dtype: str
  length: int
  masked: bool


def choose(way: Way, case: Case) -> str:
  """Returns "xla", "pallas" or "cudnn".

  That is the way's own name, or for "auto" the kernel of its devices, and "xla"
  where they have none for this case.

  Raises:
    UserError: the way is not known, or its devices do not have it.
  """
  errors.pick(dict.fromkeys((*WAYS, "auto")), way.name, "attention")
  if way.mesh is None:
    return "xla"
  device = way.mesh.devices.flat[0]
  if way.name == "auto":
    # On CPUs, Pallas is for tests.
    kernel = dict(tpu="pallas", gpu="cudnn").get(device.platform, "xla")
    return "xla" if WHY_NOT[kernel](device, case) else kernel
  if reason := WHY_NOT[way.name](device, case):
    raise errors.UserError(
      f'attention "{way.name}" {reason}; "auto" takes what there is'
    )
  return way.name


def _no_pallas(device: Any, case: Case) -> str | None:
  """Returns why there is no Pallas kernel; None if there is one."""
  if device.platform not in ("tpu", "cpu"):
    return f"is for TPUs, not for {device.platform}"
  if reason := _no_heads(case):
    return reason
  from sigjax.models import attention_tpu  # Pallas takes its time to import

  here = attention_tpu.vmem_of(device)
  width = case.heads * case.head
  rows = case.length, width, case.head, jnp.dtype(case.dtype).itemsize
  plan = attention_tpu.plan(1, *rows, here)
  needed = attention_tpu.memory(plan, case.length, *rows[2:])
  if needed > here:
    return (
      f"needs {needed / 2**20:.0f} MiB of VMEM for {case.length} tokens of "
      f"{width}, and a core of {device.device_kind} has {here / 2**20:.0f}"
    )
  return None


def _no_cudnn(device: Any, case: Case) -> str | None:
  """Returns why cuDNN has no attention; None if it has."""
  if device.platform != "gpu":
    return f"is for NVIDIA GPUs, not for {device.platform}"
  major = str(getattr(device, "compute_capability", "")).partition(".")[0]
  if not major.isdecimal() or int(major) < 8:
    return f"needs an NVIDIA GPU from Ampere on, not {device.device_kind}"
  if case.dtype != "bfloat16":
    return f'needs config.model.dtype "bfloat16", not "{case.dtype}"'
  if case.masked and case.length % 2:
    return f"needs an even number of tokens with a mask, not {case.length}"
  return _no_heads(case)


def _no_heads(case: Case) -> str | None:
  if case.head % 8 or case.head > 128:
    return f"takes heads of 8, 16 .. 128 numbers, not {case.head}"
  return None


WHY_NOT = dict(xla=lambda *_: None, pallas=_no_pallas, cudnn=_no_cudnn)


def _xla(q: Rows, k: Rows, v: Rows, mask: Mask, num_heads: int, mesh: Any):
  del mesh
  rows = q.shape
  q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
  q, k, v = (_heads(x, num_heads) for x in (q, k, v))
  allowed = mask
  if mask is not None:
    allowed = mask[:, None] if mask.ndim == 3 else mask[:, None, None, :]
  return checkpoint_name(attend(q, k, v, allowed).reshape(rows), "attended")


def _pallas(
  q: Rows,
  k: Rows,
  v: Rows,
  mask: Mask,
  num_heads: int,
  mesh: Mesh,
  bias: Any = None,
):
  from sigjax.models import attention_tpu  # Pallas takes its time to import

  return attention_tpu.attend(q, k, v, mask, num_heads, mesh, bias)


def _cudnn(q: Rows, k: Rows, v: Rows, mask: Mask, num_heads: int, mesh: Mesh):
  def local(q, k, v, mask):
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    if mask is not None:
      shape = (q.shape[0], 1, q.shape[1], k.shape[1])
      mask = jnp.broadcast_to(mask[:, None, None, :], shape)
    out = jax.nn.dot_product_attention(
      q, k, v, mask=mask, implementation="cudnn"
    )
    return out.reshape(q.shape[0], q.shape[1], -1)

  return sharding.on_each_device(local, mesh)(q, k, v, mask)


WAYS: dict[str, Callable] = dict(xla=_xla, pallas=_pallas, cudnn=_cudnn)


def _heads(x: Rows, num_heads: int) -> Float[Array, "B L N H"]:
  return x.reshape(x.shape[0], x.shape[1], num_heads, -1)


class _Projection(nn.Module):
  """flax's DenseGeneral from or to heads: (x @ kernel, the bias or None).

  Its arrays have the shapes of flax's, (W, N, H) or (N, H, W), and its product
  is one of rows, with which no head moves in memory.
  """

  heads: tuple[int, int]
  out: int | None  # W; None: to heads
  dtype: str
  bias: bool = True

  @nn.compact
  def __call__(self, x: Array | None, width: int = 0) -> tuple[Array, Any]:
    """Returns (x @ kernel, bias); for None the kernel of inputs of a width."""
    width = width if x is None else x.shape[-1]
    if self.out is None:
      shape, ends = (width, *self.heads), self.heads
    else:
      shape, ends = (*self.heads, self.out), (self.out,)
    flat = (width, math.prod(ends))
    init = nn.initializers.xavier_uniform()
    kernel = self.param(
      "kernel", lambda key, shape: init(key, flat).reshape(shape), shape
    )
    bias = None
    cast = lambda a: jnp.asarray(a, self.dtype)  # parameters may be NumPy's
    if self.bias:
      bias = cast(self.param("bias", nn.initializers.zeros, ends))
    if x is None:
      return cast(kernel), bias
    if bias is not None:
      bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
    return cast(x) @ cast(kernel).reshape(flat), bias


class MultiHeadDotProductAttention(nn.Module):
  """flax's layer of this name, with the same parameters: layer(x) or
  layer(query, keys).

  The biases of keys and values cost nothing. The keys' adds the same to all
  logits of a query, so the softmax does not see it, and its gradient is zero.
  The weights of a query sum to one, so the values' is added to each attended
  row, and with it goes through the last product once for all rows.

  Attributes:
    num_heads: N; the heads are W / N wide.
    dtype: compute dtype.
    way: of computing it.
    bias: whether the four projections have one; with a cache they may not.
  """

  num_heads: int
  dtype: str
  way: Way = Way()
  bias: bool = True

  @nn.compact
  def __call__(
    self,
    x: Array,
    keys: Rows | None = None,
    mask: Mask = None,
    length: int | None = None,
    place: Array | None = None,
  ) -> Array:
    """Returns an array like x.

    With `place`, keys and values are kept in the collection "cache". Given
    keys are projected in the first call alone. Without, x is one query of each
    row, (B, 1, W), and the keys are those of this call and of earlier ones.

    Args:
      x: queries (B, L, W), or (B L, W) if their length L is given.
      keys: (B, M, W); None: x.
      mask: which keys there are, (B, M) or for each query (B, L, M); None for
        all. Needed with `place`, without keys: M is the length of the cache.
      place: the number of the query in its row, () int32.
    """
    shape, width = x.shape, x.shape[-1]
    heads = (self.num_heads, width // self.num_heads)
    project = lambda name, out=None: _Projection(
      heads, out, self.dtype, self.bias, name=name
    )
    query, query_bias = project("query")(x)
    rows_of_keys: Array = x if keys is None else keys
    projected = lambda name: project(name)(rows_of_keys)
    value_bias: Any = None
    if place is None:
      key, _ = projected("key")
      value, value_bias = projected("value")
    else:
      assert not self.bias
      length_of_cache = None
      if keys is None:
        assert mask is not None
        length_of_cache = mask.shape[-1]
      key, value = (
        self._cached(name, projected, place, length_of_cache)
        for name in ("key", "value")
      )
    L = length or shape[1]
    name = choose(self.way, Case(*heads, self.dtype, L, mask is not None))
    if self.is_initializing():  # of one example, which no mesh divides
      name = "xla"
    more = {}
    if self.bias and name == "pallas":  # its kernel sums the bias's gradient
      more["bias"] = query_bias.reshape(1, 1, width)
    elif self.bias:
      query = query + query_bias
    if length:
      query, key, value = (
        y.reshape(-1, length, width) for y in (query, key, value)
      )
    how = self.num_heads, self.way.mesh
    attended = WAYS[name](query, key, value, mask, *how, **more)
    out = project("out", width)
    rows, bias = out(attended.reshape(shape))
    if not self.bias:
      return rows
    return rows + (out(value_bias)[0] + bias)

  def _cached(
    self, name: str, projected: Callable, place: Array, length: int | None
  ) -> Rows:
    """Returns what the cache has of keys or values, with those of `place`.

    Args:
      name: "key" or "value".
      projected: fn(name) -> (rows, bias) of this call.
      place: see __call__.
      length: of the cache; None: it is filled by the first call.
    """
    where = "cache", f"cached_{name}"  # a submodule is called "key"
    if length is None:
      return self.variable(*where, lambda: projected(name)[0]).value
    x, _ = projected(name)
    shape = (x.shape[0], length, x.shape[2])
    kept = self.variable(*where, jnp.zeros, shape, x.dtype)
    kept.value = jax.lax.dynamic_update_slice(kept.value, x, (0, place, 0))
    return kept.value


class AttentionOfOneQuery(nn.Module):
  """MultiHeadDotProductAttention of one query that all rows share.

  No key and no value is computed. The query is known before the keys, so a
  head's goes through the keys' kernel once, and the logits are products of it
  with the rows. What it attends to is a mean of the rows, by its weights, which
  goes through the values' kernel.

  Attributes:
    num_heads: N; the heads are W / N wide, H.
    dtype: compute dtype.
  """

  num_heads: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "1 W"],
    x: Float[Array, "B L W"],
    mask: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B W"]:
    width = x.shape[-1]
    heads = (self.num_heads, width // self.num_heads)
    project = lambda name, out=None: _Projection(
      heads, out, self.dtype, name=name
    )
    x = x.astype(self.dtype)
    q, bias = project("query")(query)
    q = (q + bias).reshape(heads) * heads[1] ** -0.5
    # The keys' bias adds the same to all logits.
    kernel, _ = project("key")(None, width)
    q = jnp.einsum("wnh,nh->wn", kernel, q)
    logits = jnp.einsum("blw,wn->bnl", x, q)
    weights = weights_of(logits, None if mask is None else mask[:, None])
    kernel, bias = project("value")(None, width)
    means = jnp.einsum("bnl,blw->bnw", weights, x)
    attended = jnp.einsum("bnw,wnh->bnh", means, kernel) + bias[None]
    rows, bias = project("out", width)(attended.reshape(-1, width))
    return rows + bias
