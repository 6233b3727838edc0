"""What the tests of the tools for Hugging Face share."""

import pytest


@pytest.fixture(scope="session", name="hf")
def transformers_fixture():
  """Returns (torch, transformers); CI installs both."""
  why = "pip install -e '.[hf]', and a CPU build of torch (see .ci/run)"
  torch = pytest.importorskip("torch", reason=why)
  return torch, pytest.importorskip("transformers", reason=why)
