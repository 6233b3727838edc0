"""What patches and the decoder know, against answers known by construction."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import embed, errors, sharding, terms
from sigjax import state as state_lib
from sigjax.data.source import Source
from sigjax.evaluators import captioning, dense
from sigjax.evaluators.embedder import Embedder
from sigjax.models import two_towers

ARGS = dict(bad_fraction=0.01, batch_size=16)


def images(n=24):
  records = [dict(image=np.int32(i), text=np.int32(i)) for i in range(n)]
  return Source("images", records)


def embedder(**others):
  return Embedder(lambda **_: None, None, others)


@pytest.mark.parametrize("knows", [True, False])
def test_foreground(mesh, knows):
  """A tenth of the patches are drawing: found, or guessed."""
  rng = np.random.default_rng(0)
  ink = (rng.random((24, 40)) < 0.1).astype(np.float32)
  x = rng.normal(size=(24, 40, 3)).astype(np.float32)
  if knows:
    x[..., 1] = 3 * ink + 0.1 * x[..., 1]

  def patches(image):
    rows = np.asarray(image)
    return jnp.asarray(x[rows]), jnp.asarray(ink[rows])

  data = images()
  it = dense.Foreground(
    data=data, data_test=data, pp_image="keep('image')", l2=1.0, **ARGS
  )
  (row,) = it.run(embedder(patches=patches), mesh)
  assert row.n == 24 * 40 and row.chance == 0.5
  if knows:
    assert row.value > 0.99
  else:  # all are called ground: right for all of that, for no drawing
    assert row.value == pytest.approx(0.5, abs=0.02)


def test_images_without_ground(mesh):
  patches = lambda image: (
    jnp.ones((len(image), 4, 2)),
    jnp.ones((len(image), 4)),
  )
  data = images()
  it = dense.Foreground(
    data=data, data_test=data, pp_image="keep('image')", **ARGS
  )
  with pytest.raises(errors.UserError, match="all drawing, or all white"):
    it.run(embedder(patches=patches), mesh)


def test_token_accuracy(mesh):
  """A mean over tokens, not over texts; rows past the end are left out."""

  def hits(image, text):
    n = np.asarray(image)
    return jnp.asarray(n % 3), jnp.asarray(n % 3 + 1), jnp.full(len(n), 50)

  it = captioning.Captions(data=images(), pp="keep('image','text')", **ARGS)
  (row,) = it.run(embedder(captions=hits), mesh)
  assert row.value == pytest.approx((0 + 1 + 2) / (1 + 2 + 3))
  assert row.n == 8 * 6 and row.chance == 1 / 50
  with pytest.raises(errors.UserError, match='no loss of type "caption"'):
    it.run(embedder(), mesh)


def test_what_a_model_says_of_patches_and_texts():
  """The share of ink by hand, and hits by all logits at once."""
  tower = dict(width=16, depth=1, num_heads=2, mlp_dim=32)
  model = two_towers.TwoTowers(
    image=dict(tower, patch_size=4, pool_type="tok"),
    text=dict(tower, vocab_size=12),
    out_dim=(None, 16),
  )
  (term,) = terms.make({"words": dict(type="caption")}, model)
  rng = np.random.default_rng(0)
  image = np.full((8, 8, 10, 3), 255, np.uint8)  # two columns are not seen
  image[0, :4, 4:6, 1] = 0  # half of the second patch
  image[:, :, 8:] = 0
  text = rng.integers(2, 12, (8, 5)).astype(np.int32)
  text[:, 3:] = 1
  example: Any = dict(image=image[0], text=text[0])
  params = state_lib.init_params(model, jax.random.key(0), example, [term])
  kernel = rng.normal(size=(16, 12)).astype(np.float32)
  params["dec"]["LogitsDense"]["kernel"] = kernel
  found = embed.others(model, sharding.make_mesh(), [term])
  x, ink = jax.device_get(found["patches"](params, image))
  assert x.shape == (8, 4, 16)  # without that of "cls"
  np.testing.assert_allclose(ink[0], [0, 0.5, 0, 0])
  assert not ink[1:].any()
  right, count, words = found["captions"](params, image, text)
  kind: Any = term.kind
  out: Any = model.apply({"params": params}, jnp.asarray(image), None)
  h, w, b = kind.decoder.apply(
    {"params": params["dec"]}, out[2]["img/encoded"], text, np.zeros(8, bool)
  )
  guess = np.argmax(np.asarray(h) @ np.asarray(w) + np.asarray(b), axis=2)
  np.testing.assert_array_equal(right, (guess == text)[:, :4].sum(1))
  assert np.all(count == 4) and np.all(words == 12)
