"""Times small cases of each mode. What the times are is not tested."""

import csv
import functools
import io
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from sigjax import errors, losses, sharding
from sigjax import softmax as softmax_lib
from sigjax.data import kinds
from tools import benchmark
from tools.bench import loaders, peers, timing
from tools.bench import loss as loss_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
# Numbers that every row has to have, by mode.
NUMBERS = dict(
  loss=(
    "ms",
    "ms_min",
    "ms_q1",
    "ms_q3",
    "ms_max",
    "vs_naive",
    "vs_remat",
    "temp_mib",
  ),
  step=(
    "ms",
    "ms_min",
    "ms_q1",
    "ms_q3",
    "ms_max",
    "examples_per_second",
    "temp_mib",
  ),
  data=("us", "us_min", "us_q1", "us_q3", "us_max"),
)


def command(*args, **env):
  """Runs the tool; returns the finished process."""
  return subprocess.run(
    [sys.executable, "-m", "tools.benchmark", *map(str, args)],
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=False,
    env={
      **os.environ,
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
      "JAX_NUMPY_RANK_PROMOTION": "raise",
      "JAX_NUMPY_DTYPE_PROMOTION": "strict",
      **env,
    },
  )


def check(rows, printed, mode):
  """Checks all rows, and that the table shows them."""
  where, _, _, *lines = printed.splitlines()
  assert "device_kind cpu" in where and f"jax {jax.__version__}" in where
  assert len(lines) == len(rows)
  unit = NUMBERS[mode][0]
  for row, line in zip(rows, lines):
    numbers = [float(row[key]) for key in NUMBERS[mode]]
    assert all(math.isfinite(x) and x >= 0 for x in numbers), row
    low, q1, q3, high = (
      float(row[f"{unit}_{x}"]) for x in ("min", "q1", "q3", "max")
    )
    assert low <= q1 <= float(row[unit]) <= q3 <= high
    digits = 2 if unit == "ms" else 1
    assert f" {float(row[unit]):,.{digits}f} " in line


# --- What the losses are compared with ----------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("dtype,rtol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_every_variant_computes_the_same(devices, dtype, rtol):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  z = np.random.default_rng(0).normal(size=(2, 16, 8))
  z /= np.linalg.norm(z, axis=2, keepdims=True)
  z = [jnp.asarray(x, dtype) for x in z]
  args = *z, jnp.float32(10), jnp.float32(-5)
  exact = *(x.astype(jnp.float32) for x in z), *args[2:]
  of = lambda fn, args: jax.jit(jax.value_and_grad(fn, (0, 1, 2, 3)))(*args)
  want = {
    "softmax": of(softmax_lib.softmax_loss, exact),
    "sigmoid": of(losses.sigmoid_loss, exact),
  }
  variants = loss_lib.loss_variants(mesh, [1, 4])
  assert [f"{name} {tile}" for name, tile in variants] == [
    "naive None",
    "remat ring None",
    "ring 1",
    "ring 4",
    "ring both 4",
    "all_gather 4",
    "softmax naive None",
    "softmax ring 4",
  ]
  some = (
    dict(list(variants.items())[1:2])
    if dtype == "bfloat16" or (devices != 2)
    else variants
  )  # the others are tested in test_losses
  for (name, _), fn in some.items():
    kind = "softmax" if "softmax" in name else "sigmoid"
    for x, y in zip(*map(jax.tree.leaves, (of(fn, args), want[kind]))):
      x, y = np.float64(x), np.float64(y)
      assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y) + 1e-9, name


def test_the_remat_ring_keeps_no_block():
  """It permutes, and stores neither all blocks nor any of them whole twice."""
  mesh = sharding.make_mesh(devices=jax.devices())
  B, b = 2048, 256
  z = jax.ShapeDtypeStruct(
    (B, 8), jnp.float32, sharding=sharding.batch_sharding(mesh)
  )
  fn = lambda z: jax.grad(
    lambda z: loss_lib.remat_ring_loss(
      z, z, jnp.float32(10), jnp.float32(-10), mesh=mesh
    )
  )(z)
  compiled = jax.jit(fn).lower(z).compile()
  assert "collective-permute" in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 5 * b * b * 4


# --- Taking turns -------------------------------------------------------------


def test_turns():
  ran = []

  def run(name):
    ran.append(name)
    return 10.0 * len(ran)

  runs = {name: lambda name=name: run(name) for name in "abcd"}
  times = timing.interleave({**runs, "unfit": None}, 6)
  rounds = [ran[i : i + 4] for i in range(0, len(ran), 4)]
  assert len(rounds) == 7  # the first one warms up
  assert all(sorted(r) == list("abcd") for r in rounds)
  assert len(set(map(tuple, rounds))) > 3  # in changing order
  assert times["unfit"] is None
  for i, name in enumerate("abcd"):
    want = [
      10.0 * (4 * r + turns.index("abcd"[i]) + 1)
      for r, turns in enumerate(rounds)
    ][1:]
    assert times[name].tolist() == want


def test_memory_that_ran_out_is_no_end():
  calls = []

  def fail(text, error=jax.errors.JaxRuntimeError):
    calls.append(text)
    raise error(text)

  times = timing.interleave(
    {
      "large": lambda: fail("RESOURCE_EXHAUSTED: Out of memory allocating 9"),
      "host": lambda: fail("no memory", MemoryError),
      "small": lambda: 1.0,
    },
    3,
  )
  assert times["large"] is None and times["host"] is None
  assert len(calls) == 2  # they are not tried again
  assert times["small"].tolist() == [1.0] * 3
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    timing.interleave({"bug": lambda: fail("INTERNAL: a bug")}, 1)


def test_what_a_host_cannot_hold_is_reported_not_run(
  monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(timing, "host_memory", lambda: 200 * 2**10)
  rows = benchmark.benchmark(
    "loss",
    devices=None,
    out=tmp_path,
    batch_sizes=[256],
    width=8,
    tiles=[32],
    rounds=1,
    plot=True,
  )
  by_name = {row["variant"]: row for row in rows}
  assert by_name["naive"]["ms"] is None and by_name["naive"]["temp_mib"] > 0.03
  assert by_name["ring"]["ms"] > 0 and by_name["ring"]["vs_naive"] is None
  naive = [
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith("naive")
  ]
  assert "no memory" in naive[0]
  assert (tmp_path / "loss.png").stat().st_size > 10_000  # bars, some missing


# --- The commands -------------------------------------------------------------


def test_loss(tmp_path):
  pytest.importorskip("matplotlib")
  done = command(
    "loss",
    "--batch_sizes",
    "16,32",
    "--width",
    8,
    "--tiles",
    "4,8",
    "--rounds",
    2,
    "--devices",
    2,
    "--out",
    tmp_path,
    "--plot",
  )
  assert done.returncode == 0, done.stderr
  with open(tmp_path / "loss.csv", encoding="utf-8") as f:
    rows = list(csv.DictReader(f))
  check(rows, done.stdout, "loss")
  assert all(r["device_kind"] == "cpu" and int(r["cores"]) > 0 for r in rows)
  found = [(r["variant"], r["tile"], r["batch_size"]) for r in rows]
  assert found == [
    (name, tile, size)
    for size in ("16", "32")
    for name, tile in (
      ("naive", ""),
      ("remat ring", ""),
      ("ring", "4"),
      ("ring", "8"),
      ("ring both", "8"),
      ("all_gather", "8"),
      ("softmax naive", ""),
      ("softmax ring", "8"),
    )
  ]
  for name, ratio in (("naive", "vs_naive"), ("remat ring", "vs_remat")):
    own = {
      r["batch_size"]: float(r["ms"]) for r in rows if r["variant"] == name
    }
    for row in rows:
      assert float(row[ratio]) == pytest.approx(
        float(row["ms"]) / own[row["batch_size"]]
      )
  assert {r["devices"] for r in rows} == {"2"}
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_step(tiny_config, capsys):
  rows = benchmark.benchmark(
    "step",
    config=tiny_config,
    microbatches=[1, 3],
    losses=["softmax"],
    rounds=2,
  )
  check(rows, capsys.readouterr().out, "step")
  assert [(r["loss"], r["microbatches"], r["batch_size"]) for r in rows] == [
    ("softmax", k, 24) for k in (1, 3)
  ]
  for row in rows:
    assert row["examples_per_second"] == pytest.approx(24e3 / row["ms"])
    assert row["mfu_percent"] is None  # a CPU's peak is not known


def test_data(tiny_config, capsys):
  rows = benchmark.benchmark(
    "data", config=tiny_config, rounds=2, batches=2, threads=[1, 2]
  )
  check(rows, capsys.readouterr().out, "data")
  ops = ["read"] + tiny_config["pp"].split("|")
  assert [r["stage"] for r in rows] == [
    "pipeline, 1 thread(s)",
    "pipeline, 2 thread(s)",
    "one by one, no batches",
    *(f"  {op}" for op in ops),
  ]
  for row in rows[:3]:
    assert row["examples_per_second"] == pytest.approx(1e6 / row["us"])
    # The same work, with and without threads; a batch has 24 examples.
    assert 1 / 8 < row["per_core"] / rows[2]["per_core"] < 8
  # Nothing that takes time is left out, and nothing counted twice.
  assert 70 < sum(row["share_percent"] for row in rows[3:]) < 115


def test_loaders(monkeypatch):
  """Our loader on the shards that all read; the others are not installed."""
  ours = loaders.LOADERS["sigjax"]
  monkeypatch.setattr(loaders, "BATCH", 8)
  few = functools.partial(loaders.write_shards, photos=2)
  monkeypatch.setattr(loaders, "write_shards", few)
  monkeypatch.setattr(loaders, "LOADERS", {"sigjax": ours})
  (row,) = benchmark.benchmark("data", rounds=2, batches=1)
  assert row["vs_sigjax"] == 1
  assert row["per_core"] == pytest.approx(1e6 / row["us"])


def test_shards_of_the_comparison(tmp_path):
  paths = loaders.write_shards(tmp_path, 20, shards=2, photos=3)
  source = kinds.open_source("tar", shards=paths)
  assert len(source) == 20 and len(paths) == 2
  with Image.open(io.BytesIO(source[7]["image"])) as image:
    assert image.size == (500, 375)
    # As large as photos are: noise would be slower to decode, a plane faster.
    assert 25_000 < len(source[7]["image"]) < 100_000


@pytest.mark.parametrize("name", ["tensorflow", "webdataset"])
def test_other_loaders_are_asked_for(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  make = loaders.LOADERS[name.replace("tensorflow", "tf.data")]
  with pytest.raises(
    errors.UserError, match=r"pip install 'sigjax\[loaders\]'"
  ):
    make([], None, 1)


@pytest.mark.parametrize("other", ["transformers", "open_clip"])
def test_the_step_of_others(other, monkeypatch):
  """From the same weights, each has the same loss, and another after a step."""
  torch = pytest.importorskip("torch")
  pytest.importorskip(other)
  small = dict(BATCH=16, WIDTH=48, DEPTH=2, HEADS=3, MLP=96, VOCAB=60)
  for name, value in small.items():
    monkeypatch.setattr(peers, name, value)
  tower = dict(width=48, depth=2, num_heads=3, mlp_dim=96)
  model = dict(
    image=dict(tower, patch_size=16),
    text=dict(tower, vocab_size=60),
    out_dim=(None, 48),
  )
  config = dict(peers.CONFIG, batch_size=16, model=model)
  monkeypatch.setattr(peers, "CONFIG", config)
  monkeypatch.setattr(peers, "OTHERS", {other: peers.OTHERS[other]})
  threads = torch.get_num_threads()
  try:
    rows = peers.peers(jax.devices()[:1], rounds=2)
  finally:
    torch.set_num_threads(threads)
  assert [row["code"] for row in rows] == ["sigjax", other]
  assert rows[0]["ours"] == rows[0]["ours_wall"] == 1
  assert rows[1]["ours"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
  for key, rel in (("first_loss", 1e-5), ("last_loss", 1e-3)):
    assert rows[1][key] == pytest.approx(rows[0][key], rel=rel)
  assert rows[0]["last_loss"] < rows[0]["first_loss"]


def test_others_are_asked_for(monkeypatch):
  monkeypatch.setitem(sys.modules, "open_clip", None)
  with pytest.raises(errors.UserError, match="pip install .*open_clip_torch"):
    peers.peers(jax.devices()[:1])


# --- Mistakes -----------------------------------------------------------------


def test_no_matplotlib(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(errors.UserError, match=r"pip install 'sigjax\[bench\]'"):
    benchmark.benchmark("loss", out=tmp_path, plot=True)
  with pytest.raises(errors.UserError, match="--out DIR"):
    benchmark.benchmark("loss", plot=True)


@pytest.mark.parametrize(
  "says,options",
  [
    ('"los" is not known.*mean "loss"', dict(mode="los")),
    ("--batch_sizes: 12 does not divide over 8", dict(batch_sizes=[12])),
    ("--devices=9, but there are 8", dict(devices=9)),
    ('"microbatches".*it takes: batch_sizes', dict(microbatches=[2])),
    ("needs: config", dict(mode="step")),
    ("config needs: .*pp_image", dict(mode="step", config=dict(batch_size=8))),
    (
      "config needs: data",
      dict(mode="data", config=dict(batch_size=8, pp="decode", tokenizer={})),
    ),
  ],
)
def test_mistakes_are_named(says, options, monkeypatch):
  monkeypatch.setattr(jax.config, "update", lambda *_: None)  # 8 are there
  with pytest.raises(errors.UserError, match=says):
    benchmark.benchmark(**{"mode": "loss", **options})


def test_losses_are_those_of_the_config(tiny_config):
  tiny_config["loss"] = dict(name="softmax")
  with pytest.raises(errors.UserError, match='mean "sigmoid"'):
    benchmark.benchmark("step", config=tiny_config, losses=["sigmid"], rounds=1)


def test_a_folder_that_cannot_be_made():
  with pytest.raises(errors.UserError, match="Not a directory"):
    benchmark.benchmark("loss", out=f"{__file__}/here")


def test_a_mistake_ends_in_one_line():
  done = command("loss", "--tiles", "0,4")
  assert done.returncode == 1 and done.stderr.startswith("error: --tiles takes")
  assert done.stderr.count("\n") == 1
