"""Exported towers, read back by a process without sigjax."""

import json
import shutil
import subprocess
import sys

import hf_case  # beside this file
import numpy as np
import pytest

from sigjax import errors
from sigjax.models import two_towers
from tools import export, opened

READ = """
import sys
import numpy as np
from jax import export
assert "sigjax" not in sys.modules
given = np.load("given.npz")
for key in "image", "text":
  with open(f"out/{key}.stablehlo", "rb") as f:
    fn = export.deserialize(bytearray(f.read()))
  assert fn.platforms == ("cpu", "cuda", "tpu")
  for n in 1, 3:
    np.save(f"{key}{n}.npy", fn.call(given[key][:n]))
"""


def test_both_towers_in_another_process(tmp_path):
  shutil.copy(hf_case.GOLDEN / "siglip_tiny.npz", tmp_path / "params.npz")
  hf_case.write_config(
    tmp_path, pp_image="decode|resize(32)|value_range(-1,1)|keep('image')"
  )
  about = export.export(tmp_path, tmp_path / "out")
  assert json.loads((tmp_path / "out/export.json").read_text()) == json.loads(
    json.dumps(about)
  )
  assert about["inputs"]["image"] == [["B", 32, 32, 3], "float32"]
  assert about["inputs"]["text"] == [["B", 12], "int32"]
  model = opened.open_model(tmp_path)
  rng = np.random.default_rng(0)
  given = dict(
    image=rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32),
    text=rng.integers(0, 97, (3, 12)).astype(np.int32),
  )
  np.savez(tmp_path / "given.npz", **given)
  done = subprocess.run(
    [sys.executable, "-c", READ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  towers = two_towers.of_config(model.config["model"])
  zimg, ztxt, out = towers.apply({"params": model.params}, **given)
  for key, want in ("image", zimg), ("text", ztxt):
    for n in 1, 3:
      got = np.load(tmp_path / f"{key}{n}.npy")
      np.testing.assert_allclose(got, want[:n], atol=1e-5)
  assert about["t"] == pytest.approx(float(out["t"][0]))
  assert about["b"] == pytest.approx(float(out["b"][0]))
  assert (tmp_path / "out/tokenizer.model").read_bytes() == (
    tmp_path / "tokenizer.model"
  ).read_bytes()
  with pytest.raises(errors.UserError, match="exists"):
    export.export(tmp_path, tmp_path / "out")
