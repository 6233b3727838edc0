"""Filters, shares and groups, on records that are lists."""

import io

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
    "lists": [1, 2],
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
      np.array([x["n"] for x in part])
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
    ("hole", ["x", "y"], [1, 3, 5, 7, 9, 11]),
    ("width", (19, None), [9, 10, 11]),
    ("height", (20, 20), list(range(12))),
    ("caption_length", (3, 7), [3, 4, 5, 6]),  # both captions
    ("captions_length", (3, 7), [3, 4, 5, 6]),
    ("text_length", (2, 3), [2, 3]),  # characters, not bytes
    ("nested_length", (None, 1), [0, 1]),
  ],
)
def test_where(source, key, wanted, want):
  found = filter_lib.where(source, key, wanted)
  assert kept(found) == want and len(found) == len(want)
  assert isinstance(found.members, np.ndarray)
  assert found.members.dtype == np.int32
  assert found.faults == {"missing image": 2}
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
  records.column = lambda name: [np.arange(12)]
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


def test_as_column():
  column = lambda *values: source_lib.as_column(values, "f", "s")
  assert column(1, 2**62).tolist() == [1, 2**62]
  assert column("a", None, b"\xc3\xa9").tolist() == ["a", "", "é"]
  np.testing.assert_array_equal(column(1, None), [1, np.nan])
  assert np.isnan(column(None, None)).all() and column().shape == (0,)
  assert column(np.int64(3), np.bool_(True)).tolist() == [3, 1]


def test_shuffled_keeps_the_faults(source):
  assert kinds.shuffled(source, "tag").faults == {"missing image": 2}


def test_captions_that_cannot_be():
  for text, kind in (
    (b"\xff", "caption not UTF-8"),
    ("half \ud83d", "caption not UTF-8"),
    ("x" * 65537, "caption too long"),
  ):
    with pytest.raises(faults.BadExample) as e:
      captions.captions({"c": ["a", text]}, "c")
    assert e.value.kind == kind
  assert captions.captions({"c": "x" * 65536}, "c") == ["x" * 65536]
