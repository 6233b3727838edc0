"""Reads a program that XLA compiled for TPU: loops, collectives, the schedule.

`compiled.as_text()` lists the ops of every computation in the order in which
the chip runs them. XLA's own cost analysis counts the body of a loop once; here
it counts as often as it runs.

The compiler has no estimate of cycles for Pallas kernels, sorting and
scattering: `kernels.py` reads their schedules.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import re
from typing import NamedTuple

from tools.aot import routes

BITS = dict(
  pred=8,
  s4=4,
  u4=4,
  s8=8,
  u8=8,
  s16=16,
  u16=16,
  bf16=16,
  f16=16,
  s32=32,
  u32=32,
  f32=32,
  s64=64,
  u64=64,
  f64=64,
)
KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Op(NamedTuple):
  """One line of a computation.

  Attributes:
    name: its name.
    type: such as "f32[8,128]{1,0:T(8,128)}", or several in brackets.
    op: such as "fusion".
    rest: operands and attributes.
    root: whether it is the result of the computation.
  """

  name: str
  type: str
  op: str
  rest: str
  root: bool


class Collective(NamedTuple):
  """A collective of the program.

  Attributes:
    kind: one of KINDS.
    array: what is sent, such as "bf16[8192,768]", or "24 arrays".
    sent: bytes that a device sends each time.
    times: how often it runs in one call of the program.
    hidden: cycles of computation between its start and its end; None if the
      chip waits for it.
    over_link: bytes of `sent` that go over the busiest link in one direction:
      fewer than all only for reductions, see routes.py.
  """

  kind: str
  array: str
  sent: int
  times: int
  hidden: int | None
  over_link: int


def arrays(type_text: str) -> Iterator[tuple[str, int]]:
  """Yields ("f32[8,128]", bytes) for each array of a type, without padding."""
  for dtype, dims in _ARRAY.findall(type_text):
    if dtype in BITS:
      size = math.prod(int(n) for n in dims.split(",") if n)
      yield f"{dtype}[{dims}]", size * BITS[dtype] // 8


class Program:
  """A compiled program.

  Args:
    text: the HLO of a program compiled for TPU, as compiled.as_text() has it.
    scheduled: returns the cycles of an op that the text has no estimate for.
    torus: how many chips there are along x, y and z, if that is known.

  Attributes:
    computations: {name: list of Op in the order of the schedule}.
    times: {name: how often that computation runs in one call}, for those that
      are scheduled: the entry, loop bodies, branches.
    uncounted: the number of loops of unknown length, which count once.
  """

  computations: dict[str, list[Op]]
  times: dict[str, int]
  uncounted: int

  def __init__(
    self,
    text: str,
    scheduled: Callable[[Op], int] = lambda op: 0,
    torus: Sequence[int] = (),
  ):
    self._scheduled, self._torus = scheduled, torus
    self.computations, self._entry, ops = {}, "", None
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        ops = self.computations[head[2]] = []
        self._entry = head[2] if head[1] else self._entry
      elif line == "}":
        ops = None
      elif ops is not None and (found := _LINE.match(line)):
        root, name, type_text, op, rest = found.groups()
        ops.append(Op(name, type_text, op, rest, bool(root)))
      elif ops:  # attributes of a kernel may have line breaks
        ops[-1] = ops[-1]._replace(rest=ops[-1].rest + line)
    found = re.search(r"num_partitions=(\d+)", text)
    self._devices = int(found[1]) if found else 1
    self.times, self.uncounted = {}, 0
    self._around: dict[str, tuple[str, ...]] = {}  # the computations that call
    self._visit(self._entry, 1, ())

  def _visit(self, name: str, times: int, around: tuple[str, ...]) -> None:
    """Counts how often a computation, and those it calls, run."""
    self.times[name] = self.times.get(name, 0) + times
    self._around[name], around = around, (*around, name)
    for op in self.computations[name]:
      if op.op == "while":
        trips = self._trips(op)
        self.uncounted += trips is None
        self._visit(_attribute(op, "body"), times * (trips or 1), around)
      elif op.op == "conditional":
        for branch in _branches(op):
          self._visit(branch, times, around)

  def _trips(self, loop: Op) -> int | None:
    """Returns how often a loop runs that counts from 0, as lax.scan's do.

    None if that is not known.
    """
    known = re.search(r"known_trip_count[^\d]*(\d+)", loop.rest)
    if known:
      return int(known[1])
    condition = self.computations[_attribute(loop, "condition")]
    limits = {
      op.name: int(op.rest.split(")")[0])
      for op in condition
      if op.op == "constant" and op.type.startswith(("s32[]", "u32[]"))
    }
    for op in condition:
      if op.root and "direction=LT" in op.rest:
        for operand in _operands(op):
          if operand in limits:
            return limits[operand]
    return None

  def cycles(self, name: str | None = None) -> int:
    """Returns the estimate of cycles of a computation, run once.

    Collectives are left out. The default is the whole program.
    """
    return sum(map(self._cycles, self.computations[name or self._entry]))

  def _cycles(self, op: Op) -> int:
    return sum(cycles for _, cycles in self._costs(op, 1))

  def costs(self) -> Iterator[tuple[Op, int]]:
    """Yields (op, its cycles in one call of the program), collectives left out.

    Of a conditional, the branch that takes longest counts.
    """
    for op in self.computations[self._entry]:
      yield from self._costs(op, 1)

  def _costs(self, op: Op, times: int) -> Iterator[tuple[Op, int]]:
    inner = ()
    if op.op == "while":
      times *= self._trips(op) or 1
      inner = self.computations[_attribute(op, "body")]
    elif op.op == "conditional":
      inner = self.computations[max(_branches(op), key=self.cycles)]
    elif not self._kind(op) or self.products(op):
      found = _ESTIMATE.search(op.rest)
      yield op, times * (int(found[1]) if found else self._scheduled(op))
    for part in inner:
      yield from self._costs(part, times)

  def without_estimate(self) -> set[str]:
    """Returns the names of ops that the compiler has no estimate for.

    Those that take no time are among them.
    """
    return {
      op.name
      for name in self.times
      for op in self.computations[name]
      if not _ESTIMATE.search(op.rest) and not self._kind(op)
    }

  def inner(self, op: Op) -> list[Op]:
    """Returns the ops of a fusion, fusions within it included; else the op."""
    if op.op != "fusion":
      return [op]
    ops = self.computations[_attribute(op, "calls")]
    return [part for x in ops for part in self.inner(x)]

  def products(self, op: Op) -> list[Op]:
    """Returns the matrix products and convolutions in a fusion, or the op."""
    return [x for x in self.inner(op) if x.op in ("dot", "convolution")]

  def kernels(self) -> Iterator[tuple[Op, int]]:
    """Yields (op, how often it runs) for each Pallas kernel."""
    for name, times in self.times.items():
      for op in self.computations[name]:
        if is_kernel(op):
          yield op, times

  def collectives(self) -> list[Collective]:
    """Returns all collectives.

    The TPU compiler cuts a collective into steps, the fusions between its start
    and its end, which compute something else as well. They have one channel.
    Some of them may be in a loop that lies between, one in each turn.
    """
    found, steps = [], set()
    for name in self.times:  # a loop comes after what it is in
      for i, op in enumerate(self.computations[name]):
        kind = None if op.op.endswith("-done") else self._kind(op)
        if kind is None:
          continue
        channel = _channel(kind[1]) if op.op == "fusion" else None
        places = [(place, channel) for place in (name, *self._around[name])]
        if channel is None or steps.isdisjoint(places):
          found.append(self._collective(name, i, *kind))
        steps.add((name, channel))
    return found

  def _kind(self, op: Op) -> tuple[str, Op] | None:
    """Returns (kind, the op that says what is sent) if op is a collective."""
    kind = op.op.removesuffix("-start").removesuffix("-done")
    if kind in KINDS:
      return kind, op
    if op.op not in ("fusion", "async-start"):
      return None
    inner = _attribute(op, "calls")
    for part in self.computations.get(inner, ()):
      if op.op == "async-start" and (called := _called(part)):
        part = self.computations[called][-1]  # what a SparseCore does
      if part.op in KINDS:
        # On TPU a reduce-scatter is an all-reduce fused with a slice.
        scatter = part.op == "all-reduce" and "scatter" in inner + op.name
        return "reduce-scatter" if scatter else part.op, part
    return None

  def _last_step(self, ops: list[Op], i: int, inner: Op) -> int:
    """Returns the last op of ops with the collective that the i-th has."""
    if ops[i].op != "fusion" or (channel := _channel(inner)) is None:
      return i
    return max(
      j
      for j in range(i, len(ops))
      if ops[j].op == "fusion"
      and (kind := self._kind(ops[j]))
      and _channel(kind[1]) == channel
    )

  def _collective(self, name: str, i: int, kind: str, inner: Op) -> Collective:
    """Returns the collective that op i of a computation starts."""
    ops = self.computations[name]
    found = list(arrays(inner.type))
    if kind == "collective-permute":
      found = found[:1]  # the others are where the data arrives
    n = self._group_size(inner)
    size = sum(nbytes for _, nbytes in found)
    if inner.op == "all-gather-start":
      size = size * n // (n + 1)  # the type lists the input as well
    if kind == "reduce-scatter" and inner.op == kind:
      size *= n  # the type is that of the result
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(
      kind, (n - 1) / n
    )
    begin, done = _span(ops, i)
    if done is None and (last := self._last_step(ops, i, inner)) > i:
      done = last
    hidden = None if done is None else sum(map(self._cycles, ops[begin:done]))
    if done is None and self.products(ops[i]):
      hidden = self._cycles(ops[i])
    array = found[0][0] if len(found) == 1 else f"{len(found)} arrays"
    share = None
    if n == self._devices and kind in ("all-reduce", "reduce-scatter"):
      attributes = inner.rest + ops[i].rest
      share = routes.share_of_a_link(attributes, n, self._torus)
    over_link = factor
    if share is not None:
      over_link = share * (2 if kind == "all-reduce" else 1)
    return Collective(
      kind,
      array,
      round(size * factor),
      self.times[name],
      hidden,
      round(size * over_link),
    )

  def _group_size(self, op: Op) -> int:
    """Returns the number of devices of a collective, in any of 3 notations."""
    groups = op.rest.partition("replica_groups=")[2]
    if found := re.match(r"\{\{([\d,]+)\}", groups):
      return found[1].count(",") + 1
    if found := re.match(r"\[\d+,(\d+)\]", groups):
      return int(found[1])
    if found := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
      return math.prod(int(sizes[a]) for a in re.findall(r"\w+", found[2]))
    return self._devices

  def largest(self, n: int) -> list[tuple[str, int, str]]:
    """Returns the n largest arrays it makes: (array, bytes, made by)."""
    sizes = {}
    for name in self.times:
      for op in self.computations[name]:
        if op.op in (
          "parameter",
          "get-tuple-element",
          "tuple",
          "while",
          "bitcast",
        ) or op.op.endswith(("-start", "-done")):
          continue
        for array, size in arrays(op.type):
          sizes.setdefault(array, (size, op_name(op)))
    rows = [(array, *rest) for array, rest in sizes.items()]
    return sorted(rows, key=lambda row: -row[1])[:n]


def is_kernel(op: Op) -> bool:
  """Whether an op is a Pallas kernel."""
  return 'custom_call_target="tpu_custom_call"' in op.rest


def op_name(op: Op) -> str:
  """Returns where the program made an op: scopes and primitive, "" if unknown.

  Such as "jit(step)/jvp(TwoTowers)/img/encoderblock/MlpBlock_0/dot_general".
  """
  found = re.search(r'op_name="([^"]*)"', op.rest)
  return found[1] if found else ""


def _span(ops: Sequence[Op], i: int) -> tuple[int, int | None]:
  """Returns two places in ops: where op i's collective sends, and its end.

  It sends from its start on. In newer versions of libtpu that comes before the
  array is there, and it sends from an "async-update" on, which has the array.
  The second place is None if the collective has no end: the chip waits for it.
  """
  begin, name = i, ops[i].name
  for j in range(i + 1, len(ops)):
    ends = ops[j].op.endswith("-done")
    if (ends or ops[j].op == "async-update") and name in _operands(ops[j]):
      if ends:
        return begin, j
      begin, name = j, ops[j].name
  return i, None


def _called(op: Op) -> str:
  """Returns the computation that a "call" calls, by either of two notations."""
  if op.op == "call":
    return _attribute(op, "to_apply")
  found = re.search(r"called_computations=\{%([\w.-]+)\}", op.rest)
  return found[1] if found else ""


def _channel(op: Op) -> str | None:
  found = re.search(r"channel_id=(\d+)", op.rest)
  return found[1] if found else None


def _attribute(op: Op, name: str) -> str:
  """Returns the value of an attribute, "" if the op has none."""
  found = re.search(rf"\b{name}=%?([\w.-]+)", op.rest)
  return found[1] if found else ""


def _branches(op: Op) -> list[str]:
  """Returns the names of the computations of a conditional."""
  found = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
  names = (
    found[1].split(",")
    if found
    else [_attribute(op, f"{value}_computation") for value in ("true", "false")]
  )
  return [name.strip().lstrip("%") for name in names]


def _operands(op: Op) -> list[str]:
  """Returns the names of an op's operands."""
  return re.findall(r"%([\w.-]+)", op.rest.partition("), ")[0])
