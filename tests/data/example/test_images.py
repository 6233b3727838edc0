"""Decoding fast is decoding right, to what the eye does not see."""

import io

import numpy as np
from PIL import Image
import pytest
import simplejpeg

from sigjax import errors
from sigjax.data.example import images, preprocess
from sigjax.data.faults import BadExample


def picture(h, w, seed=0):
  """Soft coloured forms, (h, w, 3) uint8."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:h, :w][..., None]
  image = 128 + sum(
    rng.normal(size=3)
    * 30
    * np.sin(
      y * rng.uniform(0, 0.05) + x * rng.uniform(0, 0.05) + rng.uniform(0, 6)
    )
    for _ in range(6)
  )
  return image.clip(0, 255).astype(np.uint8)


def encoded(image, kind="JPEG", mode="RGB", **options):
  data = io.BytesIO()
  Image.fromarray(image).convert(mode).save(data, kind, **options)
  return data.getvalue()


def by_pillow(data, size):
  return preprocess.parse(f"decode|resize_small({size})")(
    dict(image=data), None
  )["image"]


@pytest.mark.parametrize("size", [16, 32, 100, 180, 224, 300, 375, 400])
@pytest.mark.parametrize("h, w", [(375, 500), (500, 375), (401, 401)])
def test_jpegs_are_as_pillow_has_them(h, w, size):
  for subsampling in 0, 2:
    data = encoded(picture(h, w), quality=95, subsampling=subsampling)
    got, want = images.decode_small(data, size), by_pillow(data, size)
    assert got.shape == want.shape and min(got.shape[:2]) == size
    assert got.dtype == np.uint8
    error = got.astype(float) - want
    assert abs(error.mean()) < 0.5  # no shift of colours
    assert np.abs(error).mean() < 1.5 and np.abs(error).max() < 40


def test_what_is_fine_is_averaged_not_skipped():
  """Stripes of one pixel become grey, at any scale."""
  stripes = np.zeros((640, 640, 3), np.uint8)
  stripes[:, ::2] = 255
  data = encoded(stripes, quality=100, subsampling=0)
  for size in 40, 65, 100, 150, 224, 300, 320:
    got = images.decode_small(data, size).astype(float)
    assert 110 < got.mean() < 145, size
    assert got.std() < 30, (size, got.std())


def test_jpegs_are_decoded_at_a_reduced_scale(monkeypatch):
  seen = []
  whole = simplejpeg.decode_jpeg

  def decode_jpeg(*args, **kwargs):
    seen.append(whole(*args, **kwargs))
    return seen[-1]

  monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
  data = encoded(picture(375, 500))
  for size, want in (
    (224, (235, 313)),
    (40, (47, 63)),
    (375, (375, 500)),
    (500, (375, 500)),
  ):
    images.decode_small(data, size)
    assert seen.pop().shape[:2] == want


@pytest.mark.parametrize(
  "kind, mode",
  [
    ("PNG", "RGB"),
    ("PNG", "RGBA"),
    ("PNG", "L"),
    ("PNG", "P"),
    ("WEBP", "RGB"),
    ("JPEG", "CMYK"),
  ],
)
def test_others_are_pillows(kind, mode):
  data = encoded(picture(60, 80), kind, mode)
  np.testing.assert_array_equal(
    images.decode_small(data, 30), by_pillow(data, 30)
  )


def test_grey_jpegs_have_three_channels():
  data = encoded(picture(60, 80), mode="L")
  got = images.decode_small(data, 30)
  assert got.shape == (30, 40, 3)
  assert np.abs(got.astype(int) - by_pillow(data, 30)).mean() < 2
  assert np.ptp(got.astype(int), axis=2).max() == 0


@pytest.mark.parametrize("op", ["decode", "decode_small(8)"])
def test_kinds_of_faults(op):
  fn = preprocess.parse(op)

  def kind(data):
    with pytest.raises(BadExample) as e:
      fn(dict(image=data), None)
    assert "cannot be decoded" in str(e.value) and "\n" not in str(e.value)
    return e.value.kind

  jpeg, png = encoded(picture(40, 50)), encoded(picture(40, 50), "PNG")
  assert kind(jpeg[: len(jpeg) // 2]) == "truncated image"
  assert kind(png[: len(png) // 2]) == "truncated image"
  assert kind(b"") == kind(b"text") == kind(jpeg[:3]) == "damaged image"
  claims = png[:16] + (50_000).to_bytes(4, "big") * 2 + png[24:]
  assert kind(claims) in ("decompression bomb", "damaged image")
  frame = jpeg.index(b"\xff\xc0")
  claims = (
    jpeg[: frame + 5] + (60_000).to_bytes(2, "big") * 2 + jpeg[frame + 9 :]
  )
  assert kind(claims) == "decompression bomb"
  with pytest.raises(errors.UserError, match="needs an encoded image"):
    fn(dict(image=np.zeros((2, 2, 3))), None)
