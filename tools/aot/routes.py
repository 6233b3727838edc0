"""How the TPU compiler sends a reduction over the links of a torus.

It writes its strategy beside the op: the array in parts ("colors"), each
reduced along one axis of the torus after the other ("phases"), all parts at the
same time and in another order of the axes. What the words mean is our reading
of them.
"""

from collections import defaultdict
from collections.abc import Sequence
import re

# Such as "UniDirectionNDRingStrategy{colors:4 phases:2 cores:{2 2},{2 2},
# {2 2},{2 2} nophase0:0 ... dim_used:{0 1},{1 0},{0 1},{1 0}}".
_STRATEGY = re.compile(
  r'"strategy":"(?P<name>\w+)".*?cores:(?P<sizes>(?:\{[\d ]+\},?)+)'
  r"(?:[^\"]*? dim_used:(?P<axes>(?:\{[\d ]+\},?)+))?"
)

# Of SparseCores, such as {"ring_type":"...","ring_dim":"ICI_RING_DIM_X_MESH"}.
_RING = re.compile(r"ICI_RING_DIM_([XYZ])")


def share_of_a_link(
  attributes: str, devices: int, torus: Sequence[int] = ()
) -> float | None:
  """Returns the share of an array that a reduce-scatter sends over one link.

  That of the busiest link in one direction, summed over the phases. An
  all-reduce sends twice as much: it gathers the same way.

  A strategy whose name begins with "UniDirection" has rings, and each part one
  direction of them. With another one a part takes both directions of a line,
  where the first link carries as much as a ring in one direction would. Two
  devices are joined by one link. SparseCores reduce by rings in the same way.

  Args:
    attributes: of the op, as the program's text has them.
    devices: how many devices reduce.
    torus: how many there are along x, y and z. The strategy of SparseCores
      names the axis of a ring, but not its length.

  Returns:
    The share; None where no strategy is named, or one of fewer devices than
    all, whose parts may have links in common.
  """
  parts = attributes.split('"phase_rings"')[1:]
  if parts and torus:
    axes = [["XYZ".index(x) for x in _RING.findall(part)] for part in parts]
    sizes = [[torus[axis] for axis in part] for part in axes]
    rings = True
  elif found := _STRATEGY.search(attributes):
    sizes = _lists(found["sizes"])
    axes = _lists(found["axes"]) if found["axes"] else [[0]] * len(sizes)
    rings = found["name"].startswith("UniDirection")
  else:
    return None
  left = [1 / len(sizes)] * len(sizes)
  total = 0.0
  for phase in zip(zip(*sizes), zip(*axes)):  # of each part
    sent: dict[tuple[int, int], float] = defaultdict(float)
    for i, (n, axis) in enumerate(zip(*phase, strict=True)):
      sent[axis, n] += left[i] * (n - 1) / n
      left[i] /= n
    total += max(
      size / (2 if rings and n > 2 else 1) for (_, n), size in sent.items()
    )
  whole = round(1 / (len(sizes) * left[0])) == devices
  return total if whole else None


def _lists(text: str) -> list[list[int]]:
  """Returns [[4, 2], [2, 4]] for "{4 2},{2 4}"."""
  return [
    [int(n) for n in part.split()] for part in re.findall(r"{(.*?)}", text)
  ]
