"""Which records of a source count: by their features, by a share, in groups."""

import io

import numpy as np
from PIL import Image
import tqdm

from sigjax import errors
from sigjax.data import faults as faults_lib
from sigjax.data import source as source_lib
from sigjax.data.shards import files

_CHUNK = 1 << 12  # records read at once, by several threads


def where(source, key, wanted):
  """Narrows a source to the examples whose feature `key` is as wanted.

  Tar shards, Parquet and folders read the feature alone; of other sources every
  record is read once. A group keeps those of its members that fit.

  Args:
    source: a Source.
    key: a feature; or "width" or "height" where there is no such feature, which
      are then taken from the image's header; or NAME_length, the number of
      characters of the text at feature NAME or NAMEs ("caption_length" is of
      "caption" or "captions"), which of several texts all have to fit.
    wanted: a value, such as "en" or False; a list of values; or a range, the
      tuple (low, high), both included, None for no limit. An example that has
      no value does not fit.

  Raises:
    UserError: no such feature, no example fits, or wanted is none of these.
  """
  _check(key, wanted)
  fits, seen = np.zeros(len(source.records), bool), set()
  counts = dict(source.faults)
  for numbers, values in _values(source, key, counts):
    fits[numbers] = _fit(values, wanted, key, source.name)
    if len(seen) < 5:
      seen.update(str(v) for v in np.unique(values)[:5].tolist())
  if source.members is None:
    kept = _numbers(fits)
  elif isinstance(source.members, np.ndarray):
    kept = source.members[fits[source.members[:, 0]]]
  else:
    kept = [group[fits[group]] for group in source.members]
    kept = [group for group in kept if len(group)]
  if not len(kept):
    raise errors.UserError(
      f"{source.name} has no example with {key}={wanted!r}; "
      f"there is, for instance: {', '.join(sorted(seen)[:5])}"
    )
  narrowed = source.narrowed(kept)
  narrowed.faults = counts
  return narrowed


def part(source, share):
  """Narrows a source to a share of its records, always the same ones.

  Whether a record is in it depends on its number alone, through a hash, so that
  (0, 0.9) and (0.9, 1) have no record in common and all together, whatever
  filters are applied afterwards.

  Args:
    source: a Source that is not grouped.
    share: (low, high), 0 <= low < high <= 1.

  Raises:
    UserError: no such share, or no record is in it.
  """
  numeric = (
    isinstance(share, (tuple, list))
    and len(share) == 2
    and all(isinstance(v, (int, float)) for v in share)
  )
  if not numeric or not 0 <= share[0] < share[1] <= 1:
    raise errors.UserError(
      f"part is a share of the records, such as (0, 0.9) for training and "
      f"(0.9, 1) for validation, but not {share!r}"
    )
  fits = np.zeros(len(source.records), bool)
  for numbers in _chunks(np.arange(len(fits)), 1 << 20):
    place = _hash(numbers.astype(np.uint64)) / 2.0**64
    fits[numbers] = (share[0] <= place) & (place < share[1])
  if not fits.any():
    raise errors.UserError(
      f"part {share!r} of {source.name} holds none of its {len(fits)} "
      "records; ask for a larger share"
    )
  return source.narrowed(_numbers(fits))


def grouped(source, key):
  """Makes each set of examples that agree in feature `key` one element.

  Groups come in the order of their first records. Meant for sources of which
  each record may cost a few Python objects.

  Raises:
    UserError: no such feature.
  """
  groups = {}
  fits = np.zeros(len(source.records), bool)
  fits[source.numbers()] = True
  for numbers, values in _values(source, key, {}):
    for i, value in zip(numbers.tolist(), values.tolist()):
      if fits[i]:
        groups.setdefault(value, []).append(i)
  return source.narrowed([np.array(group) for group in groups.values()])


def _numbers(fits):
  """The numbers of those that fit, (n, 1), in as few bytes as will do."""
  dtype = np.int32 if len(fits) < 2**31 else np.int64
  return np.flatnonzero(fits).astype(dtype)[:, None]


def _hash(x):
  """SplitMix64's mixing of uint64: neighbours become unrelated."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _is_number(value):
  return isinstance(value, (bool, int, float, np.bool_, np.number))


def _check(key, wanted):
  """Refuses what is neither a value, a list of values, nor a range."""
  if isinstance(wanted, tuple):
    good = (
      len(wanted) == 2
      and wanted != (None, None)
      and all(v is None or _is_number(v) for v in wanted)
    )
  else:
    values = wanted if isinstance(wanted, list) else [wanted]
    good = values and all(_is_number(v) or isinstance(v, str) for v in values)
  if not good:
    raise errors.UserError(
      f"only={{{key!r}: {wanted!r}}} is not understood: give a value, a list "
      "of values, or a range (low, high) with None for no limit"
    )


def _fit(values, wanted, key, name):
  """Returns which of (n,) or (n, m) values fit, (n,) bool; of m all have to."""
  if isinstance(wanted, tuple):
    if values.dtype.kind == "U":
      raise errors.UserError(
        f'feature "{key}" of {name} holds texts, so that {key}={wanted!r} '
        "is no range of it; give a value or a list of values"
      )
    low, high = wanted
    fits = np.ones(values.shape, bool)  # nan fits no limit, and one is given
    fits &= (low is None) | (values >= (low or 0))
    fits &= (high is None) | (values <= (high or 0))
  else:
    wanted = wanted if isinstance(wanted, list) else [wanted]
    fits = np.zeros(values.shape, bool)
    for value in wanted:
      fits |= values == value
  return fits.reshape(len(values), -1).all(-1)


def _chunks(numbers, size):
  return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _values(source, key, counts):
  """Yields (numbers of records, their values): all that a source stands for.

  Args:
    source: a Source.
    key: as in where().
    counts: {kind: count}, to which the examples are added that cannot be read.
  """
  column = getattr(source.records, "column", lambda key: None)(key)
  if column is None:
    yield from _read_values(source, key, counts)
    return
  start = 0
  for values in column:
    yield np.arange(start, start + len(values)), values
    start += len(values)
  if start != len(source.records):
    raise errors.UserError(
      f'{source.name} has {len(source.records)} records, but "{key}" was '
      f"read of {start}: its files changed, or could not all be read; start "
      "again"
    )


def _value(source, key, first):
  """Returns (fn(example) -> value, whether that needs the image)."""
  stem = key.removesuffix("_length")
  texts = next((name for name in (stem, f"{stem}s") if name in first), None)
  if key in first:
    return lambda example: example.get(key), False  # not all may have it
  if key in ("width", "height"):

    def side(example):
      data = errors.pick(example, "image", f"feature of {source.name}")
      return _size(data)[key == "height"]

    return side, True
  if stem != key and texts:

    def length(example):
      lengths = list(map(len, source_lib.captions(example, texts)))
      return (min(lengths), max(lengths)) if lengths else (np.nan, np.nan)

    return length, False
  return errors.pick(first, key, f"feature of {source.name}"), False


def _size(data):
  """Returns (width, height) of an encoded image, from its header."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.size
  except Exception as e:  # not all of Pillow's errors are OSErrors
    raise faults_lib.BadExample(
      "the image's header cannot be read", kind="undecodable image"
    ) from e


def _first(source, numbers):
  """Returns the first example that can be read."""
  for i in numbers[:100]:
    try:
      return source.brief(i)
    except faults_lib.BadExample as e:
      fault = e
  raise fault


def _read_values(source, key, counts):
  """As _values(), by reading records, several at a time."""
  numbers = source.numbers()
  value, needs_image = _value(source, key, _first(source, numbers))

  def read(i):
    try:
      return value(source.records[int(i)] if needs_image else source.brief(i))
    except faults_lib.BadExample as e:
      return e

  found = {}
  with (
    files.pool() as threads,
    tqdm.tqdm(
      total=len(numbers),
      unit="example",
      delay=2,
      desc=f"reading {key} of {source.name}",
    ) as bar,
  ):
    for chunk in _chunks(numbers, _CHUNK):
      values = list(threads.map(read, chunk))
      empty = (
        (np.nan,) * 2 if any(isinstance(v, tuple) for v in values) else (None)
      )
      for i, v in enumerate(values):
        if isinstance(v, faults_lib.BadExample):
          faults_lib.merge(found, {v.kind: (1, f"{source.name}[{chunk[i]}]")})
          values[i] = empty
      yield (
        chunk,
        (
          np.array(values, float)
          if empty
          else source_lib.as_column(values, key, source.name)
        ),
      )
      bar.update(len(chunk))
  faults_lib.report(f"reading {key} of {source.name}", found)
  for kind, (count, _) in found.items():
    counts[kind] = counts.get(kind, 0) + count
