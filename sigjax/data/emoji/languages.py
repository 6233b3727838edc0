"""Captions of the emoji dataset in other languages, added to its records.

The names and keywords are Unicode's (CLDR), from the packages of the English
captions. They belong to a concept, not to a drawing. So they can be added to
whatever has the feature "concept": the dataset, or embeddings of it. Which
families are held out is the same in all languages.
"""

from collections.abc import Mapping, Sequence
import functools
import logging
import pathlib
from typing import Any

import numpy as np
from tensorflow_datasets.core import constants

from sigjax import errors
from sigjax.data.emoji import builder, packages
from sigjax.data.faults import BadExample
from sigjax.data.source import Example, Records, Source, brief_of, identity_of

log = logging.getLogger("sigjax")

# The captions of a record: (language, text) of each.
Captions = list[tuple[str, str]]


@functools.lru_cache(maxsize=4)  # each evaluation asks for them
def read(
  languages: tuple[str, ...],
  data_dir: str | None = None,
  fetched: tuple[packages.Package, ...] = packages.PACKAGES,
) -> dict[str, Captions]:
  """Returns {concept: its captions}, the languages in the order given.

  Args:
    languages: codes of CLDR, such as "en", "sw" or "zh-Hant".
    data_dir: TFDS's data directory, which keeps the packages; None: TFDS's own
      default.
    fetched: npm packages, of which those of captions are read.

  Raises:
    UserError: a language is not known, or a package could not be downloaded.
  """
  root = pathlib.Path(data_dir or constants.DATA_DIR).expanduser()
  folder = root / "downloads" / builder.SigjaxEmoji.name
  folder.mkdir(parents=True, exist_ok=True)
  paths = [packages.fetch(p, folder) for p in fetched if p.style is None]
  found: dict[str, Captions] = {}
  for language, texts in packages.captions(paths, languages).items():
    for codes, several in texts.items():
      concept = builder.concept_of(codes)
      found.setdefault(concept, []).extend((language, x) for x in several)
  return found


class _Translated:
  """Records of emoji with other captions; see translated()."""

  def __init__(
    self,
    records: Records,
    captions: Sequence[Captions],
    languages: Sequence[str],
  ):
    self._records, self._captions = records, captions
    self._languages = list(languages)

  def __len__(self) -> int:
    return len(self._captions)

  @property
  def identity(self) -> Any:
    return identity_of(self._records, languages=self._languages)

  def _with(self, example: Example, i: int) -> Example:
    found = self._captions[i]
    if not found:
      raise BadExample(
        "it has no name in these languages", kind="missing caption"
      )
    return {
      **example,
      "captions": [text for _, text in found],
      "language": [language for language, _ in found],
    }

  def __getitem__(self, i: int) -> Example:
    return self._with(self._records[i], i)

  def brief(self, i: int) -> Example:
    return self._with(brief_of(self._records)(i), i)


def translated(
  source: Source,
  languages: Sequence[str],
  captions: Mapping[str, Captions],
) -> Source:
  """Gives the records of a source the captions of their concepts.

  "captions" then has those of all languages, and "language" the language of
  each. Records without any are left out.

  Args:
    source: the emoji dataset, or embeddings of it.
    languages: of the captions.
    captions: from read().

  Raises:
    UserError: the records have no feature "concept", or none has a caption.
  """
  found, kept = [], []
  for i in range(len(source.records)):
    try:
      example = source.brief(i)
    except BadExample:  # reading it for a batch counts it
      found.append([])
      kept.append(i)
      continue
    concept = errors.pick(
      {k: v for k, v in example.items() if k != "image"},
      "concept",
      f"languages= needs emoji: feature of {source.name}",
    )
    if isinstance(concept, bytes):
      concept = concept.decode()
    found.append(captions.get(concept, []))
    if found[-1]:
      kept.append(i)
  if not any(found):
    raise errors.UserError(
      f"none of {len(found)} examples of {source.name} has a name in "
      f"{', '.join(languages)}; its concepts have to be those of the emoji "
      "dataset, such as 1f600"
    )
  lacking = len(found) - len(kept)
  if lacking:
    log.info(
      "%s: %d of %d examples have no name in %s, and are left out",
      source.name,
      lacking,
      len(found),
      ", ".join(languages),
    )
  return source.replaced(
    records=_Translated(source.records, found, languages),
    members=np.array(kept, np.int32)[:, None] if lacking else None,
  )
