"""Zero-shot classification: the class whose prompts fit the image best."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sigjax.data import kinds
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed, Row, prompts, ranking


class ZeroShot:
  """N-way accuracy; a class is the mean embedding of its prompts.

  Args:
    tokenizer: of the run.
    data: keyword arguments of kinds.open_source.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a prompt given as "text".
    label: the feature that holds the class.
    classes: one of prompts.CLASSES: where the names of the classes come from.
    templates: one of prompts.TEMPLATES.
    batch_size: B of the embedding.
    ks: the k of top-k accuracy.
  """

  source: Source

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    data: dict[str, Any],
    pp_image: str,
    pp_text: str,
    label: str = "label",
    classes: str = "labels",
    templates: str = "plain",
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
  ):
    self.source = kinds.open_source(**data)
    self.image_ids, texts = prompts.classes(
      self.source, label, classes, templates
    )
    self.num_classes = len(texts)
    self.texts = Source(
      "prompts", [dict(text=text) for names in texts for text in names]
    )
    self.text_ids = np.repeat(
      np.arange(len(texts)), [len(names) for names in texts]
    )
    self.pp_image, self.pp_text = pp_image, pp_text
    self.tokenizer, self.batch_size, self.ks = tokenizer, batch_size, ks

  def run(self, embed: Embed, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the accuracies; see Evaluator.run."""
    zimg, ztxt = (
      ranking.embed_all(embed, source, pp, self.tokenizer, self.batch_size)
      for source, pp in (
        (self.source, self.pp_image),
        (self.texts, self.pp_text),
      )
    )
    heads = np.zeros((self.num_classes, ztxt.shape[1]), np.float32)
    np.add.at(heads, self.text_ids, ztxt)
    heads /= np.linalg.norm(heads, axis=1, keepdims=True) + 1e-8
    rank = ranking.ranks(
      zimg, heads, self.image_ids, np.arange(self.num_classes), mesh
    )
    return [
      Row(
        f"{self.num_classes}-way top-{k}",
        float(np.mean(rank < k)),
        k / self.num_classes,
        len(zimg),
      )
      for k in self.ks
      if k <= self.num_classes
    ]
