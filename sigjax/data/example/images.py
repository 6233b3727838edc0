"""Encoded images to arrays: carefully by Pillow, or fast for training.

What cannot be used is a BadExample, of one of the kinds "damaged image",
"truncated image" and "decompression bomb".
"""

import io

import cv2
import numpy as np
from PIL import Image
import simplejpeg

from sigjax import errors
from sigjax.data.faults import BadExample

MAX_PIXELS = 89_478_485  # of an image; what Pillow, too, takes for suspicious

cv2.setNumThreads(1)  # the pipeline has its own


def decode(data):
  """Decodes an image to (h, w, 3) uint8.

  Whatever Pillow reads: grey, palette, 16 bits, CMYK. Transparent pixels are
  shown on white. Rotations asked for by EXIF are not made.

  Args:
    data: bytes.

  Raises:
    BadExample: it is damaged or cut, or its header claims more than MAX_PIXELS,
      of which no pixel is then decoded.
  """
  try:
    with Image.open(io.BytesIO(_bytes(data))) as image:
      _check_size(*image.size)
      image.load()
      return np.asarray(_to_rgb(image))
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # not all of Pillow's errors are OSErrors
    raise _undecodable(e) from e


def decode_small(data, size):
  """Decodes an image to (h, w, 3) uint8, its shorter side `size`.

  JPEGs are decoded at the smallest multiple of an eighth that is no smaller
  than that, in which case the decoder averages. What is left to shrink is
  bilinear: between neighbours, if it is less than a third of larger images,
  else as Pillow, antialiased. Other images are as decode() and Pillow have
  them.

  Raises:
    BadExample: as decode.
  """
  image = None
  if _bytes(data).startswith(b"\xff\xd8"):
    image, (h, w) = _jpeg(data, size)
  if image is None:
    image = decode(data)
    h, w = image.shape[:2]
  new_h, new_w = smaller(h, w, size)
  got_h, got_w = image.shape[:2]
  if (new_h, new_w) == (got_h, got_w):
    return image
  if (
    (h, w) != (got_h, got_w)
    and got_h < 1.5 * new_h
    and min(got_h, got_w) >= 128
  ):
    return cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
  # A reduced image is rounded up to whole pixels, of which the last ones stand
  # for less: of small images one pixel would be a shift that is seen.
  eighths = round(8 * got_h / h) / 8
  return np.asarray(
    Image.fromarray(image).resize(
      (new_w, new_h),
      Image.Resampling.BILINEAR,
      box=(0, 0, w * eighths, h * eighths) if eighths < 1 else None,
    )
  )


def smaller(h, w, size):
  """Returns (h, w) of the same aspect ratio whose smaller one is `size`."""
  return [max(size, round(n * size / min(h, w))) for n in (h, w)]


def _jpeg(data, size):
  """Decodes a JPEG at a reduced scale.

  Returns:
    The image and its own (h, w); None for both if its colours are unusual, or
    it is not beyond doubt: then Pillow decides.
  """
  nothing = None, (None, None)
  try:
    h, w, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(w, h)
    if colours not in ("YCbCr", "Gray"):
      return nothing
    low_h, low_w = smaller(h, w, size)
    return simplejpeg.decode_jpeg(
      data, min_height=min(low_h, h), min_width=min(low_w, w)
    ), (h, w)
  except errors.UserError:
    raise
  except ValueError:
    return nothing


def _bytes(data):
  if not isinstance(data, bytes):
    raise errors.UserError("decode needs an encoded image")
  return data


def _check_size(width, height):
  if width * height > MAX_PIXELS:
    raise BadExample(
      f"image cannot be decoded: it has {width} x {height} pixels, of which "
      f"{MAX_PIXELS} are allowed",
      kind="decompression bomb",
    )


def _undecodable(error):
  """Returns the BadExample for what Pillow raised."""
  reason = str(error).split(" <")[0]  # without the address of the BytesIO
  kind = "damaged image"
  if isinstance(
    error, (Image.DecompressionBombError, Image.DecompressionBombWarning)
  ):
    kind = "decompression bomb"
  elif isinstance(error, EOFError) or "truncated" in reason.lower():
    kind = "truncated image"
  return BadExample(f"image cannot be decoded: {reason}", kind=kind)


def _to_rgb(image):
  """Converts a loaded Pillow image of any mode to RGB."""
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode == "F":
    raise ValueError("the range of float pixels is not known")
  if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips
    deep = np.asarray(image).astype(np.uint32)
    grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")  # from PNG, palettes may have alpha, too
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
  return image.convert("RGB")
