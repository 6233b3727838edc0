"""Embeds for one round of evaluations: each split and each text once."""

from collections.abc import Mapping, Sequence
import json
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float
import numpy as np

from sigjax import errors
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed

# Why a model has none of `others`.
WHY_NOT = dict(
  patches="the image tower has no patches of pixels on a square grid",
  captions='config.losses has no loss of type "caption"',
)


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
    others: {name: fn(image=, text=) -> arrays with B rows}, what else the model
      can say of examples, see embed.others.
  """

  def __init__(
    self,
    embed: Embed,
    tokenizer: Tokenizer | None,
    others: Mapping[str, Embed] = MappingProxyType({}),
  ):
    self._embed, self._tokenizer, self._others = embed, tokenizer, others
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

  def each(
    self,
    what: str,
    source: Source,
    pp: str,
    batch_size: int,
    bad_fraction: float,
  ) -> tuple[Any, Bool[np.ndarray, " N"]]:
    """Returns what one of `others` says of all examples, in order.

    Args:
      what: its name.
      source, pp, batch_size, bad_fraction: see images.

    Returns:
      Its arrays, N rows, and which examples could be used.

    Raises:
      UserError: the model has no such part.
    """
    if what not in self._others:
      raise errors.UserError(
        f"{source.name} cannot be evaluated: {WHY_NOT[what]}"
      )
    run = self._others[what]
    return self._run(source, pp, batch_size, bad_fraction, run)

  def _run(self, source, pp, batch_size, bad_fraction, run=None):
    """Returns what embed returns, for all examples, and which can be used."""
    run = run or self._embed
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
      part = run(**batch), mask
      found.append(
        jax.tree.map(
          np.asarray, multihost_utils.process_allgather(part, tiled=True)
        )
      )
    n = len(source)  # the last batch may go on past it
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *found)
