"""Evaluating by name: each layout of data, against sums done by hand."""

import dataclasses
import json
import shutil

import hf_case  # beside this file
import jax
import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.data import kinds
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


@pytest.mark.parametrize(
  "task, spec, says",
  [
    ("imagnet", "DIR", 'did you mean "imagenet"'),
    ("imagenet", "DIR/none", "no folder .*image-net.org.*1,000 WordNet ids"),
    ("coco", "DIR/none", "no folder .*cocodataset.org"),
    ("coco", "DIR", "there is no table of captions"),
    ("classes", "DIR", "none with an image in it"),
    ("fewshot", "DIR", "needs two"),
    ("retrieval", "tfds:coco", "tfds:NAME:SPLIT"),
    ("xm3600", "DIR", "captions.jsonl of Crossmodal-3600"),
  ],
)
def test_data_that_is_not_there(model, tmp_path, task, spec, says):
  spec = spec.replace("DIR", str(tmp_path))
  with pytest.raises(errors.UserError, match=says):
    evaluate.evaluate(model, [(task, spec)])


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
  want = np.load(hf_case.GOLDEN / f"{file}_io.npz")
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
  arrays = np.load(hf_case.GOLDEN / "naflex_tiny.npz")
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
