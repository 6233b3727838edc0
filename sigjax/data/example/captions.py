"""The captions of an example."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

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


def stored(example: Mapping[str, Any], key: str) -> list[Any]:
  """Returns the texts of one example as they are stored; some may be missing.

  Args:
    example: Features.
    key: A feature that holds a text, several texts, or {"text": texts, ...}.

  Raises:
    UserError: There is no such feature.
  """
  value = errors.pick(example, key, "feature")
  if isinstance(value, dict):
    value = errors.pick(value, "text", f'feature of "{key}"')
  return list(value) if is_several(value) else [value]


def is_several(value: Any) -> TypeGuard[Sequence[Any]]:
  """Returns whether a feature holds a list of values."""
  return isinstance(value, (list, tuple)) or (
    isinstance(value, np.ndarray) and value.ndim > 0
  )


def _present(example: Mapping[str, Any], key: str) -> Iterator[tuple[int, str]]:
  """Yields (place, text) of the texts that are neither missing nor blank."""
  found = False
  for i, v in enumerate(stored(example, key)):
    if v is not None and not isinstance(v, (str, bytes)):
      raise errors.UserError(
        f'feature "{key}" holds {type(v).__name__} where a text or several are '
        "wanted; name a feature that holds the captions"
      )
    if v is not None and v.strip():
      found = True
      yield i, caption(v)
  if not found:
    raise BadExample(f'no text at "{key}"', kind="missing caption")


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
  return [text for _, text in _present(example, key)]


def one_each(values: Any, count: int, by: str, key: str) -> list[Any]:
  """Returns `count` values, one for each text of an example.

  Args:
    values: At feature `by`: as many values, or one for all texts.
    count: The number of texts at feature `key`.
    by, key: For the error.

  Raises:
    BadExample: There are not as many values as texts.
  """
  values = list(values) if is_several(values) else [values] * count
  if len(values) != count:
    raise BadExample(
      f'{len(values)} values at "{by}" for {count} texts at "{key}"',
      kind="values unlike captions",
    )
  return values


def captions_by(
  example: Mapping[str, Any], key: str, by: str
) -> dict[str, list[str]]:
  """Returns {value of `by`: the texts that have it}, such as by language.

  Args:
    example: Features.
    key: As in captions().
    by: A feature with a value for each text, or one value for all; a missing
      value is "".

  Raises:
    UserError: As captions(), or there is no feature `by`.
    BadExample: As captions(), or there are not as many values as texts.
  """
  values = errors.pick(example, by, "feature")
  texts = list(_present(example, key))
  values = one_each(values, len(stored(example, key)), by, key)
  found: dict[str, list[str]] = {}
  for i, text in texts:
    value = values[i]
    if isinstance(value, bytes):
      value = value.decode(errors="replace")
    found.setdefault("" if value is None else str(value), []).append(text)
  return found


def of_languages(value: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
  """Returns texts and the language of each, of {"en": text or texts, ...}."""
  texts, languages = [], []
  for language, several in value.items():
    several = list(several) if is_several(several) else [several]
    texts += several
    languages += [language] * len(several)
  return texts, languages
