"""Class names and prompt templates of zero-shot classification."""

import numpy as np

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.evaluators import ranking

# "{}" is the class's name. "photo" are ways in which people caption photos.
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


def from_labels(source, label):
  """Integer labels, their names from the dataset's own description."""
  names = errors.pick(
    source.label_names, label, f"{source.name}: the class label"
  )
  ids = np.array([source[i][label] for i in range(len(source))], np.int32)
  return ids, [[name.replace("_", " ")] for name in names]


def from_captions(source, label, captions="captions"):
  """The distinct values of a feature; each class's prompts are its captions."""
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


def classes(source, label, kind, templates):
  """Returns the class of each example, and each class's prompts.

  Args:
    source: a data source of N examples.
    label: the feature that holds the class.
    kind: one of CLASSES.
    templates: one of TEMPLATES.

  Returns:
    (N,) int32 class numbers, and a list (one item a class) of lists of texts.
  """
  ids, names = errors.pick(CLASSES, kind, "classes")(source, label)
  templates = errors.pick(TEMPLATES, templates, "templates")
  return ids, [
    [t.format(name) for name in group for t in templates] for group in names
  ]
