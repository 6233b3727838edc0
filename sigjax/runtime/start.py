"""What a program sets when it starts: flags, kept programs, kept memory."""

import ctypes
import logging
import os
import sys

import jax

from sigjax.runtime import files

log = logging.getLogger("sigjax")

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


LIBTPU_FLAGS = {
  # Kernels that are split over "fsdp" are gathered, then multiplied. Else
  # libtpu sends their parts around, and multiplies a part at a time: smaller
  # products, and copies between them.
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
  # SparseCores, where a chip has them and libtpu uses them (v5p, v6e), add up
  # gradients while the chip computes. On v4 and v5e this changes nothing.
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}


def tell_libtpu() -> None:
  """Adds LIBTPU_FLAGS to LIBTPU_INIT_ARGS, which libtpu reads when it starts.

  Flags that are there already stay as they are.
  """
  given = os.environ.get("LIBTPU_INIT_ARGS", "")
  new = [f"--{k}={v}" for k, v in LIBTPU_FLAGS.items() if k not in given]
  os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *new]).strip()


def log_libtpu() -> None:
  """Says on TPUs what LIBTPU_INIT_ARGS is; starts JAX."""
  if jax.default_backend() == "tpu":
    log.info("LIBTPU_INIT_ARGS=%s", os.environ.get("LIBTPU_INIT_ARGS", ""))


def keep_compiled(workdir: files.Path) -> None:
  """Keeps compiled programs, so that the next start is faster, and says where.

  Those of a run in a bucket are in its workdir: a machine that was preempted is
  gone with its own disk. Those of other runs are in the cache folder.
  JAX_COMPILATION_CACHE_DIR names another place; empty, none is kept.

  Args:
    workdir: of the run; it need not exist.
  """
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if folder is None:
    home = workdir if files.in_bucket(workdir) else files.cache_dir()
    folder = str(home / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  if files.in_bucket(files.path(folder)):
    # XLA itself writes what it measured on GPUs, and knows no buckets.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  log.info("compiled programs are kept in %s", folder or "no folder")


def keep_memory() -> bool:
  """Lets glibc keep memory that is freed; returns whether it does.

  XLA allocates the arrays of a step on a CPU anew each time. glibc gives memory
  of that size back to the system at once, which then has to clear it page by
  page. MALLOC_ARENA_MAX and GLIBC_TUNABLES have the last word, if they are set.
  """
  mallopt = None
  told = {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & set(os.environ)
  if sys.platform == "linux" and not told:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  settings = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),
    # More than an arena's piece of 64 MiB: no empty piece is given back.
    (_M_TOP_PAD, 128 * 2**20),
    # Each keeps memory of its own; with one, compiling threads wait in line.
    (_M_ARENA_MAX, 4),
  )
  return sum(mallopt(*setting) for setting in settings) == len(settings)
