"""Zero-shot classification: the class whose prompts fit the image best."""

from collections.abc import Sequence

import jax
import numpy as np

from sigjax import errors
from sigjax.data.source import Source
from sigjax.evaluators import Row, prompts, ranking
from sigjax.evaluators.embedder import Embedder


class ZeroShot:
  """N-way accuracy; a class is the mean embedding of its prompts.

  An image may have several classes, as in ReaL (arXiv 2006.07159): each of them
  is right.

  Args:
    data: N examples.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a prompt given as "text".
    bad_fraction: the largest fraction of examples that may be unusable; they
      are left out, as are those without a class.
    label: the feature that holds the class or classes.
    classes: one of prompts.CLASSES: where the names of the classes come from.
    templates: one of prompts.TEMPLATES.
    canonical: see prompts.classes; the published protocols have True.
    batch_size: B of the embedding.
    ks: the k of top-k accuracy.
  """

  source: Source

  def __init__(
    self,
    *,
    data: Source,
    pp_image: str,
    pp_text: str,
    bad_fraction: float,
    label: str = "label",
    classes: str = "labels",
    templates: str = "plain",
    canonical: bool = False,
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
  ):
    self.source = data
    self.source.check_evaluable()
    self._right, prompts_of = prompts.classes(
      self.source, label, classes, templates, canonical, bad_fraction
    )
    self._num_classes = len(prompts_of)
    self._texts = [text for texts in prompts_of for text in texts]
    self._text_classes = np.repeat(
      np.arange(len(prompts_of)), [len(texts) for texts in prompts_of]
    )
    self._pp_image, self._pp_text = pp_image, pp_text
    self._batch_size, self._bad_fraction = batch_size, bad_fraction
    self._ks = ks

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the accuracies; see Evaluator.run."""
    args = self._batch_size, self._bad_fraction
    images = embedder.images(self.source, self._pp_image, *args)
    counts = np.array([len(numbers) for numbers in self._right])
    used = images.usable & (counts > 0)
    if not used.any():
      raise errors.UserError(
        f"{self.source.name} has no example that can be evaluated; check that "
        "label= names a feature with classes"
      )
    ztxt = embedder.texts(self._texts, self._pp_text, *args)
    heads = np.zeros((self._num_classes, ztxt.shape[1]), np.float32)
    np.add.at(heads, self._text_classes, ztxt)
    heads /= np.linalg.norm(heads, axis=1, keepdims=True) + 1e-8
    right = [self._right[i] for i in np.flatnonzero(used)]
    rank = ranking.ranks(images.z[used], heads, right, mesh)
    return [
      Row(
        f"{self._num_classes}-way top-{k}",
        float(np.mean(rank < k)),
        ranking.chance(k, counts[used], self._num_classes),
        len(rank),
        int(np.sum(~used)),
      )
      for k in self._ks
      if k <= self._num_classes
    ]
