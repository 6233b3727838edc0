"""sigjax_emoji: emoji drawn in six styles, with English captions, as TFDS.

The drawings are npm packages of SVGs under free licences, fetched once and
never committed; names and keywords are Unicode's (CLDR). No TensorFlow: images
are handed over encoded, and the records are ArrayRecord.

Splits, no drawing being in two of them:
  train        five styles, about 90 % of the families
  held_style   OpenMoji, concepts that are trained on
  held_family  the five styles, families that are not trained on
  held_both    OpenMoji, families that are not trained on
A family is what differs only in gender or direction, so that "woman surfing"
is not tested where "man surfing" is trained; see family(). Flags look alike in
every style: they are in train alone, marked is_flag. A few concepts of one
family ("cook", "man cook") are one and the same picture in some styles.
"""

import fcntl
import hashlib
import io
import logging
import pathlib

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
import tqdm

from sigjax import errors
from sigjax.data.emoji import packages as packages_lib

log = logging.getLogger("sigjax")

PACKAGES = packages_lib.PACKAGES
SIZE = 64  # pixels, both sides
HELD_STYLE = "openmoji"

_FLAGS = {0x1F38C, 0x1F3C1, 0x1F3F3, 0x1F3F4, 0x1F6A9, *range(0x1F1E6, 0x1F200)}
# People of whom two or more make a couple or a family, and whole such groups.
_PEOPLE = {0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1, 0x1F9D2}
_GROUPS = {0x1F46A, 0x1F46B, 0x1F46C, 0x1F46D, 0x1F48F, 0x1F491}
# Joiner, female, male, facing right, man, woman, person.
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


def family(codes):
  """Returns the name of the family of a sequence of code points (less FE0F).

  Its members are all trained on or all held out: the sequence without gender,
  direction and joiners, or one name for all clocks, all moons, all arrows, and
  all groups of people (some styles draw many of these alike).
  """
  if codes[0] in _GROUPS or sum(c in _PEOPLE for c in codes) > 1:
    return "groups"
  for name, members in _ALIKE.items():
    if len(codes) == 1 and codes[0] in members:
      return name
  return _concept(c for c in codes if c not in _STRIPPED)


def untrained(name):
  """True for the tenth (by SHA-256) of family names that is held out."""
  return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10 == 0


def _concept(codes):
  return "-".join(f"{c:x}" for c in codes)


def assign(drawn, is_untrained):
  """Splits drawings into {split: [(style, code points)]}; see the module.

  What only OpenMoji draws is in no split: of a trained family it is neither
  trained on nor honestly new, and both new tests are to ask the same concepts.
  """
  splits = {
    name: [] for name in ("train", "held_style", "held_family", "held_both")
  }
  shared = set().union(*(drawn[s] for s in drawn if s != HELD_STYLE))
  for style, concepts in drawn.items():
    for codes in concepts:
      flag = codes[0] in _FLAGS
      new = is_untrained(family(codes)) and not flag
      if style != HELD_STYLE:
        splits["held_family" if new else "train"].append((style, codes))
      elif codes in shared and not flag:
        splits["held_both" if new else "held_style"].append((style, codes))
  return splits


def _rasteriser():
  """Returns a function from an SVG to PNG bytes, RGB on white, SIZE square."""
  try:
    import resvg_py  # pylint: disable=import-outside-toplevel
  except ImportError:
    raise errors.UserError(
      "the emoji dataset is drawn by resvg-py, which is not installed; "
      "pip install 'sigjax[emoji]'"
    ) from None

  def png(svg):
    drawn = resvg_py.svg_to_bytes(
      svg_string=svg,
      width=SIZE,
      height=SIZE,
      background="#ffffff",
      skip_system_fonts=True,
    )  # none is used, and loading them is slow
    out = io.BytesIO()
    # White shows nothing through: the alpha channel carries nothing.
    Image.open(io.BytesIO(drawn)).convert("RGB").save(out, "PNG")
    return out.getvalue()

  return png


class SigjaxEmoji(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder "sigjax_emoji"; prepare() is its short form."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS would look for it with a package that it does not depend on.
  code_path = epath.Path(__file__)
  bar = tqdm.tqdm(disable=True)

  def __init__(self, *, packages=PACKAGES, is_untrained=untrained, **kwargs):
    self._packages = packages
    self._is_untrained = is_untrained
    # TFDS's own default, tfrecord, would need TensorFlow.
    super().__init__(**{**kwargs, "file_format": "array_record"})

  def _licences(self):
    return "\n".join(
      f"{p.spec} ({p.style or 'captions'}): {p.licence}; {p.credit}"
      for p in self._packages
    )

  def _info(self):
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

  def _split_generators(self, dl_manager):
    png = _rasteriser()  # fails before anything is fetched
    folder = pathlib.Path(dl_manager.download_dir) / self.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for package in self._packages:
      self.bar.set_description(f"fetching {package.spec}")
      paths[package] = packages_lib.fetch(package, folder)
    self.bar.set_description("reading drawings and captions")
    texts = packages_lib.captions(
      path for package, path in paths.items() if package.style is None
    )
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

  def _generate_examples(self, split, rows, drawn, texts, png):
    self.bar.set_description(f"drawing {split}")
    for style, codes in rows:
      yield (
        f"{style} {_concept(codes)}",
        {
          "image": png(drawn[style][codes]),
          "captions": texts[codes],
          "name": texts[codes][0],
          "concept": _concept(codes),
          "style": style,
          "is_flag": codes[0] in _FLAGS,
        },
      )
      self.bar.update()


def prepare(data_dir=None, packages=PACKAGES, is_untrained=untrained):
  """Returns the builder of the prepared dataset; prepares it the first time.

  Args:
    data_dir: TFDS's data directory; None is TFDS's own default.
    packages: what to fetch.
    is_untrained: family name -> bool, which families to hold out.

  Returns:
    The builder. Its features are image (encoded PNG, 64 x 64 RGB on white, when
    read with tfds.decode.SkipDecoding), captions (one or two strings), name,
    concept, style and is_flag.

  Raises:
    UserError: npm or resvg-py is missing, or a package did not arrive whole.
      Nothing half-prepared is left that a later call would take for whole.
  """

  def new():
    return SigjaxEmoji(
      data_dir=data_dir, packages=packages, is_untrained=is_untrained
    )

  builder = new()
  if builder.data_path.exists():
    return builder
  folder = pathlib.Path(builder.data_dir).parent
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "prepare.lock", "w", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the file is closed
    builder = new()  # sees what another process prepared meanwhile
    if builder.data_path.exists():
      return builder
    tfds.disable_progress_bar()  # theirs: one bar is enough
    try:
      with tqdm.tqdm(unit="drawing") as builder.bar:
        builder.download_and_prepare()
        builder.bar.set_description("prepared")
    finally:
      tfds.enable_progress_bar()
      del builder.bar
  log.info("sigjax_emoji is prepared in %s", builder.data_dir)
  return builder
