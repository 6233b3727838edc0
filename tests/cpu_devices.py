"""Simulated CPU devices, and little compiling; import it before JAX.

JAX reads these variables when it starts. The programs that tests start inherit
them, and so do the workers of pytest-xdist.
"""

from importlib import metadata, util
import os
import tempfile


def xla_flags(devices: int) -> str:
  """Returns XLA_FLAGS for some number of devices.

  Compiling takes most of the time of the tests. Without optimisation it takes
  two thirds of it, and half of that with kernels that are not emitted by way of
  MLIR, which newer versions always do. One part of a program at a time takes
  four fifths of the CPU time of 32. Without LLVM's expensive passes tests of
  steps take an eighth less.
  """
  flags = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
  ]
  # XLA ends the process at a flag that it does not know, and so does libtpu.
  old = metadata.version("jaxlib").startswith("0.10.")
  if old and not util.find_spec("libtpu"):
    flags.append("--xla_cpu_use_fusion_emitters=false")
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    flags.append("--xla_llvm_disable_expensive_passes=true")
  return " ".join(flags)


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # Many tests compile the same steps. The folder is removed at the end.
  compiled = tempfile.TemporaryDirectory(prefix="sigjax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
