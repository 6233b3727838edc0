"""Which records of a source count: by their features, by a share, in groups."""

from collections.abc import Callable, Iterator
import io
from typing import Any

from jaxtyping import Bool, Int
import numpy as np
from PIL import Image
import tqdm

from sigjax import errors
from sigjax.data import faults
from sigjax.data.example import captions
from sigjax.data.faults import BadExample
from sigjax.data.shards import files
from sigjax.data.source import Example, Source, as_column

_CHUNK = 1 << 12  # records that are read at once, by several threads


def where(source: Source, key: str, wanted: Any) -> Source:
  """Narrows a source to the examples whose feature `key` is as wanted.

  Tar shards, Parquet and folders read the feature alone; of other sources every
  record is read once. A group keeps those of its members that fit.

  Args:
    source: What to narrow.
    key: A feature. If there is no such feature: "width" or "height", which are
      read from the image's header; or NAME_length, the number of characters of
      the text at feature NAME or NAMEs ("caption_length" is of "caption" or
      "captions"). Of several texts all have to fit.
    wanted: A value, such as "en" or False; a list of values; or a range, the
      tuple (low, high), both included, None for no limit. An example that has
      no value does not fit.

  Raises:
    UserError: There is no such feature, no example fits, or `wanted` is none of
      these.
  """
  _check(key, wanted)
  fits, seen = np.zeros(len(source.records), bool), set()
  counts = dict(source.faults)
  records: Any = source.records
  of_captions = getattr(records, "caption_column", lambda key: None)(key)
  if of_captions is not None:  # filters the captions of each example
    kept = _fit(of_captions, wanted, key, source.name)
    seen.update(str(v) for v in np.unique(of_captions)[:5].tolist())
    records, fits = records.with_captions(kept)
  else:
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
  return source.replaced(records=records, members=kept, faults=counts)


def part(source: Source, share: Any) -> Source:
  """Narrows a source to a share of its records, always the same ones.

  Whether a record is in it depends on its number alone, through a hash. So
  (0, 0.9) and (0.9, 1) have no record in common and together have all, whatever
  filters are applied afterwards.

  Args:
    source: A Source that is not grouped.
    share: (low, high), 0 <= low < high <= 1.

  Raises:
    UserError: `share` is none, or no record is in it.
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
  return source.replaced(members=_numbers(fits))


def grouped(source: Source, key: str) -> Source:
  """Makes each set of examples that agree in feature `key` one element.

  Groups come in the order of their first records. Each record may cost a few
  Python objects.

  Raises:
    UserError: There is no such feature.
  """
  groups: dict[Any, list[int]] = {}
  fits = np.zeros(len(source.records), bool)
  fits[source.numbers()] = True
  for numbers, values in _values(source, key, {}):
    for i, value in zip(numbers.tolist(), values.tolist()):
      if fits[i]:
        groups.setdefault(value, []).append(i)
  return source.replaced(members=[np.array(g) for g in groups.values()])


def _numbers(fits: Bool[np.ndarray, " n"]) -> Int[np.ndarray, "m 1"]:
  """Returns the numbers of those that fit, in the smallest suitable dtype."""
  dtype = np.int32 if len(fits) < 2**31 else np.int64
  return np.flatnonzero(fits).astype(dtype)[:, None]


def _hash(x: np.ndarray) -> np.ndarray:
  """Returns hashes of uint64 numbers (the mixing function of SplitMix64)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _is_number(value: Any) -> bool:
  return isinstance(value, (bool, int, float, np.bool_, np.number))


def _check(key: str, wanted: Any) -> None:
  """Raises UserError unless it is a value, a list of values, or a range."""
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


def _fit(
  values: np.ndarray, wanted: Any, key: str, name: str
) -> Bool[np.ndarray, " n"]:
  """Returns which of (n,) or (n, m) values fit; of m values all have to."""
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
  return np.all(fits.reshape(len(values), -1), axis=-1)


def _chunks(numbers: np.ndarray, size: int) -> Iterator[np.ndarray]:
  return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _values(
  source: Source, key: str, counts: dict[str, int]
) -> Iterator[tuple[Int[np.ndarray, " n"], np.ndarray]]:
  """Yields (numbers of records, their values) of all records of all elements.

  Args:
    source: The source.
    key: As in where().
    counts: {kind: count}, to which examples are added that cannot be read.
  """
  column = source.column(key)
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


def _value(
  source: Source, key: str, first: Example
) -> tuple[Callable[[Example], Any], bool]:
  """Returns (fn(example) -> value, whether that needs the image)."""
  stem = key.removesuffix("_length")
  texts = next((name for name in (stem, f"{stem}s") if name in first), None)
  if key in first:
    return lambda example: example.get(key), False  # some may lack it
  if key in ("width", "height"):

    def side(example):
      data = errors.pick(example, "image", f"feature of {source.name}")
      return _size(data)[key == "height"]

    return side, True
  if stem != key and texts:

    def length(example):
      lengths = list(map(len, captions.captions(example, texts)))
      return (min(lengths), max(lengths)) if lengths else (np.nan, np.nan)

    return length, False
  return errors.pick(first, key, f"feature of {source.name}"), False


def _size(data: bytes) -> tuple[int, int]:
  """Returns (width, height) of an encoded image, from its header."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.size
  except Exception as e:  # not all of Pillow's errors are OSErrors
    raise BadExample(
      "the image's header cannot be read", kind="undecodable image"
    ) from e


def _first(source: Source, numbers: np.ndarray) -> Example:
  """Returns the first example that can be read."""
  fault = None
  for i in numbers[:100]:
    try:
      return source.brief(i)
    except BadExample as e:
      fault = e
  assert fault is not None
  raise fault


def _read_values(source: Source, key: str, counts: dict[str, int]):
  """Does what _values() does, by reading records in several threads."""
  numbers = source.numbers()
  value, needs_image = _value(source, key, _first(source, numbers))
  read = source.read if needs_image else source.brief

  def value_of(i):
    try:
      return value(read(int(i)))
    except BadExample as e:
      return e

  found: faults.Found = {}
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
      values = list(threads.map(value_of, chunk))
      pairs = any(isinstance(v, tuple) for v in values)
      for i, v in enumerate(values):
        if isinstance(v, BadExample):
          faults.merge(found, {v.kind: (1, source.name_of(chunk[i]))})
          values[i] = (np.nan, np.nan) if pairs else None
      yield (
        chunk,
        np.array(values, float)
        if pairs
        else as_column(values, key, source.name),
      )
      bar.update(len(chunk))
  faults.report(f"reading {key} of {source.name}", found)
  for kind, (count, _) in found.items():
    counts[kind] = counts.get(kind, 0) + count
