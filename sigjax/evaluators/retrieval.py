"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.data.source import Source
from sigjax.evaluators import Row, briefs, ranking
from sigjax.evaluators.embedder import Embedder

Numbers = Int[np.ndarray, " n"]


class Retrieval:
  """Recall at k: is one of the right texts (images) among the k best?

  An image may have several captions, and a caption several images. All images
  and captions of one `group` are right answers for each other. A wrong answer
  with the score of the best right one counts as better.

  Args:
    data: N examples.
    pp_image: preprocessing string that keeps "image".
    pp_text: preprocessing string of a caption given as "text".
    bad_fraction: the largest fraction of examples that may be unusable. They
      are left out, with captions that no other example of their group has.
    captions: the feature that holds the caption or captions.
    group: the feature whose value names the group; None: each example is a
      group, as is one without a value.
    by: the feature whose values are evaluated apart, such as "language": one
      value for an example or one for each caption. The texts of a value are
      compared with the images that have one of them. The rows of each value
      begin with it, and those of their plain mean with "mean". A caption
      without a value is left out.
    equal_captions: whether equal captions of different groups are equally
      right, and are one query within a group. The published protocols have
      False: only the image's own captions are right, and each is a query.
    batch_size: B of the embedding.
    ks: the k of recall at k.
  """

  source: Source

  def __init__(
    self,
    *,
    data: Source,
    pp_image: str,
    pp_text: str,
    bad_fraction: float,
    captions: str = "captions",
    group: str | None = None,
    by: str | None = None,
    equal_captions: bool = True,
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
  ):
    self.source = data
    self.source.check_evaluable()

    def keep(example: dict[str, Any]) -> tuple[Any, list[tuple[Any, str]]]:
      label = group and briefs.value(example, group, "group of the evaluation")
      if by is None:
        texts = captions_lib.captions(example, captions)
        return label, [("", text) for text in texts]
      texts_of = captions_lib.captions_by(example, captions, by)
      pairs = [(v, t) for v, texts in texts_of.items() if v for t in texts]
      return label, pairs

    found = briefs.read(self.source, keep, bad_fraction)
    # An example without a value is told from the others by its number.
    labels = [
      (i, None) if x is None or x[0] is None else x[0]
      for i, x in enumerate(found)
    ]
    self._groups, _ = ranking.number(labels)  # of each image
    self._readable = np.array([x is not None for x in found])
    pairs = [pair for x in found if x for pair in x[1]]
    groups = np.repeat(self._groups, [len(x[1]) if x else 0 for x in found])
    if equal_captions:  # a group has each of its texts once
      strings, distinct = ranking.number(pairs)
      keys = groups.astype(np.int64) * len(distinct) + strings
      firsts = np.sort(np.unique(keys, return_index=True)[1])
    else:
      strings = firsts = np.arange(len(pairs))
    self._text_groups, self._strings = groups[firsts], strings[firsts]
    self._text_values, self._values = ranking.number(
      [pairs[i][0] for i in firsts]
    )
    self.texts = [pairs[i][1] for i in firsts]
    if not self.texts:
      what = f' with a "{by}"' if by else ""
      raise errors.UserError(
        f"{self.source.name} has no caption{what} that can be evaluated; the "
        "log names examples that cannot be used"
      )
    self._pp_image, self._pp_text = pp_image, pp_text
    self._batch_size, self._bad_fraction = batch_size, bad_fraction
    self._ks, self._by = ks, by

  def embed(
    self, embedder: Embedder
  ) -> tuple[
    Float[np.ndarray, "N E"],
    Float[np.ndarray, "M E"],
    Bool[np.ndarray, " N"],
    Bool[np.ndarray, " M"],
  ]:
    """Returns embeddings of all images and texts, and which can be used."""
    args = self._batch_size, self._bad_fraction
    found = embedder.images(self.source, self._pp_image, *args)
    images = found.usable & self._readable
    texts = np.isin(self._text_groups, self._groups[images])
    if not texts.any():
      raise self._unusable("")
    ztxt = embedder.texts(self.texts, self._pp_text, *args)
    return found.z, ztxt, images, texts

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
    compared = np.isin(self._text_groups, self._groups[images])
    compared &= np.isin(self._strings, self._strings[texts])
    strings, groups = {}, {}  # of each group, of each string
    for i in np.flatnonzero(compared):
      group, string = self._text_groups[i], self._strings[i]
      strings.setdefault(group, []).append(with_string[string])
      groups.setdefault(string, []).append(with_group[group])
    none = np.array([], int)
    texts_of = {g: np.concatenate(places) for g, places in strings.items()}
    images_of = {s: np.concatenate(places) for s, places in groups.items()}
    return (
      [texts_of.get(g, none) for g in self._groups[images]],
      [images_of.get(s, none) for s in self._strings[texts]],
    )

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the recalls; see Evaluator.run."""
    zimg, ztxt, use_image, use_text = self.embed(embedder)
    rows, recalls = [], collections.defaultdict(list)
    for number, value in enumerate(self._values):
      texts = self._text_values == number
      # An example that cannot be read may have had a text of any value.
      images = np.isin(self._groups, self._text_groups[texts]) | ~self._readable
      if not (texts & use_text).any():
        raise self._unusable(f' with {self._by} "{value}"')
      for row in self._recalls(
        zimg, ztxt, images, use_image, texts, use_text, mesh
      ):
        recalls[row.metric].append(row)
        name = f"{value} {row.metric}" if self._by else row.metric
        rows.append(row._replace(metric=name))
    if not self._by:
      return rows
    return rows + [
      Row(
        f"mean {metric}",
        float(np.mean([row.value for row in found])),
        float(np.mean([row.chance for row in found])),
        sum(row.n for row in found),
        sum(row.left_out for row in found),
      )
      for metric, found in recalls.items()
      if len(found) == len(self._values)
    ]

  def _recalls(self, zimg, ztxt, images, use_image, texts, use_text, mesh):
    """Returns the rows of a part of the images and texts."""
    used_images = np.flatnonzero(images & use_image)
    used_texts = np.flatnonzero(texts & use_text)
    right_texts, right_images = self.right(used_images, used_texts)
    zimg, ztxt = zimg[used_images], ztxt[used_texts]
    rows = []
    for name, queries, keys, right, left_out in (
      ("image->text", zimg, ztxt, right_texts, images & ~use_image),
      ("text->image", ztxt, zimg, right_images, texts & ~use_text),
    ):
      rank = ranking.ranks(queries, keys, right, mesh)
      counts = np.array([len(numbers) for numbers in right])
      rows += [
        Row(
          f"{name} recall@{k}",
          float(np.mean(rank < k)),
          ranking.chance(k, counts, len(keys)),
          len(queries),
          int(np.sum(left_out)),
        )
        for k in self._ks
        if k <= len(keys)
      ]
    return rows

  def _unusable(self, what: str) -> errors.UserError:
    return errors.UserError(
      f"{self.source.name}: no example{what} has an image that can be used; "
      "the log names some"
    )


def _places(ids: Numbers) -> dict[int, Numbers]:
  """Returns {id: where it stands in ids}."""
  order = np.argsort(ids, kind="stable")
  values, starts = np.unique(ids[order], return_index=True)
  return dict(zip(values, np.split(order, starts[1:])))
