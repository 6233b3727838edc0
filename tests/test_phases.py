"""Runs in phases: what changes on the way, and what is carried over."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_program import lines, params

from sigjax import build, errors, sharding, train, trees
from sigjax import config as config_lib
from sigjax import init as init_lib
from sigjax.data import kinds
from sigjax.stage import Stage

SECTIONS: Any = dict(
  pp="a",
  pp_image="b",
  model=dict(image=dict(width=8, pool_type="map"), dtype="float32"),
  losses=dict(words=dict(type="caption", weight=1.0)),
  microbatches=1,
  lengths=(),
)


def test_what_a_phase_takes_over():
  given: Any = dict(
    three=dict(from_steps=9, losses=dict(more=None)),
    one=dict(from_steps=4, losses=dict(more=dict(type="distill"))),
    two=dict(
      from_steps=6,
      pp="c",
      losses=dict(words=dict(weight=0.5)),
      model=dict(image=dict(kind="naflex", width=4)),
    ),
  )
  start, one, two, three = config_lib.phases_of(given, SECTIONS, 10)
  assert start.sections == SECTIONS and start.since == dict(words=0)
  more = dict(type="distill")
  assert one.sections["losses"] == dict(SECTIONS["losses"], more=more)
  assert one.sections["pp"] == "a" and one.since == dict(words=0, more=4)
  words = dict(type="caption", weight=0.5)
  assert two.sections["losses"] == dict(words=words, more=more)
  # Another kind of tower shares no settings with the one before.
  image = dict(kind="naflex", width=4)
  assert two.sections["model"] == dict(image=image, dtype="float32")
  assert two.sections["pp"] == "c" and two.since == one.since
  assert three.sections["losses"] == dict(words=words)
  plan = [start, one, two, three]
  found = [config_lib.phase_at(plan, step) for step in range(11)]
  assert found == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
  "given, says",
  [
    (dict(x=dict(pp="c")), "config.phases.x does not say when it begins"),
    (dict(x=dict(from_steps=4, seed=1)), '"seed" is not known'),
    (dict(x=dict(from_steps=10)), "after 10 of 10 steps"),
    (dict(x=dict(from_steps=0)), "after 0 of 10 steps"),
    (
      dict(x=dict(from_steps=4), y=dict(from_steps=4)),
      "phases.y and config.phases.x both begin after 4",
    ),
  ],
)
def test_mistakes_are_one_line(given, says):
  with pytest.raises(errors.UserError, match=says):
    config_lib.phases_of(given, SECTIONS, 10)


TOWER = dict(width=16, depth=1, num_heads=2, mlp_dim=32)
DISTILL: Any = dict(
  type="distill",
  prototypes=24,
  patch_prototypes=16,
  hidden=16,
  bottleneck=8,
)


def built(side, patch, losses, kind="vit"):
  image = dict(TOWER, patch_size=patch, kind=kind)
  pixels = np.zeros((side, side, 3), np.uint8)
  example: Any = dict(image=pixels, text=np.zeros(6, np.int32))
  example |= {"global": pixels, "local": pixels[None]}
  if kind == "naflex":
    example["image"] = np.zeros((9, 3 * patch * patch + 2), np.int16)
  run = build.build(
    sharding.make_mesh(data=4, fsdp=2),
    example,
    10,
    batch_size=8,
    model=dict(
      image=image, text=dict(TOWER, vocab_size=20), out_dim=(None, 16)
    ),
    optim={},
    losses=losses,
    sharding=((".*", "fsdp"),),
  )
  return run, example


def test_what_is_carried_over():
  """Parameters, the optimizer's and the teacher's state, by their names."""
  run, example = built(16, 8, dict(views=DISTILL))
  make = functools.partial(init_lib.init_state, run.model, run.tx, 0, example)
  old = make(run.state, lock=run.lock, terms=run.terms)
  # As after some steps: nothing is what a new state would have.
  old = jax.tree.map(lambda x: (x + 1).astype(x.dtype), old)
  before: Any = jax.device_get(old)
  new_run, example = built(
    24, 12, dict(views=DISTILL, words=dict(type="caption"))
  )
  # 16 / 8 and 24 / 12 are 2 x 2 patches: only the kernel changes its shape.
  got = init_lib.carry(
    new_run.model,
    new_run.tx,
    0,
    example,
    new_run.state,
    old,
    new_run.lock,
    new_run.terms,
  )
  same = jax.tree.map(lambda x, a: x.sharding == a.sharding, got, new_run.state)
  assert all(jax.tree.leaves(same))
  assert int(got.step) == 1
  was, now = trees.flatten(before), trees.flatten(jax.device_get(got))
  new = {name for name in now if name not in was}
  assert new and all("/dec/" in name for name in new)
  changed = {
    name
    for name in now
    if name in was and not np.array_equal(now[name], was[name])
  }
  assert changed == {
    name for name in now if name.endswith("img/embedding/kernel")
  }
  # A patch of 12 x 12 that is one of 8 x 8, resized, has the same embedding.
  patch = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
  larger = np.asarray(jax.image.resize(patch, (12, 12, 3), "linear"))
  for name in ("trained", "held/distill/teacher"):
    kernel = f"{name}/img/embedding/kernel"
    want = np.einsum("ijc,ijcw->w", patch, was[kernel])
    got_ = np.einsum("ijc,ijcw->w", larger, now[kernel])
    np.testing.assert_allclose(got_, want, rtol=1e-4, atol=1e-4)
  moments = [x for x in changed if x.startswith("opt_state")]
  assert len(moments) == 2 and not any(np.any(now[x]) for x in moments)


def test_positions_of_another_resolution():
  """A ramp over the grid stays one, but for its ends."""
  run, example = built(32, 4, {})
  old = init_lib.init_state(run.model, run.tx, 0, example, run.state)
  ramp = jnp.tile(jnp.arange(8.0).reshape(1, 1, 8, 1), (1, 8, 1, 16))
  was = old.trained["img"]["pos_embedding"]
  old.trained["img"]["pos_embedding"] = jax.device_put(
    ramp.reshape(1, 64, 16), was.sharding
  )
  new_run, example = built(64, 4, {})
  got = init_lib.carry(
    new_run.model, new_run.tx, 0, example, new_run.state, old
  )
  table = np.asarray(got.params["img"]["pos_embedding"]).reshape(16, 16, 16)
  want = (np.arange(1, 15) + 0.5) / 2 - 0.5
  np.testing.assert_allclose(table[3, 1:15, 2], want, atol=1e-5)


def test_from_one_resolution_to_any_aspect_ratio():
  """The first patches' embeddings stay what they are."""
  run, example = built(32, 2, {})
  old = init_lib.init_state(run.model, run.tx, 0, example, run.state)
  image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
  apply = lambda run, params, image: run.model.apply(
    {"params": params}, image, None
  )[2]["img/embedded"]
  want = apply(run, jax.device_get(old.params), jnp.asarray(image))
  new_run, example = built(32, 2, {}, "naflex")
  got = init_lib.carry(
    new_run.model, new_run.tx, 0, example, new_run.state, old
  )
  cut = image.reshape(16, 2, 16, 2, 3).swapaxes(1, 2).reshape(256, 12)
  places = np.indices((16, 16)).reshape(2, 256).T
  patches = np.concatenate([cut, places], axis=1).astype(np.int16)[None]
  found = apply(new_run, jax.device_get(got.params), jnp.asarray(patches))
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_carried_over():
  run, example = built(16, 8, {})
  old = init_lib.init_state(run.model, run.tx, 0, example, run.state)
  shapes = jax.tree.map(lambda x: x, run.state)
  wide = shapes.replace(
    trained=trees.map_named(
      lambda name, x: (
        jax.ShapeDtypeStruct((16, 33), x.dtype)
        if name.endswith(
          "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
        )
        else x
      ),
      run.state.trained,
    )
  )
  with pytest.raises(errors.UserError, match="changes the shape of img/Tr"):
    init_lib.carry(run.model, run.tx, 0, example, wide, old)


def test_a_run_through_all_phases(tmp_path, tiny_config):
  """Resumed in the middle of one: bit for bit the same end."""
  pp = (
    "decode|{}value_range(-1,1)|choice('captions')|lower|tokenize(8)|keep({})"
  )
  views = "global_view(16)|local_views(8,1)|"
  image = dict(tiny_config["model"]["image"], kind="naflex")
  config = dict(
    tiny_config,
    total_steps=6,
    checkpoints=dict(every_steps=1, keep=None),
    phases=dict(
      views=dict(
        from_percent=33,
        pp=pp.format(views, "'image','text','global','local'"),
        losses=dict(views=DISTILL),
      ),
      any=dict(
        from_steps=4,
        pp=pp.format("", "'image','text'").replace(
          "value_range(-1,1)", "resize_to_patches({length},8)"
        ),
        pp_image="decode|resize_to_patches(4,8)|keep('image')",
        model=dict(image=image),
        losses=dict(views=None),
        lengths=((9, 3),),
      ),
    ),
  )
  del config["evals"]["retrieval"]
  run = lambda workdir, **more: train.main(workdir, **{**config, **more})
  rows = run(tmp_path / "whole")
  logged = {x["step"]: x for x in lines(tmp_path / "whole") if "loss" in x}
  assert [step for step in logged if "views" in logged[step]] == [3, 4]
  saved = lambda step: params(tmp_path / f"whole/checkpoints/{step}")
  parts = [{name.split("/")[0] for name in saved(step)} for step in (2, 3, 5)]
  towers = {"img", "txt", "t", "b"}
  assert parts == [towers, {*towers, "distill"}, towers]
  assert saved(5)["img/pos_embedding"].shape == (16, 16, 32)
  # From the middle of the second phase, through the third.
  source = str(tmp_path / "whole/checkpoints/3")
  assert run(tmp_path / "from3", resume=source) == rows
  got = params(tmp_path / "from3")
  for name, x in saved(6).items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_lengths_are_drawn_by_the_step(tiny_config):
  """The same on another day; each of them; as many patches as drawn."""
  source = kinds.open_source(**tiny_config["data"])
  sections = dict(
    pp="decode|resize_to_patches({length},8)|choice('captions')|tokenize(8)"
    "|keep('image','text')",
    model=dict(
      tiny_config["model"],
      image=dict(tiny_config["model"]["image"], kind="naflex"),
    ),
    losses={},
    microbatches=1,
    lengths=((4, 1), (9, 3), (1, 1)),
  )

  def make(**changes):
    phase = config_lib.Phase("", 0, {**sections, **changes}, {})
    shared = dict(batch_size=24, optim={}, seed=3)
    return Stage(
      phase, source, Tokens(), sharding.make_mesh(), 10, shared, 0.01
    )

  stage = make()
  batches = stage.batches()
  drawn = [next(batches)["image"].shape for _ in range(12)]
  assert {shape[:1] for shape in drawn} == {(24,)}
  lengths = [shape[1] for shape in drawn]
  assert set(lengths) == {1, 4, 9}
  batches.set_state({**batches.get_state(), "step": 5})
  assert [next(batches)["image"].shape[1] for _ in range(5)] == lengths[5:10]
  batches.close()
  for changes, says in (
    (dict(lengths=()), '"{length}" in config.pp, but there are none'),
    (dict(lengths=((4, 0),)), "takes rows"),
    (dict(lengths=((4, 1), (4, 2))), "twice"),
    (dict(model=tiny_config["model"]), 'has to be "naflex"'),
  ):
    with pytest.raises(errors.UserError, match=says):
      make(**changes)


class Tokens:
  """A tokenizer, of which only the length counts."""

  vocab_size = 32

  def __call__(self, text, length, pad):
    return np.zeros(length, np.int32)
