"""Class names and prompt templates of zero-shot classification."""

import json
import pathlib
import string
from typing import Any

from jaxtyping import Int
import numpy as np

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.data.source import Source
from sigjax.evaluators import briefs

# CLIP's templates and names of ImageNet's classes; it names source and licence.
_CLIP = json.loads(pathlib.Path(__file__).with_name("clip.json").read_text())

# "{}" stands for the class's name. The templates of "photo" are common wordings
# of photo captions. "clip_7" are those of CLIP's 80 that its authors found to
# be almost as good; the published zero-shot numbers of SigLIP use them.
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
  clip_7=(
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
  ),
  clip_80=tuple(_CLIP["templates"]),
)

_WHAT = "label of the evaluation"
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# The numbers of the classes of each example, none for an example that cannot be
# used; and the names of each class.
_Found = tuple[list[Int[np.ndarray, " r"]], list[list[str]]]


def canonical(text: str, keep: str | None = None) -> str:
  """Returns a text as the published evaluations write names and templates.

  In lower case, without punctuation, with a single space between words; an
  underscore counts as a space.

  Args:
    text: any text.
    keep: punctuation that stays where it occurs as a whole, such as "{}".
  """
  parts = text.replace("_", " ").split(keep)
  parts = [part.translate(_PUNCTUATION) for part in parts]
  return " ".join((keep or " ").join(parts).lower().split())


def _of_numbers(
  source: Source, label: str, names: list[str], bad_fraction: float
) -> _Found:
  """Takes classes that are numbers of names; an example may have several."""

  def keep(example: dict[str, Any]) -> list[int]:
    numbers = briefs.values(example, label, _WHAT)
    # Splits without labels have -1.
    return [n for n in numbers if isinstance(n, int) and 0 <= n < len(names)]

  found = briefs.read(source, keep, bad_fraction)
  return [np.array(x or [], np.int32) for x in found], [[x] for x in names]


def from_labels(source: Source, label: str, bad_fraction: float) -> _Found:
  """Takes integer labels; the dataset knows the names of the classes."""
  if not source.label_names:
    raise errors.UserError(
      f"{source.name} has no class labels with names; a folder of images for "
      'each class has, or set classes="captions" to name them by captions'
    )
  names = errors.pick(
    source.label_names, label, f"{source.name}: the class label"
  )
  names = [name.replace("_", " ") for name in names]
  return _of_numbers(source, label, names, bad_fraction)


def from_imagenet(source: Source, label: str, bad_fraction: float) -> _Found:
  """Takes integer labels of ImageNet's 1,000 classes, with CLIP's names."""
  return _of_numbers(source, label, _CLIP["imagenet"], bad_fraction)


def from_captions(source: Source, label: str, bad_fraction: float) -> _Found:
  """Makes each value of a feature a class, named by its examples' captions."""

  def keep(example: dict[str, Any]) -> tuple[Any, list[str]]:
    texts = captions_lib.captions(example, "captions")
    return briefs.value(example, label, _WHAT), texts

  found = briefs.read(source, keep, bad_fraction)
  ids, number, texts = [], {}, []
  for pair in found:
    ids.append(np.array([], np.int32))
    if pair is not None and pair[0] is not None:
      place = number.setdefault(pair[0], len(number))
      ids[-1] = np.array([place], np.int32)
      if place == len(texts):
        texts.append({})
      texts[place].update(dict.fromkeys(pair[1]))
  return ids, [list(distinct) for distinct in texts]


CLASSES = dict(
  labels=from_labels, imagenet=from_imagenet, captions=from_captions
)


def classes(
  source: Source,
  label: str,
  kind: str,
  templates: str,
  is_canonical: bool,
  bad_fraction: float,
) -> _Found:
  """Returns the classes of each example, and the prompts of each class.

  Args:
    source: N examples.
    label: the feature that holds the class or classes.
    kind: one of CLASSES.
    templates: one of TEMPLATES.
    is_canonical: whether names and templates are made canonical(). Of a name,
      but not of a caption, only what is before the first comma counts then.
    bad_fraction: the largest fraction of examples that may be unusable.

  Returns:
    N arrays of class numbers, empty for an example that cannot be used or has
    no class; and a list of prompts for each class.
  """
  fn = errors.pick(CLASSES, kind, "classes")
  forms = errors.pick(TEMPLATES, templates, "templates")
  ids, names = fn(source, label, bad_fraction)
  if is_canonical:
    forms = [canonical(form, keep="{}") for form in forms]
    if kind != "captions":
      names = [[name.split(",")[0] for name in group] for group in names]
    names = [list(dict.fromkeys(map(canonical, group))) for group in names]
  return ids, [
    [form.format(name) for name in group for form in forms] for group in names
  ]
