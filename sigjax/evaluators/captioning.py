"""How many tokens of captions the decoder predicts."""

import jax
import numpy as np

from sigjax.data.source import Source
from sigjax.evaluators import Row
from sigjax.evaluators.embedder import Embedder


class Captions:
  """Token accuracy under teacher forcing: each token, given those before it.

  Tokens count up to the end of the text, that end included. For a run with a
  loss of type "caption".

  Args:
    data: the examples.
    pp: preprocessing string that keeps "image" and "text".
    bad_fraction: the largest fraction of examples that may be unusable.
    batch_size: B.
  """

  source: Source

  def __init__(
    self,
    *,
    data: Source,
    pp: str,
    bad_fraction: float,
    batch_size: int = 256,
  ):
    self.source = data
    self.source.check_evaluable()
    self._args = pp, batch_size, bad_fraction

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns one accuracy, of n tokens; see Evaluator.run."""
    del mesh
    (right, count, words), usable = embedder.each(
      "captions", self.source, *self._args
    )
    n = int(count[usable].sum())
    # By chance: the vocabulary's most frequent token is not known, so uniform.
    value = float(right[usable].sum() / max(n, 1))
    chance = 1 / int(words[0])
    row = Row("token accuracy", value, chance, n, int(np.sum(~usable)))
    return [row]
