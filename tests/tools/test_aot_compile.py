"""Reads a program of the TPU compiler; and, where that is there, uses it."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sigjax import errors, sharding
from tools import aot_compile
from tools.aot import compiler, hlo

ROOT = pathlib.Path(__file__).parent.parent.parent

# Excerpts of a compiled ring loss: in a loop, a permute that the chip waits for
# and one with a loop meanwhile; an all-reduce; a reduce-scatter as on TPU.
TEXT = pathlib.Path(__file__).with_name("ring.hlo").read_text()


def test_loops_and_collectives_are_counted():
  program = hlo.Program(TEXT)
  assert program.times == {"main.1": 1, "ring": 3, "tile": 48}
  assert program.uncounted == 0
  # The collective's own cycles are not computation.
  assert program.cycles() == 3 * 16 * 100 + 7
  n = 64 * 768
  assert {c.kind + " " + c.array: c[2:] for c in program.collectives()} == {
    "collective-permute f32[64,768]": (4 * n, 3, 0),
    "collective-permute bf16[64,768]": (2 * n, 3, 1600),
    "all-reduce 2 arrays": (2 * 3 * (4 * 768 + 2 * 2 * 768) // 4, 1, None),
    "all-gather f32[256,768]": (3 * 4 * n, 1, None),
    "reduce-scatter f32[64,768]": (3 * n, 1, None),
  }
  assert program.largest(1) == [("f32[256,768]", 16 * n, "")]


def test_a_loop_of_unknown_length_is_told():
  program = hlo.Program(TEXT.replace("direction=LT", "direction=GT"))
  assert program.uncounted == 2 and program.times["tile"] == 1


@pytest.mark.parametrize(
  "name, text",
  [
    ("v9:2x2", "choose from: v4, v5e, v5p, v6e"),
    ("v4", "write one as"),
    ("v5e:2,4", "write one as"),
    ("v4:2x2x1", "pip install 'sigjax.aot.'"),
  ],
)
def test_topologies_that_cannot_be(name, text, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=text):
    compiler.open_topology(name)


def test_a_mistake_ends_in_one_line(tmp_path):
  """A config that is not in this folder, from which the program does run."""
  done = subprocess.run(
    [sys.executable, "-m", "tools.aot_compile", "--config", "configs/x.py"],
    cwd=tmp_path,
    text=True,
    capture_output=True,
    check=False,
    env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 1
  assert f"configs/x.py: there is no such file in {tmp_path}; " in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def step_job(config, **more):
  keys = ("batch_size", "total_steps", "model", "optim", "pp_image", "pp_text")
  return errors.call(
    compiler.step_job,
    {**{k: config[k] for k in keys}, **more},
    "config",
    sharding.make_mesh(),
  )


def test_flops_as_traced_are_those_of_the_formula(tiny_config):
  config = dict(tiny_config, batch_size=32)
  config["model"]["image"]["depth"] = config["model"]["text"]["depth"] = 4
  once = step_job(config)
  traced = lambda job: compiler.traced_flops(job, 8)
  # No gradient goes into the pixels: less than twice forward for the patches.
  assert traced(once) == pytest.approx(once.flops, rel=0.1)
  twice = step_job(config, microbatches=2)
  assert twice.flops == once.flops
  assert traced(twice) == pytest.approx(4 / 3 * once.flops, rel=0.1)
  # Whatever its remat: without gradients there is nothing to compute again.
  config["model"]["image"]["remat"] = "full"
  locked = step_job(config, lock=("img",), microbatches=2)
  # Only the trained tower goes forward twice.
  img = (once.flops - locked.flops) / 2
  txt = (locked.flops - img) / 3
  assert traced(locked) == pytest.approx(img + 4 * txt, rel=0.05)


def test_shares_of_a_chip(tiny_config):
  job = step_job(dict(tiny_config, batch_size=32))
  assert job.arguments["batch: images"] == 4 * 4 * 16 * 16 * 3
  assert job.arguments["batch: texts"] == 4 * 4 * 8
  (params,) = [
    v for k, v in job.arguments.items() if k.startswith("parameters")
  ]
  assert 2 * params < job.arguments["optimizer state"] < 2 * params + 99


def test_memory_of_a_locked_tower(tiny_config):
  """Of the compiled step: its weights once in bfloat16, nothing else of it."""
  config = dict(tiny_config, batch_size=32)
  config["model"]["dtype"] = "bfloat16"
  config["model"]["image"].update(depth=4, remat="full")
  free, locked = step_job(config), step_job(config, lock=("img",))
  memory = [
    job.traced.lower().compile().memory_analysis() for job in (free, locked)
  ]
  for job, found in zip((free, locked), memory):
    assert found.argument_size_in_bytes == pytest.approx(
      sum(job.arguments.values()), abs=256
    )
  # float32 parameters and two moments, against one copy in bfloat16.
  (saved,) = [v for k, v in free.arguments.items() if k.startswith("param")]
  (kept,) = [v for k, v in locked.arguments.items() if k.startswith("param")]
  tower = 2 * (saved - kept)
  assert memory[0].argument_size_in_bytes - memory[
    1
  ].argument_size_in_bytes == pytest.approx(2.5 * tower, rel=1e-3)
  # Its gradients and what its backward pass needs are gone, too.
  assert memory[0].temp_size_in_bytes - memory[1].temp_size_in_bytes > tower


@pytest.mark.parametrize(
  "more, text",
  [
    (dict(batch_size=33), "do not divide"),
    (dict(batch_size=32, microbatches=3), "do not divide"),
    (dict(feed="host"), "config.feed"),
    (dict(modle=1), 'did you mean "model"'),
    (dict(loss=dict(name="sigmoyd")), "config.loss.name"),
  ],
  ids=str,
)
def test_configs_that_cannot_be(more, text, tiny_config):
  with pytest.raises(errors.UserError, match=text):
    step_job(tiny_config, **more)


class Fails:
  """Stands for what jax.jit(fn).trace(...) returns."""

  def __init__(self, message):
    self._message = message

  def lower(self):
    raise jax.errors.JaxRuntimeError(self._message)


def test_out_of_memory_says_how_much():
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (1.50T) exceeds available HBM "
    "(30.75G)."
  )
  with pytest.raises(
    compiler.DoesNotFit, match="needs 1536.00 GiB per chip, which has 30.7"
  ):
    compiler.compile_job(compiler.Job("", Fails(message), {}, 0))
  with pytest.raises(errors.UserError, match="the compiler says: INTERNAL: x"):
    compiler.compile_job(compiler.Job("", Fails("INTERNAL: x\ny"), {}, 0))


@pytest.mark.parametrize("first", [8, 64, 1000, 8000])
def test_largest_batch_is_found(first, monkeypatch):
  tried = []

  def compile_job(n):
    tried.append(n)
    if n > 1000:
      raise compiler.DoesNotFit(n, 1000)
    return f"compiled {n}"

  monkeypatch.setattr(compiler, "compile_job", compile_job)
  n, job, compiled = compiler.find_batch(
    lambda n: n, first, 8, lambda n, got: None
  )
  assert (job, compiled) == (n, f"compiled {n}")
  assert 8 / 9 * 1000 < n <= 1000 and n % 8 == 0
  assert len(tried) == len(set(tried)) < 12
  with pytest.raises(compiler.DoesNotFit):
    compiler.find_batch(lambda n: n, first, 1008, lambda n, got: None)


@pytest.fixture
def tpu(monkeypatch):
  """Devices of a topology, where the compiler is installed."""
  pytest.importorskip("libtpu")
  for key, value in dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v4-8",
    TPU_WORKER_HOSTNAMES="localhost",
  ).items():
    monkeypatch.setenv(key, value)  # and away again afterwards
  return compiler.open_topology("v4:2x2x1")


CONFIG = dict(
  batch_size=131072,
  data={},
  model=dict(
    image=dict(variant="mu/16"),
    text=dict(variant="mu", vocab_size=32),
    out_dim=(1024, 1024),
  ),
  loss=dict(dtype="bfloat16"),
  pp_image="decode|resize(32)|value_range(-1,1)",
  pp_text="tokenize(8)",
)


def test_loss_on_a_tpu_that_is_not_there(tpu, capsys):
  aot_compile.compile_config(CONFIG, "v4:2x2x1", what="loss")
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  row = lambda *words: next(
    line[len(words) :] for line in lines if line[: len(words)] == [*words]
  )
  b = 131072 // 4
  assert float(row("embeddings")[0]) == 2 * 2 * b * 1024 / 2**30
  found = float(row("temporaries", "(activations,", "gradients)")[0])
  # libtpu 0.0.42 plans 14 bytes a number, 0.0.52 another copy in bfloat16.
  bytes_each = found * 2**30 / (b * 1024)
  assert bytes_each == pytest.approx(14, rel=0.01) or (
    bytes_each == pytest.approx(16, rel=0.01)
  )
  assert float(row("the", "chip", "has")[0]) == 30.75
  tflop = 6 * 131072**2 * 1024 / 4 / 1e12
  for label in (
    "by formula: what the gradients need",
    "as traced: with what is computed again",
  ):
    assert float(row(*label.split())[0]) == pytest.approx(tflop, abs=1e-3)
  assert row("in", "all:")[:2] == ["all-reduce", "0.0"]
  assert row("in", "all:")[-3:] == ["collective-permute", "768.0", "MiB"]
  _, chip = tpu
  texts = [
    line
    for line in lines
    if line[:2] == ["collective-permute", f"bf16[{b},1024]"]
  ]
  assert sorted(int(line[2]) for line in texts) == [1, 3]
  for line in texts:
    assert float(line[5]) == pytest.approx(
      1e3 * 2 * b * 1024 / chip.link, abs=1e-3
    )
    assert float(line[6]) > 10 * float(line[5])  # computed meanwhile


def test_what_does_not_fit_is_told(tpu, capsys):
  del tpu
  with pytest.raises(compiler.DoesNotFit, match="which has 30.75"):
    aot_compile.compile_config(
      CONFIG, "v4:2x2x1", what="loss", batch_size=2**25
    )
  assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["v4:2x3x1", "v5e:99x99"])
def test_topologies_that_the_compiler_refuses(name, tpu):
  del tpu
  with pytest.raises(errors.UserError, match=f"--topology {name}: "):
    compiler.open_topology(name)
