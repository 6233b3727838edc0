"""Recall and accuracy against brute force and answers known by construction."""

import io
import math

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from sigjax import errors, evaluators, sharding
from sigjax.data import kinds
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.data.source import Source
from sigjax.evaluators import prompts, ranking


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh()


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
  got = ranking.ranks(queries, keys, query_ids, key_ids, mesh)
  # A rank counts the wrong keys before the first right one.
  np.testing.assert_array_equal(
    got, brute_force_ranks(queries, keys, query_ids, key_ids)
  )


def test_equal_and_nan_embeddings_are_worth_nothing(mesh):
  ids = np.arange(10)
  for value in (0.5, np.nan):
    z = np.full((10, 4), value, np.float32)
    np.testing.assert_array_equal(ranking.ranks(z, z, ids, ids, mesh), 9)


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

  def embed(image=None, text=None):
    if image is not None:
      number = jnp.round((jnp.asarray(image)[:, 8, 8, 0] + 1) * 127.5)
      return jnp.eye(len(names))[number.astype(int) // 10], None
    rows = []
    for tokens in np.asarray(text):
      words = tokenizer._model.decode([int(t) for t in tokens if t > 1]).split()
      found = [i for i, name in enumerate(names) if name in words]
      rows.append(
        np.eye(len(names))[found[0]] if found else np.zeros(len(names))
      )
    return None, jnp.asarray(np.array(rows))

  return embed


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
      data = io.BytesIO()
      # One in three dogs looks like an elk.
      shown = 4 if name == "dog" and copy == 0 else i
      Image.new("RGB", (16, 16), (10 * shown, 0, 0)).save(data, "PNG")
      records.append(
        dict(
          image=data.getvalue(),
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
)


def make(tokenizer, path=None, **section):
  return evaluators.make("config.evals.x", path, tokenizer, {**section, **PP})


def test_zeroshot(animals, tokenizer, mesh):
  embed = lookup_embed(tokenizer, NAMES)
  for options in (
    dict(label="concept", classes="captions"),
    dict(label="label", classes="labels", templates="photo"),
  ):
    rows = make(tokenizer, type="zeroshot", data=animals, **options).run(
      embed, mesh
    )
    assert [row[0] for row in rows] == ["6-way top-1", "6-way top-5"]
    _, value, by_chance, n = rows[0]
    assert value == pytest.approx(17 / 18) and n == 18
    assert by_chance == pytest.approx(1 / 6)


def test_retrieval(animals, tokenizer, mesh):
  embed = lookup_embed(tokenizer, NAMES)
  evaluator = make(
    tokenizer, type="retrieval", data=animals, group="concept", ks=(1, 2)
  )
  rows = {row[0]: row[1:] for row in evaluator.run(embed, mesh)}
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
  # Without groups each image has its own captions only: nothing tells which.
  rows = make(tokenizer, type="retrieval", data=animals, ks=(1,)).run(
    embed, mesh
  )
  assert rows[0][1] == 0 and rows[0][2] == pytest.approx(2 / 36)


def test_picture(animals, tokenizer, mesh, tmp_path):
  path = tmp_path / "x.png"
  picture = make(
    tokenizer, path, type="picture", data=animals, group="concept", count=5
  )
  assert picture.run(lookup_embed(tokenizer, NAMES), mesh) == []
  image = np.asarray(Image.open(path)).astype(int)
  green = (image == (205, 240, 205)).all(-1).any(-1)
  assert green.any() and not green.all()  # right ones are marked


def test_prompts():
  records = [
    dict(c=b"x", captions=[b"one", b"two"]),
    dict(c=b"y", captions=[b"three"]),
    dict(c=b"x", captions=[b"one", b"four"]),
  ]
  ids, texts = prompts.classes(Source("s", records), "c", "captions", "plain")
  assert ids.tolist() == [0, 1, 0]
  assert texts == [["one", "two", "four"], ["three"]]


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(type="retreival"), 'config.evals.x.type "retreival" is not known'),
    (dict(type="zeroshot", lable="label"), 'config.evals.x has no key "lable"'),
    (dict(type="picture", groop="c"), 'no key "groop"'),
    (dict(type="zeroshot", classes="wordnet"), "from: captions, labels"),
    (dict(type="zeroshot", label="concept"), 'label "concept" is not known'),
    (dict(type="zeroshot", templates="poem"), "choose from: photo, plain"),
    (dict(type="retrieval", captions="caption"), 'did you mean "captions"'),
  ],
)
def test_mistakes_are_named(animals, tokenizer, section, message):
  with pytest.raises(errors.UserError) as e:
    make(tokenizer, data=animals, **section)
  assert message in str(e.value)
