"""Few-shot classification: a linear probe on the features of the image tower.

The protocol is that of the SigLIP papers: ridge regression in closed form on
whitened features, with one strength of regularisation for all datasets.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Float, Int
import numpy as np

from sigjax import errors
from sigjax.data.source import Source
from sigjax.evaluators import Row, briefs
from sigjax.evaluators.embedder import Embedder

BIAS = 100.0  # the constant feature; large, so that l2 hardly shrinks the bias


class FewShot:
  """Accuracy of a linear probe that has seen a few examples of each class.

  The classes are the values of `label` in the training examples. Test examples
  of other classes, or without one, are left out. Where both datasets name their
  classes, those of one name are the same, whatever their numbers.

  Args:
    data: the training examples.
    data_test: the test examples.
    pp_image: preprocessing string that keeps "image". The published protocol
      resizes to 8/7 of the model's side, then crops the centre.
    bad_fraction: the largest fraction of examples that may be unusable.
    label: the feature that holds the class.
    shots: numbers of training examples of a class.
    seeds: each draws other training examples; results are means over them.
    l2: the strength of regularisation.
    first: how many training examples to draw from, the first of the source;
      None: all. ImageNet's published numbers have 65,000.
    batch_size: B of the embedding.
  """

  source: Source

  def __init__(
    self,
    *,
    data: Source,
    data_test: Source,
    pp_image: str,
    bad_fraction: float,
    label: str = "label",
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = 1024.0,
    first: int | None = None,
    batch_size: int = 256,
  ):
    self._train, self.source = data, data_test
    self._train.check_evaluable()
    self.source.check_evaluable()
    self._train.check_tower(self.source.tower, "data_test")
    if first is not None:
      members = self._train.members
      if members is None:
        members = np.arange(len(self._train))[:, None]
      self._train = self._train.replaced(members=members[:first])
    self._pp_image, self._batch_size = pp_image, batch_size
    self._bad_fraction, self._l2 = bad_fraction, l2
    self._shots, self._seeds = shots, seeds

    labels = self._labels(self._train, label)
    present = {x for x in labels if x is not None}
    if len({isinstance(x, str) for x in present}) != 1:
      raise errors.UserError(
        f'feature "{label}" of {self._train.name} holds '
        f"{'texts and numbers' if present else 'no class'}; label= names the "
        "feature with the class"
      )
    self._classes: list[Any] = sorted(present)
    self._names = self._train.label_names.get(label)
    number = {x: i for i, x in enumerate(self._classes)}
    self._y = np.array([number.get(x, -1) for x in labels])
    # A number of the test set means the class that has its name in training.
    names = self.source.label_names.get(label)
    if self._names and names and names != self._names:
      place = {name: i for i, name in enumerate(self._names)}
      of_test = {i: place.get(name) for i, name in enumerate(names)}
      number = {i: number.get(n, -1) for i, n in of_test.items()}
    self._y_test = np.array(
      [number.get(x, -1) for x in self._labels(self.source, label)]
    )
    self._check(self._y)

  def _labels(self, source: Source, label: str) -> list[Any]:
    """Returns the label of each example, None if it has none."""

    def keep(example: dict[str, Any]) -> str | float | None:
      found = briefs.value(example, label, "label of the evaluation")
      # Splits without labels have -1.
      return None if isinstance(found, int) and found < 0 else found

    return briefs.read(source, keep, self._bad_fraction)

  def _check(self, y: Int[np.ndarray, " n"]) -> None:
    """Raises UserError if a class has too few training examples."""
    counts = np.bincount(y[y >= 0], minlength=len(self._classes))
    least, most = int(np.argmin(counts)), max(self._shots)
    if counts[least] < most:
      name = self._classes[least]
      if self._names and isinstance(name, int) and name < len(self._names):
        name = self._names[name]
      raise errors.UserError(
        f'class "{name}" of {self._train.name} has {counts[least]} training '
        f"examples, fewer than shots={most}; ask for fewer shots"
      )

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns an accuracy for each number of shots; see Evaluator.run."""
    del mesh  # small enough for the host
    args = self._pp_image, self._batch_size, self._bad_fraction
    train = embedder.images(self._train, *args)
    test = embedder.images(self.source, *args)
    y = np.where(train.usable, self._y, -1)
    self._check(y)
    used = test.usable & (self._y_test >= 0)
    if not used.any():
      raise errors.UserError(
        f"{self.source.name} has no example of the classes of "
        f"{self._train.name}; check data_test= and label="
      )
    x_test, y_test = test.features[used], self._y_test[used]
    count = len(self._classes)
    right = {shots: [] for shots in self._shots}
    for seed in self._seeds:
      rng = np.random.default_rng(seed)
      order = [rng.permutation(np.flatnonzero(y == c)) for c in range(count)]
      for shots, found in right.items():
        chosen = np.concatenate([numbers[:shots] for numbers in order])
        scores = probe(
          train.features[chosen], y[chosen], x_test, count, self._l2
        )
        found.append(np.mean(np.argmax(scores, axis=1) == y_test))
    return [
      Row(
        f"{shots}-shot top-1",
        float(np.mean(found)),
        1 / count,
        len(y_test),
        int(np.sum(~used)),
      )
      for shots, found in right.items()
    ]


def probe(
  x: Float[np.ndarray, "n W"],
  y: Int[np.ndarray, " n"],
  x_test: Float[np.ndarray, "m W"],
  classes: int,
  l2: float,
) -> Float[np.ndarray, "m C"]:
  """Returns the scores that ridge regression on x and y gives to x_test.

  Args:
    x: features of the training examples.
    y: their classes, 0 to C - 1.
    x_test: features of the test examples.
    classes: C.
    l2: the strength of regularisation; the bias has it as well.

  Returns:
    A score for each class, float64; the targets were 1 and -1.
  """
  x, x_test = x.astype(np.float64), x_test.astype(np.float64)
  mean, std = x.mean(0), x.std(0) + 1e-5

  def whitened(f):
    return np.pad((f - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)

  x = whitened(x)
  targets = 2.0 * (y[:, None] == np.arange(classes)) - 1
  n, d = x.shape
  if n >= d:
    w = np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ targets)
  else:  # the same solution, from a smaller matrix
    w = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), targets)
  return whitened(x_test) @ w
