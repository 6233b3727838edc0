"""Crossmodal-3600 in its published layout, with images that a test draws."""

import json

from made import RAW, embed_by_number, run, unit
import numpy as np
from PIL import Image
import pytest

from sigjax import errors, evaluators

LANGUAGES = "en", "he", "quz"


@pytest.fixture
def folder(tmp_path):
  """Six images whose red tells their number.

  Image 5 has no Quechua, and the same Hebrew twice.
  """
  (tmp_path / "images").mkdir()
  lines = []
  for i in range(6):
    key = f"{i:016x}"
    Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(
      tmp_path / f"images/{key}.jpg", quality=100
    )
    row = {"image/key": key, "image/locale": "en"}
    for language in LANGUAGES:
      texts = [f"{language} {i} {j}" for j in range(2)]
      if language == "quz":
        texts = texts[:1] if i < 5 else []
      if (language, i) == ("he", 5):
        texts = texts[:1] * 2
      row[language] = {
        "caption": texts,
        "caption/tokenized": [text.split() for text in texts],
      }
    lines.append(json.dumps(row))
  (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
  return tmp_path


def make(folder, **options):
  section = dict(
    RAW,
    type="xm3600",
    path=str(folder / "captions.jsonl"),
    images=str(folder / "images"),
    pp_image="decode|keep('image')",
  )
  return evaluators.make("config.evals.x", None, {**section, **options}, {})


def by_red(zimg, text_of, calls):
  embed = embed_by_number(zimg, text_of, calls)

  def fn(image=None, text=None):
    if image is not None:
      image = np.round(np.asarray(image)[:, 0, 0, 0] / 40).astype(int)
    return embed(image=image, text=text)

  return fn


def test_recall_of_each_language_and_their_mean(folder, mesh):
  rng = np.random.default_rng(0)
  zimg = unit(rng, 6, 3)
  z = {}
  for language in LANGUAGES:
    for i in range(6):
      for j in range(2):
        near = zimg[i] + 0.8 * unit(rng, 3)
        z[f"{language} {i} {j}"] = near / np.linalg.norm(near)
  calls = []
  found = run(make(folder, ks=(1, 2)), by_red(zimg, z.__getitem__, calls), mesh)
  rows = {row.metric: row for row in found}
  assert len(rows) == (3 + 1) * 2 * 2
  # Six images once, in one batch; 12 + 11 + 5 texts in two.
  assert len(calls) == 3
  recalls = []
  for language in LANGUAGES:
    texts = [t for t in z if t.startswith(language)]
    if language == "quz":
      texts = [f"quz {i} 0" for i in range(5)]
    elif language == "he":
      texts[-1] = texts[-2]
    images = sorted({int(t.split()[1]) for t in texts})
    scores = zimg[images] @ np.stack([z[t] for t in texts]).T
    owner = np.array([images.index(int(t.split()[1])) for t in texts])
    best = np.argsort(-scores, axis=1)[:, :2]
    hit = (owner[best] == np.arange(len(images))[:, None]).any(1).mean()
    row = rows[f"{language} image->text recall@2"]
    assert (row.value, row.n) == (pytest.approx(hit), len(images))
    row = rows[f"{language} text->image recall@1"]
    hit = (scores.argmax(0) == owner).mean()
    assert (row.value, row.n) == (pytest.approx(hit), len(texts))
    recalls.append(hit)
  assert 0 < min(recalls) < max(recalls)
  mean = rows["mean text->image recall@1"]
  assert mean.value == pytest.approx(np.mean(recalls)) and mean.n == 29


def test_only_some_languages(folder):
  evaluator = make(folder, languages=("quz",))
  assert len(evaluator.source) == 5
  assert evaluator.source[4]["captions"] == ["quz 4 0"]


def test_mistakes_are_named(folder):
  for options, message in (
    (
      dict(languages=("iw",)),
      'captions.jsonl "iw" is not known; choose from: ',
    ),
    (dict(languages=("qu",)), '(did you mean "quz"?)'),
    (dict(path=str(folder / "x.jsonl")), "No such file or directory"),
    (dict(by="language"), 'has no key "by"'),
  ):
    with pytest.raises(errors.UserError) as e:
      make(folder, **options)
    assert message in str(e.value)
  for i in (2, 4):
    (folder / f"images/{i:016x}.jpg").unlink()
  with pytest.raises(errors.UserError) as e:
    make(folder)
  assert "2 of the 6 images of " in str(e.value)
  assert "the first is " in str(e.value)
  assert f"{2:016x}.jpg" in str(e.value)
  (folder / "captions.jsonl").write_text('{"image/key": "1"}\n{"key": 1}\n')
  with pytest.raises(errors.UserError, match=r"captions.jsonl, line 2: it has"):
    make(folder)
