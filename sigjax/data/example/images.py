"""Decoding of images: by Pillow, or faster and nearly the same for training.

An image that cannot be used raises BadExample, its kind being "damaged image",
"truncated image", "decompression bomb" or "odd shape". Sizes are checked before
pixels are decoded or memory for them is allocated.
"""

import io
from typing import NamedTuple

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import ExifTags, Image
import simplejpeg

from sigjax import errors
from sigjax.data.faults import BadExample

MAX_PIXELS = 89_478_485  # height * width; above it Pillow warns, too
MAX_ASPECT = 100  # longer by shorter side; wider panoramas are hardly an image
# Formats that Pillow may read. Others would run foreign programs (EPS) or
# decoders that are tested less. Phones write MPO, which is read as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

cv2.setNumThreads(1)  # the data pipeline has threads of its own


class Decoded(NamedTuple):
  """An image that was decoded before; its pixels are not to be written to."""

  pixels: UInt8[np.ndarray, "h w 3"]


def decode(data: bytes | Decoded) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes an image to RGB; one that was decoded before stays as it is.

  All modes of Pillow are converted: grey, palette, 16 bits, CMYK. Transparent
  pixels are shown on white. The image is turned upright as its EXIF data says.

  Raises:
    BadExample: the image is damaged, truncated or not of one of FORMATS, or its
      header claims more than MAX_PIXELS or MAX_ASPECT.
  """
  if isinstance(data, Decoded):
    return data.pixels
  try:
    with Image.open(io.BytesIO(_bytes(data)), formats=FORMATS) as image:
      _check_size(*image.size)
      image.load()
      return _upright(np.asarray(_to_rgb(image)), _orientation(image))
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # not all of Pillow's errors are OSErrors
    raise _undecodable(e) from e


def decode_small(
  data: bytes | Decoded, size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes an image to upright RGB with a shorter side of `size` pixels.

  The JPEG decoder scales by eighths, averaging pixels. It decodes at the
  smallest scale whose result is no smaller than asked for. The rest of the way
  is bilinear: not antialiased if it is a reduction by less than a third and the
  image is not small, otherwise antialiased as in Pillow. Images of other
  formats are decoded and resized by Pillow.

  Raises:
    BadExample: as for decode().
    UserError: the image was decoded before, at its full size.
  """
  if isinstance(data, Decoded):
    raise errors.UserError(
      "decode_small is for images that are not decoded, but the data has "
      f"in_memory: write decode|resize_small({size})"
    )
  found = _jpeg(data, size) if _bytes(data).startswith(b"\xff\xd8") else None
  if found is None:
    image = decode(data)
    return _shrink(image, image.shape[0], image.shape[1], size)
  image, h, w = found
  return _upright(_shrink(image, h, w, size), _jpeg_orientation(data))


def _shrink(
  image: UInt8[np.ndarray, "h w 3"], h: int, w: int, size: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Resizes an image, perhaps decoded at a reduced scale, to shorter side size.

  Args:
    image: the decoded image.
    h: height of the whole image, pixels.
    w: width of the whole image, pixels.
    size: shorter side of the result, pixels.
  """
  new_h, new_w = smaller(h, w, size)
  got_h, got_w = image.shape[:2]
  if (new_h, new_w) == (got_h, got_w):
    return image
  if (
    (h, w) != (got_h, got_w)
    and got_h < 1.5 * new_h
    and min(got_h, got_w) >= 128
  ):
    resized = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)
  # The decoder rounds the reduced size up to whole pixels, so the last row and
  # column stand for less than the others. In a small image, ignoring this would
  # shift the content visibly.
  eighths = round(8 * got_h / h) / 8
  return np.asarray(
    Image.fromarray(image).resize(
      (new_w, new_h),
      Image.Resampling.BILINEAR,
      box=(0, 0, w * eighths, h * eighths) if eighths < 1 else None,
    )
  )


def smaller(h: int, w: int, size: int) -> tuple[int, int]:
  """Returns (h, w) scaled so that the shorter side is `size`.

  Raises:
    BadExample: the result would have more than MAX_PIXELS.
  """
  short = min(h, w)
  new = max(size, round(h * size / short)), max(size, round(w * size / short))
  if new[0] * new[1] > MAX_PIXELS:
    raise BadExample(
      f"an image of {w} x {h} pixels cannot be resized to a shorter side of "
      f"{size}: of {new[1]} x {new[0]} pixels, {MAX_PIXELS} are allowed",
      kind="odd shape",
    )
  return new


def _jpeg(
  data: bytes, size: int
) -> tuple[UInt8[np.ndarray, "h w 3"], int, int] | None:
  """Decodes a JPEG at a reduced scale.

  Returns:
    The image, and the height and width of the whole image. None if its colour
    space is unusual or the fast decoder refuses it: then Pillow decides.
  """
  try:
    *shape, colours, _ = simplejpeg.decode_jpeg_header(data)
    h, w = map(int, shape)
    _check_size(w, h)
    if colours not in ("YCbCr", "Gray"):
      return None
    low_h, low_w = smaller(h, w, size)
    image = simplejpeg.decode_jpeg(
      data, min_height=min(low_h, h), min_width=min(low_w, w)
    )
    return image, h, w
  except errors.UserError:
    raise
  except ValueError:
    return None


def _bytes(data: bytes) -> bytes:
  """Raises UserError unless data is bytes."""
  if not isinstance(data, bytes):
    raise errors.UserError("decode needs an encoded image")
  return data


def _check_size(width: int, height: int) -> None:
  """Raises BadExample for an image beyond MAX_PIXELS or MAX_ASPECT."""
  if width * height > MAX_PIXELS:
    raise BadExample(
      f"image cannot be decoded: it has {width} x {height} pixels, of which "
      f"{MAX_PIXELS} are allowed",
      kind="decompression bomb",
    )
  if max(width, height) > MAX_ASPECT * min(width, height):
    raise BadExample(
      f"image cannot be decoded: it has {width} x {height} pixels, but a side "
      f"may be at most {MAX_ASPECT} times the other",
      kind="odd shape",
    )


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none."""
  if "exif" not in image.info:  # Pillow turns TIFFs itself, when it loads them
    return 1
  try:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # damaged EXIF data is no reason to refuse the image
    return 1


def _jpeg_orientation(data: bytes) -> int:
  """Returns the EXIF orientation of a JPEG, without decoding it."""
  if not _has_exif(data):  # asking Pillow takes 0.1 ms
    return 1
  try:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
      return _orientation(image)
  except Exception:  # of what precedes the pixels; these were decoded
    return 1


def _has_exif(data: bytes) -> bool:
  """Whether one of the first segments of a JPEG holds EXIF data."""
  at = 2
  for _ in range(32):
    if data[at : at + 2] == b"\xff\xe1" and data[at + 4 : at + 8] == b"Exif":
      return True
    if data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] == b"\xda":
      return False  # no segment, or the one that precedes the pixels
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
  return False


def _upright(
  image: UInt8[np.ndarray, "h w 3"], orientation: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Undoes an EXIF orientation."""
  turn = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
  }.get(orientation)
  return np.ascontiguousarray(turn(image)) if turn else image


def _undecodable(error: Exception) -> BadExample:
  """Returns the BadExample for an exception of Pillow."""
  reason = str(error).split(" <")[0]  # without the address of the BytesIO
  kind = "damaged image"
  if isinstance(
    error, (Image.DecompressionBombError, Image.DecompressionBombWarning)
  ):
    kind = "decompression bomb"
  elif isinstance(error, EOFError) or "truncated" in reason.lower():
    kind = "truncated image"
  return BadExample(f"image cannot be decoded: {reason}", kind=kind)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts a loaded Pillow image of any mode to RGB."""
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode == "F":
    raise ValueError("the range of float pixels is not known")
  if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip
    deep = np.asarray(image).astype(np.uint32)
    grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")  # a PNG's palette may hold alpha, too
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
  return image.convert("RGB")
