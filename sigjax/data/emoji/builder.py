"""sigjax_emoji: emoji drawn in six styles, with English captions, as TFDS.

The drawings are SVGs under free licences, from npm packages that are downloaded
once. Names and keywords are Unicode's (CLDR). The dataset is prepared without
TensorFlow: images are written encoded, and records as ArrayRecord.

Each drawing is in one split:
  train        five styles, about 90 % of the families
  held_style   OpenMoji, concepts that are in train
  held_family  the five styles, families that are not in train
  held_both    OpenMoji, families that are not in train
Concepts that differ only in gender or direction are one family, see family():
then "woman surfing" is not tested while "man surfing" is trained on. Flags look
the same in all styles, so they are only in train, marked is_flag. In some
styles a few concepts of a family ("cook", "man cook") are the same picture.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import fcntl
import hashlib
import io
import logging
import pathlib
from typing import Any

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
import tqdm

from sigjax import errors
from sigjax.data.emoji import packages as packages_lib
from sigjax.data.emoji.packages import PACKAGES, Codes, Package

log = logging.getLogger("sigjax")

SIZE = 64  # height and width of the images, in pixels
HELD_STYLE = "openmoji"

_FLAGS = {0x1F38C, 0x1F3C1, 0x1F3F3, 0x1F3F4, 0x1F6A9, *range(0x1F1E6, 0x1F200)}
# Two or more of _PEOPLE are a couple or a family, as is one of _GROUPS.
_PEOPLE = {0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1, 0x1F9D2}
_GROUPS = {0x1F46A, 0x1F46B, 0x1F46C, 0x1F46D, 0x1F48F, 0x1F491}
# Code points that do not change the family: the joiner, female, male, facing
# right, man, woman, person.
_STRIPPED = {0x200D, 0x2640, 0x2642, 0x27A1, 0x1F468, 0x1F469, 0x1F9D1}
_ALIKE = {
  "clocks": set(range(0x1F550, 0x1F568)),
  "moons": set(range(0x1F311, 0x1F31E)),
  "arrows": {
    *range(0x2190, 0x2200),
    0x27A1,
    0x2934,
    0x2935,
    0x2B05,
    0x2B06,
    0x2B07,
    *range(0x1F500, 0x1F505),
    *range(0x1F519, 0x1F51E),
  },
}


def family(codes: Codes) -> str:
  """Returns the name of a concept's family.

  A family is in the training split as a whole, or held out as a whole. Its name
  is the sequence without gender, direction and joiners. All clocks are one
  family, and so are all moons, all arrows, and all groups of people: some
  styles draw many of these alike.

  Args:
    codes: the concept's code points, without FE0F.
  """
  if codes[0] in _GROUPS or sum(c in _PEOPLE for c in codes) > 1:
    return "groups"
  for name, members in _ALIKE.items():
    if len(codes) == 1 and codes[0] in members:
      return name
  return concept_of(c for c in codes if c not in _STRIPPED)


def untrained(name: str) -> bool:
  """Returns whether a family is held out: a tenth are, chosen by SHA-256."""
  return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10 == 0


def concept_of(codes: Iterable[int]) -> str:
  """Returns the name of a concept, such as "1f3c4-200d-2640"."""
  return "-".join(f"{c:x}" for c in codes)


def assign(
  drawn: Mapping[str, Collection[Codes]], is_untrained: Callable[[str], bool]
) -> dict[str, list[tuple[str, Codes]]]:
  """Assigns drawings to splits; see the module's docstring.

  A concept that only OpenMoji draws is in no split. In a trained family it
  would be neither trained on nor new, and held_family and held_both should test
  the same concepts.

  Args:
    drawn: {style: the concepts it draws}.
    is_untrained: fn(name of a family) -> whether it is held out.

  Returns:
    {split: [(style, code points)]}.
  """
  splits: dict[str, list[tuple[str, Codes]]] = {
    name: [] for name in ("train", "held_style", "held_family", "held_both")
  }
  shared: set[Codes] = set().union(
    *(drawn[s] for s in drawn if s != HELD_STYLE)
  )
  for style, concepts in drawn.items():
    for codes in concepts:
      flag = codes[0] in _FLAGS
      new = is_untrained(family(codes)) and not flag
      if style != HELD_STYLE:
        splits["held_family" if new else "train"].append((style, codes))
      elif codes in shared and not flag:
        splits["held_both" if new else "held_style"].append((style, codes))
  return splits


def _rasteriser() -> Callable[[str], bytes]:
  """Returns a function from an SVG to a PNG: RGB on white, SIZE x SIZE."""
  try:
    import resvg_py
  except ImportError:
    raise errors.UserError(
      "the emoji dataset is drawn by resvg-py, which is not installed; "
      "pip install 'sigjax[emoji]'"
    ) from None

  def png(svg: str) -> bytes:
    drawn = resvg_py.svg_to_bytes(
      svg_string=svg,
      width=SIZE,
      height=SIZE,
      background="#ffffff",
      skip_system_fonts=True,  # loading fonts is slow, and none is needed
    )
    out = io.BytesIO()
    # The background is opaque, so the alpha channel holds no information.
    Image.open(io.BytesIO(drawn)).convert("RGB").save(out, "PNG")
    return out.getvalue()

  return png


class SigjaxEmoji(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder "sigjax_emoji"; use prepare() instead.

  Args:
    packages: npm packages to download.
    is_untrained: fn(name of a family) -> whether it is held out.
    **kwargs: of TFDS's builders.

  Attributes:
    VERSION: of the dataset.
    code_path: of this file. TFDS would look it up with a package that is not
      one of its dependencies.
    bar: shows progress.
  """

  VERSION = tfds.core.Version("1.0.0")
  code_path: Any = epath.Path(__file__)
  bar: tqdm.tqdm = tqdm.tqdm(disable=True)

  def __init__(
    self,
    *,
    packages: tuple[Package, ...] = PACKAGES,
    is_untrained: Callable[[str], bool] = untrained,
    **kwargs: Any,
  ):
    self._packages = packages
    self._is_untrained = is_untrained
    # Writing TFDS's default format, tfrecord, needs TensorFlow.
    super().__init__(**{**kwargs, "file_format": "array_record"})

  def _licences(self) -> str:
    return "\n".join(
      f"{p.spec} ({p.style or 'captions'}): {p.licence}; {p.credit}"
      for p in self._packages
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{__doc__}\nLicences:\n{self._licences()}\n",
      license="; ".join(sorted({p.licence for p in self._packages})),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(SIZE, SIZE, 3), encoding_format="png"
          ),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "name": tfds.features.Text(),
          "concept": tfds.features.Text(),  # "1f600", the same in all styles
          "style": tfds.features.Text(),
          "is_flag": tfds.features.Scalar(np.bool_),
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    png = _rasteriser()  # raises before anything is downloaded
    folder = pathlib.Path(dl_manager.download_dir) / self.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for package in self._packages:
      self.bar.set_description(f"fetching {package.spec}")
      paths[package] = packages_lib.fetch(package, folder)
    self.bar.set_description("reading drawings and captions")
    texts = packages_lib.captions(
      path for package, path in paths.items() if package.style is None
    )["en"]
    drawn = packages_lib.drawings(
      {package.style: path for package, path in paths.items() if package.style},
      texts,
    )
    splits = assign(drawn, self._is_untrained)
    self.bar.total = sum(map(len, splits.values()))
    (pathlib.Path(self.data_dir) / "LICENSES.txt").write_text(
      f"The pictures and captions come from:\n{self._licences()}\n"
      f"The SVGs were drawn in {SIZE} x {SIZE} pixels on white.\n"
    )
    return {
      split: self._generate_examples(split, rows, drawn, texts, png)
      for split, rows in splits.items()
    }

  def _generate_examples(
    self,
    split: str,
    rows: list[tuple[str, Codes]],
    drawn: Mapping[str, Mapping[Codes, str]],
    texts: Mapping[Codes, list[str]],
    png: Callable[[str], bytes],
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    self.bar.set_description(f"drawing {split}")
    for style, codes in rows:
      yield (
        f"{style} {concept_of(codes)}",
        {
          "image": png(drawn[style][codes]),
          "captions": texts[codes],
          "name": texts[codes][0],
          "concept": concept_of(codes),
          "style": style,
          "is_flag": codes[0] in _FLAGS,
        },
      )
      self.bar.update()


def prepare(
  data_dir: str | pathlib.Path | None = None,
  packages: tuple[Package, ...] = PACKAGES,
  is_untrained: Callable[[str], bool] = untrained,
) -> SigjaxEmoji:
  """Returns the builder of the dataset, which is prepared the first time.

  A failed preparation leaves nothing that a later call would take for the
  dataset. If several processes call this, one prepares and the others wait.

  Args:
    data_dir: TFDS's data directory; None: TFDS's own default.
    packages: npm packages to download.
    is_untrained: fn(name of a family) -> whether it is held out.

  Returns:
    The builder. Its features are image (64 x 64 RGB on white; an encoded PNG
    when read with tfds.decode.SkipDecoding), captions (one or two strings),
    name, concept, style and is_flag.

  Raises:
    UserError: npm or resvg-py is missing, or a package could not be downloaded
      or has the wrong checksum.
  """

  def new() -> SigjaxEmoji:
    return SigjaxEmoji(
      data_dir=data_dir, packages=packages, is_untrained=is_untrained
    )

  builder = new()
  if builder.data_path.exists():
    return builder
  folder = pathlib.Path(builder.data_dir).parent
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "prepare.lock", "w", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
    builder = new()  # another process may have prepared it meanwhile
    if builder.data_path.exists():
      return builder
    tfds.disable_progress_bar()  # TFDS's bar; ours is enough
    try:
      with tqdm.tqdm(unit="drawing") as builder.bar:
        builder.download_and_prepare()
        builder.bar.set_description("prepared")
    finally:
      tfds.enable_progress_bar()
      del builder.bar
  log.info("sigjax_emoji is prepared in %s", builder.data_dir)
  return builder
