"""Runs the example of docs/loss.md; as a program, prints it."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np

PAGE = pathlib.Path(__file__).parent.parent / "docs/loss.md"

# Runs after the example, in its namespace: the reference in NumPy, float64.
CHECK = """
import sys
heavy = {"grain", "orbax", "tensorflow_datasets", "flax"} & set(sys.modules)
assert not heavy, f"importing sigjax imports {heavy}"
print(float(loss(params, image, text)), float(value))
np.savez(sys.argv[1], image=image, text=text, **params)
"""


def example() -> str:
  """Returns the Python code of the page."""
  (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
  return code


def test_the_example_trains_and_imports_little(tmp_path):
  saved = tmp_path / "end.npz"
  env = os.environ | {"PYTHONPATH": str(PAGE.parent.parent)}
  out = subprocess.run(
    [sys.executable, "-c", example() + CHECK, saved],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=env,
    check=False,
  )
  assert out.returncode == 0, out.stderr
  said, numbers = out.stdout.splitlines()
  assert "on 8 device(s)" in said
  after, before = map(float, numbers.split())

  end = {k: v.astype(np.float64) for k, v in np.load(saved).items()}
  zimg, ztxt = (end[a] @ end[b] for a, b in (("image", "img"), ("text", "txt")))
  zimg /= np.linalg.norm(zimg, axis=1, keepdims=True)
  ztxt /= np.linalg.norm(ztxt, axis=1, keepdims=True)
  logits = np.exp(end["log_t"]) * zimg @ ztxt.T + end["b"]
  labels = 2 * np.eye(len(logits)) - 1
  right = np.logaddexp(0, -labels * logits).sum() / len(logits)
  assert abs(after - right) < 1e-5 * right
  assert after < before < 8  # the untrained loss is about 10


if __name__ == "__main__":
  print(example())
