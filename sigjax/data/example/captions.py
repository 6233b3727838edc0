"""The captions of an example."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data.faults import BadExample

MAX_CAPTION = 64 * 1024  # bytes; a longer text is a web page, not a caption


def caption(value: str | bytes) -> str:
  """Returns a caption as a str.

  Raises:
    BadExample: The caption is not UTF-8 (a str that cannot be encoded as
      UTF-8 is not, either), holds a NUL, or is longer than MAX_CAPTION.
  """
  if len(value) > MAX_CAPTION:
    raise BadExample(
      f"a caption of {len(value)} bytes, of which {MAX_CAPTION} are allowed",
      kind="caption too long",
    )
  try:
    if isinstance(value, str):
      value.encode()  # JSON may hold half a character: "\ud83d"
      text = value
    else:
      text = value.decode()
  except UnicodeError as e:
    raise BadExample(
      f"the caption {value[:20]!r} is not UTF-8", kind="caption not UTF-8"
    ) from e
  if "\0" in text:
    raise BadExample(
      f"the caption {text[:20]!r} holds a NUL", kind="caption with NUL"
    )
  return text


def captions(example: Mapping[str, Any], key: str) -> list[str]:
  """Returns the texts of one example; at least one.

  Texts that are missing (None) or blank are left out.

  Args:
    example: Features.
    key: A feature that holds a text, several texts, or {"text": texts, ...}.

  Raises:
    UserError: There is no such feature, or it holds something else.
    BadExample: No text is left, or one is not UTF-8, holds a NUL or is too
      long.
  """
  value = errors.pick(example, key, "feature")
  if isinstance(value, dict):
    value = errors.pick(value, "text", f'feature of "{key}"')
  values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
  texts = []
  for v in values:
    if v is not None and not isinstance(v, (str, bytes)):
      raise errors.UserError(
        f'feature "{key}" holds {type(v).__name__} where a text or several are '
        "wanted; name a feature that holds the captions"
      )
    if v is not None and v.strip():
      texts.append(caption(v))
  if not texts:
    raise BadExample(f'no text at "{key}"', kind="missing caption")
  return texts
