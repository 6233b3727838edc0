"""Cycles of Pallas kernels and of other ops that XLA has no estimate for.

The compiler dumps the schedule of every op: its bundles, of which a core issues
one a cycle, and its loops, of which the outermost is the kernel's grid. The
schedule does not know how long data is on its way: a kernel takes the larger
of what its bundles take and what its bytes take.
"""

import base64
from collections.abc import Collection
import math
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from jax.experimental.mosaic.dialects import tpu
from jaxlib.mlir import ir

from sigjax import errors
from tools.aot.chips import Chip

# One folder per process: the compiler reads its flags once, when it is loaded.
_folder: list[tempfile.TemporaryDirectory] = []


def dump_schedules() -> None:
  """Tells the compiler to dump schedules; call it before libtpu is loaded."""
  if not _folder:
    _folder.append(tempfile.TemporaryDirectory())
    flags = (
      f"--xla_jf_dump_to={_folder[0].name} --xla_jf_dump_llo_text=true "
      "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flags}".strip()


def take_schedules(names: Collection[str]) -> dict[str, str]:
  """Returns {name: schedule} of these ops in what was compiled last.

  An op whose results are there without computing has none.
  """
  found = {}
  for file in pathlib.Path(_folder[0].name).iterdir():
    # NUMBER-OP-NUMBER-final_bundles.txt
    parts = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", file.name)
    if parts and parts[1] in names:
      found[parts[1]] = file.read_text()
    file.unlink()
  return found


def code(text: str) -> str:
  """Returns a kernel's encoded program from its op's attributes, or ""."""
  found = re.search(r'"body": ?"([^"]*)"', text)
  return found[1] if found else ""


# A line of a schedule begins a bundle: its address, LB at the head of a loop,
# and a ">" for each loop that it is in.
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) (LB)?[^:{]*: *(>*) *\{", re.M)
_REGION = re.compile(r"Start region (\d+)")
_BACK = re.compile(r"sbr\.rel \(!%(\w+)\) target = \$region(\d+)")
_EXIT = re.compile(
  r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop"
)


def bundles(schedule: str, steps: int | None = None) -> tuple[int, int]:
  """Returns (bundles that run, loops of unknown length) of a schedule.

  Args:
    schedule: the text that the compiler dumps.
    steps: how often the outermost loop runs, if it is a grid.
  """
  limits = {name: int(n) for name, n in _EXIT.findall(schedule)}
  trips = {region: limits.get(name) for name, region in _BACK.findall(schedule)}
  found = list(_BUNDLE.finditer(schedule))
  ends = [bundle.start() for bundle in found[1:]] + [len(schedule)]
  times, total, unknown = [1], 0, 0
  for bundle, end in zip(found, ends):
    depth = len(bundle[2])
    if bundle[1]:
      regions = _REGION.findall(schedule, bundle.start(), end)
      known = next(filter(None, map(trips.get, regions)), None)
      if depth == 1 and steps:  # by its test 2 more, which fill the pipeline
        known = steps
      unknown += known is None
      times[depth:] = [times[depth - 1] * (known or 1)]
    total += times[depth]
  return total, unknown


class Kernel(NamedTuple):
  """A Pallas kernel.

  Attributes:
    name: that of its function.
    steps: of its grid, in all.
    cores: that share the grid where a chip has two: 2 if one of its dimensions
      is parallel.
    moved: bytes between HBM and the chip in all steps. A block that stays
      where it is from one step to the next is moved once.
  """

  name: str
  steps: int
  cores: int
  moved: int


def read(rest: str) -> Kernel:
  """Returns the kernel of a tpu_custom_call.

  Args:
    rest: the op's operands and attributes.

  Raises:
    UserError: its grid is known only when it runs.
  """
  context = ir.Context()
  context.allow_unregistered_dialects = True
  tpu.register_dialect(context)
  module: Any = ir.Module.parse(base64.b64decode(code(rest)), context)
  functions = {
    ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body
  }
  main = next(
    op for op in functions.values() if "dimension_semantics" in op.attributes
  )
  get = main.attributes.get
  name = ir.StringAttr(main.attributes["sym_name"]).value
  grid = list(get("iteration_bounds", []))
  if any(size < 0 for size in grid):
    raise errors.UserError(f"the grid of the kernel {name} is not constant")
  shared = any(
    "parallel" in str(kind) and size > 1
    for kind, size in zip(main.attributes["dimension_semantics"], grid)
  )
  # Its arguments are the place in the grid, scalars, inputs, results, scratch.
  blocks = list(main.regions[0].blocks[0].arguments)
  blocks = blocks[len(grid) + main.attributes["scalar_prefetch"].value :]
  blocks = blocks[: len(blocks) - main.attributes["scratch_operands"].value]
  windows = get("window_params", [{}] * len(blocks))
  moved = sum(
    _moved(window, block, functions, grid)
    for window, block in zip(windows, blocks)
  )
  return Kernel(name, math.prod(grid), 2 if shared else 1, moved)


def _moved(window: Any, block: Any, functions: dict, grid: list[int]) -> int:
  """Returns the bytes of a window's blocks, each time that it moves."""
  if "memory_space<smem>" in str(block.type):
    return 0
  ref = ir.MemRefType(block.type)
  size = math.prod(ref.shape) * _bits(ref.element_type) // 8
  if "transform_indices" not in window:
    return size
  index = ir.FlatSymbolRefAttr(window["transform_indices"]).value
  # It moves when a number of the grid changes that its index depends on; the
  # last number changes first.
  body = functions[index].regions[0].blocks[0]
  needs = _needs(list(body.operations)[-1].operands)
  last = max((i for i in needs if i < len(grid) and grid[i] > 1), default=-1)
  return size * math.prod(grid[: last + 1])


def _bits(element: Any) -> int:
  return int(re.findall(r"\d+", str(element))[0])


def _needs(values: Any) -> set[int]:
  """Returns the arguments of a function that values in it are computed from."""
  found = set()
  for value in values:
    if isinstance(value.owner, ir.Block):
      found.add(ir.BlockArgument(value).arg_number)
    else:
      found |= _needs(value.owner.operands)
  return found


class Cost(NamedTuple):
  """What a kernel takes, in cycles of one call.

  Attributes:
    kernel: the kernel.
    bundles: those that a core issues.
    data: how long its bytes are on their way.
    unknown: its loops of unknown length, which count once.
  """

  kernel: Kernel
  bundles: int
  data: int
  unknown: int

  @property
  def cycles(self) -> int:
    """The larger of both."""
    return max(self.bundles, self.data)


def cost(rest: str, schedule: str, chip: Chip) -> Cost:
  """Returns the cost of a tpu_custom_call on a chip.

  Args:
    rest: the op's operands and attributes.
    schedule: what the compiler dumped for it.
    chip: the chip.

  Raises:
    UserError: its grid is known only when it runs.
  """
  kernel = read(rest)
  steps = -(-kernel.steps // min(kernel.cores, chip.cores))
  grid = steps if kernel.steps > 1 else None
  issued, unknown = bundles(schedule, grid)
  data = round(kernel.moved / chip.hbm * chip.clock)
  return Cost(kernel, issued, data, unknown)
