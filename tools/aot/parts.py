"""Where the cycles of a step go: its ops by tower and by kind of layer.

An op belongs where the scopes of its name say: flax names modules in them, and
`sigjax/models/` its layers. A fusion belongs to the matrix product in it.
"""

from collections.abc import Iterable
import re

from tools.aot import hlo

REST = "LayerNorm and elementwise"
COPIES = "copies"

# The first whose pattern the name of an op has.
ROWS = {
  "MLP": r"Mlp",
  "projections": r"[Aa]ttention[^/]*/(query|key|value|qkv|out)\b",
  "attention": r"[Aa]ttention",
  "embedding": r"/embedding|/Embed_|pos_embedding|/img/(conv|patch)",
  REST: r"/(img|txt)\b|encoder|LayerNorm",
  "loss": r"shard_map|jvp",
  "optimizer and norms": r"^jit\(",
  "without a name": r"",
}
COLUMNS = {"image": r"\bimg\b", "text": r"\btxt\b", "neither": r""}

# What moves numbers and computes none.
MOVES = {
  "bitcast",
  "broadcast",
  "concatenate",
  "constant",
  "copy",
  "copy-done",
  "copy-start",
  "dynamic-slice",
  "dynamic-update-slice",
  "get-tuple-element",
  "iota",
  "pad",
  "parameter",
  "reshape",
  "slice",
  "transpose",
  "tuple",
}


def place(program: hlo.Program, op: hlo.Op) -> tuple[str, str]:
  """Returns the row and the column of an op."""
  made = program.products(op) or [op]
  name = next(filter(None, map(hlo.op_name, made)), hlo.op_name(op))
  column = _first(COLUMNS, name)
  if all(part.op in MOVES for part in program.inner(op)):
    return COPIES, column
  return _first(ROWS, name), column


def _first(table: dict[str, str], name: str) -> str:
  return next(key for key, text in table.items() if re.search(text, name))


def by_place(
  programs: Iterable[tuple[hlo.Program, int]],
) -> dict[str, dict[str, int]]:
  """Returns {row: {column: cycles}}, collectives left out.

  Args:
    programs: (program, how often it runs) of each.
  """
  found = {row: dict.fromkeys(COLUMNS, 0) for row in (*ROWS, COPIES)}
  for program, times in programs:
    for op, cycles in program.costs():
      row, column = place(program, op)
      found[row][column] += cycles * times
  return found
