"""What a program sets before JAX compiles: kept programs, kept memory.

Both only save time. The environment has the last word.
"""

import ctypes
import os
import sys

import jax

from sigjax.runtime import files

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def fast() -> None:
  """Makes the next start faster, and allocations of large arrays on a CPU.

  Compiled programs are kept in the cache folder, unless
  JAX_COMPILATION_CACHE_DIR names another one; an empty one keeps none.

  XLA allocates the arrays of a step on a CPU anew each time. glibc gives memory
  of that size back to the system at once, which then has to clear it page by
  page. With glibc it is kept instead, unless MALLOC_ARENA_MAX or
  GLIBC_TUNABLES say how to allocate.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = files.cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  if not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & set(os.environ):
    keep_memory()


def keep_memory() -> bool:
  """Lets glibc keep what is freed; returns whether it is glibc that does."""
  mallopt = None
  if sys.platform == "linux":
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 2))
  return sum(mallopt(*setting) for setting in settings) == len(settings)
