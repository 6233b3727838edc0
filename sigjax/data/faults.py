"""What may be wrong with one example, or with one file of many.

Data at scale is never whole: the pipeline may skip what is reported here, and
count it by its kind.
"""

import logging

from sigjax import errors

log = logging.getLogger("sigjax")

MAX_CAPTION = 64 * 1024  # bytes; a longer one is a web page, not a caption


class BadExample(errors.UserError):
  """This example cannot be used, though others may be fine.

  Attributes:
    kind: what is wrong, in words of which there are few, to count by.
  """

  def __init__(self, message, kind="bad example"):
    super().__init__(message)
    self.kind = kind


def caption(value):
  """Returns a caption, bytes or str, as a str.

  Raises:
    BadExample: it is not UTF-8 (as a str, it cannot be written as such), or
      longer than MAX_CAPTION.
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


def merge(total, found):
  """Adds {kind: (count, an example's name)} to such a dict."""
  for kind, (count, name) in found.items():
    before, first = total.get(kind, (0, name))
    total[kind] = before + count, first


def counts(found):
  """Returns {kind: count} of {kind: (count, an example's name)}."""
  return {kind: count for kind, (count, _) in found.items()}


def report(where, found):
  """Logs {kind: (count, an example's name)}, a line for each kind."""
  for kind, (count, name) in found.items():
    log.warning("%s: %d x %s, such as %s", where, count, kind, name)
