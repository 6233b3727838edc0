"""The linear probe against the original's and the direct solution."""

import pathlib

from made import RAW, embed_by_number, opened, run
import numpy as np
import pytest

from sigjax import errors, evaluators
from sigjax.data.source import Source
from sigjax.evaluators import fewshot

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_probe_is_that_of_the_original(shape):
  """With more columns than rows, and with fewer."""
  golden = dict(np.load(GOLDEN / "evals.npz"))
  x, y, x_test, y_test, want, accuracy = (
    golden[f"fewshot/{shape}/{key}"]
    for key in (
      "x",
      "y",
      "x_test",
      "y_test",
      "scores_l2_1024",
      "accuracy_l2_1024_and_1",
    )
  )
  scores = [
    fewshot.probe(x, y, x_test, want.shape[1], l2) for l2 in (1024.0, 1.0)
  ]
  np.testing.assert_allclose(scores[0], want, rtol=1e-3, atol=1e-4)
  got = [np.mean(s.argmax(1) == y_test) for s in scores]
  assert got == pytest.approx(accuracy)


def direct(x, y, x_test, classes, l2):
  """Ridge regression as least squares on rows that l2 adds."""
  mean, std = x.mean(0), x.std(0) + 1e-5
  x, x_test = (
    np.column_stack([(f - mean) / std, np.full(len(f), 100.0)])
    for f in (x, x_test)
  )
  more = np.sqrt(l2) * np.eye(x.shape[1])
  targets = np.where(y[:, None] == np.arange(classes), 1.0, -1.0)
  targets = np.concatenate([targets, np.zeros((len(more), classes))])
  return x_test @ np.linalg.lstsq(np.concatenate([x, more]), targets)[0]


@pytest.mark.parametrize("n", [9, 20, 21, 22, 60])  # 21 columns
def test_probe_is_the_direct_solution(n):
  rng = np.random.default_rng(n)
  x, x_test = rng.normal(3, 2, (n, 20)), rng.normal(3, 2, (7, 20))
  y = rng.integers(0, 3, n)
  for l2 in (1024.0, 1.0):
    np.testing.assert_allclose(
      fewshot.probe(x, y, x_test, 3, l2), direct(x, y, x_test, 3, l2), atol=1e-8
    )


@pytest.fixture
def made(monkeypatch):
  """Returns make(**options), the features and labels; 5 classes, one rare."""
  rng = np.random.default_rng(0)
  labels = np.concatenate([rng.permutation(np.arange(120) % 4), [4] * 3, [9]])
  centres = rng.normal(size=(10, 12))
  features = (centres[labels] + rng.normal(size=(124, 12))).astype(np.float32)
  records = [
    dict(image=np.int32(i), label=int(c)) for i, c in enumerate(labels)
  ]
  names = dict(label=[f"animal {i}" for i in range(10)])
  train = Source("train", records[:80] + records[120:123], label_names=names)
  test = Source("test", records[80:120] + records[123:], label_names=names)
  shared = dict(
    RAW,
    data=opened(monkeypatch, train, "train"),
    data_test=opened(monkeypatch, test, "test"),
  )

  def make(**options):
    return evaluators.make("x", None, dict(type="fewshot", **options), shared)

  return make, features, labels


def test_accuracy_is_the_mean_over_seeds(made, mesh):
  make, features, labels = made
  evaluator = make(shots=(1, 3), seeds=(0, 1, 5), l2=2.0)
  rows = run(evaluator, embed_by_number(features), mesh)
  train, test = [*range(80), 120, 121, 122], range(80, 120)
  for row, shots in zip(rows, (1, 3)):
    found = []
    for seed in (0, 1, 5):
      rng, chosen = np.random.default_rng(seed), []
      for c in range(5):
        mine = [i for i in train if labels[i] == c]
        chosen += list(rng.permutation(mine))[:shots]
      x = features.astype(np.float64)
      scores = direct(x[chosen], labels[chosen], x[test], 5, 2.0)
      found.append(np.mean(scores.argmax(1) == labels[test]))
    assert row.metric == f"{shots}-shot top-1"
    assert row.value == pytest.approx(np.mean(found))
    assert len(set(found)) > 1  # a single seed would not do
  # A test example has a class that no training example has.
  assert rows[0][2:] == (1 / 5, 40, 1)


def test_only_the_first_examples(made, mesh):
  make, features, _ = made
  calls = []
  evaluator = make(shots=(1,), first=30)
  rows = run(evaluator, embed_by_number(features, calls=calls), mesh)
  assert rows[0].chance == 1 / 4 and rows[0].left_out == 1
  assert {i for batch in calls[:2] for i in batch} == set(range(30))


def test_what_cannot_be_probed(made, monkeypatch):
  make, *_ = made
  with pytest.raises(errors.UserError) as e:
    make(shots=(1, 4))
  assert str(e.value) == (
    'class "animal 4" of train has 3 training examples, fewer than shots=4; '
    "ask for fewer shots"
  )
  with pytest.raises(errors.UserError, match='has no key "pp_text"'):
    make(pp_text="keep('text')")
  with pytest.raises(errors.UserError, match='did you mean "label"'):
    make(label="lable")
  records = [dict(image=0, label=c) for c in (1, "a")]
  data = opened(monkeypatch, Source("odd", records), "odd")
  with pytest.raises(errors.UserError, match="holds texts and numbers"):
    make(data=data)
