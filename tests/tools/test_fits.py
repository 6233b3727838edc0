"""Large configs fit the chips that their docstrings name.

Where the TPU compiler is installed; a case takes it minutes.
"""

import importlib
import inspect
import json

import pytest

from sigjax import sharding
from tools.aot import compiler


@pytest.mark.parametrize(
  "name, arg, topology",
  [
    ("siglip_b16", None, "v4:2x4x4"),
    ("msiglip_b16", None, "v4:2x4x4"),
    ("siglit_l16", "microbatches=8", "v4:2x2x1"),
    ("siglit_l16", "embeddings=x,microbatches=4", "v4:2x2x1"),
    ("siglip2_b16", "decoder=0,views=0,masks=0", "v5e:16x16"),
  ],
)
def test_fits(name, arg, topology, tpu):
  config = importlib.import_module(f"configs.{name}").get_config(arg)
  sections = json.loads(config.to_json_best_effort())
  devices, _ = tpu(topology)
  mesh = sharding.make_mesh(devices=devices, **sections.get("mesh", {}))
  keys = inspect.signature(compiler.step_job).parameters
  job = compiler.step_job(
    mesh, **{k: v for k, v in sections.items() if k in keys and k != "mesh"}
  )
  [program] = compiler.compile_job(job)  # or it raises DoesNotFit
  # Nor did the compiler have to make it fit by computing arrays again.
  assert ".remat" not in program.text
