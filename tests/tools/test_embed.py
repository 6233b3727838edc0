"""Embedding a dataset once: right, resumable, and refused when it changed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import cpu_devices
import jax
import numpy as np
from PIL import Image
import pytest

from sigjax import embed as embed_lib
from sigjax import errors, sharding, train, trees
from sigjax.data import kinds
from sigjax.data.example import captions, preprocess
from sigjax.models import two_towers
from sigjax.weights import npz
from tools import embed, predict
from tools.embedding import tower as tower_lib

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(name="config")
def fixture_config(tiny_config, tmp_path):
  """tiny_config with a locked image tower that starts from a file."""
  del tiny_config["data"]["group_by"]
  tower = two_towers.image_tower(two_towers.TwoTowers(**tiny_config["model"]))
  params = jax.jit(tower.init)(
    jax.random.key(1), np.zeros((1, 16, 16, 3), np.float32)
  )["params"]
  npz.save_params(tmp_path / "tower.npz", params)
  return dict(
    tiny_config,
    init=dict(path=str(tmp_path / "tower.npz"), into="img"),
    lock=("img",),
  )


def precomputed(config, out, width=32):
  """The config that trains on what was embedded."""
  of = lambda section: dict(
    kind="embeddings",
    path=str(out / section["split"]),
    pp_image=config["pp_image"],
  )
  config = {k: v for k, v in config.items() if k not in ("init", "lock")}
  return dict(
    config,
    data=of(config["data"]),
    pp_image="keep('image')",
    pp=config["pp"].replace("decode|value_range(-1,1)|", ""),
    model=dict(config["model"], image=dict(kind="precomputed", width=width)),
    evals={k: dict(v, data=of(v["data"])) for k, v in config["evals"].items()},
  )


@pytest.mark.parametrize(
  "dtype, atol", [("float32", 1e-6), ("float16", 3e-4), ("bfloat16", 2e-3)]
)
def test_embeddings_are_the_towers(config, tmp_path, dtype, atol, capsys):
  out = tmp_path / "out"
  embed.embed(config, out, dtype=dtype, part_size=50, batch_size=16)
  assert "192 embeddings of 32" in capsys.readouterr().out
  model = two_towers.TwoTowers(**config["model"])
  params = {
    "img": npz.load_params(config["init"]["path"]),
    "t": np.zeros(1),
    "b": np.zeros(1),
  }
  run = embed_lib.make_embed(model, sharding.make_mesh())
  pp = preprocess.parse(config["pp_image"])
  for split, count in ("train", 192), ("test", 48):
    source = kinds.open_source(**dict(config["data"], split=split))
    found = kinds.open_source("embeddings", path=str(out / split))
    assert len(found) == len(source) == count
    assert found.label_names == source.label_names
    images = np.stack([pp(source[i], None)["image"] for i in range(count)])
    want = np.asarray(run(params, image=images)[0])
    for i, example in enumerate(found[i] for i in range(count)):
      assert str(example["image"].dtype) == dtype
      np.testing.assert_allclose(
        example["image"].astype(np.float32), want[i], atol=atol
      )
      assert example["captions"] == captions.captions(source[i], "captions")
      assert example["label"] == source[i]["label"]


def test_training_on_embeddings_is_training_on_the_tower(config, tmp_path):
  """The same losses, scores and predictions, with and without the tower."""
  config = dict(config, total_steps=3)
  out = tmp_path / "out"
  embed.embed(config, out, dtype="float32")
  rows, lines = [], []
  for name, section in ("a", config), ("b", precomputed(config, out)):
    rows.append(train.main(tmp_path / name, **section))
    text = (tmp_path / name / "metrics.jsonl").read_text()
    lines.append([json.loads(line) for line in text.splitlines()])
    (tmp_path / name / "config.json").write_text(json.dumps(section))
  assert rows[0] == rows[1]
  losses = [[x["loss"] for x in part if "loss" in x] for part in lines]
  assert len(losses[0]) == 3
  np.testing.assert_allclose(*losses, rtol=1e-5)

  source = kinds.open_source(**config["data"])
  images, texts = [source[i]["image"] for i in (0, 9)], ["red disc", "a bar"]
  both = [
    predict.Predictor(tmp_path / "a"),
    predict.Predictor(tmp_path / "b"),  # the folder says which tower
  ]
  want, got = (
    p.scores([p.image(x) for x in images], [p.text(x) for x in texts])
    for p in both
  )
  np.testing.assert_allclose(got.probability, want.probability, rtol=1e-4)
  want, got = (p.images(np.stack(list(map(p.prepared, images)))) for p in both)
  np.testing.assert_allclose(got, want, atol=1e-5)
  tower = kinds.open_source("embeddings", path=str(out / "train")).tower
  assert tower and tower in both[1].image_checksum
  index = out / "train/index.json"
  text = index.read_text()
  index.write_text(text.replace("made_by", "made"))  # of an older version
  with pytest.raises(errors.UserError, match="give --tower"):
    predict.Predictor(tmp_path / "b")
  predict.Predictor(tmp_path / "b", config)
  index.write_text(text)
  npz.save_params(
    config["init"]["path"],
    jax.tree.map(lambda x: x + 1, npz.load_params(config["init"]["path"])),
  )
  with pytest.raises(errors.UserError, match="is not the one of"):
    predict.Predictor(tmp_path / "b", config)

  # The run cannot continue on embeddings of another tower.
  other = dict(config, evals={})
  embed.embed(other, tmp_path / "other", dtype="float32")
  with pytest.raises(errors.UserError, match="another identity"):
    train.main(tmp_path / "b", **precomputed(other, tmp_path / "other"))


def test_any_folder_by_any_tower(config, tmp_path, capsys):
  """Of a file and of a program: the same numbers as by hand."""
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  for i in range(3):
    image = Image.fromarray(np.full((20, 30, 3), 80 * i, np.uint8))
    image.save(pictures / f"{i}.png")
    (pictures / f"{i}.txt").write_text(f"grey {i}")
  (tmp_path / "config.json").write_text(
    json.dumps({k: config[k] for k in ("model", "pp_image")})
  )
  model = two_towers.TwoTowers(**config["model"])
  params = npz.load_params(tmp_path / "tower.npz")
  npz.save_params(tmp_path / "both.npz", dict(img=params, t=np.zeros(1)))
  x = np.stack([np.full((16, 16, 3), 80 * i / 127.5 - 1) for i in range(3)])
  want = model.apply(
    {"params": dict(img=params, t=np.zeros(1), b=np.zeros(1))},
    x.astype(np.float32),
    None,
  )[0]
  tower = tower_lib.open_tower(tmp_path / "both.npz")
  data = dict(kind="folder", path=str(pictures))
  embed.embed(dict(data=data), tmp_path / "out", tower=tower, dtype="float32")
  found = kinds.open_source("embeddings", path=str(tmp_path / "out/folder"))
  for i in range(3):
    np.testing.assert_allclose(found[i]["image"], want[i], atol=1e-5)
    assert found[i]["captions"] == [f"grey {i}"]

  program = tmp_path / "tower.py"
  program.write_text(
    "import jax.numpy as jnp\n"
    "def get_tower():\n"
    "  mean = lambda params, x: params * jnp.mean(x, axis=(1, 2))\n"
    "  pp = \"decode|resize(4)|value_range(0,1)|keep('image')\"\n"
    "  return mean, jnp.full((1, 3), 2.0), pp, 'the mean'\n"
  )
  command = ["tools.embed", f"--weights={program}", f"--data={pictures}"]
  done = subprocess.run(
    [sys.executable, "-m", *command, f"--out={tmp_path}/mean"],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": cpu_devices.xla_flags(1)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "3 embeddings of 3 float16" in done.stdout
  found = kinds.open_source("embeddings", path=f"{tmp_path}/mean/folder")
  assert found.tower == "the mean"
  for i in range(3):
    np.testing.assert_allclose(found[i]["image"], 160 * i / 255, atol=1e-3)
  assert tower_lib.open_tower(program).made_by == dict(weights=str(program))


def test_what_names_no_tower(tmp_path):
  with pytest.raises(errors.UserError, match="names no image tower"):
    tower_lib.open_tower(tmp_path)
  with pytest.raises(errors.UserError, match="there is no file"):
    tower_lib.open_tower(tmp_path / "no.py")
  (tmp_path / "no.py").write_text("")
  with pytest.raises(errors.UserError, match="has no function get_tower"):
    tower_lib.open_tower(tmp_path / "no.py")


def test_a_killed_run_goes_on(config, tmp_path):
  """Killed between parts, complete parts are kept; two processes share it."""
  (tmp_path / "c.py").write_text(
    "from ml_collections import ConfigDict\n"
    f"get_config = lambda: ConfigDict({config!r})\n"
  )
  out = tmp_path / "out"
  command = [
    sys.executable,
    "-m",
    "tools.embed",
    "--config",
    str(tmp_path / "c.py"),
    "--out",
    str(out),
    "--part_size",
    "8",
    "--batch_size",
    "8",
  ]
  with subprocess.Popen(command, cwd=ROOT) as process:
    while not list(out.glob("train/*-of-*.array_record")):
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert not (out / "train" / "index.json").exists()
  with pytest.raises(errors.UserError, match="still being written"):
    kinds.open_source("embeddings", path=str(out / "train"))
  done = {p: p.stat().st_ino for p in out.glob("train/*-of-*.array_record")}
  # A part that is cut short, as by an interrupted copy, is computed again.
  cut = sorted(done)[0]
  os.truncate(cut, cut.stat().st_size // 2)
  for i in (1, 0):
    embed.embed(
      config, out, part_size=8, batch_size=8, process_id=i, num_processes=2
    )
  assert len(kinds.open_source("embeddings", path=str(out / "train"))) == 192
  for path, inode in done.items():
    assert (path.stat().st_ino == inode) == (path != cut), path
  embed.embed(config, tmp_path / "new", part_size=8, batch_size=8)
  for path in out.glob("*/*.array_record"):
    again = tmp_path / "new" / path.relative_to(out)
    assert again.read_bytes() == path.read_bytes()


def test_what_changed_is_refused(config, tmp_path):
  out = tmp_path / "out"
  small = dict(config, evals={})
  embed.embed(small, out)
  before = kinds.open_source("embeddings", path=str(out / "train")).tower

  def message(config, **options):
    with pytest.raises(errors.UserError) as e:
      embed.embed(config, out, **options)
    assert "\n" not in str(e.value)
    return str(e.value)

  assert "with pp_image" in message(
    dict(small, pp_image=config["pp_image"].replace("(-1,1)", "(0,1)"))
  )
  assert "with part_size" in message(small, part_size=3)
  assert "with dtype" in message(small, dtype="bfloat16")
  params = trees.flatten(npz.load_params(config["init"]["path"]))
  params["embedding/bias"][0] += 1e-3
  npz.save_params(config["init"]["path"], trees.unflatten(params))
  assert "with tower" in message(small)
  embed.embed(small, tmp_path / "other")
  other = kinds.open_source("embeddings", path=str(tmp_path / "other/train"))
  assert other.tower != before

  # Training and evaluation of different towers.
  mixed = precomputed(small, out)
  mixed["evals"] = {
    "zeroshot": dict(
      type="zeroshot",
      data=dict(kind="embeddings", path=str(tmp_path / "other/train")),
    )
  }
  with pytest.raises(errors.UserError, match="all have to be of the same"):
    train.main(tmp_path / "a", **mixed)


def pictures(config, folder, bad, count=20):
  """Writes a folder of pictures, some of them cut short; returns its config."""
  folder.mkdir()
  source = kinds.open_source(**config["data"])
  rows = ["file,caption"]
  for i in range(count):
    data = source[i]["image"]
    (folder / f"{i}.png").write_bytes(data[:60] if i in bad else data)
    rows.append(f"{i}.png,number {i}")
  (folder / "captions.csv").write_text("\n".join(rows))
  return dict(config, evals={}, data=dict(kind="folder", path=str(folder)))


@pytest.mark.parametrize(
  "bad", [(0, 3, 19), tuple(range(8, 16))], ids=["some", "a whole part"]
)
def test_bad_examples_are_left_out(config, tmp_path, capsys, bad):
  config = pictures(config, tmp_path / "pictures", bad)
  embed.embed(config, tmp_path / "out", part_size=8, batch_size=8)
  printed = capsys.readouterr().out
  assert f"{len(bad)} examples were left out: {{'truncated image': " in printed
  assert f"{20 - len(bad)} embeddings of 32" in printed
  found = kinds.open_source("embeddings", path=str(tmp_path / "out/folder"))
  assert [found[i]["captions"] for i in range(len(found))] == [
    [f"number {i}"] for i in range(20) if i not in bad
  ]
  # Nothing is computed again.
  files = list((tmp_path / "out/folder").glob("*.array_record"))
  before = [file.stat().st_ino for file in files]
  embed.embed(config, tmp_path / "out", part_size=8, batch_size=8)
  assert [file.stat().st_ino for file in files] == before
  # Another thread may have met the next one, too.
  with pytest.raises(errors.UserError, match=r"\d x truncated image"):
    embed.embed(dict(config, bad_fraction=0.0), tmp_path / "new")


def test_damaged_shards(config, tmp_path):
  out = tmp_path / "out"
  embed.embed(dict(config, evals={}), out, part_size=100)
  first, second = sorted(out.glob("train/*.array_record"))
  open_it = lambda: kinds.open_source("embeddings", path=str(out / "train"))
  shutil.copy(first, tmp_path / "whole")
  os.truncate(first, first.stat().st_size - 1)
  with pytest.raises(errors.UserError, match="bytes, but .* were written"):
    open_it()
  shutil.copy(tmp_path / "whole", first)
  open_it()
  second.unlink()
  with pytest.raises(errors.UserError, match="00001-of-00002.* is missing"):
    open_it()


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(init=None), "names no weights"),
    (dict(init=dict(path="x", into="txt")), "names no weights"),
    (dict(init=dict(path="none.npz", into="img")), "none.npz"),
    (
      dict(model=dict(image=dict(kind="precomputed", width=3), text={})),
      "precomputed",
    ),
  ],
)
def test_configs_without_a_tower(config, tmp_path, change, text):
  with pytest.raises(errors.UserError, match=text):
    embed.embed({**config, **change}, tmp_path / "out")


def test_sections(config):
  found = embed.sections(
    dict(
      config,
      evals=dict(
        a=dict(data=dict(config["data"], group_by="concept")),
        b=dict(data=dict(config["data"], split="test"), pp_image="x"),
      ),
    )
  )
  assert {k: v[1] for k, v in found.items()} == {
    "train": config["pp_image"],
    "test": "x",
  }
  with pytest.raises(errors.UserError, match='both be "train"'):
    embed.sections(
      dict(
        config,
        evals=dict(a=dict(data=dict(config["data"], data_dir="/elsewhere"))),
      )
    )
