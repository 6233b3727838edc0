"""Random views for self-distillation, and the ops that make them."""

import numpy as np
import pytest

from sigjax import errors
from sigjax.data.example import preprocess, views


def picture(height, width):
  """Returns an image whose pixels say where they are: row, column, 0."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.arange(height)[:, None]
  image[..., 1] = np.arange(width)
  return image


@pytest.mark.parametrize("height, width", [(60, 100), (100, 30)])
def test_parts_have_the_shares_that_were_asked_for(height, width):
  """Within the image, of areas and aspects all over their ranges."""
  rng = np.random.default_rng(0)
  boxes = np.array(
    [views.crop(height, width, rng, (0.05, 0.4)) for _ in range(2000)]
  )
  left, top, right, bottom = boxes.T
  assert min(left.min(), top.min()) >= 0
  assert right.max() <= width and bottom.max() <= height
  w, h = right - left, bottom - top
  share, aspect = w * h / (height * width), w / h
  assert 0.05 <= share.min() < 0.06 and 0.34 < share.max() <= 0.4001
  assert 3 / 4 <= aspect.min() + 1e-9 < 0.78
  if width > height:  # wide parts fit
    assert 1.28 < aspect.max() <= 4 / 3 + 1e-9
    assert share.mean() == pytest.approx(0.225, abs=0.01)
  # All over the image.
  assert left.std() > width / 8 and top.std() > height / 8


def test_what_never_fits_is_a_central_square():
  rng = np.random.default_rng(0)
  assert views.crop(10, 200, rng, (1.0, 1.0)) == (95, 0, 105, 10)


def test_a_view_shows_its_part(monkeypatch):
  """In the right place, mirrored half of the time."""
  monkeypatch.setattr(views, "crop", lambda *_: (20, 8, 52, 40))
  monkeypatch.setattr(views, "recoloured", lambda image, _: image)
  monkeypatch.setattr(views.ImageFilter, "GaussianBlur", lambda _: _Same())
  mirrored = []
  for seed in range(20):
    found = views.view(
      picture(48, 64), np.random.default_rng(seed), 16, (0.1, 0.2)
    )
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    want = picture(48, 64)[8:40, 20:52].reshape(16, 2, 16, 2, 3).mean((1, 3))
    flip = found[0, 0, 1] > found[0, -1, 1]
    want = want[:, ::-1] if flip else want
    np.testing.assert_allclose(found, want, atol=2)
    mirrored.append(flip)
  assert 4 < sum(mirrored) < 16


class _Same(views.ImageFilter.MultibandFilter):
  def filter(self, image):
    return image


def test_colours():
  """Grey is the luma; contrast leaves the mean; nothing wraps around."""
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  image[0] = 255
  found = [
    views.recoloured(image, np.random.default_rng(seed)) for seed in range(60)
  ]
  grey = [x for x in found if (x == x[..., :1]).all()]
  same = [x for x in found if np.array_equal(x, image)]
  assert 4 < len(grey) < 25 and 3 < len(same) < 25
  light = np.full((4, 4, 3), 250, np.uint8)
  for seed in range(30):
    x = views.recoloured(light, np.random.default_rng(seed))
    assert x.min() > 140  # 250 * .6 at the darkest


def test_ops():
  image = picture(40, 50)
  fn = preprocess.parse("global_view(16)|local_views(8,3)")
  example = dict(image=image)
  found = fn(example, np.random.default_rng(0))
  assert found["global"].shape == (16, 16, 3)
  assert found["local"].shape == (3, 8, 8, 3)
  assert found["image"] is image and set(example) == {"image"}
  again = fn(example, np.random.default_rng(0))
  np.testing.assert_array_equal(again["local"], found["local"])
  assert np.abs(np.diff(found["local"].astype(int), axis=0)).max() > 9


@pytest.mark.parametrize(
  "op, says",
  [
    ("global_view(0)", "global_view: size is 0"),
    ("local_views(8,0)", "local_views: count is 0"),
    ("global_view(8,(0.5,0.2))", r"area\[1\] is 0.2"),
    ("local_views(8,2,(0.5,))", "has to be two numbers"),
  ],
)
def test_mistakes_are_one_line(op, says):
  with pytest.raises(errors.UserError, match=says):
    preprocess.parse(op)


def test_views_are_of_decoded_images():
  fn = preprocess.parse("global_view(8)")
  with pytest.raises(errors.UserError, match="decode has to come before"):
    fn(dict(image=b"x"), np.random.default_rng(0))
