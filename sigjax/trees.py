"""Names of the leaves of a parameter tree, and tables of (regex, value).

A name is the path of a leaf joined by "/", as in the released checkpoints:
"img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel".
"""

from collections.abc import Callable, Sequence
import functools
import re
from typing import Any

import jax

from sigjax import errors

_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {name: leaf} in the order of the tree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict:
  """Returns nested dicts from {name: leaf}: the inverse of flatten."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Maps fn(name, leaf, *leaves of rest) over a tree."""
  named = lambda path, *leaves: fn(_name(path), *leaves)
  return jax.tree_util.tree_map_with_path(named, tree, *rest)


def split(tree: dict, taken: Callable[[str], bool]) -> tuple[dict, dict]:
  """Divides nested dicts into (rest, leaves whose name is taken)."""
  parts = {}, {}
  for name, leaf in flatten(tree).items():
    parts[bool(taken(name))][name] = leaf
  return unflatten(parts[0]), unflatten(parts[1])


def split_off(tree: dict, parts: Sequence[str], what: str) -> tuple[dict, dict]:
  """Divides nested dicts into (rest, leaves that are part of `parts`).

  Args:
    tree: nested dicts.
    parts: names of leaves, or of all leaves below them, such as "img" or
      "txt/Embed_0".
    what: the setting's name in the error, such as "config.lock".

  Raises:
    UserError: a part that is not in the tree.
  """
  prefixes = set()
  for name in flatten(tree):
    names = name.split("/")
    prefixes |= {"/".join(names[: i + 1]) for i in range(len(names))}
  for part in parts:
    if part not in prefixes:
      raise errors.UserError(
        f'{what} names "{part}", which is no part of the parameters'
        + errors.closest(part, prefixes)
      )
  return split(
    tree, lambda name: any(f"{name}/".startswith(f"{p}/") for p in parts)
  )


def join(a: dict, b: dict) -> dict:
  """Returns the tree that was divided into a and b."""
  return unflatten({**flatten(a), **flatten(b)})


def first_match(table: Sequence[Sequence], tree: Any, what: str) -> Any:
  """Gives each leaf the value of the first row that matches its name.

  Args:
    table: rows (regex, value); a regex has to match the whole name.
    tree: any tree; only the names of its leaves are used.
    what: the table's name in errors, such as "config.optim.wd_mults".

  Returns:
    A tree of the same structure with a value at each leaf.

  Raises:
    UserError: a name that no row matches, or a row that matches no name.
  """
  rows = [(re.compile(pattern), value) for pattern, value in table]
  names = list(flatten(tree))
  for pattern, _ in rows:
    # A row hidden by earlier ones is harmless. One that matches nothing is
    # nearly always a misspelt name.
    if not any(map(pattern.fullmatch, names)):
      near = errors.closest(pattern.pattern, names)
      raise errors.UserError(
        f'{what}: the row "{pattern.pattern}" matches no parameter{near}'
      )
  missed = [x for x in names if not any(row.fullmatch(x) for row, _ in rows)]
  if missed:
    raise errors.UserError(
      f"{what} has no row for {len(missed)} parameters, such as "
      f'{", ".join(missed[:3])}; end it with a row (".*", value)'
    )
  value = lambda name, _: next(v for row, v in rows if row.fullmatch(name))
  return map_named(value, tree)


def difference(want: Any, got: Any) -> list[str]:
  """Returns lines that say how the tree `got` differs in names and shapes.

  The first ten missing names come with the closest left-over one.
  """
  want, got = flatten(want), flatten(got)
  left = [name for name in got if name not in want]
  lines = []
  for name, leaf in want.items():
    if name not in got:
      near = errors.closest(name, left) if len(lines) < 10 else ""
      lines.append(f"missing {name} {leaf.shape}{near}")
    elif tuple(leaf.shape) != tuple(got[name].shape):
      lines.append(f"shape of {name} is {got[name].shape}, not {leaf.shape}")
  return lines + [f"left over {name} {got[name].shape}" for name in left]
