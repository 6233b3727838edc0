import pytest

from sigjax import sharding


@pytest.fixture(scope="session")
def mesh():
  return sharding.make_mesh()
