"""Targets with regions, for a captioning decoder."""

import collections
import re

import numpy as np
import pytest

from sigjax import errors
from sigjax.data.example import preprocess
from sigjax.data.faults import BadExample

OBJECTS = dict(
  bbox=np.array([[0.0, 0.1, 0.5, 1.0], [0.25, 0.5, 0.75, 0.6]]),
  text=[b"a cat", "the dog"],
)


class Letters:
  """A tokenizer that keeps the text."""

  vocab_size = 300

  def __call__(self, text, length, pad):
    return np.array([ord(c) for c in text.ljust(length)[:length]], np.int32)


def target(objects=None, p=0.5, seed=0):
  fn = preprocess.parse(f"regions(60,p={p})", tokenizer=Letters())
  example = dict(
    text="A Scene", objects=OBJECTS if objects is None else objects
  )
  out = fn(example, np.random.default_rng(seed))
  assert out["text"] == "A Scene"
  return "".join(map(chr, out["target"])).rstrip()


def test_the_three_tasks():
  """Each region with its own box, in both directions, and the caption."""
  found = collections.Counter(target(seed=seed) for seed in range(400))
  assert set(found) == {
    "Cap: A Scene",
    "ARef: a cat : 0 100 500 999",
    "GCap: 0 100 500 999 : a cat",
    "ARef: the dog : 250 500 749 599",
    "GCap: 250 500 749 599 : the dog",
  }
  assert found["Cap: A Scene"] == pytest.approx(200, abs=40)
  assert min(found.values()) > 30


def test_images_without_regions():
  assert target(dict(bbox=np.zeros((0, 4)), text=[]), p=1.0) == "Cap: A Scene"


@pytest.mark.parametrize(
  "objects, error, says",
  [
    (dict(bbox=[[0, 0, 1, 1]]), errors.UserError, '"text" is not known'),
    (dict(OBJECTS, text=["x"]), errors.UserError, "2 of bbox, but 1 of text"),
    (dict(OBJECTS, text=[1, 2]), errors.UserError, "holds int"),
    (
      dict(bbox=[[0, 0, 2, 1]], text=["x"]),
      BadExample,
      re.escape("[0.0, 0.0, 2.0, 1.0] is not within"),
    ),
  ],
)
def test_mistakes_are_one_line(objects, error, says):
  with pytest.raises(error, match=says):
    target(objects, p=1.0)
