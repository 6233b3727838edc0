"""Embeds for one round of evaluations: each split and each text once."""

from collections.abc import Sequence
import json
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float
import numpy as np

from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed


class Images(NamedTuple):
  """The embedded images of a source, float32.

  Attributes:
    z: unit rows.
    features: the image tower's output before its head, not normalised.
    usable: which examples could be used; the other rows mean nothing.
  """

  z: Float[np.ndarray, "N E"]
  features: Float[np.ndarray, "N W"]
  usable: Bool[np.ndarray, " N"]


class _Texts:
  """Texts as the records of a Source."""

  def __init__(self, texts: Sequence[str]):
    self._texts = texts

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, i: int) -> dict[str, str]:
    return dict(text=self._texts[i])


class Embedder:
  """Embeds what evaluations ask for, and keeps it.

  Evaluations often share a split, or ask for the same texts. An embedder is
  made for each round, so its memory is free when the round is over.

  Args:
    embed: the model.
    tokenizer: of the run, for the tokenize op.
  """

  def __init__(self, embed: Embed, tokenizer: Tokenizer | None):
    self._embed, self._tokenizer = embed, tokenizer
    self._images: dict[str, Images] = {}
    self._texts: dict[str, dict[str, Float[np.ndarray, " E"]]] = {}

  def images(
    self, source: Source, pp: str, batch_size: int, bad_fraction: float
  ) -> Images:
    """Embeds every image of a source, in order.

    Args:
      source: N examples. Of two sources with equal names and identities only
        one is embedded.
      pp: preprocessing string that keeps "image".
      batch_size: B.
      bad_fraction: the largest fraction of examples that may be unusable.

    Returns:
      Images; every process gets all of them.

    Raises:
      UserError: too many examples cannot be used.
    """
    # Parts of a TFDS split that are in one file differ in their names alone.
    key = json.dumps([source.name, source.identity(), pp, bad_fraction])
    if key not in self._images:
      (z, _, features), usable = self._run(source, pp, batch_size, bad_fraction)
      self._images[key] = Images(z, features, usable)
    return self._images[key]

  def texts(
    self, texts: Sequence[str], pp: str, batch_size: int, bad_fraction: float
  ) -> Float[np.ndarray, "M E"]:
    """Embeds texts; equal ones once.

    Args:
      texts: M texts, at least one.
      pp: preprocessing string that keeps "text".
      batch_size: B.
      bad_fraction: the largest fraction of texts that may be unusable.

    Returns:
      Unit rows, float32; every process gets all of them.
    """
    known = self._texts.setdefault(pp, {})
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
      source = Source("texts", _Texts(new))
      (_, z, _), _ = self._run(source, pp, batch_size, bad_fraction)
      known.update(zip(new, z))
    return np.stack([known[text] for text in texts])

  def _run(self, source, pp, batch_size, bad_fraction):
    """Returns what embed returns, for all examples, and which can be used."""
    fn = preprocess.parse(pp, tokenizer=self._tokenizer)
    found = []
    for batch in pipeline.eval_batches(
      source,
      fn,
      batch_size=batch_size,
      bad_fraction=bad_fraction,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    ):
      mask = batch.pop("_mask")
      part = self._embed(**batch), mask
      found.append(
        jax.tree.map(
          np.asarray, multihost_utils.process_allgather(part, tiled=True)
        )
      )
    n = len(source)  # the last batch may go on past it
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *found)
