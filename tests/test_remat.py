"""remat="auto": which rematerialisation is chosen."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from sigjax import build, errors, remat, sharding

EXAMPLE: Any = dict(
  image=np.zeros((32, 32, 3), np.uint8), text=np.zeros(16, np.int32)
)
TOWER: dict[str, Any] = dict(width=32, num_heads=2, mlp_dim=128)


def built(image="auto", text="auto", depth=1, **kwargs):
  return build.build(
    sharding.make_mesh(),
    EXAMPLE,
    10,
    batch_size=64,
    model=dict(
      image=dict(TOWER, depth=depth, patch_size=4, remat=image),
      text=dict(TOWER, depth=1, vocab_size=20, remat=text),
      out_dim=(None, 32),
    ),
    optim={},
    **kwargs,
  )


def names(made):
  return made.model.image["remat"], made.model.text["remat"]


@pytest.fixture
def compiled(tmp_path):
  """The folder of compiled programs, where the choice is kept."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  yield tmp_path
  jax.config.update("jax_compilation_cache_dir", before)


def test_the_first_that_fits(monkeypatch, compiled):
  sizes, tried = dict(zip(remat.NAMES, (4, 3, 2, 1))), []

  def needed_by(made, batch, last):
    assert last == ("full" in names(made))
    assert batch["image"].shape == (64, 32, 32, 3)
    tried.append(names(made))
    return sizes[made.model.image["remat"]]

  monkeypatch.setattr(remat, "needed_by", needed_by)
  for limit, name in ((4, "none"), (2, "attention"), (1, "full")):
    monkeypatch.setattr(remat, "limit_of", lambda _, n=limit: n)
    tried.clear()
    assert names(built()) == (name, name)
    upto = remat.NAMES[: remat.NAMES.index(name) + 1]
    assert tried == [(n, n) for n in upto]
    tried.clear()  # the next start knows
    assert names(built()) == (name, name) and not tried
  assert len(list((compiled / "remat").iterdir())) == 3
  # What is named stays, and is another program.
  assert names(built(text="dots")) == ("full", "dots") and len(tried) == 4
  # Of a topology the compiler alone knows the limit.
  monkeypatch.setattr(remat, "limit_of", lambda _: math.inf)
  sizes["none"] = math.inf
  assert names(built()) == ("dots", "dots")
  monkeypatch.setattr(remat, "limit_of", lambda _: 0)
  with pytest.raises(errors.UserError, match='not even with remat="full"'):
    built()
  # Where no programs are kept, each start tries again.
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(remat, "limit_of", lambda _: 2)
  for _ in range(2):
    tried.clear()
    assert names(built()) == ("attention", "attention") and len(tried) == 3


def test_bytes_are_the_compilers():
  """A device holds the state, and an eighth of the batch and of its tokens."""
  made = built("none", "none", depth=3)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.state))
  batch = sharding.abstract_batch(EXAMPLE, 64, sharding.make_mesh())
  hidden = 3 * 8 * 64 * 128 * 4  # of three MLPs, 8 images of 64 patches
  needed = remat.needed_by(made, batch, last=False)
  assert held + hidden < needed < held + 20 * hidden


def test_a_cpu_has_no_limit(monkeypatch):
  monkeypatch.delattr(remat, "needed_by")
  assert names(built()) == ("none", "none")
  assert names(built("full", "dots")) == ("full", "dots")


def test_what_waits_on_the_host_is_no_program():
  with pytest.raises(errors.UserError, match='config.feed="host"'):
    built(feed="host", microbatches=2)
