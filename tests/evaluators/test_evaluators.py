"""Recall and accuracy against brute force and answers known by construction."""

import io
import json
import math
import pathlib
import tracemalloc

import jax.numpy as jnp
from made import RAW, embed_by_number, opened, run, unit
import numpy as np
from PIL import Image
import pytest
import sentencepiece

from sigjax import errors, evaluators
from sigjax.data import kinds
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.data.faults import BadExample
from sigjax.data.source import Source
from sigjax.evaluators import prompts, ranking


def brute_force_ranks(queries, keys, query_ids, key_ids):
  found = []
  for q, i in zip(queries, query_ids):
    scores = keys.astype(np.float64) @ q.astype(np.float64)
    order = sorted(
      range(len(keys)), key=lambda j: (-scores[j], key_ids[j] == i)
    )
    found.append(next(n for n, j in enumerate(order) if key_ids[j] == i))
  return np.array(found)


@pytest.mark.parametrize("n, m", [(50, 30), (5, 40), (1030, 7)])
def test_ranks(mesh, n, m):
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(n, 8)).astype(np.float32)
  keys = rng.normal(size=(m, 8)).astype(np.float32)
  key_ids = rng.integers(0, 6, m)
  query_ids = rng.choice(key_ids, n)
  right = [np.flatnonzero(key_ids == i) for i in query_ids]
  got = ranking.ranks(queries, keys, right, mesh)
  # A rank counts the wrong keys before the first right one.
  np.testing.assert_array_equal(
    got, brute_force_ranks(queries, keys, query_ids, key_ids)
  )


def test_equal_and_nan_embeddings_are_worth_nothing(mesh):
  right = list(np.arange(10)[:, None])
  for value in (0.5, np.nan):
    z = np.full((10, 4), value, np.float32)
    np.testing.assert_array_equal(ranking.ranks(z, z, right, mesh), 9)


def test_without_a_right_key_the_rank_is_the_worst(mesh):
  z = np.eye(4, dtype=np.float32)
  right = [np.array([0]), np.array([], int), np.array([2, 3]), np.array([1])]
  assert ranking.ranks(z, z, right, mesh).tolist() == [0, 4, 0, 3]


def test_chance_is_what_random_scores_reach(mesh):
  rng = np.random.default_rng(0)
  key_ids = np.repeat(np.arange(10), 3)
  key_ids[:5] = 0
  query_ids = np.tile(np.arange(10), 400)
  right = np.bincount(key_ids, minlength=10)[query_ids]
  hits = []
  for i in query_ids:
    drawn = rng.choice(len(key_ids), 5, replace=False)
    hits.append((key_ids[drawn] == i).any())
  want = ranking.chance(5, right, len(key_ids))
  sigma = math.sqrt(want * (1 - want) / len(hits))
  assert abs(np.mean(hits) - want) < 4 * sigma
  assert ranking.chance(1, np.ones(7), 50) == pytest.approx(1 / 50)


def lookup_embed(tokenizer, names):
  """Embeds a text as the one-hot of the name in it, an image by its colour."""

  model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

  def embed(image=None, text=None):
    if image is not None:
      number = jnp.round((jnp.asarray(image)[:, 8, 8, 0] + 1) * 127.5)
      z = jnp.eye(len(names))[number.astype(int) // 10]
      return z, None, z
    rows = []
    for tokens in np.asarray(text):
      words = model.decode([int(t) for t in tokens if t > 1]).split()
      found = [i for i, name in enumerate(names) if name in words]
      rows.append(
        np.eye(len(names))[found[0]] if found else np.zeros(len(names))
      )
    return None, jnp.asarray(np.array(rows)), None

  return embed


def encoded(colour):
  data = io.BytesIO()
  Image.new("RGB", (16, 16), colour).save(data, "PNG")
  return data.getvalue()


GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = ["ant", "bee", "cow", "dog", "elk", "fox"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("t") / "tokenizer.model"
  tokenizer_lib.train(NAMES * 3 + ["a photo of many"] * 9, 24, path)
  return tokenizer_lib.Tokenizer(path)


@pytest.fixture
def animals(monkeypatch):
  """Three images of each animal; the colour tells the class: 10 * i."""
  records = []
  for copy in range(3):
    for i, name in enumerate(NAMES):
      # One in three dogs looks like an elk.
      shown = 4 if name == "dog" and copy == 0 else i
      records.append(
        dict(
          image=encoded((10 * shown, 0, 0)),
          label=i,
          concept=name,
          captions=[name, f"a {name}"],
        )
      )
  monkeypatch.setitem(
    kinds.SOURCES,
    "animals",
    lambda: lambda: Source("animals", records, label_names={"label": NAMES}),
  )
  return dict(kind="animals")


PP = dict(
  pp_image="decode|value_range(-1,1)|keep('image')",
  pp_text="lower|tokenize(8)|keep('text')",
  batch_size=8,
  bad_fraction=0.01,
)


def make(path=None, **section):
  return evaluators.make("config.evals.x", path, section, PP)


def test_zeroshot(animals, tokenizer, mesh):
  embed = lookup_embed(tokenizer, NAMES)
  for options in (
    dict(label="concept", classes="captions"),
    dict(label="label", classes="labels", templates="photo"),
  ):
    evaluator = make(type="zeroshot", data=animals, **options)
    rows = run(evaluator, embed, mesh, tokenizer)
    assert [row[0] for row in rows] == ["6-way top-1", "6-way top-5"]
    _, value, by_chance, n, left_out = rows[0]
    assert left_out == 0
    assert value == pytest.approx(17 / 18) and n == 18
    assert by_chance == pytest.approx(1 / 6)


def test_retrieval(animals, tokenizer, mesh):
  embed = lookup_embed(tokenizer, NAMES)
  evaluator = make(type="retrieval", data=animals, group="concept", ks=(1, 2))
  rows = {
    row.metric: row[1:4] for row in run(evaluator, embed, mesh, tokenizer)
  }
  # 12 texts, two of each animal; 18 images, three of each animal.
  value, by_chance, n = rows["image->text recall@1"]
  assert (value, n) == (pytest.approx(17 / 18), 18)
  assert by_chance == pytest.approx(1 / 6)
  assert rows["image->text recall@2"][1] == pytest.approx(
    1 - (10 / 12) * (9 / 11)
  )
  # "elk" scores the false dog as high as its own three: a tie counts against.
  value, by_chance, n = rows["text->image recall@1"]
  assert (value, n) == (pytest.approx(10 / 12), 12)
  assert by_chance == pytest.approx(3 / 18)
  # Without groups each caption is there three times, and all are right.
  evaluator = make(type="retrieval", data=animals, ks=(1,))
  rows = run(evaluator, embed, mesh, tokenizer)
  assert rows[0].value == pytest.approx(17 / 18)
  assert rows[0].chance == pytest.approx(6 / 36)


def test_picture(animals, tokenizer, mesh, tmp_path):
  path = tmp_path / "x.png"
  picture = make(path, type="picture", data=animals, group="concept", count=5)
  assert run(picture, lookup_embed(tokenizer, NAMES), mesh, tokenizer) == []
  assert picture.path == path
  image = np.asarray(Image.open(path)).astype(int)
  green = (image == (205, 240, 205)).all(-1)[50:].any(-1)  # below the legend
  assert green.any() and not green.all()  # right ones are marked


def test_evaluations_of_a_round_open_equal_data_once(shapes_dir):
  data = dict(kind="tfds", name="shapes", data_dir=str(shapes_dir))
  shared, made = dict(PP, bad_fraction=0.01), []
  opened: dict[str, Source] = {}
  for split in ("test", "test", "train"):
    options = dict(type="zeroshot", data=dict(data, split=split))
    path = pathlib.Path()
    made.append(evaluators.make("x", path, options, shared, opened).source)
  assert made[0] is made[1] is not made[2]
  assert [source.name for source in opened.values()] == [
    "shapes[test]",
    "shapes[train]",
  ]


def test_a_picture_marks_a_caption_that_others_have_too(
  monkeypatch, mesh, tmp_path
):
  png = encoded((0, 0, 0))
  records = [dict(image=png, captions=["a dog"]) for _ in range(3)]
  picture = evaluators.make(
    "x",
    tmp_path / "x.png",
    dict(type="picture", data=opened(monkeypatch, Source("m", records))),
    RAW,
  )

  def embed(image=None, text=None):
    z = jnp.ones((len(image if text is None else text), 2))
    return (z, None, z) if text is None else (None, z, None)

  picture._retrieval._pp_image = "decode|keep('image')"
  run(picture, embed, mesh)
  image = np.asarray(Image.open(picture.path)).astype(int)
  lines = (image == (205, 240, 205)).all(-1)[30:]
  for cell in range(3):
    assert 15 <= lines[:, 12 + 420 * cell :][:, :400].any(1).sum() <= 20


def test_a_picture_shows_whole_images_in_their_own_shape(
  tokenizer, mesh, tmp_path
):
  for i, size in enumerate([(200, 50), (20, 80)]):
    Image.new("RGB", size, "blue").save(tmp_path / f"{i}.png")
  (tmp_path / "captions.csv").write_text(
    'file,caption\n0.png,"a cow\n\nwith a break"\n1.png,' + "dog " * 5000 + "\n"
  )
  picture = make(
    tmp_path / "sheet.png",
    type="picture",
    data=dict(kind="folder", path=str(tmp_path)),
  )

  def embed(image=None, text=None):
    z = jnp.ones((len(image if text is None else text), 2))
    return (z, None, z) if text is None else (None, z, None)

  picture._retrieval._pp_image = "decode|resize(16)|keep('image')"
  run(picture, embed, mesh, tokenizer)
  pixels = np.asarray(Image.open(picture.path)).astype(int)
  # Of embeddings, the images of another source are shown.
  with pytest.raises(errors.UserError, match="has 2 images for the 1 of"):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    (tmp_path / "one.csv").write_text("file,caption\none.png,a cow\n")
    make(
      tmp_path / "sheet.png",
      type="picture",
      data=dict(kind="folder", path=str(tmp_path), table="one.csv"),
      shown=dict(kind="folder", path=str(tmp_path)),
    )
  blue = (abs(pixels - (0, 0, 255)) < 40).all(-1)
  shapes = []
  for half in np.split(blue[:, :840], 2, axis=1):
    y, x = np.nonzero(half)
    shapes.append((np.ptp(y) + 1, np.ptp(x) + 1))
  assert shapes == [(28, 112), (112, 28)]


def test_a_class_is_the_normalised_mean_of_its_prompts(mesh, monkeypatch):
  rng = np.random.default_rng(0)
  names = [f"n{i}" for i in range(12)]
  # Prompts of later classes agree less, so that their means are shorter; the
  # last prompt is a poor one.
  z = {}
  for i, name in enumerate(names):
    centre = unit(rng, 6)
    for form in prompts.TEMPLATES["photo"]:
      text = centre + 0.15 * i * unit(rng, 6)
      if form == prompts.TEMPLATES["photo"][-1]:
        text = centre + 2 * unit(rng, 6)
      z[form.format(name)] = (text / np.linalg.norm(text)).astype(np.float32)
  zimg, labels = unit(rng, 300, 6), rng.integers(0, 12, 300)
  source = Source(
    "made",
    [dict(image=np.int32(i), label=int(c)) for i, c in enumerate(labels)],
    label_names=dict(label=names),
  )
  options = dict(
    RAW, type="zeroshot", data=opened(monkeypatch, source), templates="photo"
  )
  rows = run(
    evaluators.make("x", None, options, {}),
    embed_by_number(zimg, z.__getitem__),
    mesh,
  )
  each = np.stack(
    [[z[f.format(n)] for f in prompts.TEMPLATES["photo"]] for n in names]
  )
  mean = each.mean(1)

  def accuracies(heads):
    order = np.argsort(-zimg @ heads.T, axis=1)
    return [(order[:, :k] == labels[:, None]).any(1).mean() for k in (1, 5, 10)]

  want = accuracies(mean / np.linalg.norm(mean, axis=1, keepdims=True))
  assert [row.value for row in rows] == pytest.approx(want)
  for other in (mean, each[:, -1], each[:, 0]):  # the data tells these apart
    assert accuracies(other)[0] != pytest.approx(want[0])


def test_equal_captions_are_equally_right(mesh, monkeypatch):
  """A perfect model has a recall of 1, though captions repeat."""
  captions = [["a dog", "my pet"], ["a dog"], ["a cow"], ["my pet"], ["a cow"]]
  source = Source(
    "made",
    [dict(image=np.int32(i), captions=c) for i, c in enumerate(captions)],
  )
  names = ["a dog", "my pet", "a cow"]
  eye = np.eye(3, dtype=np.float32)
  embed = embed_by_number(
    eye[[0, 0, 2, 1, 2]], lambda text: eye[names.index(text)]
  )
  options = dict(
    RAW, type="retrieval", data=opened(monkeypatch, source), ks=(1,)
  )
  rows = run(evaluators.make("x", None, options, {}), embed, mesh)
  assert [row.value for row in rows] == [1, 1]
  # Of 6 captions those of dogs and pets (4, 2, 2, 2, 2) are right.
  assert rows[0].chance == pytest.approx((4 + 2 + 2 + 2 + 2) / 5 / 6)
  assert [row.n for row in rows] == [5, 6]


@pytest.mark.parametrize("group", [None, "g"])
def test_recall_is_that_of_brute_force(mesh, monkeypatch, group):
  rng = np.random.default_rng(3)
  n = 60
  words = [f"w{i}" for i in range(40)]
  z = dict(zip(words, unit(rng, 40, 4)))
  records = []
  for i in range(n):
    texts = list(rng.choice(words, rng.integers(1, 4)))
    label = None if i % 10 == 3 else int(rng.integers(15))
    records.append(dict(image=np.int32(i), captions=texts, g=label))
  records[7]["captions"] = [b"\xff"]  # left out
  zimg = unit(rng, n, 4)
  data = opened(monkeypatch, Source("made", records))
  options = dict(RAW, type="retrieval", data=data, group=group, ks=(1, 5))
  rows = run(
    evaluators.make("x", None, options, {}),
    embed_by_number(zimg, z.__getitem__),
    mesh,
  )

  good = [i for i in range(n) if i != 7]
  same = lambda i, j: (
    i == j
    or (
      group is not None
      and records[i]["g"] is not None
      and records[i]["g"] == records[j]["g"]
    )
  )
  texts = []  # each caption once for each group
  for i in good:
    for text in records[i]["captions"]:
      if not any(t == text and same(i, j) for j, t in texts):
        texts.append((i, text))
  is_right = np.array(
    [
      [
        any(t == u and same(i, j) for j in good for u in records[j]["captions"])
        for _, t in texts
      ]
      for i in good
    ]
  )
  scores = zimg[good] @ np.stack([z[t] for _, t in texts]).T
  want = []
  for s, right in ((scores, is_right), (scores.T, is_right.T)):
    best = np.where(right, s, -9).max(1, keepdims=True)
    rank = (~right & (s >= best)).sum(1)
    want += [(rank < 1).mean(), (rank < 5).mean()]
  assert [row.value for row in rows] == pytest.approx(want)
  assert [row.n for row in rows] == [59, 59, len(texts), len(texts)]
  assert [row.left_out for row in rows] == [1, 1, 0, 0]


def brute_force_recalls(scores, right):
  """Returns recall at 1 and 5 of each row, in float64."""
  best = np.where(right, scores, -9).max(1, keepdims=True)
  rank = (~right & (scores >= best)).sum(1)
  return [(rank < 1).mean(), (rank < 5).mean()]


def test_recall_is_that_of_the_original(mesh, monkeypatch):
  golden = dict(np.load(GOLDEN / "evals.npz"))
  zimg, ztxt = golden["retrieval/zimg"], golden["retrieval/ztxt"]
  owner = golden["retrieval/image_of_text"]
  source = Source(
    "made",
    [
      dict(
        image=np.int32(i),
        captions=[str(j) for j in np.flatnonzero(owner == i)],
      )
      for i in range(len(zimg))
    ],
  )
  options = dict(type="retrieval", equal_captions=False)
  data = opened(monkeypatch, source)
  evaluator = evaluators.make("x", None, options, dict(RAW, data=data))
  rows = run(evaluator, embed_by_number(zimg, lambda t: ztxt[int(t)]), mesh)
  want = [
    *golden["retrieval/image_to_text_at_1_5_10"],
    *golden["retrieval/text_to_image_at_1_5_10"],
  ]
  assert [row.value for row in rows] == pytest.approx(want, abs=1e-6)
  assert rows[-1].n == len(ztxt)


def test_without_equal_captions_only_the_own_ones_are_right(mesh, monkeypatch):
  """As published: each caption is a query, and has one right image."""
  captions = [["a dog", "a dog"], ["a dog"], ["a cow"]]
  source = Source(
    "made",
    [dict(image=np.int32(i), captions=c) for i, c in enumerate(captions)],
  )
  z = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
  options = dict(type="retrieval", ks=(1, 2), equal_captions=False)
  data = opened(monkeypatch, source)
  evaluator = evaluators.make("x", None, options, dict(RAW, data=data))
  embed = embed_by_number(z, lambda t: z[0] if t == "a dog" else z[2])
  rows = {row.metric: row for row in run(evaluator, embed, mesh)}
  assert rows["text->image recall@1"].value == 3 / 4
  assert rows["text->image recall@2"].value == 1
  assert rows["text->image recall@1"].n == 4
  # The dog of another image ties with the own two, and counts as better.
  assert rows["image->text recall@1"].value == 1 / 3


def test_recall_by_language(mesh, monkeypatch):
  """One value for each caption or for the record; some have none."""
  rng = np.random.default_rng(1)
  words = [f"w{i}" for i in range(25)]
  z = dict(zip(words, unit(rng, 25, 4)))
  zimg = unit(rng, 40, 4)
  records = []
  for i in range(40):
    texts = [" ", *rng.choice(words, 3)]
    values = ["en", *rng.choice(["en", "de", "iw"], 3)]
    if i % 5 == 0:  # of the record; the other captions are missing
      values, texts = "de", texts[:2]
    if i % 7 == 0:
      values = [*values[:-1], None] if isinstance(values, list) else None
    records.append(dict(image=np.int32(i), captions=texts, language=values))
  records[3]["image"] = b""  # found to be unusable when its image is read
  source = Source("made", records)
  options = dict(type="retrieval", by="language", ks=(1, 5), bad_fraction=0.1)
  data = opened(monkeypatch, source)
  monkeypatch.setitem(preprocess.OPS, "number", number_or_bad)
  options["pp_image"] = "number|keep('image')"
  evaluator = evaluators.make("x", None, options, dict(RAW, data=data))
  found = run(evaluator, embed_by_number(zimg, z.__getitem__), mesh)
  rows = {row.metric: row for row in found}

  values = []
  for language in ("en", "de", "iw"):
    pairs = []  # (image, text), each text of an image once
    for i, record in enumerate(records):
      given = record["language"]
      if not isinstance(given, list):
        given = [given] * len(record["captions"])
      for value, text in zip(given, record["captions"]):
        if value == language and text.strip() and (i, text) not in pairs:
          pairs.append((i, text))
    left_out = {i for i, _ in pairs if i == 3}
    pairs = [(i, t) for i, t in pairs if i != 3]
    images = sorted({i for i, _ in pairs})
    right = np.array([[(i, t) in pairs for _, t in pairs] for i in images])
    scores = zimg[images] @ np.stack([z[t] for _, t in pairs]).T
    for name, s, is_right in (
      ("image->text", scores, right),
      ("text->image", scores.T, right.T),
    ):
      want = brute_force_recalls(s, is_right)
      got = [rows[f"{language} {name} recall@{k}"] for k in (1, 5)]
      assert [row.value for row in got] == pytest.approx(want)
      assert got[0].n == len(s)
      values.append((name, want[0]))
    assert got[0].chance < got[1].chance
    assert rows[f"{language} image->text recall@1"].left_out == len(left_out)
  assert len(rows) == 4 * 4
  assert found[-1].metric == "mean text->image recall@5"
  for name in ("image->text", "text->image"):
    mean = np.mean([value for key, value in values if key == name])
    assert rows[f"mean {name} recall@1"].value == pytest.approx(mean)


def number_or_bad():
  def apply(example, rng):
    del rng
    if example["image"] == b"":
      raise BadExample("no image", kind="no image")
    return example

  return apply


@pytest.mark.parametrize(
  "value, message",
  [
    (["en"], 'made has no caption with a "language"'),  # of two captions
    (None, 'made has no caption with a "language"'),
  ],
)
def test_no_caption_has_a_language(monkeypatch, value, message):
  records = [dict(image=0, captions=["a", "b"], language=value)] * 3
  data = opened(monkeypatch, Source("made", records))
  options = dict(type="retrieval", by="language", data=data)
  with pytest.raises(errors.UserError, match=message):
    evaluators.make("x", None, options, RAW)


def test_any_of_several_labels_is_right(mesh, monkeypatch):
  """As in ReaL: an image without labels is left out."""
  rng = np.random.default_rng(2)
  labels = [list(rng.choice(8, rng.integers(0, 4), False)) for _ in range(50)]
  zimg, heads = unit(rng, 50, 5), unit(rng, 8, 5)
  source = Source(
    "made",
    [dict(image=np.int32(i), real=x) for i, x in enumerate(labels)],
    label_names=dict(real=[f"c{i}" for i in range(8)]),
  )
  options = dict(type="zeroshot", label="real", ks=(1, 3))
  data = opened(monkeypatch, source)
  evaluator = evaluators.make("x", None, options, dict(RAW, data=data))
  embed = embed_by_number(zimg, lambda t: heads[int(t[1:])])
  rows = run(evaluator, embed, mesh)
  order = np.argsort(-zimg @ heads.T, axis=1)
  used = [i for i in range(50) if labels[i]]
  for row, k in zip(rows, (1, 3)):
    hits = [bool(set(order[i, :k]) & set(labels[i])) for i in used]
    assert row.value == pytest.approx(np.mean(hits))
    miss = [math.comb(8 - len(labels[i]), k) / math.comb(8, k) for i in used]
    assert row.chance == pytest.approx(1 - np.mean(miss))
    assert (row.n, row.left_out) == (len(used), 50 - len(used))


class Unreadable:
  """Records whose images must not be read."""

  def __init__(self, n):
    self._n = n

  def __len__(self):
    return self._n

  def __getitem__(self, i):
    raise AssertionError("the image was read")

  def brief(self, i):
    return dict(captions=[f"text {i}"], label=i % 6, concept=f"c{i % 6}")


SECTIONS = [
  dict(type="retrieval"),
  dict(type="retrieval", group="concept"),
  dict(type="zeroshot"),
  dict(type="zeroshot", label="concept", classes="captions"),
  dict(type="picture", group="concept"),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_images_are_not_read_to_begin_with(monkeypatch, section):
  source = Source("made", Unreadable(100), label_names=dict(label=NAMES))
  data = opened(monkeypatch, source)
  evaluators.make("x", None, section, dict(RAW, data=data))


class Large:
  """Records of a megabyte, that cannot be read without their images."""

  def __len__(self):
    return 300

  def __getitem__(self, i):
    return dict(
      image=bytes(1 << 20), captions=[f"text {i}"], label=0, concept="c"
    )


@pytest.mark.parametrize("section", SECTIONS[1:4])
def test_images_are_not_held(monkeypatch, section):
  source = Source("made", Large(), label_names=dict(label=NAMES))
  data = opened(monkeypatch, source)
  tracemalloc.start()
  evaluators.make("x", None, section, dict(RAW, data=data))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 100 << 20


def test_what_cannot_be_used_is_left_out_and_said(tokenizer, mesh, tmp_path):
  """A real folder with a truncated image and a caption that is none."""
  for i in range(12):
    Image.new("RGB", (16, 16), (10 * (i % 6), 0, 0)).save(tmp_path / f"{i}.png")
  broken = tmp_path / "4.png"
  broken.write_bytes(broken.read_bytes()[:45])
  (tmp_path / "captions.jsonl").write_text(
    "".join(
      json.dumps(
        dict(
          file=f"{i}.png",
          caption=NAMES[i % 6] if i != 5 else "x" * 70_000,
          kind=NAMES[i % 6],
        )
      )
      + "\n"
      for i in range(12)
    )
  )
  data = dict(kind="folder", path=str(tmp_path))
  embed = lookup_embed(tokenizer, NAMES)
  evaluator = make(type="retrieval", data=data, ks=(1,))
  rows = run(evaluator, embed, mesh, tokenizer)
  assert [tuple(row)[1:] for row in rows] == [
    (1.0, pytest.approx((2 * 8 + 2) / 10 / 10), 10, 2),
    (1.0, pytest.approx((2 * 8 + 2) / 10 / 10), 10, 1),
  ]
  assert str(rows[0]).endswith("100.0% (chance 18.00%, n 10, 2 left out)")
  options = dict(type="zeroshot", label="kind", classes="captions", ks=(1,))
  rows = run(make(data=data, **options), embed, mesh, tokenizer)
  assert rows == [("6-way top-1", 1.0, pytest.approx(1 / 6), 10, 2)]
  with pytest.raises(errors.UserError, match="bad_fraction=0.0001 allows"):
    evaluator = make(type="retrieval", data=data, bad_fraction=0.0001)
    run(evaluator, embed, mesh, tokenizer)


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(type="retreival"), 'config.evals.x.type "retreival" is not known'),
    (dict(type="zeroshot", lable="label"), 'config.evals.x has no key "lable"'),
    (dict(type="picture", groop="c"), 'no key "groop"'),
    (dict(type="picture", by="label"), 'no key "by"'),
    (dict(type="zeroshot", classes="wordnet"), "from: captions, imagenet"),
    (dict(type="zeroshot", label="concept"), 'label "concept" is not known'),
    (dict(type="zeroshot", templates="poem"), "choose from: clip_7, clip_80"),
    (dict(type="retrieval", captions="caption"), 'did you mean "captions"'),
    (
      dict(type="retrieval", group="captions"),
      'group of the evaluation: feature "captions" is not known',
    ),
    (dict(type="retrieval", by="labl"), 'feature "labl" is not known'),
    (dict(type="retrieval", group="concpt"), "choose from: concept, label"),
    (
      dict(type="zeroshot", label="captions", classes="captions"),
      "choose from: concept, label",
    ),
    (dict(type="zeroshot", label="lable"), 'did you mean "label"'),
  ],
)
def test_mistakes_are_named(animals, section, message):
  with pytest.raises(errors.UserError) as e:
    make(data=animals, **section)
  assert message in str(e.value)
