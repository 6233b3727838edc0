"""Where examples come from: random-access sources, read without TensorFlow.

An element of a source is one example: a dict of features as TFDS stores them,
with texts as bytes and images still encoded. A source may be narrowed to the
examples with a certain value (`where`), and its examples may be put into groups
of which each is one element (`grouped`): then no batch holds two members of a
group, and each epoch shows a random one.
"""

import os

import numpy as np

from sigjax import errors


class Source:
  """Elements 0..len-1, each standing for one record or for a group of them.

  Attributes:
    name: a short name for logs and faults, such as "coco_captions/2014[train]".
    records: what is read: anything with len() and [int] -> dict of features.
    members: None if element i is record i; or, for each element, an int64 array
      of the records it stands for, in rising order.
    label_names: {feature: list of its classes' names}, where they are known.
  """

  def __init__(self, name, records, members=None, label_names=None):
    self.name = name
    self.records = records
    self.members = members
    self.label_names = label_names or {}

  def narrowed(self, members):
    """Returns the same source with other members."""
    return Source(self.name, self.records, members, self.label_names)

  def __len__(self):
    return len(self.records if self.members is None else self.members)

  def numbers(self):
    """Returns the numbers of all records it stands for, in rising order."""
    if self.members is None:
      return range(len(self.records))
    return np.sort(np.concatenate(self.members)).tolist()

  def pick(self, i, rng=None):
    """Returns the number of the record element i stands for.

    Of a group that is a random record, or the first one if rng is None.
    """
    if self.members is None:
      return i
    group = self.members[i]
    random = rng is not None and len(group) > 1
    return int(group[rng.integers(len(group)) if random else 0])

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f"{self.name} has {len(self)} elements, none at {i}")
    return self.records[self.pick(i)]


def _column(source, key):
  """Reads feature `key` of all records a source stands for: {record: value}."""
  column = {}
  for i in source.numbers():
    example = source.records[i]
    value = errors.pick(example, key, f"feature of {source.name}")
    column[i] = value.decode() if isinstance(value, bytes) else value
    if isinstance(value, (dict, list)) or np.ndim(value):
      raise errors.UserError(
          f'feature "{key}" of {source.name} holds more than one value, so '
          "examples cannot be chosen or grouped by it")
  return column


def where(source, key, value):
  """Narrows a source to the examples whose feature `key` equals `value`.

  Reads every record once. A group keeps those of its members that fit.

  Raises:
    UserError: no such feature, or no example fits.
  """
  column = _column(source, key)
  fits = {i for i, found in column.items() if found == value}
  if not fits:
    seen = ", ".join(sorted({str(v) for v in column.values()})[:5])
    raise errors.UserError(
        f"{source.name} has no example with {key}={value!r}; "
        f"there is, for instance: {seen}")
  if source.members is None:
    kept = np.array(sorted(fits))[:, None]
  else:
    kept = [np.array([i for i in group if i in fits], np.int64)
            for group in source.members]
    kept = [group for group in kept if len(group)]
  return source.narrowed(kept)


def grouped(source, key):
  """Makes each set of examples that agree in feature `key` one element.

  Reads every record once. Groups come in the order of their first records.

  Raises:
    UserError: no such feature.
  """
  groups = {}
  for i, value in _column(source, key).items():
    groups.setdefault(value, []).append(i)
  return source.narrowed([np.array(group) for group in groups.values()])


class _Shuffled:
  """Records of which each has feature `key` of another one."""

  def __init__(self, records, key):
    self._records, self._key = records, key
    self._other = np.random.default_rng(0).permutation(len(records)).tolist()

  def __len__(self):
    return len(self._records)

  def __getitem__(self, i):
    other = self._records[self._other[i]]
    return {**self._records[i], self._key: other[self._key]}


def shuffled(source, key):
  """Gives each record the feature `key` of another one, always the same one.

  A control: images and captions that have nothing to do with each other.

  Raises:
    UserError: no such feature.
  """
  errors.pick(source.records[0], key, f"feature of {source.name}")
  return Source(f"{source.name} with shuffled {key}",
                _Shuffled(source.records, key), source.members,
                source.label_names)


def _as_source(builder, split):
  """Opens a split of a prepared TFDS dataset, its images left encoded."""
  import tensorflow_datasets as tf_datasets

  def skip_images(features):
    # Images within a Sequence are left out: TFDS cannot skip decoding those.
    skips = {}
    for key, feature in features.items():
      if isinstance(feature, tf_datasets.features.Image):
        skips[key] = tf_datasets.decode.SkipDecoding()
      elif isinstance(feature, tf_datasets.features.FeaturesDict):
        skips[key] = skip_images(feature)
    return skips

  name = f"{builder.info.name}[{split}]"
  try:
    records = builder.as_data_source(
        split, decoders=skip_images(builder.info.features))
    len(records)
  except ValueError as e:
    raise errors.UserError(
        f'{builder.info.full_name} in {builder.data_dir} cannot read split '
        f'"{split}"; it has: {", ".join(builder.info.splits)}, and parts such '
        'as "train[:90%]"') from e
  return Source(name, records, label_names={
      key: feature.names for key, feature in builder.info.features.items()
      if isinstance(feature, tf_datasets.features.ClassLabel)})


_PREPARE = (
    'python -c "import tensorflow_datasets as tfds; tfds.builder({args}, '
    "file_format='array_record').download_and_prepare()\" "
    "(many of TFDS's own builders need TensorFlow for this one step)")


def tfds(name, split, data_dir=None):
  """A TFDS dataset that has been prepared as array_record.

  Args:
    name: "name", "name/config", "name/config:version", or the directory that
      holds a dataset's features.json.
    split: "train", "validation[:1000]", "train+test", ...
    data_dir: where datasets are; TFDS's own default if None.

  Returns:
    A Source named "name[split]".

  Raises:
    UserError: no such dataset there, in another file format, or no such split.
  """
  # Slow to import, so only where it is used.
  from tensorflow_datasets.core import read_only_builder
  from tensorflow_datasets.core.utils import file_utils
  # From the files alone: a dataset's own code is not needed for reading it, and
  # often imports TensorFlow.
  try:
    if os.path.exists(os.path.join(name, "features.json")):
      builder = read_only_builder.builder_from_directory(name)
    else:
      builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except ValueError as e:  # TFDS's DatasetNotFoundError is one
    places = ", ".join(map(str, file_utils.list_data_dirs(data_dir)))
    args = repr(name) + (f", data_dir={str(data_dir)!r}" if data_dir else "")
    raise errors.UserError(
        f'dataset "{name}" is not prepared in {places}; to prepare it: '
        + _PREPARE.format(args=args)) from e
  found = builder.info.file_format.value
  if found != "array_record":
    args = f"{name!r}, data_dir='NEW_DIR'"
    raise errors.UserError(
        f'dataset "{name}" in {builder.data_dir} is stored as {found}, which '
        "has no random access; prepare it once more, elsewhere, and set "
        "data_dir to that: " + _PREPARE.format(args=args))
  return _as_source(builder, split)


def emoji(split, data_dir=None):
  """The embedded dataset of drawings, prepared first if it is not there yet."""
  from sigjax.data import emoji as emoji_builder
  return _as_source(emoji_builder.prepare(data_dir), split)


SOURCES = {"tfds": tfds, "emoji": emoji}


def open_source(kind, *, only=None, group_by=None, shuffle=None, **kwargs):
  """Opens SOURCES[kind](**kwargs), narrowed and grouped as asked.

  Args:
    kind: a name in SOURCES.
    only: {feature: value} that examples must have, such as {"is_flag": False}.
    group_by: the feature by which examples are grouped, such as "concept".
    shuffle: the feature that is given to the wrong examples, see `shuffled`.
    **kwargs: split and whatever else that source takes.

  Raises:
    UserError: an unknown kind, or anything that the source, `where` or
      `grouped` refuse.
  """
  fn = errors.pick(SOURCES, kind, "source")
  source = errors.call(fn, kwargs, f'source "{kind}"')
  if shuffle:
    source = shuffled(source, shuffle)
  for key, value in (only or {}).items():
    source = where(source, key, value)
  return grouped(source, group_by) if group_by else source


def captions(example, key):
  """Returns the texts of one example, a list of str.

  Args:
    example: dict of features.
    key: a feature with a text, several, or {"text": several, ...}.
  """
  value = errors.pick(example, key, "feature")
  if isinstance(value, dict):
    value = errors.pick(value, "text", f'feature of "{key}"')
  values = [value] if isinstance(value, (str, bytes)) else value
  return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def all_captions(source, key):
  """Yields every text at `key` of all records that a source stands for."""
  for i in source.numbers():
    yield from captions(source.records[i], key)
