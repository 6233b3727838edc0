"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Float
import numpy as np

from sigjax.data import kinds
from sigjax.data.example import captions as captions_lib
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed, Row, ranking


class Retrieval:
  """Recall at k: is one of the right texts (images) among the k best?

  An image may have several captions, and a caption several images. All images
  and captions of one `group` are right answers for each other.

  Args:
    tokenizer: of the run.
    data: keyword arguments of kinds.open_source.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a caption given as "text".
    captions: the feature that holds the caption or captions.
    group: the feature whose value names the group; None: each example is a
      group.
    batch_size: B of the embedding.
    ks: the k of recall at k.
  """

  source: Source

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    data: dict[str, Any],
    pp_image: str,
    pp_text: str,
    captions: str = "captions",
    group: str | None = None,
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
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

  def embed(
    self, embed: Embed
  ) -> tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "M E"]]:
    """Returns the embeddings of all images and of all texts."""
    args = self.tokenizer, self.batch_size
    return (
      ranking.embed_all(embed, self.source, self.pp_image, *args),
      ranking.embed_all(embed, self.texts, self.pp_text, *args),
    )

  def run(self, embed: Embed, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the recalls; see Evaluator.run."""
    zimg, ztxt = self.embed(embed)
    rows = []
    for name, q, k, q_ids, k_ids in (
      ("image->text", zimg, ztxt, self.image_ids, self.text_ids),
      ("text->image", ztxt, zimg, self.text_ids, self.image_ids),
    ):
      rank = ranking.ranks(q, k, q_ids, k_ids, mesh)
      right = np.bincount(k_ids, minlength=max(q_ids) + 1)[q_ids]
      rows += [
        Row(
          f"{name} recall@{n}",
          float(np.mean(rank < n)),
          ranking.chance(n, right, len(k)),
          len(q),
        )
        for n in self.ks
        if n <= len(k)
      ]
    return rows
