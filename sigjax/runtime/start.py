"""What a program sets when it starts: kept programs, kept memory."""

import ctypes
import os
import sys

import jax

from sigjax.runtime import files

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_compiled() -> None:
  """Keeps compiled programs in the cache folder: the next start is faster.

  JAX_COMPILATION_CACHE_DIR names another folder; empty, it keeps none.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = files.cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
