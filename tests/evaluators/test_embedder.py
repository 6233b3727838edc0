"""What a round of evaluations embeds: each split and each text once."""

import collections

from made import RAW, embed_by_number, opened, unit
import numpy as np
import pytest

from sigjax import evaluators
from sigjax.data.source import Source
from sigjax.evaluators.embedder import Embedder


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def records(start, n):
  return [
    dict(
      image=np.int32(i), captions=[f"t{i % 4}", "all"], concept=i % 4, lang="en"
    )
    for i in range(start, start + n)
  ]


def test_a_round_embeds_each_split_and_text_once(mesh, monkeypatch, rng):
  zimg = unit(rng, 60, 4)
  z = {text: unit(rng, 4) for text in ("all", "t0", "t1", "t2", "t3")}
  test, train = Source("test", records(0, 20)), Source("train", records(20, 40))
  data = opened(monkeypatch, test, "test")
  data_train = opened(monkeypatch, train, "train")
  zeroshot = dict(
    type="zeroshot", data=data, label="concept", classes="captions", ks=(1, 2)
  )
  sections = [
    zeroshot,
    dict(type="retrieval", data=data, group="concept"),
    dict(type="retrieval", data=data, by="lang"),
    dict(
      type="fewshot",
      data=data_train,
      data_test=data,
      label="concept",
      shots=(1, 5),
    ),
    dict(zeroshot, data=data_train),
  ]
  made = [evaluators.make("x", None, s, RAW) for s in sections]
  calls = []
  embed = embed_by_number(zimg, z.__getitem__, calls)
  embedder = Embedder(embed, None)
  together = [e.run(embedder, mesh) for e in made]
  # Two batches of the test images, three of the others; 5 texts are one batch.
  assert len(calls) == 2 + 3 + 1
  seen = collections.Counter(sum(calls, []))
  assert [seen[i] for i in range(1, 60)] == [1] * 59  # 0 fills blank rows
  assert [seen[text] for text in z] == [1] * 5
  calls.clear()
  apart = [e.run(Embedder(embed, None), mesh) for e in made]
  assert together == apart
  assert len(calls) > 2 * (2 + 3 + 1)


class OneFile(list):
  identity = "the digest of a file that several splits are part of"


def test_what_is_another_split(monkeypatch, rng):
  """Another name, other elements or other preprocessing; not another batch."""
  zimg, calls = unit(rng, 60, 4), []
  embedder = Embedder(embed_by_number(zimg, calls=calls), None)
  first = Source("a[:10]", OneFile(records(0, 10)))
  one = embedder.images(first, "keep('image')", 16, 0.01)
  assert embedder.images(first, "keep('image')", 8, 0.01) is one
  np.testing.assert_array_equal(one.z, zimg[:10])
  assert len(calls) == 1
  for source, pp in (
    (first, "keep('image','image')"),
    (Source("a[10:]", OneFile(records(10, 10))), "keep('image')"),
    (first.replaced(members=np.arange(5)[:, None]), "keep('image')"),
    (first.replaced(members=np.arange(5, 10)[:, None]), "keep('image')"),
  ):
    assert embedder.images(source, pp, 16, 0.01) is not one
  assert len(calls) == 5
