"""Pipe strings: op|op(arg, key=arg)|..., read with `ast`, never evaluated."""

import ast
from collections.abc import Callable, Iterator, Mapping
import inspect
from typing import Any, TypeVar

from sigjax import errors

Built = TypeVar("Built")


def build(
  string: str,
  ops: Mapping[str, Callable[..., Built]],
  context: Mapping[str, Any],
) -> list[Built]:
  """Calls the ops of a pipe string.

  Args:
    string: calls joined by "|", whose arguments are literals.
    ops: {name: function}. Arguments are checked against the function's
      signature and annotations. Keyword-only parameters are filled from the
      context.
    context: {name: value}.

  Returns:
    What each op returned, in order.

  Raises:
    UserError: the string is not a pipe string, an op is unknown, or its
      arguments are wrong.
  """
  return [_build(ops, *call, context) for call in calls(string)]


def calls(string: str) -> list[tuple[str, list[Any], dict[Any, Any]]]:
  """Returns (name, args, kwargs) of each op of a pipe string.

  Raises:
    UserError: the string is not a pipe string.
  """
  if not isinstance(string, str):
    raise errors.UserError(
      f'preprocessing is a text of the form op|op(1, "a")|..., not {string!r}'
    )
  try:
    tree = ast.parse(string.strip(), mode="eval")
    return list(_calls(tree.body, string))
  except errors.UserError:
    raise
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
    # ValueError: NUL characters, or a number of thousands of digits.
    raise errors.UserError(
      f'"{_line(string)}" is not of the form op|op(1, "a")|...: '
      + _line(str(getattr(e, "msg", e)))
    ) from e


def _calls(
  node: ast.expr, string: str
) -> Iterator[tuple[str, list[Any], dict[Any, Any]]]:
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
    except (ValueError, TypeError) as e:  # TypeError: {[]: 1}
      raise errors.UserError(
        f'arguments in "{_line(ast.unparse(node))}" have to be plain values '
        "(numbers, quoted strings, tuples)"
      ) from e
  else:
    raise errors.UserError(
      f'"{_line(ast.unparse(node))}" in "{_line(string)}" is not an op'
    )


def _line(text: str) -> str:
  """Returns a text as one line of at most 200 characters."""
  text = " ".join(text.split())
  return text if len(text) <= 200 else f"{text[:197]}..."


def _build(
  ops: Mapping[str, Callable[..., Built]],
  name: str,
  args: list[Any],
  kwargs: dict[Any, Any],
  context: Mapping[str, Any],
) -> Built:
  """Calls one op after checking its arguments against its signature."""
  op = errors.pick(ops, name, "preprocessing op")
  signature = inspect.signature(op)
  params = signature.parameters.values()
  needs = [p.name for p in params if p.kind == p.KEYWORD_ONLY]
  shown = [str(p) for p in params if p.kind != p.KEYWORD_ONLY]
  title = f"preprocessing op {name}({', '.join(shown)})"
  for need in needs:
    if context.get(need) is None:
      raise errors.UserError(f'preprocessing op "{name}" needs a {need}')
  try:
    bound = signature.bind(
      *args, **kwargs, **{need: context[need] for need in needs}
    )
  except TypeError as e:
    raise errors.UserError(f"{title}: {e}") from e
  for key, value in bound.arguments.items():
    param = signature.parameters[key]
    values = value if param.kind == param.VAR_POSITIONAL else [value]
    types = (int, float) if param.annotation is float else param.annotation
    if key not in needs:
      wrong = [
        v for v in values if not isinstance(v, types) or isinstance(v, bool)
      ]
      if wrong:
        raise errors.UserError(f"{title}: {key} cannot be {wrong[0]!r}")
  return op(*bound.args, **bound.kwargs)
