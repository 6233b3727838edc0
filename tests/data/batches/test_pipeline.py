"""The pipeline on Grain: what is in each batch, known by construction."""

import collections
import io
import json
import threading
import time

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import filter as filter_lib
from sigjax.data import kinds
from sigjax.data.batches import order, pipeline
from sigjax.data.example import preprocess
from sigjax.data.formats import tfds as tfds_lib
from sigjax.data.source import Source


def source(n):
  return Source("test", [{"i": i} for i in range(n)])


def keep_and_draw(example, rng):
  return {"i": np.int32(example["i"]), "r": rng.random(3)}


def batches(n, size, seed=0, fn=keep_and_draw, **kwargs):
  data = source(n) if isinstance(n, int) else n
  kwargs = {"num_threads": 2, **kwargs}
  return pipeline.train_batches(data, fn, batch_size=size, seed=seed, **kwargs)


def take(iterator, n):
  out = [next(iterator) for _ in range(n)]
  return {key: np.stack([batch[key] for batch in out]) for key in out[0]}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])
    assert a[key].dtype == b[key].dtype


def test_an_epoch_is_every_example_once_in_a_new_order():
  epochs = take(batches(24, 6), 12)["i"].reshape(3, 24)
  for epoch in epochs:
    assert sorted(epoch) == list(range(24))
  orders = {tuple(epoch) for epoch in epochs} | {tuple(range(24))}
  assert len(orders) == 4


def test_random_numbers_differ_between_rows_steps_and_seeds():
  rows = [take(batches(24, 6, seed=s), 8)["r"].reshape(-1, 3) for s in (0, 1)]
  assert len(np.unique(np.concatenate(rows), axis=0)) == 2 * 48


def test_seeds_do_not_share_epochs():
  epochs = [
    tuple(epoch)
    for s in range(3)
    for epoch in take(batches(24, 24, seed=s), 4)["i"]
  ]
  assert len(set(epochs)) == 12


def test_batches_across_epochs_leave_nothing_out_and_repeat_nothing():
  steps = take(batches(10, 4), 40)["i"]
  assert all(len(set(step)) == 4 for step in steps)
  for epoch in steps.reshape(16, 10):
    assert sorted(epoch) == list(range(10))


def test_without_shuffling_the_order_is_the_sources():
  got = take(batches(10, 4, shuffle=False), 5)["i"]
  np.testing.assert_array_equal(got.ravel(), [*range(10), *range(10)])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_contiguous_rows_of_the_one_process_batch(processes):
  whole = take(batches(20, 8, num_threads=0), 7)
  parts = [
    take(
      batches(20, 8, process_index=p, process_count=processes, num_threads=p), 7
    )
    for p in range(processes)
  ]
  joined = {
    key: np.concatenate([part[key] for part in parts], axis=1) for key in whole
  }
  assert parts[0]["i"].shape == (7, 8 // processes)
  assert_same(joined, whole)


@pytest.mark.parametrize("num_threads, prefetch", [(0, 0), (0, 2), (3, 1)])
def test_threads_and_prefetching_change_nothing(num_threads, prefetch):
  got = take(batches(20, 8, num_threads=num_threads, prefetch=prefetch), 5)
  assert_same(got, take(batches(20, 8), 5))


def test_resumes_bit_for_bit_in_mid_epoch():
  kwargs = {"process_index": 1, "process_count": 2}
  run = batches(20, 4, **kwargs)
  take(run, 7)  # five steps are an epoch
  state = json.loads(json.dumps(run.get_state()))
  assert state["step"] == 7
  want = take(run, 6)
  fresh = batches(20, 4, **kwargs)
  next(fresh)  # its prefetched batches have to go
  fresh.set_state(state)
  assert fresh.get_state() == state
  assert_same(take(fresh, 6), want)
  run.set_state(state)  # backwards
  assert_same(take(run, 6), want)
  assert run.get_state()["step"] == 13


class Counting:
  """Records i -> {"i": i}; counts how often any is read."""

  def __init__(self, n):
    self.n, self.reads = n, 0

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    self.reads += 1
    return {"i": i}


def test_goes_on_with_another_preprocessing():
  double = lambda example, rng: {"i": np.int32(2 * example["i"])}
  whole = take(batches(10, 4), 6)["i"]
  run = batches(10, 4)
  take(run, 3)
  threads = threading.active_count()
  run.change(batches(10, 4, fn=double))
  assert threading.active_count() <= threads  # the first one's are gone
  np.testing.assert_array_equal(take(run, 3)["i"], 2 * whole[3:])
  assert run.get_state()["step"] == 6
  older = {**run.get_state(), "step": 3}
  run.set_state(older)
  np.testing.assert_array_equal(take(run, 3)["i"], 2 * whole[3:])
  with pytest.raises(errors.UserError, match="batch_size=4"):
    run.change(batches(10, 5, fn=double))
  run.close()
  with pytest.raises(StopIteration):
    next(run)


def test_resuming_far_away_reads_nothing_before():
  records = Counting(20)
  run = batches(Source("test", records), 4, num_threads=1, prefetch=1)
  run.set_state({**run.get_state(), "step": 10**12})
  next(run)
  assert records.reads < 40


def test_loads_ahead_in_the_background():
  records = Counting(100)
  run = batches(Source("test", records), 10, prefetch=2)
  next(run)
  deadline = time.time() + 10
  while records.reads < 30 and time.time() < deadline:
    time.sleep(0.01)
  assert records.reads >= 30
  run.close()
  with pytest.raises(StopIteration):
    next(run)


def test_loads_in_several_threads():
  both = threading.Barrier(2)  # passed by two at a time, or never

  def fn(example, rng):
    both.wait(timeout=10)
    return keep_and_draw(example, rng)

  take(batches(8, 8, fn=fn, prefetch=1), 1)


def test_state_of_other_batches_is_refused():
  state = batches(20, 4).get_state()
  for other in (
    batches(20, 4, seed=1),
    batches(20, 5),
    batches(21, 4),
    batches(20, 4, shuffle=False),
  ):
    with pytest.raises(errors.UserError, match="data position was saved with"):
      other.set_state(state)


def test_a_run_of_an_older_version_goes_on_with_its_order(caplog):
  n = 70_000  # so many that the order is computed
  old = order.Sequence([("test", n)], [1.0], 4, 0, version=1)
  # As it was saved before there were versions.
  state = {
    "step": 5,
    "seed": 0,
    "batch_size": 4,
    "elements": [n],
    "weights": [1.0],
    "shuffle": True,
  }
  for _ in range(2):  # and again after the next restart
    run = batches(n, 4)
    next(run)
    run.set_state(state)
    step = state["step"]
    want = [
      [old.at(4 * s + r) for r in range(4)] for s in range(step, step + 3)
    ]
    assert take(run, 3)["i"].tolist() == want
    state = json.loads(json.dumps(run.get_state()))
    assert state["step"] == step + 3 and state["order"] == 1
    run.close()
  new = batches(n, 4).get_state()
  assert new["order"] == order.VERSION
  with pytest.raises(errors.UserError, match="with order 99.*update sigjax"):
    batches(n, 4).set_state({**new, "order": 99})


def test_groups():
  # Concept c has c + 1 members.
  concepts = [c for c in range(6) for _ in range(c + 1)]
  records = [{"i": i, "c": c} for i, c in enumerate(concepts)]
  groups = filter_lib.grouped(Source("test", records), "c")
  fn = lambda example, rng: {**keep_and_draw(example, rng), "c": example["c"]}
  run = batches(groups, 3, fn=fn, num_threads=0, prefetch=0)
  early = take(run, 50)
  state = run.get_state()
  got = take(run, 200)
  for steps in (early["c"], got["c"]):
    for epoch in steps.reshape(-1, 6):
      assert sorted(epoch) == list(range(6))
  counts = collections.Counter(got["i"].ravel().tolist())
  assert set(counts) == set(range(len(records)))
  # 100 epochs: each of the six members of concept 5 about 17 times.
  assert all(5 < counts[i] < 35 for i in range(len(records))[-6:])
  fresh = batches(groups, 3, fn=fn)
  fresh.set_state(state)
  assert_same(take(fresh, 200), got)


def test_impossible_batches():
  for fn in (
    batches,
    lambda n, size, **kwargs: pipeline.eval_batches(
      source(n), keep_and_draw, batch_size=size, **kwargs
    ),
  ):
    with pytest.raises(errors.UserError, match="batch of 9 cannot be split"):
      fn(20, 9, process_count=2)
  with pytest.raises(errors.UserError, match="3 elements, too few .* of 4"):
    batches(3, 4)
  with pytest.raises(errors.UserError, match="no elements"):
    pipeline.eval_batches(source(0), keep_and_draw, batch_size=4)


def test_features_that_cannot_be_batched():
  for fn, words in (
    (lambda i: {"x": np.zeros(i % 2)}, r'"x".*shape \(.,\) .*shape \(.,\)'),
    (
      lambda i: {"x": np.zeros(2, [int, float][i % 2])},
      '"x".*(int64.*float64|float64.*int64)',
    ),
    (lambda i: {"x": 0, **({"y": 0} if i % 2 else {})}, '"y".*missing'),
    (lambda i: {"x": "text" if i % 2 else 0}, '"x".*text'),
    (lambda i: {"y": {"i": i}}, '"y".*no array.*keep'),
  ):
    with pytest.raises(errors.UserError, match=words):
      next(batches(4, 4, fn=lambda example, rng, fn=fn: fn(example["i"])))


def test_texts_of_any_length():
  fn = lambda example, rng: {
    "s": "x" * example["i"],
    "b": np.asarray(b"y" * example["i"]),
  }
  batch = next(iter(pipeline.eval_batches(source(4), fn, batch_size=4)))
  assert batch["s"].tolist() == ["", "x", "xx", "xxx"]
  assert batch["b"].tolist() == [b"", b"y", b"yy", b"yyy"]


def test_batches_are_arrays_of_their_own():
  run = batches(8, 4)
  first, second = next(run), next(run)
  kept = first["r"].copy()
  second["r"][:] = 0
  next(run)["r"][:] = 0
  np.testing.assert_array_equal(first["r"], kept)


def test_tells_how_long_it_was_waited_for():
  def slow(example, rng):
    time.sleep(0.05)
    return keep_and_draw(example, rng)

  run = batches(8, 4, fn=slow, num_threads=0, prefetch=1)
  assert run.waited == 0
  next(run)
  assert 0.2 <= run.waited < 2
  before = run.waited
  time.sleep(1)  # so long that what follows is ready
  next(run)
  assert run.waited - before < 0.1


def test_first_example():
  example = pipeline.first_example(source(4), keep_and_draw)
  assert example["i"] == 0 and example["i"].dtype == np.int32
  assert example["r"].shape == (3,)


def test_mistakes_in_code_keep_their_type_and_name_the_record():
  def fn(example, rng):
    return {"x": 1 // (example["i"] - 2)}

  with pytest.raises(ZeroDivisionError) as e:
    take(batches(4, 4, fn=fn), 1)
  assert "in test[2]" in e.value.__notes__


@pytest.mark.parametrize("processes, n", [(1, 11), (2, 11), (2, 1), (4, 12)])
def test_eval_sees_each_example_once(processes, n):
  parts = []
  for p in range(processes):
    part = pipeline.eval_batches(
      source(n),
      keep_and_draw,
      batch_size=4,
      process_index=p,
      process_count=processes,
      num_threads=p,
    )
    assert len(part) == -(-n // 4)
    parts.append(list(part))
    assert len(parts[-1]) == len(part)
  joined = [
    {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
    for step in zip(*parts)
  ]
  mask = np.concatenate([batch["_mask"] for batch in joined])
  assert mask.dtype == bool
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < n)
  seen = np.concatenate([batch["i"] for batch in joined])
  assert seen.dtype == np.int32
  np.testing.assert_array_equal(seen[mask], np.arange(n))  # in order
  assert not seen[~mask].any()
  draws = np.concatenate([batch["r"] for batch in joined])
  assert len(np.unique(draws[mask], axis=0)) == n and not draws[~mask].any()


def test_eval_can_be_repeated_or_left_early():
  data = pipeline.eval_batches(source(11), keep_and_draw, batch_size=4)
  for batch in data:
    first = batch
    break
  again, more = list(data), list(data)
  assert_same(first, again[0])
  for a, b in zip(again, more, strict=True):
    assert_same(a, b)


class PipelineTestImages(tfds.core.GeneratorBasedBuilder):
  """PNGs of one colour, which the caption repeats; one of 16 is damaged."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(encoding_format="png"),
        "captions": tfds.features.Sequence(tfds.features.Text()),
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {
      "good": self._generate_examples(None),
      "bad": self._generate_examples(5),
    }

  def _generate_examples(self, damaged):
    for i in range(16):
      data = io.BytesIO()
      Image.new("RGB", (8, 8), (i, i, i)).save(data, "PNG")
      data = data.getvalue()[: 40 if i == damaged else None]
      yield i, {"image": data, "captions": [f"{i} {k}" for k in range(3)]}


def test_from_array_record_to_batches(tmp_path):
  tfds.disable_progress_bar()
  PipelineTestImages(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  tokenizer = lambda text, length, pad: np.array(text.split(), np.int32)[
    :length
  ]
  fn = preprocess.parse(
    "decode|flip_lr|value_range(0,255)|choice('captions')|tokenize(2)"
    "|keep('image','text')",
    tokenizer=tokenizer,
  )
  good = tfds_lib.tfds("pipeline_test_images", "good", tmp_path)
  got = take(batches(good, 8, fn=fn), 20)
  assert got["image"].shape == (20, 8, 8, 8, 3)
  assert got["image"].dtype == np.float32
  # Pictures and captions stay together, and each caption is shown.
  np.testing.assert_allclose(got["image"][..., 4, 4, 1], got["text"][..., 0])
  assert set(got["text"][..., 1].ravel()) == {0, 1, 2}
  assert_same(take(batches(good, 8, fn=fn), 20), got)

  bad = tfds_lib.tfds("pipeline_test_images", "bad", tmp_path)
  where = [i for i in range(16) if bad[i]["captions"][0] == b"5 0"]
  data = pipeline.eval_batches(bad, fn, batch_size=5)
  for _ in range(2):  # each pass counts anew
    joined = list(data)
    mask = np.concatenate([batch["_mask"] for batch in joined])
    assert np.flatnonzero(~mask).tolist() == [*where, 16, 17, 18, 19]
    images = np.concatenate([batch["image"] for batch in joined])
    texts = np.concatenate([batch["text"] for batch in joined])
    assert not images[~mask].any() and not texts[~mask].any()
    assert sorted(images[mask][:, 4, 4, 1]) == sorted({*range(16)} - {5})
    (count,) = data.faults().values()
    assert count == 1
  with pytest.raises(errors.UserError) as e:
    list(pipeline.eval_batches(bad, fn, batch_size=8, bad_fraction=0))
  assert str(e.value).startswith("1 of ")
  assert f"(pipeline_test_images[bad][{where[0]}]: image cannot" in str(e.value)


# ---- Mismatched pairs ----


def pairs(share, n=40):
  """Example i has image i and text i."""
  rows = [{"image": np.int32(i), "text": np.int32(i)} for i in range(n)]
  return Source("pairs", rows).replaced(mismatch=share)


def same(example, rng):
  del rng
  return example


def test_mismatched_pairs_pass_their_texts_on():
  found = take(batches(pairs(0.3), 20, fn=same), 200)
  clean = take(batches(pairs(0.0), 20, fn=same), 200)
  np.testing.assert_array_equal(found["image"], clean["image"])
  np.testing.assert_array_equal(clean["image"], clean["text"])
  wrong = found["image"] != found["text"]
  # One chosen row in a batch by itself stays as it is: 20 * .3 * .7 ** 19.
  want = 0.3 - 0.3 * 0.7**19
  assert wrong.mean() == pytest.approx(want, abs=4 * (0.21 / 4000) ** 0.5)
  for image, text, bad in zip(found["image"], found["text"], wrong):
    assert sorted(text) == sorted(image)  # no text is lost or there twice
    assert sorted(text[bad]) == sorted(image[bad]) and bad.sum() != 1
    given, seen, start = dict(zip(image[bad], text[bad])), [], None
    for _ in range(bad.sum()):  # one circle through all of them
      start = given[start if seen else image[bad][0]]
      seen.append(start)
    assert sorted(seen) == sorted(image[bad])
  # Which rows they are differs from step to step, and with the seed.
  assert len({tuple(row) for row in wrong}) > 190
  other = take(batches(pairs(0.3), 20, seed=1, fn=same), 3)
  assert ((other["image"] != other["text"]) != wrong[:3]).any()
  all_wrong = take(batches(pairs(1.0), 20, fn=same), 5)
  assert (all_wrong["image"] != all_wrong["text"]).all()


def test_mismatched_pairs_on_any_processes_and_after_a_resume():
  whole = take(batches(pairs(0.4), 8, fn=same), 12)
  for count in (2, 4):
    parts = [
      take(
        batches(
          pairs(0.4),
          8,
          fn=same,
          process_index=i,
          process_count=count,
          num_threads=threads,
        ),
        12,
      )
      for i, threads in zip(range(count), (0, 3, 1, 2))
    ]
    for key, want in whole.items():
      got = np.concatenate([part[key] for part in parts], axis=1)
      np.testing.assert_array_equal(got, want)
  first = batches(pairs(0.4), 8, fn=same)
  take(first, 5)
  resumed = batches(pairs(0.4), 8, fn=same)
  resumed.set_state(json.loads(json.dumps(first.get_state())))
  later = {key: x[5:] for key, x in whole.items()}
  assert_same(take(resumed, 7), later)
  # Of a version that did not know of it.
  older = {k: v for k, v in first.get_state().items() if k != "mismatch"}
  batches(pairs(0.0), 8, fn=same).set_state(older)
  for share in (0.0, 0.3):
    with pytest.raises(errors.UserError, match="with mismatch=0.4, but"):
      batches(pairs(share), 8, fn=same).set_state(first.get_state())


def test_what_mismatch_refuses(shapes_dir):
  with pytest.raises(errors.UserError, match="mismatch=0.1, which is noise"):
    pipeline.eval_batches(pairs(0.1), same, batch_size=4)
  data = dict(kind="tfds", name="shapes", data_dir=str(shapes_dir))
  train = dict(data, split="train")
  assert kinds.open_source(**train, mismatch=0.25).mismatch == 0.25
  noisy = dict(train, mismatch=0.1)
  for wrong, message in (
    (dict(train, mismatch=1.5), "has to be a share"),
    (dict(train, mismatch="a"), "has to be a share"),
    (dict(kind="mix", sources=[noisy], weights=[1]), "give it to the mix"),
  ):
    with pytest.raises(errors.UserError, match=message):
      kinds.open_source(**wrong)
  tests = dict(data, split="test")
  mix = dict(kind="mix", sources=[train, tests], weights=[1, 1])
  assert kinds.open_source(**mix, mismatch=0.1).mismatch == 0.1
