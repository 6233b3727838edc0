"""Zero-shot classification: the class whose prompts fit the image best."""

import numpy as np

from sigjax.data import kinds
from sigjax.data.source import Source
from sigjax.evaluators import prompts, ranking


class ZeroShot:
  """N-way accuracy: the N classes' mean prompt embeddings as the classifier.

  Args:
    tokenizer: of the run.
    data: keyword arguments of sources.open_source.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a prompt given as "text".
    label: name of the feature with the class.
    classes: one of prompts.CLASSES: where the classes' names come from.
    templates: one of prompts.TEMPLATES.
    batch_size: B of the embedding.
    ks: the k of top-k accuracy.
  """

  def __init__(
    self,
    tokenizer,
    *,
    data,
    pp_image,
    pp_text,
    label="label",
    classes="labels",
    templates="plain",
    batch_size=256,
    ks=(1, 5, 10),
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

  def run(self, embed, mesh):
    """Returns rows (metric, value, chance, n); see Retrieval.run."""
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
      (
        f"{self.num_classes}-way top-{k}",
        float(np.mean(rank < k)),
        k / self.num_classes,
        len(zimg),
      )
      for k in self.ks
      if k <= self.num_classes
    ]
