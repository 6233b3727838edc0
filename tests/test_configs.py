"""Every config is built, its strings parsed and its model shaped."""

import importlib
import inspect
import io
import json
import pathlib
import re
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
import train_program

from sigjax import build, errors, optim, sharding, train, trees
from sigjax import config as config_lib
from sigjax.data.example import captions, preprocess
from sigjax.weights import npz

CONFIGS = [
  p.stem
  for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  if p.stem not in ("common", "__init__")
]
SMOKE = ["siglip_b16", "siglit_l16", "msiglip_b16", "siglip2_b16"]


def get(name, arg=None):
  return importlib.import_module(f"configs.{name}").get_config(arg)


class CountingTokenizer:
  def __call__(self, text, length, pad):
    return np.full(length, min(len(text), 9), np.int32)


@pytest.mark.parametrize(
  "name, arg",
  [(n, None) for n in CONFIGS]
  + [(n, "smoke") for n in SMOKE]
  + [
    ("siglip_b16", "pretrained=augreg/B_16"),
    ("siglit_l16", "embeddings=x"),
    ("msiglip_b16", "bottleneck=0,language=language"),
    ("msiglip_emoji", "bottleneck=0,shuffle_captions"),
    ("siglit_l16", "smoke,embeddings=x"),
    ("finetune", "weights=siglip2/b16_naflex"),
    ("siglip2_b16", "patch=32,start=x,teacher=siglip2/so400m16_256"),
  ],
)
def test_config(name, arg):
  config = get(name, arg).lock().to_dict()
  parse = lambda s: preprocess.parse(s, tokenizer=CountingTokenizer())
  data = io.BytesIO()
  Image.new("RGB", (50, 40)).save(data, "PNG")
  rng = np.random.default_rng(0)
  image = data.getvalue()
  precomputed = config["model"]["image"].get("kind") == "precomputed"
  if precomputed:
    image = np.zeros(config["model"]["image"]["width"], np.float16)
  example = parse(config["pp"])(
    dict(image=image, captions=["A cat"], language="en"), rng
  )
  assert set(example) == {"image", "text"}
  for key, value in (("image", image), ("text", "A cat")):
    alone = parse(config[f"pp_{key}"])({key: value}, rng)[key]
    if key == "image" and not precomputed and "resize" not in config["pp"]:
      example["image"] = alone
    assert alone.shape == example[key].shape, key
  if name == "siglip_emoji":
    assert example["image"].shape == (64, 64, 3)

  total = {
    k: config.pop(k, None)
    for k in ("total_steps", "total_examples", "total_epochs")
  }
  times = config_lib.Durations(config["batch_size"], 100_000, **total)
  config["optim"] = times.resolve(config["optim"], "config.optim")
  keys = set(inspect.signature(build.build).parameters) - {"mesh"}
  run = build.build(
    sharding.make_mesh(),
    example,
    times.total_steps,
    **{k: v for k, v in config.items() if k in keys},
  )
  size = sum(x.size for x in jax.tree.leaves(run.state.params))
  if arg is None and name == "siglip_b16":
    assert size == pytest.approx(203.2e6, rel=0.01)  # the released B/16's
  if arg is None and name == "msiglip_b16":
    assert size == pytest.approx(202.7e6, rel=0.001)  # 370.7 M without
  if arg and "smoke" in arg:
    assert size < 1e6
  if arg and "embeddings" in arg:
    assert set(run.state.params) == {"txt", "t", "b"}


def test_what_is_pretrained_learns_slowly():
  config = get("siglip_b16", "pretrained=augreg/B_16")
  assert config.init.path == "augreg/B_16" and config.init.into == "img"
  params = {t: {"kernel": np.ones((2, 2), np.float32)} for t in ("img", "txt")}
  zero = jax.tree.map(np.zeros_like, params)
  tx, _ = optim.make_optimizer(
    params,
    10,
    lr_mults=config.optim.lr_mults,
    wd_mults=config.optim.wd_mults,
    lr=1.0,
    wd=0.5,
  )
  moved = lambda grads: {
    t: float(-x["kernel"][0, 0])
    for t, x in tx.update(grads, tx.init(params), params)[0].items()
  }
  assert moved(zero) == {"img": 0.0, "txt": 0.5}  # weight decay alone
  assert moved(params) == pytest.approx({"img": 0.1, "txt": 1.5}, rel=1e-3)


def test_arguments():
  config = get("siglip_b16", "dataset=x/y,batch_size=64,examples=1e5")
  assert config.data.name == "x/y" and config.batch_size == 64
  config = get("siglip_emoji", "shuffle_captions")
  assert config.data.shuffle == "captions"
  with pytest.raises(errors.UserError, match='did you mean "dataset"'):
    get("siglip_b16", "datset=x")


def test_a_teacher_chooses_at_the_end_of_small_models():
  config = get("siglip2_b16", "start=x,teacher=siglip2/so400m16_256")
  assert config.init.path == "x" and config.total_examples == 4e9
  assert config.curate.path == "siglip2/so400m16_256"
  assert config.curate.model.image.variant == "So400m/16"
  assert not config.phases and "losses" not in config
  like = lambda *shape: np.zeros(shape, np.float32)
  weights = dict(img=dict(kernel=like(2, 2)), t=like(1))
  tx, lr_fn = optim.make_optimizer(
    weights, 10, **dict(config.optim.to_dict(), schedule={})
  )
  assert float(lr_fn(0)) == pytest.approx(1e-5)
  zeros = jax.tree.map(np.zeros_like, weights)
  ones = jax.tree.map(np.ones_like, weights)
  updates, _ = tx.update(zeros, tx.init(ones), ones)
  assert not any(np.any(x) for x in jax.tree.leaves(updates))  # no decay
  for arg, says in (
    ("teacher=y", "start and teacher belong together"),
    ("start=x", "start and teacher belong together"),
    ("naflex,patch=32", "patch=32 is not for it"),
  ):
    with pytest.raises(errors.UserError, match=says):
      get("siglip2_b16", arg)


def test_languages_are_trained_on_or_held_out():
  config = get("msiglip_emoji")
  trained = config.data.languages
  assert len(trained) == len(set(trained)) == 24
  assert {"th", "am", "hi", "ar", "he", "ja", "ko", "zh", "el", "ru"} < set(
    trained
  )
  held = {
    name: section.data.languages
    for name, section in config.evals.items()
    if "language" in name
  }
  assert set(held.values()) == {("af", "uk")}
  assert len(held) == 2 and not {"af", "uk"} & set(trained)
  config = get("msiglip_emoji", "languages=en+sw,held=,shuffle_captions")
  assert config.data.languages == ("en", "sw")
  assert config.data.shuffle == "captions"
  assert len(config.evals) == 3
  with pytest.raises(errors.UserError, match='"sw" is in languages='):
    get("msiglip_emoji", "held=sw+af")


def test_what_comes_along_with_the_weights(tmp_path):
  """Model, length of texts and tokenizer are those of the run."""
  old = get("siglip_emoji")
  (tmp_path / "config.json").write_text(old.to_json())
  config = get("siglip_own", f"init={tmp_path}")
  assert config.init.path == str(tmp_path)
  assert config.tokenizer.to_dict() == dict(path=f"{tmp_path}/tokenizer.model")
  assert config.model.to_json() == old.model.to_json()  # tuples are lists
  assert config.pp_text == old.pp_text
  assert config.pp.endswith("|lower|tokenize(12)|keep('image','text')")
  with pytest.raises(errors.UserError, match="is no workdir of sigjax.train"):
    get("siglip_own", f"init={tmp_path}/none")


def built(config):
  """Returns the parts of a run of a config, on 64 pixels and 12 tokens."""
  config = config.to_dict()
  keys = set(inspect.signature(build.build).parameters) - {"mesh"}
  config["optim"]["schedule"] = {}
  example = dict(image=np.zeros((64, 64, 3), np.uint8), text=np.zeros(12, int))
  return build.build(
    sharding.make_mesh(),
    example,
    10,
    **{k: config[k] for k in keys if k in config and k != "total_steps"},
  )


@pytest.mark.parametrize(
  "arg, learns",
  [
    ("train=all", {"img", "txt", "t", "b"}),
    ("train=img", {"img", "t", "b"}),
    ("train=txt", {"txt", "t", "b"}),
    ("train=head", {"img/head", "txt/head", "t", "b"}),
    ("train=calibrate", {"t", "b"}),
    ("lora=4", {"lora/img", "lora/txt", "t", "b"}),
    ("lora=4,train=txt", {"lora/txt", "t", "b"}),
  ],
)
def test_fine_tuning_a_run(tmp_path, arg, learns):
  """What learns; all else comes from the run, and is read from its weights."""
  old = get("siglip_emoji")
  (tmp_path / "config.json").write_text(old.to_json())
  config = get("finetune", f"weights={tmp_path},{arg}")
  assert config.pp_image == old.pp_image and config.pp_text == old.pp_text
  run = built(config)
  depth = 2 if "head" in str(learns) or "lora" in str(learns) else 1
  names = trees.flatten(run.state.trained)
  assert {"/".join(name.split("/")[:depth]) for name in names} == learns
  all_names = set(trees.flatten(built(old).state.stored))
  stored = {n for n in trees.flatten(run.state.stored) if n[:5] != "lora/"}
  assert stored == all_names


def test_fine_tuning_leaves_a_decoder_out(tmp_path):
  old = get("siglip_emoji")
  old.losses = dict(caption=dict(type="caption"))
  (tmp_path / "config.json").write_text(old.to_json())
  init = get("finetune", f"weights={tmp_path}").init
  names = "img/x", "dec/x", "txt/t", "t", "b", "r", "total"
  left = [n for n in names if re.fullmatch(init.dont_load[0], n)]
  assert left == ["dec/x", "total"]


def test_fine_tuning_a_released_model():
  config = get("finetune", "weights=siglip2/b16_256,lora=8")
  assert config.tokenizer.path == "gemma"
  assert config.pp_text == "lower|tokenize(64,pad=0)|keep('text')"
  assert config.pp == (
    "decode|resize(256)|choice('captions')|lower|tokenize(64,pad=0)"
    "|keep('image','text')"
  )
  assert config.model.image.remat == "full" and config.optim.lr == 2e-4
  assert config["lock"] == ()  # of a list no override is taken
  with pytest.raises(errors.UserError, match="adapts whole towers"):
    get("finetune", "lora=8,train=head")
  with pytest.raises(errors.UserError, match="is an image tower alone"):
    get("finetune", "weights=augreg/B_16")
  with pytest.raises(errors.UserError, match="is no workdir of sigjax.train"):
    get("finetune", "weights=siglip2/b16_25")
  # Its file is known by its name, wherever it is.
  file = "files/siglip2_b16_256.npz"
  of_file = get("finetune", f"weights={file},lora=8")
  assert of_file.init.path == file
  of_file.init.path = config.init.path
  assert of_file.to_dict() == config.to_dict()


def test_fine_tuning_a_file(tmp_path, spm_path):
  """The whole run: pictures with a table, evaluated before and after."""
  new, arg = tmp_path / "new", f"weights={tmp_path}/x.npz,batch_size=8"
  golden = pathlib.Path(__file__).parent / "golden/siglip_tiny.npz"
  with pytest.raises(errors.UserError, match="there is no file .*x.npz"):
    get("finetune", arg)
  shutil.copy(golden, tmp_path / "x.npz")
  with pytest.raises(errors.UserError, match='no config.json with "model" in'):
    get("finetune", arg)
  tower = dict(width=48, depth=2, mlp_dim=96, num_heads=3)
  about = dict(
    model=dict(
      image=dict(tower, patch_size=8, pool_type="map"),
      text=dict(tower, vocab_size=97),
      out_dim=[None, 48],
    ),
    pp_image="decode|resize(32)|value_range(-1,1)|keep('image')",
    pp_text="lower|tokenize(12)|keep('text')",
  )
  (tmp_path / "config.json").write_text(json.dumps(about))
  with pytest.raises(errors.UserError, match="there is no tokenizer.model in"):
    get("finetune", arg)
  shutil.copy(spm_path, tmp_path / "tokenizer.model")
  with pytest.raises(errors.UserError, match="its config.json is something"):
    get("finetune", f"weights={tmp_path}")

  pictures = tmp_path / "pictures"
  pictures.mkdir()
  lines = ["file,caption"]
  for i in range(60):
    Image.new("RGB", (40, 32), (4 * i, 0, 90)).save(pictures / f"{i}.png")
    lines.append(f"{i}.png,a red apple in the forest {i}")
  (pictures / "captions.csv").write_text("\n".join(lines))
  config = get("finetune", f"{arg},path={pictures},lr=1e-3")
  config.log_every_steps, config.total_steps = 1, 2
  del config.total_epochs
  rows = errors.call(train.main, config.to_dict(), "config", new)
  metric = "retrieval/image->text recall@1"
  found = train_program.lines(new)
  assert {x["step"] for x in found if metric in x} == {0, 1, 2}
  assert [x["step"] for x in found if "loss" in x] == [1, 2]
  assert f"retrieval/{rows[0][1].metric}" == metric
  assert found[-1][metric] == rows[0][1].value
  # It began with the file's arrays, and learnt a little.
  end = train_program.params(new)
  start = trees.flatten(npz.load_params(golden, trees.unflatten(end)))
  moved = {k: np.abs(x - start[k]).max() for k, x in end.items()}
  assert max(moved.values()) < 5e-3
  assert moved["img/embedding/kernel"] > 0 and moved["txt/head/kernel"] > 0


def test_own_pictures_embedded_before(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  np.save(folder / "embeddings.npy", np.zeros((4, 7), np.float16))
  (folder / "captions.jsonl").write_text('"a"\n' * 4)
  config = get("siglip_own", f"path=pictures,embeddings={tmp_path}")
  assert config.model.image.to_dict() == dict(kind="precomputed", width=7)
  assert config.data.path == str(folder)
  assert config.evals.picture.shown.path == "pictures"
  assert config.evals.picture.shown.part == config.evals.picture.data.part
  assert config.pp.startswith("choice('captions')|")
  with pytest.raises(errors.UserError, match="neither index.json"):
    get("siglip_own", f"embeddings={tmp_path}/none")


def test_shuffling_reaches_the_data(tiny_config):
  from sigjax.data import kinds

  plain = kinds.open_source(**tiny_config["data"])
  mixed = kinds.open_source(**tiny_config["data"], shuffle="captions")
  same = sum(
    captions.captions(plain.records[i], "captions")
    == captions.captions(mixed.records[i], "captions")
    for i in range(len(plain.records))
  )
  assert same < len(plain.records) / 8
  assert len(plain) == len(mixed)


def test_missing_things_of_the_large_configs_are_named(tmp_path):
  config = get("siglip_b16", "dataset=coco_captions").to_dict()
  config["batch_size"] = 8
  with pytest.raises(errors.UserError) as e:
    errors.call(train.main, config, "config", tmp_path)
  assert "coco_captions" in str(e.value)
  assert "download_and_prepare" in str(e.value)
