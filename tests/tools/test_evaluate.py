"""Evaluating by name: each layout of data, against sums done by hand."""

import csv
import dataclasses
import io
import itertools
import json
import shutil
import tarfile

import hf_case  # beside this file
import jax
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.evaluators import prompts
from sigjax.models import two_towers
from sigjax.weights import known, npz, vocabulary
from tools import convert_from_hf, evaluate, opened, predict

RES, LENGTH = 32, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return hf_case.golden_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
  return opened.open_model(folder)


def pixels(path, size=RES, crop=None):
  """Returns a picture as a protocol prepares it, by Pillow alone."""
  with Image.open(path) as image:
    image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
  x = np.asarray(image, np.float64) / 127.5 - 1
  at = (size - crop) // 2 if crop else 0
  return x[at : at + crop, at : at + crop] if crop else x


def embed(model, images=None, texts=None):
  """Returns unit rows in float64, of pixels and of canonical texts."""
  towers = two_towers.of_config(model.config["model"])
  image = None if images is None else np.stack(images).astype(np.float32)
  text = texts and np.stack([model.tokenizer(x, LENGTH) for x in texts])
  zimg, ztxt, _ = towers.apply({"params": model.params}, image, text)
  return [z if z is None else np.asarray(z, np.float64) for z in (zimg, ztxt)]


def heads(model, names):
  """Returns a unit row for each class, from the seven templates."""
  forms = [
    "itap of a {}",
    "a bad photo of the {}",
    "a origami {}",
    "a photo of the large {}",
    "a {} in a video game",
    "art of the {}",
    "a photo of the small {}",
  ]
  texts = [form.format(name) for name in names for form in forms]
  mean = embed(model, texts=texts)[1].reshape(len(names), 7, -1).mean(axis=1)
  return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def values(results):
  return {x.row.metric: x.row.value for x in results}


def test_class_folders(model, tmp_path):
  names = ["Red_Cat, small", "dogs", "some green grass"]
  files = [
    hf_case.jpeg(tmp_path / name / f"{i}.jpg", 10 * k + i)
    for k, name in enumerate(sorted(names))
    for i in range(4)
  ]
  (tmp_path / "dogs/notes.txt").write_text("no image")
  broken = tmp_path / "dogs/x.jpg"
  broken.write_bytes(files[0].read_bytes()[:60])
  lenient = dataclasses.replace(
    model, config=dict(model.config, bad_fraction=0.2)
  )
  got = evaluate.evaluate(lenient, [("classes", str(tmp_path))], batch_size=8)
  z = embed(model, [pixels(f, 37, 32) for f in files])[0]
  scores = z @ heads(model, ["red cat", "dogs", "some green grass"]).T
  right = np.repeat(np.arange(3), 4)
  assert values(got)["3-way top-1"] == np.mean(scores.argmax(axis=1) == right)
  assert got[0].row.n == 12 and got[0].row.left_out == 1
  assert got[0].published is None

  # Other names; folders that are numbers are in the order of the numbers.
  for old, new in zip(sorted(names), ("2", "10", "1")):
    (tmp_path / old).rename(tmp_path / new)
  with pytest.raises(
    errors.UserError, match='what "1" in .* write classes.txt'
  ):
    evaluate.evaluate(lenient, [("classes", str(tmp_path))], batch_size=8)
  (tmp_path / "classes.txt").write_text("1 a\n2 b, c\n10: d e\n")
  source = kinds.open_source("classes", path=str(tmp_path))
  assert source.label_names == {"label": ["a", "b, c", "d e"]}
  assert [source.brief(i)["label"] for i in (0, 4, 8)] == [0, 1, 2]
  assert source[4]["image"] == (tmp_path / "2/0.jpg").read_bytes()


def test_imagenet_and_real(model, tmp_path, monkeypatch):
  monkeypatch.setitem(prompts.TEMPLATES, "clip_7", ("{}",))  # fewer texts
  val, right = tmp_path / "val", [3, 700, 999]
  for i in range(1000):
    (val / f"n{i:08d}").mkdir(parents=True)
  files = [
    hf_case.jpeg(val / f"n{k:08d}/ILSVRC2012_val_{9 - i:08d}.JPEG", k)
    for i, k in enumerate(right)
  ]
  z = embed(model, [pixels(f, 37, 32) for f in files])[0]
  names = [
    prompts.canonical(name.split(",")[0]) for name in prompts._CLIP["imagenet"]
  ]
  scores = z @ embed(model, texts=names)[1].T
  ranks = np.argsort(np.argsort(-scores))[np.arange(3), right]
  got = evaluate.evaluate(model, [("imagenet", str(val))], batch_size=8)
  for k in (1, 5, 10):
    assert values(got)[f"1000-way top-{k}"] == np.mean(ranks < k)
  # ReaL lists labels in the order of the files' names: that of the last first.
  best = [[int(np.argmax(s)), 5] for s in scores]
  (val / "real.json").write_text(json.dumps([[], best[1], best[0]]))
  got = evaluate.evaluate(model, [("imagenet_real", str(val))], batch_size=8)
  assert values(got)["1000-way top-1"] == 1.0
  assert got[0].row.n == 2 and got[0].row.left_out == 1
  (val / "real.json").write_text("[[1], [2]]")
  with pytest.raises(errors.UserError, match="list of 3 lists .* it has 2"):
    evaluate.evaluate(model, [("imagenet_real", str(val))], batch_size=8)
  (val / "more").mkdir()
  with pytest.raises(errors.UserError, match="has 1001 classes, not 1000"):
    evaluate.evaluate(model, [("imagenet", str(val))], batch_size=8)


def recall(scores, owners):
  """Returns recall@1 both ways; column j is a text of image owners[j]."""
  of_image = np.mean(owners[scores.argmax(axis=1)] == np.arange(len(scores)))
  return of_image, np.mean(scores.argmax(axis=0) == owners)


def test_coco_xm3600_and_fewshot(model, tmp_path):
  texts = ["a photo", "the red cat", "two dogs", "grass", "a red cat", "above"]
  files = [hf_case.jpeg(tmp_path / f"val2014/{i}.jpg", i) for i in range(3)]
  images = [
    dict(
      filepath="val2014",
      filename=f"{i}.jpg",
      split="test",
      sentences=[dict(raw=t) for t in texts[2 * i : 2 * i + 2]],
    )
    for i in range(3)
  ]
  train = dict(images[0], split="train", filename="not_there.jpg")
  (tmp_path / "dataset_coco.json").write_text(
    json.dumps(dict(images=[*images, train]))
  )
  z, ztxt = embed(model, [pixels(f) for f in files], texts)
  want = recall(z @ ztxt.T, np.repeat(np.arange(3), 2))
  released = dataclasses.replace(model, name="siglip/b16_256")
  got = evaluate.evaluate(released, [("coco", str(tmp_path))], batch_size=8)
  found = {x.row.metric: x for x in got}
  for metric, value, published in zip(
    ("image->text recall@1", "text->image recall@1"), want, (65.1, 47.4)
  ):
    assert found[metric].row.value == pytest.approx(value)
    assert found[metric].published == published
  assert found["text->image recall@1"].row.n == 6

  # The same pictures in two languages, and as classes of a probe.
  (tmp_path / "images").symlink_to(tmp_path / "val2014")
  lines = [
    {
      "image/key": str(i),
      "en": {"caption": [texts[2 * i]]},
      "de": {"caption": [texts[2 * i + 1]]},
    }
    for i in range(3)
  ]
  (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  for part in ("train", "val"):
    for i in range(3):
      for j in range(25 if part == "train" else 1):
        copy = tmp_path / part / f"class {i}" / f"{j}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(files[i])
  got = evaluate.evaluate(
    model,
    [
      ("xm3600", str(tmp_path)),
      ("fewshot", f"{tmp_path}/train,{tmp_path}/val"),
    ],
    batch_size=8,
  )
  scores = z @ ztxt.T
  each = [recall(scores[:, k::2], np.arange(3)) for k in (0, 1)]
  found = values(got)
  for metric, value in zip(("image->text", "text->image"), np.mean(each, 0)):
    assert found[f"mean {metric} recall@1"] == pytest.approx(value)
  assert found["5-shot top-1"] == 1  # each class has a picture of its own


# ---- The same pictures in each layout that people have ----

NAMES = ["red cat", "dogs", "grass"]
LABELS = [0, 2, 1, 1, 0, 2]  # of NAMES
WIDE = [3, 700, 999, 20, 3, 51]  # of ImageNet's classes
REAL = [[], [700, 8], [4, 5, 6], [20], [3], [51, 2]]
CAPTIONS = [
  ["a photo", "the red cat"],
  ["two dogs", "grass"],
  ["a red cat", "a photo"],  # of another picture, too
  ["above", "some bird"],
  ["the cat", "a drawing"],
  ["small dogs", "green"],
]
LAYOUTS = {
  "class folders, WordNet ids": ("classes", "AT/classes"),
  "classes, TFDS": ("classes", "tfds:AT/few/made/1.0.0:test"),
  "classes, Parquet": ("classes", "AT/few.parquet"),
  "ImageNet, TFDS": ("imagenet", "tfds:AT/wide/made/1.0.0:test"),
  "ImageNet, Parquet": ("imagenet", "AT/wide.parquet"),
  "ImageNetV2, folders 0 to 999": ("imagenet_v2", "AT/v2"),
  "ReaL, TFDS": ("imagenet_real", "tfds:AT/wide/made/1.0.0:test"),
  "ReaL, Parquet": ("imagenet_real", "AT/wide.parquet"),
  "few-shot, folders and TFDS": (
    "fewshot",
    "AT/train,tfds:AT/few/made/1.0.0:test",
  ),
  "few-shot, TFDS and Parquet": (
    "fewshot",
    "tfds:AT/few/made/1.0.0:train,AT/few.parquet",
  ),
  "COCO, TFDS": ("coco", "tfds:AT/few/made/1.0.0:test"),
  "COCO, its own JSON": ("coco", "AT/coco/annotations/captions_val2017.json"),
  "Flickr30k": ("flickr30k", "AT/flickr30k"),
  "retrieval, tars": ("retrieval", "AT/{0,1}.tar"),
  "retrieval, Parquet": ("retrieval", "AT/captions-*.parquet"),
  "retrieval, a table": ("retrieval", "AT/table/pairs.csv"),
}


def write_tfds(at, features, **splits):
  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      image = tfds.features.Image(encoding_format="jpeg")
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(dict(features, image=image)),
      )

    def _split_generators(self, dl_manager):
      return {k: self._generate_examples(v) for k, v in splits.items()}

    def _generate_examples(self, rows):
      yield from enumerate(rows)

  tfds.disable_progress_bar()
  Made(data_dir=at, file_format="array_record").download_and_prepare()


def write_parquet(path, classes=None, **columns):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet

  image = [dict(bytes=x, path=None) for x in columns.pop("image")]
  table = pa.table(dict(image=image, **columns))
  if classes:  # as Hugging Face's datasets writes it
    label = dict(names=classes, _type="ClassLabel")
    features = dict(image=dict(_type="Image"), label=label)
    about = json.dumps(dict(info=dict(features=features)))
    table = table.replace_schema_metadata({"huggingface": about})
  pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_layouts(at):
  """Writes all layouts; returns six pictures, and 25 of each class."""
  files = [hf_case.jpeg(at / f"pictures/{i}.jpg", i) for i in range(6)]
  data = [file.read_bytes() for file in files]
  train = {
    k: [hf_case.jpeg(at / "train" / n / f"{i:02}.jpg", 99 * k + i + 9)
        for i in range(25)]
    for k, n in enumerate(NAMES)
  }  # fmt: skip

  def copies(folder, names):
    for file, name in zip(files, names, strict=True):
      (at / folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(file, at / folder / name)

  # Classes.
  copies("classes", [f"n{9 - k}/{i}.JPEG" for i, k in enumerate(LABELS)])
  lines = [f"n{9 - k} {name}, and more\n" for k, name in enumerate(NAMES)]
  (at / "classes/classes.txt").write_text("".join(lines))
  for i in range(1000):
    (at / f"v2/{i}").mkdir(parents=True)
  copies("v2", [f"{k}/{i}.jpg" for i, k in enumerate(WIDE)])
  label, lib = tfds.features.ClassLabel, tfds.features
  write_tfds(
    at / "wide",
    dict(
      label=label(num_classes=1000),
      real_label=lib.Sequence(label(num_classes=1000)),
    ),
    test=[
      dict(image=x, label=k, real_label=several)
      for x, k, several in zip(data, WIDE, REAL)
    ],
  )
  write_parquet(at / "wide.parquet", image=data, label=WIDE, real_label=REAL)
  write_parquet(at / "few.parquet", NAMES, image=data, label=LABELS)
  text = dict(id=lib.Scalar(np.int64), text=lib.Text())
  write_tfds(
    at / "few",
    dict(label=label(names=NAMES), captions=lib.Sequence(text)),
    train=[
      dict(image=file.read_bytes(), label=k, captions=[])
      for k, several in train.items()
      for file in several
    ],
    test=[
      dict(image=x, label=k, captions=[dict(id=0, text=t) for t in texts])
      for x, k, texts in zip(data, LABELS, CAPTIONS)
    ],
  )

  # Captions.
  copies("coco/val2017", [f"{i:012}.jpg" for i in range(6)])
  (at / "coco/annotations").mkdir()
  for part, names in ("val", range(6)), ("train", range(70, 76)):
    notes = [
      dict(image_id=100 + i, id=2 * i + j, caption=text)
      for j in (1, 0)
      for i, texts in enumerate(CAPTIONS)
      for text in texts[j : j + 1]
    ]
    images = [
      dict(id=100 + i, file_name=f"{name:012}.jpg", width=60, height=45)
      for i, name in enumerate(names)
    ]
    (at / f"coco/annotations/captions_{part}2017.json").write_text(
      json.dumps(dict(info={}, images=images, annotations=notes))
    )
  copies("flickr30k/flickr30k-images", [f"{i}.jpg" for i in range(6)])
  karpathy = [
    dict(filename=f"{i}.jpg", split="test", sentences=[dict(raw=t) for t in x])
    for i, x in enumerate(CAPTIONS)
  ]
  karpathy.insert(1, dict(karpathy[0], filename="9.jpg", split="train"))
  (at / "flickr30k/dataset_flickr30k.json").write_text(
    json.dumps(dict(dataset="flickr30k", images=karpathy))
  )
  for part in 0, 1:
    mine = range(4 * part, 4 + 2 * part)
    with tarfile.open(at / f"{part}.tar", "w") as tar:
      for i in mine:
        about = json.dumps(dict(caption=CAPTIONS[i])).encode()
        for name, member in ((f"{i}.jpg", data[i]), (f"{i}.json", about)):
          info = tarfile.TarInfo(name)
          info.size = len(member)
          tar.addfile(info, io.BytesIO(member))
    write_parquet(
      at / f"captions-{part}.parquet",
      image=[data[i] for i in mine],
      caption=[CAPTIONS[i] for i in mine],
    )
  copies("table", [f"{i}.jpg" for i in range(6)])
  with (at / "table/pairs.csv").open("w") as file:
    csv.writer(file).writerows(
      [["file", "caption"]]
      + [[f"{i}.jpg", t] for i, x in enumerate(CAPTIONS) for t in x]
    )
  return files, train


def by_rank(form, scores, right, ks):
  """Returns {metric: share of rows with a right column among the k best}."""
  best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
  rank = np.sum(~right & (scores >= best), axis=1)
  return {form.format(k): np.mean(rank < k) for k in ks}


def probe(model, files, train):
  """Returns {metric: accuracy}: ridge regression by its normal equations."""
  towers = two_towers.of_config(model.config["model"])

  def features(files):
    images = np.stack([pixels(f, 37, RES) for f in files]).astype(np.float32)
    out = towers.apply({"params": model.params}, images, None)[2]
    return np.asarray(out["img/pre_logits"], np.float64)

  # In the order of the folders' names: dogs, grass, red cat.
  order = sorted(range(3), key=NAMES.__getitem__)
  x = np.stack([features(train[k]) for k in order])  # (3, 25, W)
  x_test, right = features(files), [order.index(k) for k in LABELS]
  found = {}
  for shots in (1, 5, 10, 25):
    each = []
    for seed in (0, 1, 2):
      rng = np.random.default_rng(seed)
      rows = np.concatenate(
        [x[c][rng.permutation(25)[:shots]] for c in (0, 1, 2)]
      )
      mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-5
      a, b = (
        np.column_stack([(f - mean) / std, np.full(len(f), 100.0)])
        for f in (rows, x_test)
      )
      y = 2 * np.repeat(np.eye(3), shots, axis=0) - 1
      w = np.linalg.solve(a.T @ a + 1024 * np.eye(a.shape[1]), a.T @ y)
      each.append(np.mean((b @ w).argmax(axis=1) == right))
    found[f"{shots}-shot top-1"] = np.mean(each)
  return found


def by_hand(model, files, train):
  """Returns {task: {metric: value}}."""
  cropped = embed(model, [pixels(f, 37, RES) for f in files])[0]
  of = lambda labels, n: np.array([np.isin(np.arange(n), x) for x in labels])
  few = cropped @ embed(model, texts=NAMES)[1].T
  names = [n.split(",")[0] for n in prompts._CLIP["imagenet"]]
  wide = cropped @ embed(model, texts=list(map(prompts.canonical, names)))[1].T
  strings = sorted({t for texts in CAPTIONS for t in texts})
  z, ztxt = embed(model, [pixels(f) for f in files], strings)
  places = [strings.index(t) for texts in CAPTIONS for t in texts]
  scores = z @ ztxt[places].T
  own = np.arange(6)[:, None] == np.repeat(np.arange(6), 2)
  top = "1000-way top-{}"
  return dict(
    classes=by_rank("3-way top-{}", few, of(LABELS, 3), [1]),
    imagenet=by_rank(top, wide, of(WIDE, 1000), [1, 5, 10]),
    imagenet_v2=by_rank(top, wide, of(WIDE, 1000), [1, 5, 10]),
    imagenet_real=by_rank(top, wide[1:], of(REAL[1:], 1000), [1, 5, 10]),
    fewshot=probe(model, files, train),
    retrieval={
      **by_rank("image->text recall@{}", scores, own, [1, 5, 10]),
      **by_rank("text->image recall@{}", scores.T, own.T, [1, 5]),
    },
  )


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
  """Returns {layout: its results in the JSON file}, and the sums by hand."""
  at = tmp_path_factory.mktemp("layouts")
  files, train = write_layouts(at)
  want = by_hand(model, files, train)
  tasks = [(k, spec.replace("AT", str(at))) for k, spec in LAYOUTS.values()]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(prompts.TEMPLATES, "clip_7", ("{}",))  # fewer texts
    released = dataclasses.replace(model, name="siglip/b16_256")
    results = evaluate.evaluate(released, tasks, batch_size=64)
  rows = iter(json.loads(evaluate.as_json("w", tasks, results))["results"])
  found = {}
  for layout, (task, _) in LAYOUTS.items():
    count = len(want.get(task, want["retrieval"]))
    found[layout] = list(itertools.islice(rows, count))
  assert next(rows, None) is None
  return found, want


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_against_sums_by_hand(measured, layout):
  found, want = measured
  task, spec = LAYOUTS[layout]
  rows = {row["metric"]: row for row in found[layout]}
  assert {row["task"] for row in found[layout]} == {task}
  sums = want.get(task, want["retrieval"])
  assert rows.keys() == sums.keys()
  if spec.startswith("tfds:") and task == "fewshot":
    # TFDS shuffles what it writes, so that other pictures are drawn.
    sums = {"25-shot top-1": sums["25-shot top-1"]}
  for metric, value in sums.items():
    assert rows[metric]["value"] == pytest.approx(value), metric
    real = task == "imagenet_real"
    n = 12 if metric.startswith("text->image") else 6 - real
    assert (rows[metric]["n"], rows[metric]["left_out"]) == (n, real)
  if task == "coco":  # what is published is of Karpathy's test split
    published = 65.1 if spec.startswith("tfds:") else None
    assert rows["image->text recall@1"]["published"] == published


@pytest.mark.parametrize(
  "task, spec, says",
  [
    ("imagnet", "DIR", 'did you mean "imagenet"'),
    ("imagenet", "DIR/none", "no folder .*image-net.org.*1,000 WordNet ids"),
    ("coco", "DIR/none", "no folder .*cocodataset.org.*DIR/val2014/"),
    ("coco", "DIR", "has no pictures and no table of captions"),
    ("classes", "DIR", "none with an image in it"),
    ("fewshot", "DIR", "needs two"),
    ("retrieval", "tfds:coco", "tfds:NAME:SPLIT"),
    ("xm3600", "DIR", "captions.jsonl of Crossmodal-3600"),
    ("imagenet", "DIR/{0..9}.tar", "of tars only captions are read, no class"),
    ("coco", "DIR/none/annotations/captions_val2017.json", "no folder .*none;"),
  ],
)
def test_data_that_is_not_there(tmp_path, task, spec, says):
  """Said before the model is opened, and before another task runs."""
  hf_case.jpeg(tmp_path / "good/red car/0.jpg", 0)
  (tmp_path / "bad").mkdir()
  tasks = [("classes", f"{tmp_path}/good")]
  spec = spec.replace("DIR", f"{tmp_path}/bad")
  with pytest.raises(errors.UserError, match=says) as e:
    evaluate.evaluate("siglip2/b16_256", [*tasks, (task, spec)])
  assert "\n" not in str(e.value)


def test_folders_that_are_not_of_imagenet(tmp_path):
  """Their order would say which class is which."""
  for i in range(999):
    (tmp_path / f"n{i:08}").mkdir()
  hf_case.jpeg(tmp_path / "tench/0.jpg", 0)
  with pytest.raises(errors.UserError, match='which class "tench" in'):
    evaluate.evaluate("siglip/b16_256", [("imagenet", str(tmp_path))])


@pytest.mark.parametrize("pieces, rows", [(97, 96), (97, 120)])
def test_the_tokenizer_of_another_model(tmp_path, caplog, pieces, rows):
  """With more pieces than rows it is refused; far fewer are said."""
  hf_case.golden_folder(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  config["model"]["text"]["vocab_size"] = rows
  (tmp_path / "config.json").write_text(json.dumps(config))
  tokenizer = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.model")
  assert tokenizer.rows == pieces
  if rows < pieces:
    with pytest.raises(errors.UserError, match="97 pieces, but .* 96 tokens"):
      opened.open_model(tmp_path)
  else:
    model = dict(config["model"], text=dict(vocab_size=rows, width=8, depth=1))
    opened._tokenizer(tmp_path / "tokenizer.model", dict(model=model))
    assert "97 pieces, but the model has embeddings of 120" in caplog.text


def test_cropped():
  assert evaluate.cropped("decode|resize(224)|keep('image')") == (
    "decode|resize(256)|central_crop(224)|keep('image')"
  )
  patches = "decode|resize_to_patches(256,16)|keep('image')"
  assert evaluate.cropped(patches) == patches  # sees whole images
  assert evaluate.cropped("decode|resize(384, method='bicubic')|x") == (
    "decode|resize(439, method='bicubic')|central_crop(384)|x"
  )


# ---- Models by name ----


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_released_name(family, tmp_path, monkeypatch, caplog):
  """The file of a name gives what its own arguments give; at any size, too."""
  caplog.set_level("INFO", logger="sigjax")
  scan = family == "siglip2"
  file = f"{family}_tiny{'_scan' if scan else ''}"
  tower = dict(hf_case.BOTH, scan=scan)
  it = known.Known(
    str(hf_case.GOLDEN / f"{file}.npz"),
    dict(
      image=dict(tower, patch_size=8, pool_type="map"),
      text=dict(tower, vocab_size=97),
      out_dim=(None, 48),
    ),
    32,
    12,
    "gemma" if scan else "c4_en",
    None,
  )
  monkeypatch.setitem(known.KNOWN, f"{family}/tiny", it)
  spm = str(hf_case.spm(tmp_path / "spm.model"))
  monkeypatch.setitem(vocabulary.NAMES, it.tokenizer, spm)
  model = opened.open_model(f"{family}/tiny")
  want = dict(np.load(hf_case.GOLDEN / f"{file}_io.npz"))
  towers = two_towers.of_config(model.config["model"])
  zimg, ztxt, _ = towers.apply(
    {"params": model.params}, want["image"], want["text"]
  )
  np.testing.assert_allclose(zimg, want["zimg"], atol=1e-5)
  np.testing.assert_allclose(ztxt, want["ztxt"], atol=1e-5)
  assert ("pad=0" in model.config["pp_text"]) == scan
  larger = opened.open_model(f"{family}/tiny", 48)
  assert larger.name == f"{family}/tiny at 48 pixels"  # has no published score
  assert larger.params["img"]["pos_embedding"].shape == (1, 36, 48)
  assert "trained with images of 32 pixels" in caplog.text
  # The same file elsewhere, told by its name.
  shutil.copy(it.url, tmp_path / f"{file}.npz")
  again = opened.open_model(tmp_path / f"{file}.npz")
  assert again.name == f"{family}/tiny"
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_what_names_no_model(tmp_path, folder):
  with pytest.raises(errors.UserError, match="is an image tower alone"):
    opened.open_model("augreg/B_16")
  with pytest.raises(errors.UserError, match='did you mean "siglip/b16_256"'):
    opened.open_model("siglip/b16_25")
  with pytest.raises(errors.UserError, match="neither checkpoints nor config"):
    opened.open_model(tmp_path)
  with pytest.raises(errors.UserError, match="has its own"):
    opened.open_model(folder, resolution=64)
  npz.save_params(tmp_path / "x.npz", {"t": np.zeros(1)})
  with pytest.raises(errors.UserError, match="no config.json beside it"):
    opened.open_model(tmp_path / "x.npz")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(errors.UserError, match='nothing says "model"'):
    opened.open_model(tmp_path / "x.npz")


@pytest.mark.parametrize("golden", ["siglip_tiny", "siglip2_tiny_scan"])
def test_probabilities_are_those_of_transformers(hf, tmp_path, golden):
  """From JPEG files and words: a folder of Hugging Face, opened in both."""
  torch, transformers = hf
  hf_case.write_config(
    tmp_path, pp_image=f"decode|resize({RES})|value_range(-1,1)|keep('image')"
  )
  hf_case.convert_golden(tmp_path, golden)
  files = [hf_case.jpeg(tmp_path / f"{i}.jpg", i) for i in range(3)]
  texts = ["a photo of the red cat", "two small dogs", "grass"]
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
  inputs = processor(
    text=texts,
    images=[Image.open(file) for file in files],
    padding="max_length",
    truncation=True,
    return_tensors="pt",
  )
  with torch.no_grad():
    want = torch.sigmoid(theirs(**inputs).logits_per_image).numpy()
  model = predict.Predictor(tmp_path / "hf")
  got = model.scores(
    [model.image(file.read_bytes()) for file in files],
    [model.text(text) for text in texts],
  )
  np.testing.assert_allclose(got.probability, want, atol=1e-4)


def test_naflex_gives_the_probabilities_of_transformers(hf, tmp_path):
  """From JPEG files of several shapes and words, with pieces as Gemma's."""
  torch, transformers = hf
  hf_case.spm(
    tmp_path / "tokenizer.model",
    model_type="bpe",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
  )
  hf_case.write_config(tmp_path, **hf_case.NAFLEX)
  hf_case.convert_golden(tmp_path, "naflex_tiny")
  arrays = dict(np.load(hf_case.GOLDEN / "naflex_tiny.npz"))
  convert_from_hf.convert(tmp_path / "hf", tmp_path / "back", scan=True)
  hf_case.same_arrays(tmp_path / "back/params.npz", arrays)
  files = []
  for i, (h, w) in enumerate([(40, 90), (300, 120), (64, 64), (33, 500)]):
    pixels = np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)
    files.append(tmp_path / f"{i}.jpg")
    Image.fromarray(pixels).save(files[-1])
  texts = ["a photo of the Red cat", "two small dogs", "grass"]
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
  assert type(theirs).__name__ == "Siglip2Model"
  with torch.no_grad():
    for p in theirs.parameters():  # arrays that were never ours
      p.add_(torch.randn_like(p) * 0.05)
    theirs.logit_bias.fill_(0.0)  # probabilities of all sizes
    found = theirs(
      **processor(
        text=texts,
        images=[Image.open(file) for file in files],
        max_length=12,
        images_kwargs=dict(patch_size=8, max_num_patches=25),
        return_tensors="pt",
      )
    )
    want = torch.sigmoid(found.logits_per_image).numpy()
  theirs.save_pretrained(tmp_path / "hf")
  model = predict.Predictor(tmp_path / "hf")
  got = model.scores(
    [model.image(file.read_bytes()) for file in files],
    [model.text(text) for text in texts],
  )
  assert np.ptp(want) > 0.1
  np.testing.assert_allclose(got.probability, want, atol=1e-4)


def test_the_table_and_the_file(model, tmp_path):
  results = [
    evaluate.Result("coco", evaluate.Row("a", 0.5, 0.25, 8, 1), 40.0),
    evaluate.Result("own", evaluate.Row("b", 0.125, 0.5, 2), None),
  ]
  lines = evaluate.table(results)
  assert " ".join(lines[2].split()) == "coco a 50.0 40.0 25.00 8, 1 left out"
  assert " ".join(lines[3].split()) == "own b 12.5 50.00 2"
  said = json.loads(evaluate.as_json("w", [("coco", "d")], results))
  assert said["results"][0]["published"] == 40.0
  assert said["results"][0]["left_out"] == 1
  assert said["data"] == [dict(task="coco", data="d")]
