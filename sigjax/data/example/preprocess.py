"""What is done to one example, written as a pipe string.

  fn = parse("decode|resize(64)|flip_lr|value_range(-1,1)|choice('captions')"
             "|lower|tokenize(16)|keep('image','text')", tokenizer=tokenizer)
  example = fn(example, np.random.default_rng(0))

An op is a function of its arguments that returns fn(example, rng) -> example.
It may change the dict it is given, never the values in it. All randomness is
drawn from rng. Its arguments are annotated with the types that parse() checks.
Between `decode` and `value_range`, "image" is (h, w, 3) uint8; "text" is a str
from `choice` or `first` until `tokenize`.
"""

import numpy as np
from PIL import Image

from sigjax import errors
from sigjax.data.example import captions
from sigjax.data.example import images, pipe_string
from sigjax.data.faults import BadExample

# Pillow widens the filter when it shrinks an image (antialiasing) in all of
# these but nearest. "area" is the mean over the covered pixels.
_RESAMPLING = {
  "nearest": Image.Resampling.NEAREST,
  "area": Image.Resampling.BOX,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def _on_image(fn):
  """Turns fn(image, rng) -> image into an op's function."""

  def apply(example, rng):
    example["image"] = fn(example["image"], rng)
    return example

  return apply


# Decoding and sizes.


def decode():
  """Decodes "image" from bytes to (h, w, 3) uint8; see images.decode."""
  return _on_image(lambda data, _: images.decode(data))


def decode_small(size: int):
  """Decodes "image" and makes its shorter side `size`, the fastest way.

  For training; evaluations take decode|resize_small(size), which is antialiased
  exactly as in Pillow. See images.decode_small.
  """
  return _on_image(lambda data, _: images.decode_small(data, size))


def resize(height: int, width: int = None, method: str = "bilinear"):
  """Resizes to (height, width), or to a square, whatever the shape was.

  Methods: nearest, bilinear, bicubic, lanczos, area. When an image shrinks, all
  but nearest are antialiased, as in Pillow.
  """
  size = (width or height, height)
  resample = errors.pick(_RESAMPLING, method, "resize method")

  def fn(image, _):
    if image.shape[1::-1] == size:
      return image
    return np.asarray(Image.fromarray(image).resize(size, resample))

  return _on_image(fn)


def resize_small(size: int, method: str = "bilinear"):
  """Resizes the shorter side to `size`, keeping the aspect ratio."""

  def fn(example, rng):
    h, w = example["image"].shape[:2]
    return resize(*images.smaller(h, w, size), method)(example, rng)

  errors.pick(_RESAMPLING, method, "resize method")
  return fn


def _crop(image, height, width, where):
  """Cuts height x width out; where(room) -> offset, from 0 to room."""
  h, w = image.shape[:2]
  if h < height or w < width:
    raise BadExample(
      f"no crop of {height}x{width} fits an image of {h}x{w}",
      kind="image too small",
    )
  top, left = where(h - height), where(w - width)
  return image[top : top + height, left : left + width]


def random_crop(height: int, width: int = None):
  """Cuts a (height, width) part out of the image, at random."""
  return _on_image(
    lambda image, rng: _crop(
      image, height, width or height, lambda room: rng.integers(room + 1)
    )
  )


def central_crop(height: int, width: int = None):
  """Cuts the central (height, width) part out of the image."""
  return _on_image(
    lambda image, _: _crop(
      image, height, width or height, lambda room: room // 2
    )
  )


# Augmentation.


def flip_lr(p: float = 0.5):
  """Mirrors left and right with probability p."""
  return _on_image(
    lambda image, rng: image[:, ::-1] if rng.random() < p else image
  )


def random_affine(
  scale: tuple = (0.9, 1.1), shift: float = 0.1, fill: int = 255
):
  """Scales about the centre and shifts; what comes into view is `fill`.

  Args:
    scale: the range of the factor; log-uniform, so that 1/2 is as likely as 2.
    shift: the most that it moves, as a fraction of each side; uniform.
    fill: the value of new pixels in all channels.

  Bilinear without antialiasing: for scales of about 0.5 and more.
  """
  low, high = np.log(scale[0]), np.log(scale[1])

  def fn(image, rng):
    h, w = image.shape[:2]
    zoom = np.exp(-rng.uniform(low, high))
    dx, dy = rng.uniform(-shift, shift, 2) * (w, h)
    # Pillow asks where an output pixel comes from: input = zoom * output + c.
    cx = w / 2 - zoom * (w / 2 + dx)
    cy = h / 2 - zoom * (h / 2 + dy)
    return np.asarray(
      Image.fromarray(image).transform(
        (w, h),
        Image.Transform.AFFINE,
        (zoom, 0, cx, 0, zoom, cy),
        Image.Resampling.BILINEAR,
        fillcolor=(fill,) * 3,
      )
    )

  return _on_image(fn)


def color_gain(amount: float):
  """Multiplies each channel by a random factor in [1 - amount, 1 + amount]."""

  def fn(image, rng):
    gain = rng.uniform(1 - amount, 1 + amount, 3).astype(np.float32)
    # The values are positive, so adding a half and truncating rounds.
    return np.minimum(image * gain + np.float32(0.5), 255).astype(np.uint8)

  return _on_image(fn)


def random_grey(p: float):
  """Drops the colours with probability p (luma as in ITU-R 601)."""

  def fn(image, rng):
    if rng.random() >= p:
      return image
    grey = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat(grey[..., None], 3, axis=-1)

  return _on_image(fn)


def random_invert(p: float):
  """Replaces every value v by 255 - v with probability p."""
  return _on_image(
    lambda image, rng: 255 - image if rng.random() < p else image
  )


def value_range(low: float, high: float):
  """Maps 0..255 linearly to low..high, as float32."""
  slope, low = np.float32((high - low) / 255), np.float32(low)
  return _on_image(lambda image, _: image * slope + low)


# Text.


def choice(key: str, out: str = "text"):
  """Picks one of the texts at `key` at random; "" if there is none.

  The feature may be a text, several, or {"text": several, ...}, as in COCO.
  """

  def fn(example, rng):
    texts = captions.captions(example, key)
    example[out] = texts[rng.integers(len(texts))] if texts else ""
    return example

  return fn


def first(key: str, out: str = "text"):
  """Like `choice`, but always the first text."""

  def fn(example, _):
    example[out] = (captions.captions(example, key) or [""])[0]
    return example

  return fn


def lower():
  """Makes "text" lower case."""

  def fn(example, _):
    example["text"] = example["text"].lower()
    return example

  return fn


def tokenize(length: int, pad: int = 1, *, tokenizer):
  """Replaces "text" by its tokens, (length,) int32; see Tokenizer.

  SigLIP's texts are padded with 1, SigLIP 2's with 0.
  """

  def fn(example, _):
    example["text"] = tokenizer(example["text"], length, pad)
    return example

  return fn


def keep(*names: str):
  """Drops all features but these, and orders them so."""
  return lambda example, _: {name: _get(example, name) for name in names}


def _get(example, key):
  return errors.pick(example, key, "feature")


OPS = {
  op.__name__: op
  for op in (
    decode,
    decode_small,
    resize,
    resize_small,
    random_crop,
    central_crop,
    flip_lr,
    random_affine,
    color_gain,
    random_grey,
    random_invert,
    value_range,
    choice,
    first,
    lower,
    tokenize,
    keep,
  )
}


def parse(string, **context):
  """Builds the function that a pipe string describes.

  Args:
    string: op|op(arg, ...)|..., the ops being names in OPS, the arguments
      literals.
    **context: what ops need beside their written arguments: tokenizer=.

  Returns:
    fn(example: dict, rng: np.random.Generator) -> dict. It leaves its argument
    as it was, and raises BadExample for an example that cannot be used.

  Raises:
    UserError: no valid pipe string, an unknown op, or wrong arguments.
  """
  fns = pipe_string.build(string, OPS, context)

  def preprocess(example, rng):
    example = dict(example)
    for fn in fns:
      example = fn(example, rng)
    return example

  return preprocess
