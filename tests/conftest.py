"""Eight fake CPU devices and JAX's strict flags, before JAX is first used."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8")

import jax  # pylint: disable=wrong-import-position

# A silent broadcast or a silent float64/float32 mix is how losses go wrong.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
