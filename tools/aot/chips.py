"""The kinds of chips that tools.aot_compile knows."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
  """A kind of chip. Its peak FLOP/s are in metrics.PEAK_FLOPS.

  Attributes:
    link: bytes/s over one link in one direction, from data sheets, without
      headers.
    hbm: bytes/s between a chip and its memory, from data sheets.
    clock: Hz, computed from the peak FLOP/s and the number of multipliers.
    cores: that share what a device computes.
    env: the value of TPU_ACCELERATOR_TYPE, without which libtpu does not start.
    options: arguments of get_topology_desc.
  """

  link: float
  hbm: float
  clock: float
  cores: int
  env: str
  options: dict[str, Any]


# On v4 and v5p the two cores of a chip are one device.
MEGACORE = dict(
  chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1
)
CHIPS = {
  "v4": Chip(45e9, 1228e9, 1.05e9, 2, "v4-8", MEGACORE),
  "v5e": Chip(45e9, 819e9, 1.5e9, 1, "v5litepod-8", {}),
  "v5p": Chip(90e9, 2765e9, 1.75e9, 2, "v5p-8", MEGACORE),
  "v6e": Chip(90e9, 1640e9, 1.75e9, 1, "v6e-8", {}),
}
