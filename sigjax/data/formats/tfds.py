"""TFDS datasets by name, from ArrayRecord or TFRecord, without TensorFlow."""

from collections.abc import Callable
import functools
import os
from typing import Any, cast

from etils import epath
import numpy as np

from sigjax import errors
from sigjax.data import source as source_lib
from sigjax.data.faults import BadExample

_PREPARE = (
  'python -c "import tensorflow_datasets as tfds; tfds.builder({args}, '
  "file_format='array_record').download_and_prepare()\" "
  "(many of TFDS's own builders need TensorFlow for this one step)"
)


class ArrayRecordRecords:
  """Random access to a split that is stored as ArrayRecord.

  Args:
    builder: a TFDS builder.
    split: "train[:90%]" and the like.
    decoders: of the features that are to stay encoded.
    parse_brief: fn(bytes) -> dict of features without images.

  Raises:
    ValueError: there is no such split.
    UserError: all of its files are missing.
  """

  def __init__(
    self,
    builder: Any,
    split: str,
    decoders: dict[str, Any],
    parse_brief: Callable[[bytes], dict[str, Any]],
  ):
    # Slow to import, so only where they are used.
    from tensorflow_datasets.core import splits
    from tensorflow_datasets.core.data_sources import base

    self._source = builder.as_data_source(split, decoders=decoders)
    self._parse_brief = parse_brief
    wanted = base.file_instructions(builder.info, splits.Split(split))
    self._paths = [str(part.filename) for part in wanted]
    if not any(epath.Path(path).exists() for path in self._paths):
      raise errors.UserError(
        f"none of {len(self._paths)} files of {builder.info.full_name}[{split}]"
        f" is there, such as {self._paths[0]}; prepare the dataset again"
      )

  @functools.cached_property
  def identity(self) -> str:
    """Returns a digest of the split's files, see files.identity()."""
    from sigjax.data.shards import files

    paths = list(map(files.canonical, self._paths))
    return files.identity(paths, files.stamps(paths))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._read(i, self._source.__getitem__)

  def brief(self, i: int) -> dict[str, Any]:
    """Returns example i without its images, which saves their parsing."""
    raw = self._source.data_source
    return self._read(i, lambda i: self._parse_brief(raw[i]))

  def _read(self, i, read):
    if not 0 <= i < len(self):
      raise IndexError(i)
    try:
      return read(i)
    except Exception as e:  # array_record's and TFDS's have no common base
      raise BadExample(
        f"record {i} cannot be read: {e}", kind="damaged record"
      ) from e


def brief_parser(
  features: Any, decoders: dict[str, Any]
) -> Callable[[bytes], dict[str, Any]]:
  """Returns a function that parses an example, but not its images.

  TFDS takes .03 ms for each feature; reading the record takes .1 ms. So labels,
  numbers and texts, and lists of them, are taken from the protocol buffer as
  they are. TFDS parses what is left.

  Args:
    features: TFDS's, of the dataset.
    decoders: of the features that are to stay encoded.
  """
  import tensorflow_datasets as tf_datasets
  from tensorflow_datasets.proto import tf_example_pb2

  lib, proto = tf_datasets.features, cast(Any, tf_example_pb2)
  plain, others = {}, {}
  for key, feature in features.items():
    inner = feature.feature if type(feature) is lib.Sequence else feature
    if type(inner) in (lib.ClassLabel, lib.Text, lib.Scalar):
      plain[key] = feature.get_serialized_info()
    elif not isinstance(feature, lib.Image):
      others[key] = feature
  rest: Any = lib.FeaturesDict(others)
  decoders = {key: value for key, value in decoders.items() if key in others}
  brief = sorted({**plain, **others})

  def parse(data: bytes) -> dict[str, Any]:
    found = proto.Example.FromString(data).features.feature
    record = dict.fromkeys(brief)
    if others:
      record.update(rest.deserialize_example_np(data, decoders=decoders))
    for key, info in plain.items():
      stored = found[key]
      values = getattr(stored, stored.WhichOneof("kind")).value
      array = np.array(values, info.np_dtype)
      record[key] = list(array) if info.shape else array.item()
    return record

  return parse


def from_builder(builder: Any, split: str) -> source_lib.Source:
  """Opens a split of a prepared TFDS dataset; its images stay encoded.

  Raises:
    UserError: there is no such split.
  """
  import tensorflow_datasets as tf_datasets

  def skip_images(features: Any) -> dict[str, Any]:
    # TFDS cannot skip the decoding of images within a Sequence.
    skips = {}
    for key, feature in features.items():
      if isinstance(feature, tf_datasets.features.Image):
        skips[key] = tf_datasets.decode.SkipDecoding()
      elif isinstance(feature, tf_datasets.features.FeaturesDict):
        skips[key] = skip_images(feature)
    return skips

  decoders, faults = skip_images(builder.info.features), {}
  brief = brief_parser(builder.info.features, decoders)
  name = f"{builder.info.name}[{split}]"
  try:
    if builder.info.file_format.value == "tfrecord":
      from sigjax.data.formats import tfrecord

      records, faults = tfrecord.of_builder(builder, split, decoders, brief)
    else:
      records = ArrayRecordRecords(builder, split, decoders, brief)
  except errors.UserError:
    raise
  except ValueError as e:
    raise errors.UserError(
      f"{builder.info.full_name} in {builder.data_dir} cannot read split "
      f'"{split}"; it has: {", ".join(builder.info.splits)}, and parts such '
      'as "train[:90%]"'
    ) from e
  return source_lib.Source(
    name,
    records,
    faults=faults,
    label_names={
      key: feature.names
      for key, feature in builder.info.features.items()
      if isinstance(feature, tf_datasets.features.ClassLabel)
    },
  )


def tfds(
  name: str, split: str, data_dir: str | None = None
) -> source_lib.Source:
  """Opens a TFDS dataset that has been prepared as ArrayRecord or TFRecord.

  Args:
    name: "name", "name/config", "name/config:version", or the directory that
      holds a dataset's features.json.
    split: "train", "validation[:1000]", "train+test", ...
    data_dir: TFDS's data directory; None: TFDS's own default.

  Returns:
    A Source named "name[split]".

  Raises:
    UserError: there is no such dataset or split, or it is stored in another
      file format.
  """
  # Imported here because importing TFDS is slow.
  from tensorflow_datasets.core import read_only_builder
  from tensorflow_datasets.core.utils import file_utils

  # Only from the files: a dataset's own code is not needed for reading, and
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
      + _PREPARE.format(args=args)
    ) from e
  found: Any = builder.info.file_format
  if found.value not in ("array_record", "tfrecord"):
    args = f"{name!r}, data_dir='NEW_DIR'"
    raise errors.UserError(
      f'dataset "{name}" in {builder.data_dir} is stored as {found.value}, '
      "which has no random access; prepare it once more, elsewhere, and set "
      "data_dir to that: " + _PREPARE.format(args=args)
    )
  return from_builder(builder, split)
