"""Pipe strings: op|op(arg, key=arg)|..., read with `ast`, never evaluated."""

import ast
import inspect

from sigjax import errors


def build(string, ops, context):
  """Returns the list of what the ops of a pipe string return.

  Args:
    string: calls joined by "|"; the arguments are literals.
    ops: {name: function}. Its arguments are checked against its signature and
      annotations; those that are keyword-only come from the context.
    context: {name: value}.

  Raises:
    UserError: no valid pipe string, an unknown op, or wrong arguments.
  """
  try:
    tree = ast.parse(string.strip(), mode="eval")
  except SyntaxError as e:
    raise errors.UserError(
      f'"{string}" is not of the form op|op(1, "a")|...: {e.msg}'
    ) from e
  return [_build(ops, *call, context) for call in _calls(tree.body, string)]


def _calls(node, string):
  """Yields (name, args, kwargs) of each call in a|b(1)|c(d=2)."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    yield from _calls(node.left, string)
    yield from _calls(node.right, string)
  elif isinstance(node, ast.Name):
    yield node.id, [], {}
  elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
    try:
      yield (
        node.func.id,
        [ast.literal_eval(arg) for arg in node.args],
        {kw.arg: ast.literal_eval(kw.value) for kw in node.keywords},
      )
    except ValueError as e:
      raise errors.UserError(
        f'arguments in "{ast.unparse(node)}" have to be plain values '
        "(numbers, quoted strings, tuples)"
      ) from e
  else:
    raise errors.UserError(f'"{ast.unparse(node)}" in "{string}" is not an op')


def _build(ops, name, args, kwargs, context):
  """Makes one op's function, its arguments checked against its signature."""
  factory = errors.pick(ops, name, "preprocessing op")
  signature = inspect.signature(factory)
  params = signature.parameters.values()
  needs = [p.name for p in params if p.kind == p.KEYWORD_ONLY]
  taken = [str(p) for p in params if p.kind != p.KEYWORD_ONLY]
  face = f"{name}({', '.join(taken)})"
  for need in needs:
    if context.get(need) is None:
      raise errors.UserError(f'preprocessing op "{name}" needs a {need}')
  try:
    bound = signature.bind(
      *args, **kwargs, **{need: context[need] for need in needs}
    )
  except TypeError as e:
    raise errors.UserError(f"preprocessing op {face}: {e}") from e
  for key, value in bound.arguments.items():
    param = signature.parameters[key]
    values = value if param.kind == param.VAR_POSITIONAL else [value]
    kinds = {float: (int, float)}.get(param.annotation, param.annotation)
    wrong = [v for v in values if not isinstance(v, kinds)]
    if wrong and key not in needs:
      raise errors.UserError(
        f"preprocessing op {face}: {key} cannot be {wrong[0]!r}"
      )
  return factory(*bound.args, **bound.kwargs)
