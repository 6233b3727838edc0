"""Names and templates against those of the original evaluators."""

import json
import pathlib

import numpy as np
import pytest

from sigjax.data.source import Source
from sigjax.evaluators import prompts

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
  "case", json.loads((GOLDEN / "canonical.json").read_text())
)
def test_canonical(case):
  for column, keep in (
    ("plain", None),
    ("keep_braces", "{}"),
    ("keep_comma", ","),
  ):
    assert prompts.canonical(case["text"], keep) == case[column]


def classes(source, label, kind, templates="plain", is_canonical=False):
  ids, texts = prompts.classes(
    source, label, kind, templates, is_canonical, 0.01
  )
  return [numbers.tolist() for numbers in ids], texts


def test_classes_from_captions():
  records = [
    dict(c=b"x", captions=[b"one", b"two"]),
    dict(c=b"y", captions=[b"three"]),
    dict(c=None, captions=[b"five"]),
    dict(c=b"x", captions=[b"one", b"four, 4"]),
    dict(c=b"y", captions=[b"\xff"]),
    dict(c=b"y", captions=[b"Three!"]),
  ]
  ids, texts = classes(Source("s", records), "c", "captions")
  assert ids == [[0], [1], [], [0], [], [1]]
  assert texts == [["one", "two", "four, 4"], ["three", "Three!"]]
  # A caption is no name: what is behind its comma stays.
  _, texts = classes(Source("s", records), "c", "captions", is_canonical=True)
  assert texts == [["one", "two", "four 4"], ["three"]]


def test_classes_from_labels():
  records = [dict(label=np.int64(i), image=b"") for i in (1, 0, -1, 2)]
  names = dict(label=["A_b, or B", "c"])
  source = Source("s", records, label_names=names)
  ids, texts = classes(source, "label", "labels", "photo")
  assert ids == [[1], [0], [], []]
  assert texts[0][:2] == ["A b, or B", "a A b, or B"] and len(texts[0]) == 7
  _, texts = classes(source, "label", "labels", "clip_7", is_canonical=True)
  assert texts[0][0] == "itap of a a b" and texts[1][-1].endswith("small c")


def test_classes_of_imagenet():
  """Lists of numbers as ReaL has them, an empty one included."""
  values = [[0, 999], np.array([], np.int64), np.array([134]), 517, -1, None]
  source = Source("s", [dict(real=v) for v in values])
  ids, texts = classes(source, "real", "imagenet", "clip_80", True)
  assert ids == [[0, 999], [], [134], [517], [], []]
  assert len(texts) == 1000 and {len(forms) for forms in texts} == {80}
  assert texts[0][0] == "a bad photo of a tench"
  assert texts[999][-1] == "a tattoo of the toilet paper"
  # Two classes with a name that two things have, and one in brackets.
  assert texts[134][0].endswith("a crane bird")
  assert texts[517][0].endswith("a construction crane")
  assert texts[21][0].endswith("a kite bird of prey")


def test_clip_7_are_of_the_80():
  every = prompts.TEMPLATES["clip_80"]
  assert len(set(every)) == 80
  assert set(prompts.TEMPLATES["clip_7"]) < set(every)
  assert all(form.count("{}") == 1 for form in every)
