"""A folder without the right to write."""

import os
import pathlib
import tempfile

import pytest


@pytest.fixture
def read_only_dir():
  """A folder that this process may not write, even if root runs the tests."""
  folder = pathlib.Path(tempfile.mkdtemp())
  folder.chmod(0o555)
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  yield folder
  os.seteuid(user)
  folder.rmdir()
