"""The order of the devices; test_losses.py has what they compute."""

import itertools
import types

import jax
import numpy as np
import pytest

from sigjax import losses, ring


def chips(*box, first=(2, 0, 4), cores=1):
  """Returns the devices of a box of TPUs, in any order."""
  found = [
    types.SimpleNamespace(
      coords=tuple(x + y for x, y in zip(place, first)), core_on_chip=core
    )
    for place in itertools.product(*map(range, box))
    for core in range(cores)
  ]
  np.random.default_rng(0).shuffle(found)
  return found


def hops(devices):
  """Returns the links from each device to the next in the ring."""
  order = ring.order(devices)
  assert sorted(order) == list(range(len(devices)))
  where = [np.array(devices[i].coords) for i in order]
  return [np.abs(x - y).sum() for x, y in zip(where, where[1:] + where[:1])]


@pytest.mark.parametrize(
  "box",
  [(2, 2, 1), (2, 4, 1), (4, 4, 2), (8, 8, 4), (16, 16, 1), (3, 5, 4)],
)
def test_neighbours_in_the_ring_are_neighbours_on_the_torus(box):
  assert set(hops(chips(*box))) == {1}


def test_two_cores_of_a_chip_are_neighbours():
  steps = hops(chips(2, 2, 1, cores=2))
  assert sorted(steps) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_line_has_one_way_back():
  assert sorted(hops(chips(4, 1, 1))) == [1, 1, 1, 3]


@pytest.mark.parametrize(
  "devices",
  [
    jax.devices(),
    chips(2, 2, 1) + chips(2, 2, 1),  # two slices
    chips(2, 4, 1)[1:],
  ],
  ids=["cpu", "slices", "hole"],
)
def test_other_devices_stay_in_their_order(devices):
  assert ring.order(devices) == tuple(range(len(devices)))


def test_devices_of_a_ring_of_some_axes():
  mesh = jax.make_mesh((2, 2, 2), ("data", "model", "fsdp"))
  found = losses.devices_on(mesh, ("fsdp", "data"))
  assert found == [
    mesh.devices[i] for i in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1))
  ]
