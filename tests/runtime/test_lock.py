"""The lock on a workdir; see test_hosts.py for two runs."""

import pytest

from sigjax import errors
from sigjax.runtime import lock


def test_a_workdir_that_cannot_be_written(read_only_dir):
  with (
    pytest.raises(
      errors.UserError, match="lock cannot be written .Permission denied."
    ),
    lock.hold(read_only_dir),
  ):
    pass


def test_it_is_free_again_after_the_body(tmp_path):
  for _ in range(2):
    with lock.hold(tmp_path):
      assert "process" in (tmp_path / "lock").read_text()
