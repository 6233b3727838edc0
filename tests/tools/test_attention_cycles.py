"""Cycles of attention kernels, where the TPU compiler is."""

import pytest

from sigjax import errors
from tools import attention_cycles


def test_a_kernel_that_is_not_there():
  with pytest.raises(errors.UserError, match='--kernels "flesh"'):
    attention_cycles.measure("flesh", "v5e:1x1")


@pytest.mark.parametrize("name", ["ours", "splash"])
def test_cycles_are_of_an_image(name, tpu):
  tpu("v5e:1x1")
  size = dict(length=128, heads=2, head=64)
  found = {
    batch: attention_cycles.measure(name, "v5e:1x1", batch=batch, **size)
    for batch in (32, 64)
  }
  for one, two in zip(found[32], found[64], strict=True):
    assert one[0] == two[0]
    assert one[1] == pytest.approx(two[1], rel=0.05)
  # q, k, v, the result and its gradients are at least once on their way.
  rows = 128 * 2 * 64 * 2 / 819e9 * 1.5e9
  assert found[64][0][2] > 4 * rows and found[64][1][2] > 7 * rows
