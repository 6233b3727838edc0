"""Decoding fast is decoding right, to what the eye does not see."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
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


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
    options = dict(quality=100) if kind == "JPEG" else {}
    data = encoded(picture(60, 90), kind, exif=exif, **options)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = images.decode(data)
    np.testing.assert_array_equal(got, np.asarray(want.convert("RGB")))
    assert got.shape == ((90, 60, 3) if orientation > 4 else (60, 90, 3))
    # A quarter of the JPEG is decoded, which is close to Pillow's result.
    small = images.decode_small(data, 15)
    want = np.asarray(want.convert("RGB").resize(small.shape[1::-1]), float)
    assert small.shape == ((22, 15, 3) if orientation > 4 else (15, 22, 3))
    assert np.abs(small - want).mean() < 1.5


def test_damaged_exif_data_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(picture(60, 90), exif=exif)
  at = data.index(b"Exif\0\0") + 6
  damaged = data[:at] + b"\xff" * 8 + data[at + 8 :]
  assert images.decode(damaged).shape == (60, 90, 3)
  assert images.decode_small(damaged, 30).shape == (30, 45, 3)


# Hostile bytes.


def png_of(width, height, rows=None):
  """Returns a PNG that claims a size, with `rows` rows of zeros in it."""

  def chunk(name, data):
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

  pixels = zlib.compress(bytes(width + 1) * (height if rows is None else rows))
  head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  return b"".join(
    [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"IDAT", pixels)]
    + [chunk(b"IEND", b"")]
  )


@pytest.mark.parametrize("op", ["decode", "decode_small(224)"])
@pytest.mark.parametrize(
  "width, height", [(60_000, 1), (1, 60_000), (10_000_000, 1), (80_000_000, 1)]
)
def test_odd_shapes_are_refused_by_their_header(op, width, height):
  data = png_of(width, height, rows=0)  # the pixels are not read
  with pytest.raises(BadExample, match=f"{width} x {height}") as e:
    preprocess.parse(op)(dict(image=data), None)
  assert e.value.kind == "odd shape"
  assert images.decode(png_of(500, 5)).shape == (5, 500, 3)


def test_the_size_of_the_result_is_judged_too():
  wide = png_of(6000, 60)
  for string in (
    "decode_small(4000)",
    "decode|resize_small(4000)",
    "decode|resize(8192,9)|resize_small(2000)",
  ):
    with pytest.raises(BadExample) as e:
      preprocess.parse(string)(dict(image=wide), None)
    assert e.value.kind == "odd shape"
  long = Image.new("L", (20_000, 500))
  data = io.BytesIO()
  long.save(data, "PNG")
  with pytest.raises(BadExample) as e:
    preprocess.parse("decode|pad_to_square")(dict(image=data.getvalue()), None)
  assert e.value.kind == "odd shape"


@pytest.mark.parametrize("op", ["decode", "decode_small(8)"])
def test_only_listed_formats_are_read(op):
  for kind in ("EPS", "PPM", "ICO"):  # EPS would be handed to Ghostscript
    data = encoded(picture(40, 50), kind)
    assert Image.open(io.BytesIO(data)).format == kind
    with pytest.raises(BadExample, match="cannot identify"):
      preprocess.parse(op)(dict(image=data), None)
  for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"):
    options = {}
    if kind == "MPO":
      options = dict(save_all=True, append_images=[Image.new("RGB", (50, 40))])
    data = encoded(picture(40, 50), kind, **options)
    assert Image.open(io.BytesIO(data)).format == kind
    preprocess.parse(op)(dict(image=data), None)


@pytest.mark.filterwarnings("ignore")
def test_no_bytes_raise_anything_but_bad_example():
  exif = Image.Exif()
  exif[0x0112] = 6
  rng = np.random.default_rng(0)
  fine = 0
  for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
    options = dict(compression="tiff_lzw") if kind == "TIFF" else {}
    mode = "RGBA" if kind == "PNG" else "RGB"
    whole = encoded(picture(24, 40), kind, mode, exif=exif, **options)
    for _ in range(150):
      data = bytearray(whole)
      for _ in range(rng.integers(1, 6)):
        # Headers are at the start, or at the end of a TIFF.
        at = min(int(rng.exponential(60)), len(data) - 1)
        at = -1 - at if kind == "TIFF" and rng.random() < 0.7 else at
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
      if rng.random() < 0.2:
        del data[rng.integers(len(data)) :]
      for decode in (images.decode, lambda x: images.decode_small(x, 16)):
        try:
          image = decode(bytes(data))
          assert image.dtype == np.uint8 and image.shape[2] == 3
          fine += 1
        except BadExample as e:
          assert "\n" not in str(e)
  assert 100 < fine < 1700  # neither all survive nor none
