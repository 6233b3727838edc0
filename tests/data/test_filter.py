"""Filters, shares and groups, on records that are lists."""

import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.data import faults, kinds
from sigjax.data import filter as filter_lib
from sigjax.data import source as source_lib
from sigjax.data.example import captions
from sigjax.data.source import Source


def png(width, height):
  data = io.BytesIO()
  Image.new("RGB", (width, height)).save(data, "PNG")
  return data.getvalue()


def example(i):
  return {
    "n": i,
    "less": -i,
    "f": i / 2,
    "tag": "abc"[i % 3],
    "b": i % 2 == 0,
    "raw": f"é{i % 4}".encode(),
    "gap": None if i % 5 == 0 else i,
    "hole": "x" if i % 2 else None,
    "mixed": i if i % 2 else "x",
    "lists": [1, 2, 3],
    "captions": ["x" * i, "y" * (i + 1)],
    "text": "é" * i,
    "nested": {"text": [b"z" * i]},
    "image": png(10 + i, 20),
  }


@pytest.fixture
def source():
  return Source(
    "s", [example(i) for i in range(12)], faults={"missing image": 2}
  )


class Columns(list):
  """Records that give columns by themselves, in two parts, but no examples."""

  def __getitem__(self, i):
    raise AssertionError("read")

  def column(self, name):
    if name != "n":
      return None
    return (
      source_lib.as_column([x["n"] for x in part], name, "s")
      for part in (list(self)[:5], list(self)[5:])
    )


def kept(source):
  if source.members is None:
    return list(range(len(source.records)))
  return np.ravel(source.members).tolist()


@pytest.mark.parametrize(
  "key, wanted, want",
  [
    ("n", 5, [5]),
    ("n", [5, 7, 99], [5, 7]),
    ("n", (3, 6), [3, 4, 5, 6]),
    ("n", (None, 1), [0, 1]),
    ("n", (10, None), [10, 11]),
    ("n", 5.0, [5]),
    ("n", (0, 0), [0]),
    ("less", (None, -9), [9, 10, 11]),
    ("n", (-5, 0), [0]),
    ("f", (0.5, 1.0), [1, 2]),
    ("tag", "a", [0, 3, 6, 9]),
    ("tag", ["b", "c", 7], [i for i in range(12) if i % 3]),
    ("b", 0, [1, 3, 5, 7, 9, 11]),
    ("b", True, [0, 2, 4, 6, 8, 10]),
    ("raw", "é1", [1, 5, 9]),
    ("gap", (None, 4), [1, 2, 3, 4]),
    ("hole", ["x"], [1, 3, 5, 7, 9, 11]),
    ("width", (19, None), [9, 10, 11]),
    ("height", (20, 20), list(range(12))),
    ("caption_length", (3, 7), [3, 4, 5, 6]),  # both captions
    ("captions_length", (3, 7), [3, 4, 5, 6]),
    ("text_length", (2, 3), [2, 3]),  # characters, not bytes
    ("nested_length", (None, 1), [1]),
  ],
)
def test_where(source, key, wanted, want):
  found = filter_lib.where(source, key, wanted)
  assert kept(found) == want and len(found) == len(want)
  assert isinstance(found.members, np.ndarray)
  assert found.members.dtype == np.int32
  blank = (
    {"missing caption": 1} if key in ("text_length", "nested_length") else {}
  )
  assert found.faults == {"missing image": 2, **blank}
  # Of what is narrowed already, and of groups.
  half = filter_lib.where(source, "n", (4, None))
  both = [i for i in want if i >= 4]
  groups = source.replaced(members=[np.array([i, i + 6]) for i in range(6)])
  if both:
    assert kept(filter_lib.where(half, key, wanted)) == both
  members = [m.tolist() for m in filter_lib.where(groups, key, wanted).members]
  assert members == [
    m for m in ([j for j in (i, i + 6) if j in want] for i in range(6)) if m
  ]


@pytest.mark.parametrize(
  "key, wanted, message",
  [
    ("n", 99, "no example with n=99; there is, for instance: 0, 1, "),
    ("n", "5", "no example with n='5'"),
    ("tag", 1, "no example with tag=1"),
    ("n", (20, None), r"no example with n=\(20, None\)"),
    ("n", (None, None), "not understood"),
    ("n", (1, 2, 3), "not understood"),
    ("n", ("a", "b"), "not understood"),
    ("n", [], "not understood"),
    ("n", [256, None], "not understood"),
    ("n", None, "not understood"),
    ("tag", (1, 2), "holds texts"),
    ("lists", 1, "more than one value"),
    ("mixed", 1, "texts in some examples and numbers in others"),
    ("tga", "a", 'feature of s "tga" is not known .*mean "tag"'),
    ("tga_length", (1, 2), '"tga_length" is not known'),
  ],
)
def test_what_where_refuses(source, key, wanted, message):
  with pytest.raises(errors.UserError, match=message) as e:
    filter_lib.where(source, key, wanted)
  assert "\n" not in str(e.value)


def test_columns_are_used_and_have_to_be_whole():
  records = Columns([example(i) for i in range(12)])
  source = Source("s", records)
  found = filter_lib.where(source, "n", (3, 6))
  assert kept(found) == [3, 4, 5, 6]
  assert kept(filter_lib.where(found, "n", [2, 5])) == [5]
  groups = source.replaced(members=[np.array([0, 1]), np.array([2, 5])])
  assert [
    m.tolist() for m in filter_lib.where(groups, "n", [2, 5]).members
  ] == [[2, 5]]
  assert [m.tolist() for m in filter_lib.grouped(found, "n").members] == [
    [3],
    [4],
    [5],
    [6],
  ]
  records.append(example(12))
  records.column = lambda name: [source_lib.as_column(range(12), name, "s")]
  with pytest.raises(errors.UserError, match='13 records, but "n" .* of 12'):
    filter_lib.where(source, "n", 3)


def test_examples_that_cannot_be_read_do_not_fit(source, caplog):
  source.records[3]["image"] = b"no image"
  source.records[0]["image"] = b""
  found = filter_lib.where(source, "width", (0, 1000))
  assert kept(found) == [1, 2, *range(4, 12)]
  assert found.faults == {"missing image": 2, "undecodable image": 2}
  assert "such as s[0]" in caplog.text
  source.records[4]["captions"] = [b"\xff"]
  found = filter_lib.where(found, "caption_length", (0, 8))
  assert kept(found) == [1, 2, 5, 6, 7]
  assert found.faults["caption not UTF-8"] == 1
  assert source.faults == {"missing image": 2}  # its own are as they were


def test_brief_spares_the_image(source):
  class Brief(list):
    def __getitem__(self, i):
      raise AssertionError("the image was read")

    def brief(self, i):
      return {"n": list(self)[i]["n"], "captions": ["x"]}

  narrow = Source("s", Brief(source.records))
  assert kept(filter_lib.where(narrow, "n", (3, 4))) == [3, 4]
  assert kept(filter_lib.where(narrow, "caption_length", 1)) == list(range(12))
  assert list(kinds.all_captions(narrow, "captions")) == ["x"] * 12


def test_parts_share_nothing_and_are_everything():
  source = Source("s", range(20_000))
  ends = [0, 0.05, 0.3, 0.9, 1]
  parts = [
    kept(filter_lib.part(source, share)) for share in zip(ends, ends[1:])
  ]
  assert sorted(sum(parts, [])) == list(range(20_000))
  for found, share in zip(parts, np.diff(ends)):
    assert abs(len(found) - share * 20_000) < 300
    assert found == sorted(found)
    # They come from everywhere.
    assert abs(np.mean(found) - 10_000) < 700
  again = kept(filter_lib.part(Source("t", range(20_000)), (0.3, 0.9)))
  assert again == parts[2]
  # What is appended changes no record's part; what it is may never change.
  more = kept(filter_lib.part(Source("t", range(20_100)), (0.3, 0.9)))
  assert more[: len(again)] == again
  assert kept(filter_lib.part(Source("t", range(40)), (0, 0.1))) == [
    10,
    18,
    21,
  ]


@pytest.mark.parametrize(
  "share",
  [
    0.9,
    (0.5,),
    (0.5, 0.5),
    (0.9, 0.1),
    (-1, 0.5),
    (0, 1.1),
    "[:90%]",
    (0, "a"),
  ],
)
def test_parts_that_cannot_be(source, share):
  with pytest.raises(errors.UserError, match="part is a share"):
    filter_lib.part(source, share)


def test_an_empty_part(source):
  with pytest.raises(errors.UserError, match="none of its 12"):
    filter_lib.part(source, (0, 1e-9))


def test_open_source_takes_the_part_first(monkeypatch):
  records = [example(i) for i in range(100)]
  monkeypatch.setitem(
    kinds.SOURCES, "mine", lambda: lambda: Source("s", records)
  )
  a, b = (
    kinds.open_source("mine", part=share, only=dict(n=(10, None)))
    for share in ((0, 0.8), (0.8, 1))
  )
  assert sorted(kept(a) + kept(b)) == list(range(10, 100))
  assert set(kept(b)) < set(
    kept(filter_lib.part(Source("s", records), (0.8, 1)))
  )


def test_numbers_of_many_are_no_list():
  source = Source("s", range(1000))
  part = filter_lib.part(source, (0, 0.5))
  for found in (source, part):
    assert isinstance(found.numbers(), np.ndarray)
  assert part.numbers().tolist() == kept(part)
  assert part.pick(3) == kept(part)[3] and type(part.pick(3)) is int


def column(*values):
  found = source_lib.as_column(values, "f", "s")
  return [
    None if gone else value
    for value, gone in zip(found["value"].tolist(), found["missing"].tolist())
  ]


@pytest.mark.parametrize(
  "values, want",
  [
    ([1, 2**62], [1, 2**62]),
    ([2**53 + 1, None], [2**53 + 1, None]),  # not through a float
    ([2**63, 1], [2**63, 1]),
    ([0.5, 1, None], [0.5, 1.0, None]),
    (["a", None, b"\xc3\xa9"], ["a", None, "é"]),
    (["007", "7", " ", ""], ["007", "7", None, None]),
    ([float("nan"), None, 3], [None, None, 3]),
    ([None, None], [None, None]),
    ([], []),
    ([np.int64(3), np.bool_(True)], [3, True]),
  ],
)
def test_columns_are_exact(values, want):
  assert column(*values) == want


def test_what_no_column_holds_exactly():
  for values in ([2**53 + 1, 0.5], [2**64], [object()]):
    with pytest.raises(errors.UserError, match="cannot be compared exactly"):
      column(*values)


@pytest.mark.parametrize(
  "values, want",
  [
    (["a", "", None, "a", " "], [[0, 3], [1], [2], [4]]),
    ([1, None, None, 1, float("nan")], [[0, 3], [1], [2], [4]]),
    ([2**53, 2**53 + 1, None, 2**53, 0], [[0, 3], [1], [2], [4]]),
    (["007", "7", "7", "07", "007"], [[0, 4], [1, 2], [3]]),
  ],
)
def test_groups_are_of_equal_values_and_nothing_else(values, want):
  found = filter_lib.grouped(Source("s", [{"k": v} for v in values]), "k")
  assert [m.tolist() for m in found.members] == want


def test_what_is_missing_fits_nothing():
  source = Source("s", [{"k": v, "c": v} for v in ("a", None, "", "b")])
  assert kept(filter_lib.where(source, "k", ["a", "b", ""])) == [0, 3]
  source = Source("s", [{"k": v} for v in (5, None, -3, 0)])
  assert kept(filter_lib.where(source, "k", (None, 0))) == [2, 3]
  source = Source("s", [{"c": v} for v in ("ab", None, [None, " "], "b")])
  assert kept(filter_lib.where(source, "c_length", (0, 9))) == [0, 3]


def test_a_feature_that_the_first_examples_lack():
  class Records(list):
    def __getitem__(self, i):
      if i in (0, 2):
        raise OSError("broken")
      return super().__getitem__(i)

  records = Records(
    {"k": 1, "w": i} if i > 200 else {"k": 1} for i in range(300)
  )
  found = filter_lib.where(Source("s", records), "w", (250, None))
  assert kept(found) == list(range(250, 300))
  assert found.faults == {"unreadable": 2}
  with pytest.raises(errors.UserError, match='"v" is not known.*: k, w'):
    filter_lib.where(Source("s", records), "v", 1)


def test_parts_are_of_images_not_of_records():
  class Rows(list):
    def image_ids(self):
      return [row["file"] for row in self]

  rows = Rows({"file": f"{i % 500}.jpg", "i": i} for i in range(2000))
  source = Source("s", rows)
  train, val = (filter_lib.part(source, p) for p in ((0, 0.9), (0.9, 1)))
  assert sorted(kept(train) + kept(val)) == list(range(2000))
  assert not {i % 500 for i in kept(train)} & {i % 500 for i in kept(val)}
  # Where each image has one record, nothing has changed.
  once = Source("s", Rows(rows[:500]))
  plain = Source("s", list(rows[:500]))
  assert kept(filter_lib.part(once, (0.9, 1))) == kept(
    filter_lib.part(plain, (0.9, 1))
  )
  # Groups keep the members that fit.
  groups = filter_lib.part(filter_lib.grouped(source, "file"), (0.9, 1))
  assert {len(m) for m in groups.members} == {4}
  assert sorted(np.concatenate(groups.members).tolist()) == kept(val)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  values=st.lists(
    st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=1
  )
  | st.lists(st.one_of(st.none(), st.text(max_size=4)), min_size=1),
  data=st.data(),
)
def test_selection_agrees_with_plain_python(values, data):
  source = Source("s", [{"k": v} for v in values])
  present = lambda v: v is not None and (not isinstance(v, str) or v.strip())
  groups = {}
  for i, v in enumerate(values):
    # U arrays cannot hold trailing NULs: such texts are refused.
    groups.setdefault(v if present(v) else (None, i), []).append(i)
  if any(isinstance(v, str) and v.endswith("\0") for v in values):
    return
  found = filter_lib.grouped(source, "k")
  assert [m.tolist() for m in found.members] == list(groups.values())
  wanted = data.draw(st.sampled_from(values))
  if present(wanted):
    fits = [i for i, v in enumerate(values) if v == wanted]
    assert kept(filter_lib.where(source, "k", wanted)) == fits
  if all(not isinstance(v, str) for v in values):
    low = data.draw(st.integers(-(2**63), 2**63 - 1))
    fits = [i for i, v in enumerate(values) if v is not None and v >= low]
    if fits:
      assert kept(filter_lib.where(source, "k", (low, None))) == fits


def test_identity():
  class Sharded(list):
    identity = "3f"

  a = Source("s", Sharded([example(i) for i in range(12)]))
  assert a.identity() == {"data": "3f", "records": 12, "members": None}
  narrowed = [
    filter_lib.where(a, "n", (3, 6)),
    filter_lib.where(a, "n", (3, 7)),
    filter_lib.part(a, (0, 0.5)),
    filter_lib.grouped(a, "tag"),
    filter_lib.grouped(a, "b"),
    kinds.shuffled(a, "tag"),
    Source("other", list(a.records)),
  ]
  told = [json.dumps(x.identity()) for x in [a, *narrowed]]
  assert len(set(told)) == len(told)
  again = filter_lib.where(Source("t", a.records), "n", (3, 6)).identity()
  assert json.loads(json.dumps(again)) == narrowed[0].identity()


def test_shuffled_keeps_the_faults(source):
  assert kinds.shuffled(source, "tag").faults == {"missing image": 2}


def test_shuffled_reads_no_image_for_a_brief():
  class Records(list):
    brief = list.__getitem__

    def __getitem__(self, i):
      return {**self.brief(i), "image": b"%d" % i}

  records = Records({"n": i, "tag": f"t{i}"} for i in range(9))
  found = kinds.shuffled(Source("s", records), "tag")
  briefs = [found.brief(i) for i in range(9)]
  whole = [found.read(i) for i in range(9)]
  assert all("image" not in brief for brief in briefs)
  assert whole == [{**x, "image": b"%d" % i} for i, x in enumerate(briefs)]
  assert {x["tag"] for x in briefs} == {f"t{i}" for i in range(9)}
  assert [x["tag"] for x in briefs] != [f"t{i}" for i in range(9)]
  images = kinds.shuffled(Source("s", records), "image")
  assert images.brief(3) == records.brief(3)
  assert images.read(3)["image"] != b"3"


def test_captions_that_cannot_be():
  for text, kind in (
    ("a\0b", "caption with NUL"),
    (b"\xff", "caption not UTF-8"),
    ("half \ud83d", "caption not UTF-8"),
    ("x" * 65537, "caption too long"),
  ):
    with pytest.raises(faults.BadExample) as e:
      captions.captions({"c": ["a", text]}, "c")
    assert e.value.kind == kind
  assert captions.captions({"c": "x" * 65536}, "c") == ["x" * 65536]
  for nothing in ("", b" \n", None, [], ["", None, b"\t"], {"text": [""]}):
    with pytest.raises(faults.BadExample) as e:
      captions.captions({"c": nothing}, "c")
    assert e.value.kind == "missing caption"
  assert captions.captions({"c": ["", "a ", None, b"b"]}, "c") == ["a ", "b"]
  for other in (3, [1], [["a"]], [{"raw": "a"}], np.zeros(2)):
    with pytest.raises(errors.UserError, match="where a text or several"):
      captions.captions({"c": other}, "c")


def test_captions_of_one_image_are_filtered():
  """Where a feature belongs to captions, an image keeps those that fit."""

  class Captions:
    """Two images; image i has captions i0, i1, i2 in three languages."""

    def __init__(self, kept=(True,) * 6):
      self.kept = np.array(kept)

    def __len__(self):
      return 2

    def __getitem__(self, i):
      texts = np.array([f"{i}{k}" for k in range(3)])
      return {"captions": texts[self.kept[3 * i : 3 * i + 3]].tolist()}

    def caption_column(self, name):
      if name == "language":
        return source_lib.as_column(["en", "de", None, "en", "", "fr"], "", "")
      return None

    def with_captions(self, kept):
      return Captions(kept), kept.reshape(2, 3).any(1)

  source = Source("s", Captions())
  found = filter_lib.where(source, "language", "en")
  assert list(kinds.all_captions(found, "captions")) == ["00", "10"]
  found = filter_lib.where(source, "language", "fr")
  assert list(kinds.all_captions(found, "captions")) == ["12"]
  assert len(found) == 1 and found.numbers().tolist() == [1]
  with pytest.raises(errors.UserError, match="for instance: de, en, fr"):
    filter_lib.where(source, "language", "es")


TEXTS = [
  dict(captions=["a", "b", "c"], language=["en", "de", "en"], n=0),
  dict(captions=["d", " "], language=["de", "sw"], n=1),
  dict(captions=["e"], language=[b"en"], n=2),
]


def test_captions_are_filtered_by_their_language():
  source = Source("s", TEXTS)
  found = filter_lib.where(source, "language", ["en", "sw"])
  assert found.numbers().tolist() == [0, 1, 2]
  assert found[0] == dict(captions=["a", "c"], language=["en", "en"], n=0)
  english = filter_lib.where(source, "language", "en")
  assert english.numbers().tolist() == [0, 2]
  assert english[1]["captions"] == ["e"] and english.brief(2)["n"] == 2
  twice = filter_lib.where(
    filter_lib.where(source, "n", (1, None)), "language", "de"
  )
  assert twice.numbers().tolist() == [1] and twice[0]["captions"] == ["d"]
  for wanted in ("we", ["en", "we"]):
    with pytest.raises(
      errors.UserError, match='no example with .*we.*did you mean "sw"'
    ):
      filter_lib.where(source, "language", wanted)
  # One whose languages are not as many as its captions is left out and told.
  bad = Source("s", [*TEXTS, dict(captions=["f"], language=["en", "de"])])
  found = filter_lib.where(bad, "language", "en")
  assert len(found) == 2 and found.faults == {"values unlike captions": 1}


def test_each_caption_is_an_element(source):
  """Counted by caption, an epoch shows a, b, c, d, e; blank ones are none."""
  found = filter_lib.each_caption(Source("s", TEXTS))
  assert [found[i] for i in range(len(found))] == [
    dict(captions=["a"], language=["en"], n=0),
    dict(captions=["b"], language=["de"], n=0),
    dict(captions=["c"], language=["en"], n=0),
    dict(captions=["d"], language=["de"], n=1),
    dict(captions=["e"], language=[b"en"], n=2),
  ]
  assert list(found.image_ids()) == [0, 0, 0, 1, 2]
  # Of a part, and in groups.
  some = filter_lib.where(Source("s", TEXTS), "n", (0, 1))
  groups = filter_lib.grouped(filter_lib.each_caption(some), "n")
  assert [m.tolist() for m in groups.members] == [[0, 1, 2], [3]]
  # Fields that have no value for each caption stay.
  assert filter_lib.each_caption(source)[3]["lists"] == [1, 2, 3]
  with pytest.raises(
    errors.UserError, match='"texts" is not .*: caption, image'
  ):
    kinds.open_source("tar", shards="x", element="texts")


def test_a_source_needs_a_kind():
  for section, words in (
    ({}, "it has only: nothing"),
    ({"kid": "tar", "shards": "x"}, "needs a kind, .*it has only: kid, shards"),
    ({"kind": ["tar"]}, "kind="),
  ):
    with pytest.raises(errors.UserError, match=words) as e:
      kinds.open_source(**section)
    assert "\n" not in str(e.value)
