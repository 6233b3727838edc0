"""Cycles of attention kernels for TPUs, without a TPU: ours and others.

  pip install 'sigjax[aot]' tokamax
  python -m tools.attention_cycles --topology v5e:1x1 --length 196

Prints for each kernel, forward and backward, the bundles that one core issues
for an image, one a cycle, and the cycles in which its bytes move. The others
take heads one by one, (B, heads, L, head), and sequences of whole registers of
128: their L is padded, with no mask; the copies that they need around them are
not counted. Their blocks are as long as the sequence.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from sigjax import errors, sharding
from sigjax.models import attention_tpu
from sigjax.runtime import metrics, program
from tools.aot import compiler, hlo, kernels

FLAGS = flags.FLAGS
# What splash attention and its successor in tokamax call their blocks.
BLOCKS = (
  "block_q",
  "block_kv",
  "block_kv_compute",
  "block_q_dkv",
  "block_kv_dkv",
  "block_kv_dkv_compute",
)


def ours(heads: int, length: int, mesh: Any) -> Callable:
  """Returns attend(q, k, v) of rows (B, L, W)."""
  del length
  attend = attention_tpu.attend
  return lambda q, k, v: attend(q, k, v, None, heads, mesh)


def flash(heads: int, length: int, mesh: Any) -> Callable:
  """Returns JAX's flash attention, of (B, heads, L, head)."""
  del heads, mesh
  from jax.experimental.pallas.ops.tpu import flash_attention as lib

  names = [f.name for f in dataclasses.fields(lib.BlockSizes)]
  sizes: Any = {name: length for name in names if name != "block_b"}
  blocks = lib.BlockSizes(block_b=1, **sizes)
  return lambda q, k, v: lib.flash_attention(q, k, v, block_sizes=blocks)


def splash(heads: int, length: int, mesh: Any) -> Callable:
  """Returns JAX's splash attention, of (B, heads, L, head)."""
  del mesh
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  mask = lib.MultiHeadMask([lib.FullMask((length, length))] * heads)
  blocks = lib.BlockSizes(
    **dict.fromkeys(BLOCKS, length),
    use_fused_bwd_kernel=True,
  )
  kernel: Any = lib.make_splash_mha(
    mask, block_sizes=blocks, head_shards=1, q_seq_shards=1
  )
  return jax.vmap(kernel)


def tokamax(heads: int, length: int, mesh: Any) -> Callable:
  """Returns tokamax' splash attention, of (B, heads, L, head)."""
  del heads, mesh
  from tokamax._src.ops.experimental.tpu import (  # pyright: ignore
    splash_attention as lib,
  )

  kernel = lib.splash_attention_kernel
  config = dataclasses.replace(
    kernel.SplashConfig.get_default(),
    **dict.fromkeys(BLOCKS, length),
    use_base2_exp=True,
    use_experimental_scheduler=True,
  )
  mask = lib.splash_attention_mask.FullMask((length, length))
  made = kernel.make_splash_mha(mask, config=config, q_seq_shards=1)
  return jax.vmap(made)


KERNELS: Mapping[str, Callable] = dict(
  ours=ours, flash=flash, splash=splash, tokamax=tokamax
)


def measure(
  name: str,
  topology: str,
  *,
  batch: int = 256,
  length: int = 196,
  heads: int = 12,
  head: int = 64,
) -> list[tuple[str, float, float]]:
  """Returns (kernel, bundles of a core, cycles of its data), for an image each.

  Args:
    name: in KERNELS.
    topology: such as "v5e:1x1"; its first chip computes.
    batch: images.
    length: tokens of an image.
    heads, head: their number and width.

  Raises:
    UserError: there is no such kernel, chip or package.
  """
  make = errors.pick(KERNELS, name, "--kernels")
  devices, chip = compiler.open_topology(topology)
  mesh = sharding.make_mesh(devices=devices[:1])
  shape = batch, length, heads * head
  if name != "ours":
    lanes = attention_tpu.LANES
    length = -(-length // lanes) * lanes
    shape = batch, heads, length, head
  x = jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=sharding.batch_sharding(mesh)
  )

  def there_and_back(q, k, v, dout):
    out, vjp = jax.vjp(make(heads, length, mesh), q, k, v)
    return out, vjp(dout)

  try:
    with jax.set_mesh(mesh):  # tokamax asks it for the kind of chip
      compiled = jax.jit(there_and_back).lower(x, x, x, x).compile()
  except ImportError as e:
    raise errors.UserError(f"{e}: pip install {name}") from None
  found = hlo.Program(str(compiled.as_text()))
  ops = [op for op, _ in found.kernels()]
  schedules = kernels.take_schedules({op.name for op in ops})
  rows = []
  for op in ops:
    cost = kernels.cost(op.rest, schedules[op.name], chip)
    # The cores of a chip share the images.
    cores = min(cost.kernel.cores, chip.cores)
    images = batch / cores
    rows.append((cost.kernel.name, cost.bundles / images, cost.data / images))
  return rows


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # leaves a real TPU alone
  jax.config.update("jax_enable_compilation_cache", False)
  size: Any = {k: FLAGS[k].value for k in ("batch", "length", "heads", "head")}
  rows = []
  for name in FLAGS.kernels:
    for kernel, bundles, data in measure(name, FLAGS.topology, **size):
      rows.append((name, kernel, f"{bundles:,.0f}", f"{data:,.0f}"))
  header = "by", "kernel", "bundles of a core", "cycles of its data"
  for line in metrics.table(rows, header):
    print(line)


if __name__ == "__main__":
  flags.DEFINE_string("topology", "v5e:1x1", "The kind of chip.")
  flags.DEFINE_list("kernels", list(KERNELS), "Which of them.")
  for name, value in dict(batch=256, length=196, heads=12, head=64).items():
    flags.DEFINE_integer(name, value, "See measure.", lower_bound=1)
  program.run(main)
