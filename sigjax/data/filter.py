"""Which records of a source count: by their features, by a share, in groups.

And which of their captions: those with a feature, or each by itself.
"""

from collections.abc import Callable, Iterator, Sequence
import hashlib
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
from sigjax.data.source import (
  Example,
  Members,
  Records,
  Source,
  as_column,
  brief_of,
  identity_of,
  spread,
)

_CHUNK = 1 << 12  # records that are read at once, by several threads
_PART = 1 << 5  # of them, by one thread


def where(source: Source, key: str, wanted: Any) -> Source:
  """Narrows a source to the examples whose feature `key` is as wanted.

  Tar shards, Parquet and folders read the feature alone; of other sources every
  record is read once. A group keeps those of its members that fit. If the
  captions of one image have different values of the feature, such as their
  languages, the image keeps the captions that fit.

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
  absent = {v for v in _listed(wanted) if isinstance(v, str)}

  def fit(values, missing):
    if len(seen) < 5:
      seen.update(str(v) for v in np.unique(values[~missing])[:99].tolist())
    if values.dtype.kind == "U":
      absent.difference_update([v for v in absent if np.any(values == v)])
    return _fit(values, missing, wanted, key, source.name)

  column = source.caption_column(key)
  records = source.records
  if column is not None:
    chosen = fit(column["value"], column["missing"])
    records, fits = source.with_captions(chosen)
  elif _is_of_captions(source, key):
    records, fits = _with_captions(source, key, fit, counts)
  else:
    for numbers, values, missing in _values(source, key, counts):
      fits[numbers] = fit(values, missing)
  kept = _narrowed(source, fits)
  if not len(kept):
    near = errors.closest(wanted, seen) if absent else ""
    raise errors.UserError(
      f"{source.name} has no example with {key}={wanted!r}{near}; "
      f"there is, for instance: {', '.join(sorted(seen)[:5])}"
    )
  for value in sorted(absent):
    raise errors.UserError(
      f'{source.name} has no example with {key}="{value}"'
      f"{errors.closest(value, seen)}; leave it out of only="
    )
  return source.replaced(records=records, members=kept, faults=counts)


def part(source: Source, share: Any) -> Source:
  """Narrows a source to a share of its images, always the same ones.

  Whether an image is in it depends on the number of the first record that shows
  it, through a hash. So (0, 0.9) and (0.9, 1) have no image in common and
  together have all, whatever filters are applied afterwards.

  Args:
    source: What to narrow.
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
  shown = np.arange(len(fits))  # the first record that shows the same image
  ids = source.image_ids()
  if ids is not None:
    _, first, image = np.unique(ids, return_index=True, return_inverse=True)
    shown = first[image]
  for numbers in _chunks(np.arange(len(fits)), 1 << 20):
    place = _hash(shown[numbers].astype(np.uint64)) / 2.0**64
    fits[numbers] = (share[0] <= place) & (place < share[1])
  kept = _narrowed(source, fits)
  if not len(kept):
    raise errors.UserError(
      f"part {share!r} of {source.name} holds none of its {len(fits)} "
      "records; ask for a larger share"
    )
  return source.replaced(members=kept)


def grouped(source: Source, key: str) -> Source:
  """Makes each set of examples that agree in feature `key` one element.

  An example without a value is a group of its own. Groups come in the order of
  their first records. Each record may cost a few Python objects.

  Raises:
    UserError: There is no such feature.
  """
  groups: dict[Any, list[int]] = {}
  fits = np.zeros(len(source.records), bool)
  fits[source.numbers()] = True
  for numbers, values, missing in _values(source, key, {}):
    if values.ndim > 1:
      raise errors.UserError(
        f'examples cannot be grouped by "{key}", which may differ between the '
        "texts of one example; group by a feature"
      )
    for i, value, gone in zip(
      numbers.tolist(), values.tolist(), missing.tolist()
    ):
      if fits[i]:
        groups.setdefault((None, i) if gone else value, []).append(i)
  return source.replaced(members=[np.array(g) for g in groups.values()])


def each_caption(source: Source) -> Source:
  """Makes each caption an element of its own, with its image.

  An example then has one caption, and its language if that is known. An epoch
  shows each image as often as it has captions, and a batch may hold an image
  twice, each time as a negative of its other captions.

  Raises:
    UserError: There is no feature "captions".
  """
  numbers, which = [], []

  def count(example):
    texts = captions.stored(example, "captions")
    return [j for j, text in enumerate(texts) if text and text.strip()]

  faults_: dict[str, int] = {}
  read = _read_all(source, source.numbers(), count, "captions", faults_)
  for chunk, found in read:
    for i, places in zip(chunk.tolist(), found):
      # One that cannot be read, or has no text, is told when a batch reads it.
      places = places or [0]
      numbers += [i] * len(places)
      which += places
  dtype = np.int32 if len(source.records) < 2**31 else np.int64
  records = _Chosen(
    source.records,
    np.array(numbers, dtype),
    np.array(which, np.int32)[:, None],
    ("language",),
    "each caption",
  )
  return source.replaced(records=records, members=None)


class _Chosen:
  """Records with some of their captions.

  Args:
    records: All.
    numbers: (n,), the record of which each example is.
    which: n arrays, the places of the captions that each example has.
    features: Those that have a value for each caption.
    key: What tells this choice from others; JSON-able.
  """

  def __init__(
    self,
    records: Records,
    numbers: Int[np.ndarray, " n"],
    which: Sequence[np.ndarray] | Int[np.ndarray, "n 1"],
    features: Sequence[str],
    key: Any,
  ):
    self._records, self._numbers, self._which = records, numbers, which
    self._features, self._key = features, key

  def __len__(self) -> int:
    return len(self._numbers)

  @property
  def identity(self) -> Any:
    return identity_of(self._records, captions=self._key)

  def _narrow(self, example: Example, i: int) -> Example:
    texts = captions.stored(example, "captions")
    example = {**example, "captions": [texts[j] for j in self._which[i]]}
    for key in self._features:
      values = example.get(key)
      if captions.is_several(values) and len(values) == len(texts):
        example[key] = [values[j] for j in self._which[i]]
    return example

  def __getitem__(self, i: int) -> Example:
    return self._narrow(self._records[int(self._numbers[i])], i)

  def brief(self, i: int) -> Example:
    return self._narrow(brief_of(self._records)(int(self._numbers[i])), i)

  def image_ids(self) -> Sequence[Any]:
    inner = getattr(self._records, "image_ids", None)
    if inner is None:
      return self._numbers.tolist()
    ids = inner()
    return [ids[i] for i in self._numbers]


def _is_of_captions(source: Source, key: str) -> bool:
  """Returns whether feature `key` has a value for each caption."""
  for i in spread(len(source.records)):
    try:
      example = source.brief(i)
    except BadExample:
      continue
    values, texts = example.get(key), example.get("captions")
    return (
      captions.is_several(values)
      and captions.is_several(texts)
      and len(values) == len(texts)
    )
  return False


def _with_captions(
  source: Source,
  key: str,
  fit: Callable[[np.ndarray, np.ndarray], np.ndarray],
  counts: dict[str, int],
) -> tuple[Records, Bool[np.ndarray, " n"]]:
  """Keeps the captions whose value of feature `key` fits.

  Returns:
    Records with the same numbers, and which of them have a caption left.
  """
  n = len(source.records)
  places: list[np.ndarray] = [np.array([], int)] * n
  digest = hashlib.sha256()

  def value(example):
    count = len(captions.stored(example, "captions"))
    return captions.one_each(example.get(key), count, key, "captions")

  for chunk, found in _read_all(source, source.numbers(), value, key, counts):
    found = [values or [] for values in found]
    column = as_column([v for x in found for v in x], key, source.name)
    chosen = fit(column["value"], column["missing"])
    ends = np.cumsum([len(values) for values in found])
    for i, part in zip(chunk.tolist(), np.split(chosen, ends[:-1])):
      places[i] = np.flatnonzero(part)
    digest.update(chosen.tobytes())
  features = tuple(dict.fromkeys(("language", key)))
  records = _Chosen(
    source.records, np.arange(n), places, features, digest.hexdigest()
  )
  return records, np.array([len(x) > 0 for x in places], bool)


def _narrowed(source: Source, fits: Bool[np.ndarray, " n"]) -> Members:
  """Returns the members of a source that fit, without groups that are empty."""
  if source.members is None:
    return _numbers(fits)
  if isinstance(source.members, np.ndarray):
    return source.members[fits[source.members[:, 0]]]
  kept = [group[fits[group]] for group in source.members]
  return [group for group in kept if len(group)]


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


def _listed(wanted: Any) -> list[Any]:
  return wanted if isinstance(wanted, list) else [wanted]


def _check(key: str, wanted: Any) -> None:
  """Raises UserError unless it is a value, a list of values, or a range."""
  if isinstance(wanted, tuple):
    good = (
      len(wanted) == 2
      and wanted != (None, None)
      and all(v is None or _is_number(v) for v in wanted)
    )
  else:
    values = _listed(wanted)
    good = values and all(_is_number(v) or isinstance(v, str) for v in values)
  if not good:
    raise errors.UserError(
      f"only={{{key!r}: {wanted!r}}} is not understood: give a value, a list "
      "of values, or a range (low, high) with None for no limit"
    )


def _fit(
  values: np.ndarray,
  missing: Bool[np.ndarray, " n"],
  wanted: Any,
  key: str,
  name: str,
) -> Bool[np.ndarray, " n"]:
  """Returns which of (n,) or (n, m) values fit; of m values all have to."""
  if isinstance(wanted, tuple):
    if values.dtype.kind == "U":
      raise errors.UserError(
        f'feature "{key}" of {name} holds texts, so that {key}={wanted!r} '
        "is no range of it; give a value or a list of values"
      )
    low, high = wanted
    fits = np.ones(values.shape, bool)
    fits &= (low is None) | (values >= (low or 0))
    fits &= (high is None) | (values <= (high or 0))
  else:
    fits = np.zeros(values.shape, bool)
    for value in _listed(wanted):
      fits |= values == value
  return np.all(fits.reshape(len(values), -1), axis=-1) & ~missing


def _chunks(numbers: np.ndarray, size: int) -> Iterator[np.ndarray]:
  return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _values(
  source: Source, key: str, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (numbers of records, their values, which of these are missing).

  All records of all elements are among them. Values are (n,), or (n, 2) if they
  are the smallest and the largest of several in one example.

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
  for part in column:
    numbers = np.arange(start, start + len(part))
    yield numbers, part["value"], part["missing"]
    start += len(part)
  if start != len(source.records):
    raise errors.UserError(
      f'{source.name} has {len(source.records)} records, but "{key}" was '
      f"read of {start}: its files changed, or could not all be read; start "
      "again"
    )


def _value(
  source: Source, key: str, known: Example
) -> tuple[Callable[[Example], Any], bool]:
  """Returns (fn(example) -> value, whether that needs the image).

  Args:
    source: The source.
    key: As in where().
    known: All features that examples have; some examples may lack some.
  """
  stem = key.removesuffix("_length")
  texts = next((name for name in (stem, f"{stem}s") if name in known), None)
  if key in known:
    return lambda example: example.get(key), False
  if key in ("width", "height"):

    def side(example):
      data = errors.pick(example, "image", f"feature of {source.name}")
      return _size(data)[key == "height"]

    return side, True
  if stem != key and texts:

    def length(example):
      if example.get(texts) is None:
        return None
      lengths = list(map(len, captions.captions(example, texts)))
      return min(lengths), max(lengths)

    return length, False
  return errors.pick(known, key, f"feature of {source.name}"), False


def _size(data: bytes) -> tuple[int, int]:
  """Returns (width, height) of an encoded image, from its header."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.size
  except Exception as e:  # not all of Pillow's errors are OSErrors
    raise BadExample(
      "the image's header cannot be read", kind="undecodable image"
    ) from e


def _features(source: Source, numbers: np.ndarray, key: str) -> Example:
  """Returns the features that examples have, with a value of each.

  Reads examples from all over the source until one has `key`.

  Raises:
    BadExample: None of them can be read.
  """
  known, fault = {}, None
  for i in spread(len(numbers)):
    try:
      known = {**source.brief(numbers[i]), **known}
    except BadExample as e:
      fault = fault or e
    if key in known:
      break
  if not known and fault:
    raise fault
  return known


def _read_values(source: Source, key: str, counts: dict[str, int]):
  """Does what _values() does, by reading records in several threads."""
  numbers = source.numbers()
  value, needs_image = _value(source, key, _features(source, numbers, key))
  for chunk, values in _read_all(
    source, numbers, value, key, counts, needs_image
  ):
    if any(isinstance(v, tuple) for v in values):
      missing = np.array([v is None for v in values])
      yield chunk, np.array([v or (0, 0) for v in values]), missing
    else:
      column = as_column(values, key, source.name)
      yield chunk, column["value"], column["missing"]


def _read_all(
  source: Source,
  numbers: np.ndarray,
  value: Callable[[Example], Any],
  key: str,
  counts: dict[str, int],
  with_image: bool = False,
) -> Iterator[tuple[np.ndarray, list[Any]]]:
  """Yields numbers of records, and value(record) of each, read by threads.

  The value of a record that cannot be read is None; it is added to `counts`.
  `key` names what is read in messages.
  """
  read = source.read if with_image else source.brief

  def value_of(i):
    try:
      return value(read(int(i)))
    except BadExample as e:
      return e

  values_of = lambda part: [value_of(i) for i in part]

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
      # Several at a time: a record in memory takes less than its hand-over.
      parts = threads.map(values_of, _chunks(chunk, _PART))
      values = [v for part in parts for v in part]
      for i, v in enumerate(values):
        if isinstance(v, BadExample):
          faults.merge(found, {v.kind: (1, source.name_of(chunk[i]))})
          values[i] = None
      yield chunk, values
      bar.update(len(chunk))
  faults.report(f"reading {key} of {source.name}", found)
  for kind, (count, _) in found.items():
    counts[kind] = counts.get(kind, 0) + count
