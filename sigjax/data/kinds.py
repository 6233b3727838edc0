"""The kinds of sources, and the one function that opens a source.

A source gives any record by its number, in any order and from many threads. So
the shuffle is global, and what is in a batch does not depend on who reads it.
The code of a format is imported when a config names its kind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import os
from typing import Any

import numpy as np

from sigjax import errors
from sigjax.data import faults
from sigjax.data.example import captions
from sigjax.data.faults import BadExample
from sigjax.data.source import (
  Example,
  Mixture,
  Records,
  Source,
  brief_of,
  identity_of,
  keep_briefs,
)

# ---- Kinds: functions that import a format and return what opens it ----


def _tfds():
  from sigjax.data.formats import tfds

  return tfds.tfds


def _emoji():
  from sigjax.data.emoji import builder
  from sigjax.data.formats import tfds

  def emoji(
    split: str,
    data_dir: str | None = None,
    languages: Sequence[str] | None = None,
  ) -> Source:
    """Opens the dataset of drawings; prepares it first if it is not there.

    With `languages`, such as ("en", "th"), captions are in these; see
    emoji.languages.translated. None: in English.
    """
    source = tfds.from_builder(builder.prepare(data_dir), split)
    return _in_languages(source, languages, data_dir)

  return emoji


def _in_languages(
  source: Source, languages: Sequence[str] | None, data_dir: str | None
) -> Source:
  """Returns the source with captions in these languages; None: as they are."""
  if languages is None:
    return source
  if isinstance(languages, str) or not languages:
    raise errors.UserError(
      f"languages is {languages!r}, but has to be a list of codes, such as "
      '["en", "th"]'
    )
  from sigjax.data.emoji import languages as languages_lib

  names = tuple(dict.fromkeys(languages))
  captions = languages_lib.read(names, data_dir)
  return languages_lib.translated(source, names, captions)


def _tar():
  from sigjax.data.formats import tar

  return tar.tar


def _parquet():
  from sigjax.data.formats import parquet

  return parquet.parquet


def _folder():
  from sigjax.data.formats import folder

  return folder.folder


def _classes():
  from sigjax.data.formats import classes

  return classes.classes


def _embeddings():
  from sigjax.data.formats import embeddings as embeddings_lib

  def embeddings(
    path: str,
    tower: str | None = None,
    pp_image: str | None = None,
    languages: Sequence[str] | None = None,
    data_dir: str | None = None,
  ) -> Source:
    """Opens embeddings that were computed before; see open_folder.

    Embeddings of the emoji dataset may be given captions in `languages`, as the
    dataset itself; `data_dir` then keeps the packages of captions.
    """
    records, found, label_names = embeddings_lib.open_folder(
      path, tower, pp_image
    )
    name = os.path.basename(os.path.normpath(path))
    source = Source(name, records, label_names=label_names, tower=found)
    return _in_languages(source, languages, data_dir)

  return embeddings


def _mix():
  return mix


SOURCES: dict[str, Callable[[], Callable[..., Source]]] = {
  "tfds": _tfds,
  "emoji": _emoji,
  "tar": _tar,
  "parquet": _parquet,
  "folder": _folder,
  "classes": _classes,
  "embeddings": _embeddings,
  "mix": _mix,
}


def open_source(
  kind: str | None = None,
  *,
  part: Sequence[float] | None = None,
  only: Mapping[str, Any] | None = None,
  element: str = "image",
  group_by: str | None = None,
  shuffle: str | None = None,
  mismatch: float = 0.0,
  in_memory: bool = False,
  **kwargs: Any,
) -> Source:
  """Opens a source, narrowed and grouped as asked.

  Args:
    kind: A name in SOURCES.
    part: A share of the records, such as (0, 0.9) and (0.9, 1), for sources
      that have no splits of their own; see filter.part.
    only: {feature: wanted}: a value, a list of values or a range (low, high),
      such as dict(language="en", width=(256, None), caption_length=(3, 200));
      see filter.where.
    element: "image", so that an epoch shows each image once; or "caption": each
      caption once, with its image; see filter.each_caption.
    group_by: The feature by which examples are grouped, such as "concept".
    shuffle: The feature that is given to the wrong examples, see `shuffled`.
    mismatch: The share of the images of each training batch that are given the
      text of another one (SigLIP, section 4.10); see pipeline.train_batches.
    in_memory: Whether images are decoded once and then stay in memory, for
      small datasets: an image takes height * width * 3 bytes.
    **kwargs: Arguments of that kind, such as split.

  Raises:
    UserError: There is no such kind, or the kind or one of the others cannot be
      as given.
  """
  if not isinstance(kind, str):
    raise errors.UserError(
      f"a source needs a kind, one of: {', '.join(SOURCES)}; it has "
      + (
        f"kind={kind!r}" if kind else f"only: {', '.join(kwargs) or 'nothing'}"
      )
    )
  elements = {"image": True, "caption": False}
  by_image = errors.pick(elements, element, "element of a source,")
  opener = errors.pick(SOURCES, kind, "source")()
  if not isinstance(mismatch, (int, float)) or not 0 <= mismatch <= 1:
    raise errors.UserError(
      f"mismatch is {mismatch!r}, but has to be a share of the pairs, from 0 "
      "to 1"
    )
  source = errors.call(opener, kwargs, f'source "{kind}"')
  if kind != "mix":  # its parts do
    source = keep_briefs(source)
  source.mismatch = float(mismatch)
  source = _narrowed(source, part, only, by_image, group_by, shuffle)
  if not in_memory:
    return source
  from sigjax.data import memory  # only where it is needed

  return memory.in_memory(source)


def _narrowed(
  source: Source,
  part: Sequence[float] | None,
  only: Mapping[str, Any] | None,
  by_image: bool,
  group_by: str | None,
  shuffle: str | None,
) -> Source:
  """Returns the source as open_source describes it."""
  if part is None and not only and not group_by and not shuffle and by_image:
    return source
  from sigjax.data import filter as filter_lib  # only where it is needed

  if part is not None:
    source = filter_lib.part(source, part)
  if shuffle:
    source = shuffled(source, shuffle)
  for key, wanted in (only or {}).items():
    source = filter_lib.where(source, key, wanted)
  if not by_image:
    source = filter_lib.each_caption(source)
  return filter_lib.grouped(source, group_by) if group_by else source


def mix(
  sources: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> Mixture:
  """Opens several sources as one, mixed by weight.

  Args:
    sources: Arguments of open_source for each.
    weights: A positive number for each, of any sum.

  Raises:
    UserError: A source is given twice or is itself a mix, or cannot be opened;
      or they cannot be mixed, see Mixture.
  """
  for i, section in enumerate(sources):
    if section.get("kind") == "mix":
      raise errors.UserError(
        "a source of a mix is itself a mix; list all sources in one"
      )
    if section.get("mismatch"):
      raise errors.UserError(
        f"source {i} of the mix has mismatch, which is of whole batches; give "
        "it to the mix"
      )
    if section in sources[:i]:
      raise errors.UserError(
        f"source {i} of the mix is there already, so that a batch could hold "
        "an example twice; give it once, with a larger weight"
      )
  return Mixture(
    [
      errors.call(open_source, section, f"source {i} of the mix")
      for i, section in enumerate(sources)
    ],
    weights,
  )


class _Shuffled:
  """Records of which each has feature `key` of another record.

  Captions take their languages along.
  """

  def __init__(self, records: Records, key: str):
    self._records, self._key = records, key
    self._moved = (key, "language") if key == "captions" else (key,)
    self._brief = brief_of(records)
    self._other = np.random.default_rng(0).permutation(len(records))

  def __len__(self):
    return len(self._records)

  @property
  def identity(self):
    return identity_of(self._records, shuffled=self._key)

  def brief(self, i) -> Example:
    """Returns an example without its image, if the records can do that."""
    return self._with_other(i, self._brief)

  def __getitem__(self, i) -> Example:
    return self._with_other(i, self._records.__getitem__)

  def _with_other(self, i, read) -> Example:
    example, other = read(i), int(self._other[i])
    if read == self._brief and self._key not in example:  # it is the image
      return example
    brief = self._brief(other)
    found = brief if self._key in brief else self._records[other]
    return {**example, **{k: found[k] for k in self._moved if k in found}}


def shuffled(source: Source, key: str) -> Source:
  """Gives each record the feature `key` of another one, always the same one.

  A control: images and captions that have nothing to do with each other.

  Raises:
    UserError: There is no such feature.
  """
  errors.pick(source.records[0], key, f"feature of {source.name}")
  return source.replaced(
    name=f"{source.name} with shuffled {key}",
    records=_Shuffled(source.records, key),
  )


def all_captions(source: Source, key: str) -> Iterator[str]:
  """Yields every text at `key` of all records of all elements.

  Examples that cannot be read are left out, and logged.
  """
  bad: faults.Found = {}
  for i in source.numbers():
    try:
      yield from captions.captions(source.brief(i), key)
    except BadExample as e:
      faults.merge(bad, {e.kind: (1, source.name_of(i))})
  faults.report(f"captions of {source.name}", bad)
