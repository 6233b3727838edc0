"""Leaf names of a parameter tree, and tables of (regex, value) over them.

A name is the path of a leaf joined by "/", as in the released checkpoints:
"img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel".
"""

import re

import jax

from sigjax import errors


def _key(entry):
  for attr in ("key", "name", "idx"):
    if hasattr(entry, attr):
      return str(getattr(entry, attr))
  return str(entry)


def flatten(tree):
  """Returns {name: leaf} in the order of the tree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def unflatten(flat):
  """Returns nested dicts from {name: leaf}: flatten, backwards."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def map_named(fn, tree, *rest):
  """Maps fn(name, leaf, *leaves of rest) over a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn("/".join(map(_key, path)), *leaves), tree, *rest
  )


def split_off(tree, parts, what):
  """Divides nested dicts into (rest, taken), either with some leaves missing.

  Args:
    tree: nested dicts.
    parts: names of leaves, or of all leaves below them, such as "img" or
      "txt/Embed_0".
    what: for the error, such as "config.lock".

  Raises:
    UserError: a part that is not in the tree.
  """
  flat = flatten(tree)
  within = lambda name, part: f"{name}/".startswith(f"{part}/")
  for part in parts:
    if not any(within(name, part) for name in flat):
      names = {
        "/".join(name.split("/")[:i])
        for name in flat
        for i in range(1, part.count("/") + 2)
      }
      raise errors.UserError(
        f'{what} names "{part}", which is no part of the parameters'
        + errors.closest(part, names)
      )
  taken = {name for name in flat if any(within(name, p) for p in parts)}
  return tuple(
    unflatten({k: v for k, v in flat.items() if (k in taken) == it})
    for it in (False, True)
  )


def join(a, b):
  """Returns the tree of which split_off made a and b."""
  return unflatten({**flatten(a), **flatten(b)})


def first_match(table, tree, what):
  """Gives every leaf the value of the first row whose regex matches its name.

  Args:
    table: rows (regex, value); a regex has to match the whole name.
    tree: any tree of leaves; only their names are used.
    what: the table's name in error messages, such as "config.optim.wd_mults".

  Returns:
    A tree of the same structure, with a value at each leaf.

  Raises:
    UserError: a name is matched by no row, or a row matches no name.
  """
  rows = [(re.compile(pattern), value) for pattern, value in table]
  used = set()
  missed = []

  def find(name, _):
    for i, (pattern, value) in enumerate(rows):
      if pattern.fullmatch(name):
        used.add(i)
        return value
    missed.append(name)
    return None

  found = map_named(find, tree)
  if missed:
    raise errors.UserError(
      f"{what} has no row for {len(missed)} parameters, such as "
      f'{", ".join(missed[:3])}; end it with a row (".*", value)'
    )
  names = list(flatten(tree))
  for i, (pattern, _) in enumerate(rows):
    # A row hidden behind earlier ones is harmless; one that matches nothing is
    # nearly always a misspelt name.
    if i not in used and not any(map(pattern.fullmatch, names)):
      near = errors.closest(pattern.pattern, names)
      raise errors.UserError(
        f'{what}: the row "{pattern.pattern}" matches no parameter{near}'
      )
  return found


def difference(want, got):
  """Describes how the tree `got` differs from `want` in names and shapes.

  Returns a list of lines, empty if they agree: missing names (with the closest
  left-over one), left-over names, and shapes that differ.
  """
  want, got = flatten(want), flatten(got)
  left = [name for name in got if name not in want]
  lines = []
  for name, leaf in want.items():
    if name not in got:
      lines.append(f"missing {name} {leaf.shape}{errors.closest(name, left)}")
    elif tuple(leaf.shape) != tuple(got[name].shape):
      lines.append(f"shape of {name} is {got[name].shape}, not {leaf.shape}")
  return lines + [f"left over {name} {got[name].shape}" for name in left]
