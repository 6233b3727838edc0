"""Several sources mixed by weight, through the pipeline."""

import json

import numpy as np
import pytest

from sigjax import errors
from sigjax.data import faults, kinds
from sigjax.data import filter as filter_lib
from sigjax.data.batches import pipeline
from sigjax.data.source import Mixture, Source


def make(name, n, **attributes):
  records = [{"name": name, "i": i, "c": i // 3} for i in range(n)]
  return Source(name, records, **attributes)


def mix(weights=(5, 2, 3)):
  return Mixture([make("a", 50), make("b", 34), make("c", 90)], weights)


def show(example, rng):
  return {
    "name": example["name"],
    "i": np.int32(example["i"]),
    "r": rng.random(2),
  }


def batches(source, size=20, fn=show, **kwargs):
  return pipeline.train_batches(
    source, fn, batch_size=size, **{"seed": 0, "num_threads": 2, **kwargs}
  )


def take(run, n):
  out = [next(run) for _ in range(n)]
  return {
    key: np.stack(
      [
        batch[key].astype("U1") if key == "name" else batch[key]
        for batch in out
      ]
    )
    for key in out[0]
  }


def test_each_batch_has_its_shares_and_each_source_its_epochs():
  got = take(batches(mix()), 170)
  for name, share, n in (("a", 10, 50), ("b", 4, 34), ("c", 6, 90)):
    own = got["name"] == name
    assert (own.sum(1) == share).all()
    epochs = got["i"][own][: 170 * share // n * n].reshape(-1, n)
    if n % share == 0:  # no batch across epochs
      for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    counts = np.bincount(got["i"][own], minlength=n)
    assert counts.max() - counts.min() <= 1
    for step in range(170):
      assert len(set(got["i"][step][own[step]])) == share


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_and_restarts(processes):
  whole = take(batches(mix()), 9)
  parts = [
    take(batches(mix(), process_index=p, process_count=processes), 9)
    for p in range(processes)
  ]
  for key in whole:
    np.testing.assert_array_equal(
      np.concatenate([part[key] for part in parts], axis=1), whole[key]
    )
  run = batches(mix())
  take(run, 4)
  fresh = batches(mix())
  fresh.set_state(json.loads(json.dumps(run.get_state())))
  for key, value in take(fresh, 5).items():
    np.testing.assert_array_equal(value, whole[key][4:])
  with pytest.raises(errors.UserError, match="saved with weights="):
    batches(mix((5, 3, 3))).set_state(run.get_state())


def test_narrowed_and_grouped_parts():
  last = filter_lib.where(make("c", 90), "i", (0, 59))
  source = Mixture(
    [make("a", 50), make("b", 34), filter_lib.grouped(last, "c")], (5, 2, 3)
  )
  assert len(source) == 50 + 34 + 20
  assert source.numbers().tolist() == list(range(50 + 34 + 60))
  got = take(batches(source), 100)
  groups = got["i"][got["name"] == "c"].reshape(100, 6) // 3
  assert all(len(set(batch)) == 6 for batch in groups)
  assert set(got["i"][got["name"] == "c"]) == set(range(60))


def test_what_the_program_asks_of_a_source():
  a = make("a", 50, label_names={"c": ["x"], "d": ["y"]}, faults={"odd": 1})
  b = make("b", 34, label_names={"c": ["x"]}, faults={"odd": 2, "even": 3})
  source = Mixture([a, b], [1, 2])
  assert source.name == "mix of a, b" and len(source) == 84
  assert source.label_names == {"c": ["x"]} and source.tower is None
  assert source.faults == {"odd": 3, "even": 3}
  assert source[0]["name"] == "a" and source[49] == {
    "name": "a",
    "i": 49,
    "c": 16,
  }
  assert source[50]["name"] == "b" and source[83]["i"] == 33
  for i in (-1, 84):
    with pytest.raises(IndexError):
      source[i]
  assert source.brief(51) == {"name": "b", "i": 1, "c": 0}
  assert list(kinds.all_captions(source, "name")) == ["a"] * 50 + ["b"] * 34


def test_faults_name_the_part():
  def fn(example, rng):
    if (example["name"], example["i"]) == ("b", 7):
      raise faults.BadExample("is odd", kind="odd")
    return show(example, rng)

  run = batches(mix(), fn=fn)
  got = take(run, 30)
  assert run.faults()["odd"] >= 3
  own = got["name"] == "b"
  assert (own.sum(1) == 4).all()  # what takes its place is of b, too
  assert 7 not in got["i"][own]
  assert all(len(set(got["i"][s][own[s]])) == 4 for s in range(30))
  with pytest.raises(errors.UserError, match=r"1 x odd \(b\[7\]: is odd\)"):
    take(batches(mix(), fn=fn, bad_fraction=0), 30)


def test_parts_have_to_be_alike():
  def fn(example, rng):
    return {"x": np.zeros(2 if example["name"] == "c" else 1)}

  with pytest.raises(errors.UserError, match=r'"x".*\(2,\) in c\[0\]'):
    pipeline.first_example(mix(), fn)
  assert pipeline.first_example(mix(), show)["name"] == "a"


@pytest.mark.parametrize(
  "weights, words",
  [
    ([1, 2], "3 sources and 2 weights"),
    ([1, 0, 1], "0 cannot be a weight"),
    ([1, -1, 1], "-1 cannot be a weight"),
    ([1, "1", 1], "'1' cannot be a weight"),
    ([0, 0, 0], "0 cannot be a weight"),
    ([1, None, 1], "None cannot be a weight"),
    ([1, float("nan"), 1], "nan cannot be a weight"),
    ([1, 1e-12, 1], "1e-12 cannot be a weight"),
  ],
)
def test_what_cannot_be_a_weight(weights, words):
  with pytest.raises(errors.UserError, match=words):
    mix(weights)


def test_mistakes():
  with pytest.raises(errors.UserError, match="d has embeddings of tower other"):
    Mixture([make("a", 50), make("d", 40, tower="other")], [1, 1])
  with pytest.raises(errors.UserError, match="b has 34 .* its 40 .* weight"):
    batches(mix((1, 2, 1)), 80)
  with pytest.raises(errors.UserError, match="cannot be evaluated on"):
    pipeline.eval_batches(mix(), show, batch_size=4)
  for narrow in (
    lambda s: filter_lib.where(s, "i", 3),
    lambda s: filter_lib.grouped(s, "c"),
    lambda s: kinds.shuffled(s, "i"),
    lambda s: s.replaced(members=[[0]]),
  ):
    with pytest.raises(errors.UserError, match="to each of its sources"):
      narrow(mix())


def test_as_a_line_of_a_config(shapes_dir):
  part = lambda *share: dict(
    kind="tfds",
    name="shapes",
    split="train",
    data_dir=str(shapes_dir),
    part=share,
  )
  source = kinds.open_source(
    "mix", sources=[part(0, 0.5), part(0.5, 1)], weights=[0.75, 0.25]
  )
  assert isinstance(source, Mixture) and len(source) == 192
  first = set(kinds.open_source(**part(0, 0.5)).numbers().tolist())
  seen = [int(source.records[i]["label"]) for i in (0, 191)]
  assert all(0 <= label < 24 for label in seen) and 0 < len(first) < 192
  for sources, words in (
    ([part(0, 0.5)], "1 sources and 2 weights"),
    ([part(0, 0.5), part(0, 0.5)], "source 1 of the mix is there already"),
    ([part(0, 0.5), dict(kind="mix")], "itself a mix"),
    ([part(0, 0.5), dict(kind="tfds", nam="x")], '"tfds" has no key "nam"'),
    ([part(0, 0.5), dict(kin="tfds")], "a source needs a kind.*only: kin"),
  ):
    with pytest.raises(errors.UserError, match=words):
      kinds.open_source("mix", sources=sources, weights=[1, 2])
