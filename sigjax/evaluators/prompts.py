"""Class names and prompt templates of zero-shot classification."""

from jaxtyping import Int
import numpy as np

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.data.source import Source
from sigjax.evaluators import ranking

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


def from_labels(
  source: Source, label: str
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Takes integer labels; the dataset knows the names of the classes."""
  names = errors.pick(
    source.label_names, label, f"{source.name}: the class label"
  )
  ids = np.array([source[i][label] for i in range(len(source))], np.int32)
  return ids, [[name.replace("_", " ")] for name in names]


def from_captions(
  source: Source, label: str, captions: str = "captions"
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Makes each value of a feature a class, named by its examples' captions."""
  texts = {}
  labels = []
  for i in range(len(source)):
    example = source[i]
    labels.append(example[label])
    for text in captions_lib.captions(example, captions):
      texts.setdefault(example[label], {})[text] = None
  ids, values = ranking.number(labels)
  return ids, [list(texts[value]) for value in values]


CLASSES = dict(labels=from_labels, captions=from_captions)


def classes(
  source: Source, label: str, kind: str, templates: str
) -> tuple[Int[np.ndarray, " N"], list[list[str]]]:
  """Returns the class of each example, and the prompts of each class.

  Args:
    source: N examples.
    label: the feature that holds the class.
    kind: one of CLASSES.
    templates: one of TEMPLATES.

  Returns:
    (N,) int32 class numbers, and a list of prompts for each class.
  """
  ids, names = errors.pick(CLASSES, kind, "classes")(source, label)
  forms = errors.pick(TEMPLATES, templates, "templates")
  return ids, [
    [form.format(name) for name in group for form in forms] for group in names
  ]
