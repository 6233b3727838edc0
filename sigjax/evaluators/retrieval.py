"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

import numpy as np

from sigjax.data import kinds
from sigjax.data.example import captions as captions_lib
from sigjax.data.source import Source
from sigjax.evaluators import ranking


class Retrieval:
  """Recall at k: is one of the right texts (images) among the k best?

  An image may have several captions, and a caption several images: whatever
  has the same `group` belongs together.

  Args:
    tokenizer: of the run.
    data: keyword arguments of sources.open_source.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a caption given as "text".
    captions: name of the feature with the caption or captions.
    group: name of a feature that tells what belongs together; None: each
      example is a group of its own.
    batch_size: B of the embedding.
    ks: the k of recall at k.
  """

  def __init__(
    self,
    tokenizer,
    *,
    data,
    pp_image,
    pp_text,
    captions="captions",
    group=None,
    batch_size=256,
    ks=(1, 5, 10),
  ):
    self.source = kinds.open_source(**data)
    examples = [self.source[i] for i in range(len(self.source))]
    self.image_ids, _ = ranking.number(
      [i if group is None else x[group] for i, x in enumerate(examples)]
    )
    pairs = dict.fromkeys(
      (group_id, text)
      for group_id, x in zip(self.image_ids, examples)
      for text in captions_lib.captions(x, captions)
    )
    self.texts = Source("captions", [dict(text=text) for _, text in pairs])
    self.text_ids = np.array([group_id for group_id, _ in pairs], np.int32)
    self.pp_image, self.pp_text = pp_image, pp_text
    self.tokenizer, self.batch_size, self.ks = tokenizer, batch_size, ks

  def embed(self, embed):
    """Returns the embeddings of all images (N, E) and all texts (M, E)."""
    return [
      ranking.embed_all(embed, source, pp, self.tokenizer, self.batch_size)
      for source, pp in (
        (self.source, self.pp_image),
        (self.texts, self.pp_text),
      )
    ]

  def run(self, embed, mesh):
    """Returns rows (metric, value, chance, n): fractions, number of queries.

    Args:
      embed: fn(image=..., text=...) -> (zimg, ztxt).
      mesh: the devices to compare on.
    """
    zimg, ztxt = self.embed(embed)
    rows = []
    for name, q, k, q_ids, k_ids in (
      ("image->text", zimg, ztxt, self.image_ids, self.text_ids),
      ("text->image", ztxt, zimg, self.text_ids, self.image_ids),
    ):
      rank = ranking.ranks(q, k, q_ids, k_ids, mesh)
      right = np.bincount(k_ids, minlength=max(q_ids) + 1)[q_ids]
      rows += [
        (
          f"{name} recall@{n}",
          float(np.mean(rank < n)),
          ranking.chance(n, right, len(k)),
          len(q),
        )
        for n in self.ks
        if n <= len(k)
      ]
    return rows
