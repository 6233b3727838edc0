"""Where examples come from: random-access sources, read without TensorFlow.

Every kind gives the same: any record by its number, in any order and from many
threads, images left encoded, for which shards are indexed once. So shuffling is
global, and what is in a batch does not depend on who reads it.
"""

import os

import numpy as np

from sigjax import errors
from sigjax.data import faults, mixture
from sigjax.data import filter as filter_lib
from sigjax.data import source as source_lib
from sigjax.data.formats import embeddings as embeddings_lib
from sigjax.data.formats import folder, parquet, tar
from sigjax.data.formats import tfds as tfds_lib

Source = source_lib.Source
captions = source_lib.captions
where = filter_lib.where
grouped = filter_lib.grouped
tfds = tfds_lib.tfds


class _Shuffled:
  """Records of which each has feature `key` of another one."""

  def __init__(self, records, key):
    self._records, self._key = records, key
    self._other = np.random.default_rng(0).permutation(len(records))

  def __len__(self):
    return len(self._records)

  def __getitem__(self, i):
    other = self._records[int(self._other[i])]
    return {**self._records[i], self._key: other[self._key]}


def shuffled(source, key):
  """Gives each record the feature `key` of another one, always the same one.

  A control: images and captions that have nothing to do with each other.

  Raises:
    UserError: no such feature.
  """
  errors.pick(source.records[0], key, f"feature of {source.name}")
  return source.replaced(
    name=f"{source.name} with shuffled {key}",
    records=_Shuffled(source.records, key),
  )


def emoji(split, data_dir=None):
  """The embedded dataset of drawings, prepared first if it is not there yet."""
  from sigjax.data.emoji import builder

  return tfds_lib.from_builder(builder.prepare(data_dir), split)


def embeddings(path, tower=None, pp_image=None):
  """Embeddings computed before; see embeddings.open_folder."""
  records, tower, label_names = embeddings_lib.open_folder(
    path, tower, pp_image
  )
  return Source(
    os.path.basename(os.path.normpath(path)),
    records,
    label_names=label_names,
    tower=tower,
  )


def mix(sources, weights):
  """Several sources mixed by weight; see mixture.mix."""
  return mixture.mix(open_source, sources, weights)


SOURCES = {
  "tfds": tfds_lib.tfds,
  "emoji": emoji,
  "tar": tar.tar,
  "parquet": parquet.parquet,
  "folder": folder.folder,
  "embeddings": embeddings,
  "mix": mix,
}


def open_source(
  kind, *, part=None, only=None, group_by=None, shuffle=None, **kwargs
):
  """Opens SOURCES[kind](**kwargs), narrowed and grouped as asked.

  Args:
    kind: a name in SOURCES.
    part: a share of the records, such as (0, 0.9) and (0.9, 1), for sources
      that have no splits of their own; see selection.part.
    only: {feature: what it has to be}: a value, a list of values or a range
      (low, high), such as dict(language="en", width=(256, None),
      caption_length=(3, 200)); see selection.where.
    group_by: the feature by which examples are grouped, such as "concept".
    shuffle: the feature that is given to the wrong examples, see `shuffled`.
    **kwargs: split and whatever else that source takes.

  Returns:
    A Source.

  Raises:
    UserError: an unknown kind, or anything that the source, `part`, `where` or
      `grouped` refuse.
  """
  fn = errors.pick(SOURCES, kind, "source")
  source = errors.call(fn, kwargs, f'source "{kind}"')
  if part is not None:
    source = filter_lib.part(source, part)
  if shuffle:
    source = shuffled(source, shuffle)
  for key, wanted in (only or {}).items():
    source = where(source, key, wanted)
  return grouped(source, group_by) if group_by else source


def all_captions(source, key):
  """Yields every text at `key` of all records that a source stands for.

  Those of examples that cannot be read are left out, and logged.
  """
  bad = {}
  for i in source.numbers():
    try:
      yield from captions(source.brief(i), key)
    except faults.BadExample as e:
      faults.merge(bad, {e.kind: (1, mixture.name_of(source, i))})
  faults.report(f"captions of {source.name}", bad)
