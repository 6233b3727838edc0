"""Class names and prompt templates of zero-shot classification."""

from typing import Any

from jaxtyping import Int
import numpy as np

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.data.source import Source
from sigjax.evaluators import briefs

# "{}" stands for the class's name. The templates of "photo" are common wordings
# of photo captions.
TEMPLATES = dict(
  plain=("{}",),
  photo=(
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of the {}",
    "a close-up photo of a {}",
    "one {}",
    "many {}",
  ),
)

_WHAT = "label of the evaluation"


def from_labels(
  source: Source, label: str, bad_fraction: float
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Takes integer labels; the dataset knows the names of the classes."""
  if not source.label_names:
    raise errors.UserError(
      f"{source.name} has no class labels with names; set "
      'classes="captions" to name classes by their captions'
    )
  names = errors.pick(
    source.label_names, label, f"{source.name}: the class label"
  )

  def keep(example: dict[str, Any]) -> int:
    number = briefs.value(example, label, _WHAT)
    if isinstance(number, int) and 0 <= number < len(names):
      return number
    return -1  # as in splits without labels

  found = briefs.read(source, keep, bad_fraction)
  ids = np.array([-1 if number is None else number for number in found])
  return ids.astype(np.int32), [[name.replace("_", " ")] for name in names]


def from_captions(
  source: Source, label: str, bad_fraction: float
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Makes each value of a feature a class, named by its examples' captions."""

  def keep(example: dict[str, Any]) -> tuple[Any, list[str]]:
    texts = captions_lib.captions(example, "captions")
    return briefs.value(example, label, _WHAT), texts

  found = briefs.read(source, keep, bad_fraction)
  ids, number, texts = np.full(len(found), -1, np.int32), {}, []
  for i, pair in enumerate(found):
    if pair is not None and pair[0] is not None:
      ids[i] = number.setdefault(pair[0], len(number))
      if ids[i] == len(texts):
        texts.append({})
      texts[ids[i]].update(dict.fromkeys(pair[1]))
  return ids, [list(distinct) for distinct in texts]


CLASSES = dict(labels=from_labels, captions=from_captions)


def classes(
  source: Source,
  label: str,
  kind: str,
  templates: str,
  bad_fraction: float,
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Returns the class of each example, and the prompts of each class.

  Args:
    source: N examples.
    label: the feature that holds the class.
    kind: one of CLASSES.
    templates: one of TEMPLATES.
    bad_fraction: the largest fraction of examples that may be unusable.

  Returns:
    (N,) int32 class numbers, -1 for an example that cannot be used or has no
    class; and a list of prompts for each class.
  """
  fn = errors.pick(CLASSES, kind, "classes")
  forms = errors.pick(TEMPLATES, templates, "templates")
  ids, names = fn(source, label, bad_fraction)
  return ids, [
    [form.format(name) for name in group for form in forms] for group in names
  ]
