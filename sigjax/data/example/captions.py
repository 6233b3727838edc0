"""The captions of an example."""

from collections.abc import Mapping
from typing import Any

from sigjax import errors
from sigjax.data.faults import BadExample

MAX_CAPTION = 64 * 1024  # bytes; a longer text is a web page, not a caption


def caption(value: str | bytes) -> str:
  """Returns a caption as a str.

  Raises:
    BadExample: The caption is not UTF-8 (a str that cannot be encoded as
      UTF-8 is not, either), or is longer than MAX_CAPTION.
  """
  if len(value) > MAX_CAPTION:
    raise BadExample(
      f"a caption of {len(value)} bytes, of which {MAX_CAPTION} are allowed",
      kind="caption too long",
    )
  try:
    if isinstance(value, str):
      value.encode()  # JSON may hold half a character: "\ud83d"
      return value
    return value.decode()
  except UnicodeError as e:
    raise BadExample(
      f"the caption {value[:20]!r} is not UTF-8", kind="caption not UTF-8"
    ) from e


def captions(example: Mapping[str, Any], key: str) -> list[str]:
  """Returns the texts of one example.

  Args:
    example: Features.
    key: A feature that holds a text, several texts, or {"text": texts, ...}.

  Raises:
    UserError: There is no such feature.
    BadExample: A text is not UTF-8, or is too long.
  """
  value = errors.pick(example, key, "feature")
  if isinstance(value, dict):
    value = errors.pick(value, "text", f'feature of "{key}"')
  values = [value] if isinstance(value, (str, bytes)) else value
  return [caption(v if isinstance(v, (str, bytes)) else str(v)) for v in values]
