"""What single patches know: are they drawing or empty ground?

A linear probe on the patches of the image tower, before pooling. It is trained
on some images and evaluated on others. For drawings on a white ground, whose
pixels say which is which.
"""

import jax
import numpy as np

from sigjax import errors
from sigjax.data.source import Source
from sigjax.evaluators import Row
from sigjax.evaluators.embedder import Embedder
from sigjax.evaluators.fewshot import probe


class Foreground:
  """Balanced accuracy of a probe that tells drawing from ground.

  A patch is drawing if at least half of its pixels are not white. Balanced: the
  mean of the accuracies on both kinds, so that chance is a half.

  Args:
    data: the training images.
    data_test: the test images.
    pp_image: preprocessing string that keeps "image".
    bad_fraction: the largest fraction of examples that may be unusable.
    l2: the strength of the probe's regularisation.
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
    l2: float = 1024.0,
    batch_size: int = 256,
  ):
    self._train, self.source = data, data_test
    self._train.check_evaluable()
    self.source.check_evaluable()
    self._args = pp_image, batch_size, bad_fraction
    self._l2 = l2

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns one accuracy, of n patches; see Evaluator.run."""
    del mesh  # small enough for the host
    x, y, _ = self._patches(embedder, self._train)
    x_test, y_test, left_out = self._patches(embedder, self.source)
    scores = probe(x, y, x_test, 2, self._l2)
    right = np.argmax(scores, axis=1) == y_test
    value = np.mean([right[y_test == kind].mean() for kind in (0, 1)])
    row = Row("foreground", float(value), 0.5, len(y_test), left_out)
    return [row]

  def _patches(self, embedder: Embedder, source: Source):
    """Returns features (N, W), kinds (N,) and how many images are left out."""
    (x, ink), usable = embedder.each("patches", source, *self._args)
    x, ink = x[usable], ink[usable]
    kind = (ink >= 0.5).astype(int).ravel()
    if len(np.unique(kind)) < 2:
      raise errors.UserError(
        f"the patches of {source.name} are all drawing, or all white ground: "
        "the evaluation of type foreground is for drawings on white"
      )
    return x.reshape(-1, x.shape[-1]), kind, int(np.sum(~usable))
