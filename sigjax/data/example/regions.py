"""What a captioning decoder is to write of an image and its regions (LocCa).

  Cap: a dog on a sofa                       the image's caption
  ARef: the red cushion : 120 40 410 260     where something is
  GCap: 120 40 410 260 : the red cushion     what is there

Boxes are top, left, bottom and right in thousandths of the image's height and
width (arXiv 2403.19596, which leaves the form open).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data.example import captions
from sigjax.data.faults import BadExample


def target(
  example: Mapping[str, Any],
  text: str,
  key: str,
  names: tuple[str, str],
  p: float,
  rng: np.random.Generator,
) -> str:
  """Returns the text to write.

  Args:
    example: has the regions at `key`, {box: (n, 4), phrase: n texts}; n may be
      0.
    text: the caption of the whole image.
    key: of the regions.
    names: of their boxes (top, left, bottom, right, in 0 to 1) and phrases.
    p: the probability of one of the other two tasks, if there is a region.
    rng: of the choice.

  Raises:
    UserError: there are no such features, or their lengths differ.
    BadExample: a box that is none.
  """
  found = errors.pick(example, key, "feature")
  boxes, phrases = (
    errors.pick(found, name, f'feature of "{key}"') for name in names
  )
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  if len(boxes) != len(phrases):
    raise errors.UserError(
      f'"{key}" has {len(boxes)} of {names[0]}, but {len(phrases)} of '
      f"{names[1]}"
    )
  if not len(boxes) or rng.random() >= p:
    return f"Cap: {text}"
  i, locate = rng.integers(len(boxes)), rng.random() < 0.5
  phrase = phrases[i]
  if not isinstance(phrase, (str, bytes)):
    raise errors.UserError(
      f'"{names[1]}" of "{key}" holds {type(phrase).__name__}, but has to hold '
      "texts; name another feature with texts="
    )
  phrase, box = captions.caption(phrase), boxes[i]
  top, left, bottom, right = box
  if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
    raise BadExample(
      f"the box {box.tolist()} is not within 0 to 1", kind="damaged box"
    )
  place = " ".join(str(round(999 * x)) for x in box)
  if locate:
    return f"ARef: {phrase} : {place}"
  return f"GCap: {place} : {phrase}"
