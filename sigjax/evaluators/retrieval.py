"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.example import captions as captions_lib
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed, Row, briefs, ranking

Numbers = Int[np.ndarray, " n"]


class Retrieval:
  """Recall at k: is one of the right texts (images) among the k best?

  An image may have several captions, and a caption several images. All images
  and captions of one `group` are right answers for each other. Equal captions
  of different groups are equally right.

  Args:
    tokenizer: of the run.
    data: keyword arguments of kinds.open_source.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a caption given as "text".
    bad_fraction: the largest fraction of examples that may be unusable. They
      are left out, with captions that no other example of their group has.
    captions: the feature that holds the caption or captions.
    group: the feature whose value names the group; None: each example is a
      group, as is one without a value.
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
    bad_fraction: float,
    captions: str = "captions",
    group: str | None = None,
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
  ):
    self.source = kinds.open_source(**data)
    self.source.check_evaluable()

    def keep(example: dict[str, Any]) -> tuple[Any, list[str]]:
      label = group and briefs.value(example, group, "group of the evaluation")
      return label, captions_lib.captions(example, captions)

    found = briefs.read(self.source, keep, bad_fraction)
    # An example without a value is told from the others by its number.
    labels = [
      (i, None) if x is None or x[0] is None else x[0]
      for i, x in enumerate(found)
    ]
    self._groups, _ = ranking.number(labels)  # of each image
    self._readable = np.array([x is not None for x in found])
    texts = [text for x in found if x for text in x[1]]
    strings, distinct = ranking.number(texts)
    groups = np.repeat(self._groups, [len(x[1]) if x else 0 for x in found])
    # A group has each of its texts once.
    pairs = groups.astype(np.int64) * len(distinct) + strings
    firsts = np.sort(np.unique(pairs, return_index=True)[1])
    self._text_groups, self._strings = groups[firsts], strings[firsts]
    self.texts = [texts[i] for i in firsts]
    self._pp_image, self._pp_text = pp_image, pp_text
    self._tokenizer, self._batch_size = tokenizer, batch_size
    self._bad_fraction, self._ks = bad_fraction, ks

  def embed(
    self, embed: Embed
  ) -> tuple[
    Float[np.ndarray, "N E"],
    Float[np.ndarray, "M E"],
    Bool[np.ndarray, " N"],
    Bool[np.ndarray, " M"],
  ]:
    """Returns embeddings of all images and texts, and which can be used."""
    args = self._tokenizer, self._batch_size, self._bad_fraction
    zimg, good = ranking.embed_all(embed, self.source, self._pp_image, *args)
    ztxt, _ = ranking.embed_all(
      embed, Source("captions", ranking.Texts(self.texts)), self._pp_text, *args
    )
    images = good & self._readable
    if not images.any():
      raise errors.UserError(
        f"{self.source.name} has no example that can be evaluated"
      )
    texts = np.isin(self._text_groups, self._groups[images])
    return zimg, ztxt, images, texts

  def right(
    self, images: Numbers, texts: Numbers
  ) -> tuple[list[Numbers], list[Numbers]]:
    """Returns which texts and images are right answers for each other.

    Args:
      images: numbers of the images to compare, of N.
      texts: numbers of the texts to compare, of M.

    Returns:
      For each of the images the places of its right texts in `texts`; for each
      of the texts the places of its right images in `images`.
    """
    with_group = _places(self._groups[images])
    with_string = _places(self._strings[texts])
    strings, groups = {}, {}  # of each group, of each string
    for group, string in zip(self._text_groups, self._strings):
      if group in with_group and string in with_string:
        strings.setdefault(group, []).append(with_string[string])
        groups.setdefault(string, []).append(with_group[group])
    none = np.array([], int)
    texts_of = {g: np.concatenate(places) for g, places in strings.items()}
    images_of = {s: np.concatenate(places) for s, places in groups.items()}
    return (
      [texts_of.get(g, none) for g in self._groups[images]],
      [images_of.get(s, none) for s in self._strings[texts]],
    )

  def run(self, embed: Embed, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the recalls; see Evaluator.run."""
    zimg, ztxt, use_image, use_text = self.embed(embed)
    right_texts, right_images = self.right(
      np.flatnonzero(use_image), np.flatnonzero(use_text)
    )
    zimg, ztxt = zimg[use_image], ztxt[use_text]
    rows = []
    for name, queries, keys, right, used in (
      ("image->text", zimg, ztxt, right_texts, use_image),
      ("text->image", ztxt, zimg, right_images, use_text),
    ):
      rank = ranking.ranks(queries, keys, right, mesh)
      counts = np.array([len(numbers) for numbers in right])
      rows += [
        Row(
          f"{name} recall@{k}",
          float(np.mean(rank < k)),
          ranking.chance(k, counts, len(keys)),
          len(queries),
          int(np.sum(~used)),
        )
        for k in self._ks
        if k <= len(keys)
      ]
    return rows


def _places(ids: Numbers) -> dict[int, Numbers]:
  """Returns {id: where it stands in ids}."""
  order = np.argsort(ids, kind="stable")
  values, starts = np.unique(ids[order], return_index=True)
  return dict(zip(values, np.split(order, starts[1:])))
