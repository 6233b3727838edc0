"""Views of an image for self-distillation: random crops in changed colours.

As in DINO (arXiv 2104.14294), but for its solarisation, and with one kind of
view for the teacher.
"""

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageFilter

Pixels = UInt8[np.ndarray, "h w 3"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601


def view(
  image: Pixels, rng: np.random.Generator, size: int, area: tuple[float, float]
) -> UInt8[np.ndarray, "size size 3"]:
  """Returns a random part of an image, resized, mirrored and recoloured.

  Args:
    image: the whole image.
    rng: of all that is random.
    size: height and width of the view, pixels.
    area: (low, high) of the part's share of the image.
  """
  box = crop(image.shape[0], image.shape[1], rng, area)
  part = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR, box=box
  )
  if rng.random() < 0.5:
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if rng.random() < 0.5:  # a deviation of .1 to 2 pixels at 224
    part = part.filter(
      ImageFilter.GaussianBlur(float(rng.uniform(0.1, 2.0)) * size / 224)
    )
  return recoloured(np.asarray(part), rng)


def crop(
  height: int,
  width: int,
  rng: np.random.Generator,
  area: tuple[float, float],
) -> tuple[float, float, float, float]:
  """Returns (left, top, right, bottom) of a random part of an image.

  Its share of the area is uniform, its aspect ratio log-uniform from 3:4 to
  4:3. If ten such parts do not fit, it is a central square.
  """
  for _ in range(10):
    share = rng.uniform(*area) * height * width
    aspect = np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
    w, h = np.sqrt(share * aspect), np.sqrt(share / aspect)
    if w <= width and h <= height:
      left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
      return left, top, left + w, top + h
  side = min(height, width)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def recoloured(image: Pixels, rng: np.random.Generator) -> Pixels:
  """Changes brightness, contrast and saturation, or makes the image grey.

  With probability .8 by factors of .6 to 1.4 (saturation .8 to 1.2); then grey
  with probability .2.
  """
  factors = rng.uniform(-1, 1, 3) * (0.4, 0.4, 0.2) + 1
  change, grey = rng.random() < 0.8, rng.random() < 0.2
  if not change and not grey:
    return image
  x = image.astype(np.float32)
  if change:
    brightness, contrast, saturation = factors.astype(np.float32)
    x *= brightness
    mean = (x @ LUMA).mean()
    x = mean + contrast * (x - mean)
    luma = (x @ LUMA)[..., None]
    x = luma + saturation * (x - luma)
  if grey:
    x = np.repeat((x @ LUMA)[..., None], 3, axis=-1)
  return np.clip(x + 0.5, 0, 255).astype(np.uint8)
