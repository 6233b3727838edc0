"""Preprocessing of one example, written as a pipe string.

  fn = parse("decode|resize(64)|flip_lr|value_range(-1,1)|choice('captions')"
             "|lower|tokenize(16)|keep('image','text')", tokenizer=tokenizer)
  example = fn(example, np.random.default_rng(0))

An op is a function of its arguments that returns fn(example, rng) -> example.
fn may change the dict, but not the values in it, and draws all random numbers
from rng. parse() checks an op's arguments against the types in its signature.
Between `decode` and `value_range` or `resize_to_patches`, "image" is (h, w, 3)
uint8. From `choice` or
`first` to `tokenize`, "text" is a str.
"""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import inspect
import itertools
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sigjax import errors
from sigjax.data.example import captions as captions_lib
from sigjax.data.example import images, pipe_string
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.faults import BadExample

Example = dict[str, Any]  # {feature: value}
Fn = Callable[[Example, np.random.Generator], Example]


class Tokenize(Protocol):
  """A tokenizer as the ops call it; see tokenizer.Tokenizer."""

  vocab_size: int

  def __call__(self, text: str, length: int, pad: int = ...) -> np.ndarray: ...


MAX_SIDE = 1 << 13  # pixels, that an op may be asked for
MAX_TOKENS = 1 << 16

# When an image shrinks, all of these but nearest are antialiased by Pillow.
# "area" is the mean over the covered pixels.
_RESAMPLING = {
  "nearest": Image.Resampling.NEAREST,
  "area": Image.Resampling.BOX,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def _check(what: str, value: float, low: float, high: float) -> None:
  """Raises UserError unless low <= value <= high."""
  if not low <= value <= high:
    raise errors.UserError(
      f"{what} is {value!r:.40}, but has to be from {low} to {high}"
    )


def _check_sides(op: str, height: int, width: int | None) -> None:
  """Raises UserError unless (height, width) can be the size of an image."""
  _check(f"{op}: height", height, 1, MAX_SIDE)
  _check(f"{op}: width", height if width is None else width, 1, MAX_SIDE)


def _decoder(fn: Callable[[Any], np.ndarray]) -> Fn:
  """Applies fn to the "image" of an example, bytes or images.Decoded."""

  def apply(example: Example, rng: np.random.Generator) -> Example:
    del rng
    example["image"] = fn(errors.pick(example, "image", "feature"))
    return example

  return apply


def _on_image(
  fn: Callable[[Any, np.random.Generator], np.ndarray],
) -> Fn:
  """Applies fn(image, rng) -> image to the decoded "image" of an example."""

  def apply(example: Example, rng: np.random.Generator) -> Example:
    example["image"] = fn(_decoded(example), rng)
    return example

  return apply


def _decoded(example: Example) -> np.ndarray:
  """Returns the decoded "image" of an example."""
  image = errors.pick(example, "image", "feature")
  if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3:
    raise errors.UserError(
      "an op on images needs uint8 pixels; decode has to come before it, "
      "and value_range or resize_to_patches after it"
    )
  return image


# Decoding and sizes.


def decode() -> Fn:
  """Decodes "image" to (h, w, 3) uint8; see images.decode."""
  return _decoder(images.decode)


def decode_small(size: int) -> Fn:
  """Decodes "image" and resizes its shorter side to `size`, fast.

  Meant for training. Evaluations use decode|resize_small(size), which gives
  exactly Pillow's antialiased result. See images.decode_small.
  """
  _check("decode_small: size", size, 1, MAX_SIDE)
  return _decoder(lambda data: images.decode_small(data, size))


def resize(
  height: int, width: int | None = None, method: str = "bilinear"
) -> Fn:
  """Resizes to (height, width); the aspect ratio may change.

  Args:
    height: H, pixels.
    width: W, pixels; None for a square.
    method: nearest, bilinear, bicubic, lanczos or area, as in Pillow. When an
      image shrinks, all but nearest are antialiased.
  """
  _check_sides("resize", height, width)
  resample = errors.pick(_RESAMPLING, method, "resize method")
  return _on_image(
    lambda image, _: _resized(image, height, width or height, resample)
  )


def _resized(
  image: np.ndarray, height: int, width: int, resample: Image.Resampling
) -> np.ndarray:
  """Returns the image in another size; itself if it has that size."""
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(Image.fromarray(image).resize((width, height), resample))


def resize_small(size: int, method: str = "bilinear") -> Fn:
  """Resizes the shorter side to `size` and keeps the aspect ratio.

  Methods are those of `resize`.
  """
  _check("resize_small: size", size, 1, MAX_SIDE)
  resample = errors.pick(_RESAMPLING, method, "resize method")

  def fn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    h, w = images.smaller(image.shape[0], image.shape[1], size)
    return _resized(image, h, w, resample)

  return _on_image(fn)


def pad_to_square(fill: int = 255) -> Fn:
  """Makes the image a square: adds bars to both sides, nothing is cut off.

  Args:
    fill: the value of the bars in all channels.
  """
  _check("pad_to_square: fill", fill, 0, 255)

  def fn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    h, w = image.shape[:2]
    side = max(h, w)
    if side * side > images.MAX_PIXELS:
      raise BadExample(
        f"an image of {w} x {h} pixels cannot be padded to a square: of "
        f"{side} x {side} pixels, {images.MAX_PIXELS} are allowed",
        kind="odd shape",
      )
    padded = np.full((side, side, 3), fill, np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    padded[top : top + h, left : left + w] = image
    return padded

  return _on_image(fn)


def resize_to_patches(length: int, patch: int) -> Fn:
  """Cuts the image into patches, for towers that take any aspect ratio.

  The image is resized (bilinear, antialiased) to as many whole patches as
  `length` allows, its aspect ratio kept but for rounding; see patch_grid. It
  becomes (length, 3 patch^2 + 2) int16: each row a patch, (patch, patch, 3) in
  row-major order, 0..255, then its row and its column. Rows of padding, at the
  end, have -1 for both and pixels of 0.

  Args:
    length: L, the largest number of patches (256 in the released models).
    patch: the side of a patch in pixels.
  """
  _check("resize_to_patches: length", length, 1, 1 << 14)
  _check("resize_to_patches: patch", patch, 1, MAX_SIDE)
  if length * patch * patch > images.MAX_PIXELS:
    raise errors.UserError(
      f"resize_to_patches: {length} patches of {patch} x {patch} pixels are "
      f"more than {images.MAX_PIXELS} pixels"
    )

  def fn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    rows, columns = patch_grid(image.shape[0], image.shape[1], length)
    image = _resized(
      image, rows * patch, columns * patch, _RESAMPLING["bilinear"]
    )
    cut = image.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    n = rows * columns
    out = np.zeros((length, 3 * patch * patch + 2), np.int16)
    out[:n, :-2] = cut.reshape(n, -1)
    out[:n, -2:] = np.indices((rows, columns)).reshape(2, n).T
    out[n:, -2:] = -1
    return out

  return _on_image(fn)


def patch_grid(height: int, width: int, length: int) -> tuple[int, int]:
  """Returns the rows and columns of patches of an image (SigLIP 2, NaFlex).

  With patches of p pixels they are ceil(height r / p) and ceil(width r / p), at
  least 1 each, for the largest scale r with which they are at most `length`
  together. As r grows, the side that lags behind grows by one patch next. So p
  does not matter.

  transformers finds r by bisection, to 1e-5 and up to 100. So it may end one
  step earlier, and makes fewer patches of images of a few pixels.
  """
  rows = columns = 1
  more_rows, more_columns = rows, columns
  while more_rows * more_columns <= length:
    rows, columns = more_rows, more_columns
    # The scales up to which this grid is right: rows p / height, ...
    by_row, by_column = rows * width, columns * height
    more_rows, more_columns = (
      rows + (by_row <= by_column),
      columns + (by_column <= by_row),
    )
  return rows, columns


def _crop(
  image: np.ndarray, height: int, width: int, where: Callable[[int], Any]
) -> np.ndarray:
  """Cuts out (height, width); where(room) -> an offset from 0 to room."""
  h, w = image.shape[:2]
  if h < height or w < width:
    raise BadExample(
      f"no crop of {height}x{width} fits an image of {h}x{w}",
      kind="image too small",
    )
  top, left = where(h - height), where(w - width)
  return image[top : top + height, left : left + width]


def random_crop(height: int, width: int | None = None) -> Fn:
  """Cuts out (height, width), or a square, at a random place."""
  _check_sides("random_crop", height, width)
  return _on_image(
    lambda image, rng: _crop(
      image, height, width or height, lambda room: rng.integers(room + 1)
    )
  )


def central_crop(height: int, width: int | None = None) -> Fn:
  """Cuts out the central (height, width), or a square."""
  _check_sides("central_crop", height, width)
  return _on_image(
    lambda image, _: _crop(
      image, height, width or height, lambda room: room // 2
    )
  )


# Augmentation.


def flip_lr(p: float = 0.5) -> Fn:
  """Mirrors left and right with probability p."""
  _check("flip_lr: p", p, 0, 1)
  return _on_image(
    lambda image, rng: image[:, ::-1] if rng.random() < p else image
  )


def random_affine(
  scale: tuple = (0.9, 1.1), shift: float = 0.1, fill: int = 255
) -> Fn:
  """Scales the image about its centre and shifts it; its size stays.

  The result is interpolated bilinearly without antialiasing, so the factor
  should be at least about 0.5.

  Args:
    scale: (low, high) of the factor, drawn log-uniformly: 1/2 is as likely as
      2.
    shift: the largest shift as a fraction of each side, drawn uniformly.
    fill: the value of uncovered pixels in all channels.
  """
  if len(scale) != 2 or not all(isinstance(v, (int, float)) for v in scale):
    raise errors.UserError(
      f"random_affine: scale is {scale!r:.40}, but has to be two numbers "
      "(low, high)"
    )
  _check("random_affine: scale[0]", scale[0], 0.01, 100)
  _check("random_affine: scale[1]", scale[1], scale[0], 100)
  _check("random_affine: shift", shift, 0, 1)
  _check("random_affine: fill", fill, 0, 255)
  low, high = np.log(scale[0]), np.log(scale[1])

  def fn(image, rng):
    h, w = image.shape[:2]
    zoom = np.exp(-rng.uniform(low, high))
    dx, dy = rng.uniform(-shift, shift, 2) * (w, h)
    # Pillow maps output to input coordinates: input = zoom * output + c.
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


def color_gain(amount: float) -> Fn:
  """Multiplies each channel by a random factor in [1 - amount, 1 + amount]."""
  _check("color_gain: amount", amount, 0, 1)

  def fn(image, rng):
    gain = rng.uniform(1 - amount, 1 + amount, 3).astype(np.float32)
    # The values are positive, so adding 0.5 and truncating rounds them.
    return np.minimum(image * gain + np.float32(0.5), 255).astype(np.uint8)

  return _on_image(fn)


def random_grey(p: float) -> Fn:
  """Makes the image grey with probability p (luma of ITU-R 601)."""
  _check("random_grey: p", p, 0, 1)

  def fn(image, rng):
    if rng.random() >= p:
      return image
    grey = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat(grey[..., None], 3, axis=-1)

  return _on_image(fn)


def random_invert(p: float) -> Fn:
  """Replaces every value v by 255 - v with probability p."""
  _check("random_invert: p", p, 0, 1)
  return _on_image(
    lambda image, rng: 255 - image if rng.random() < p else image
  )


def global_view(size: int, area: tuple = (0.4, 1.0), out: str = "global") -> Fn:
  """Sets `out` to a random view of most of the image, for self-distillation.

  (size, size, 3) uint8; see views.view. "image" stays. Comes after `decode`.

  Args:
    size: pixels.
    area: (low, high) of the view's share of the image's area.
    out: the feature to set.
  """
  _check("global_view: size", size, 1, MAX_SIDE)
  _check_area("global_view", area)
  from sigjax.data.example import views  # few runs have any

  def fn(example: Example, rng: np.random.Generator) -> Example:
    image = _decoded(example)
    return {**example, out: views.view(image, rng, size, area)}

  return fn


def local_views(
  size: int, count: int = 8, area: tuple = (0.05, 0.4), out: str = "local"
) -> Fn:
  """Sets `out` to random views of small parts, (count, size, size, 3) uint8.

  As global_view does.
  """
  _check("local_views: size", size, 1, MAX_SIDE)
  _check("local_views: count", count, 1, 1000)
  _check_area("local_views", area)
  from sigjax.data.example import views  # few runs have any

  def fn(example: Example, rng: np.random.Generator) -> Example:
    image = _decoded(example)
    found = [views.view(image, rng, size, area) for _ in range(count)]
    return {**example, out: np.stack(found)}

  return fn


def _check_area(op: str, area: tuple) -> None:
  """Raises UserError unless area is (low, high), shares of an image."""
  if len(area) != 2 or not all(isinstance(v, (int, float)) for v in area):
    raise errors.UserError(
      f"{op}: area is {area!r:.40}, but has to be two numbers (low, high)"
    )
  _check(f"{op}: area[0]", area[0], 0.001, 1)
  _check(f"{op}: area[1]", area[1], area[0], 1)


def value_range(low: float, high: float) -> Fn:
  """Maps 0..255 linearly to low..high, as float32."""
  _check("value_range: low", low, -1e6, 1e6)
  _check("value_range: high", high, -1e6, 1e6)
  slope, offset = np.float32((high - low) / 255), np.float32(low)
  return _on_image(lambda image, _: image * slope + offset)


# Text.


def choice(
  key: str, out: str = "text", by: str = "", weights: dict | None = None
) -> Fn:
  """Sets `out` to a random one of the texts at `key`.

  With `by`, such as "language", first a value of that feature is drawn from
  those that the example has, then a text that has it.

  Args:
    key: a feature that holds a text, several texts, or {"text": several, ...}
      as in COCO.
    out: the feature to set.
    by: a feature with a value for each text; "": all texts are equally likely.
    weights: {value: weight} of values of `by`; others have weight 1. A value
      of weight 0 is not drawn.
  """
  weights = weights or {}
  if weights and not by:
    raise errors.UserError(
      "choice: weights need by=, the feature whose values they weigh, such as "
      "by='language'"
    )
  for value, weight in weights.items():
    if not isinstance(weight, (int, float)):
      raise errors.UserError(
        f"choice: the weight of {value!r} is {weight!r}; give a number"
      )
    _check(f"choice: the weight of {value!r}", weight, 0, 1e9)

  def fn(example: Example, rng: np.random.Generator) -> Example:
    if by:
      groups = captions_lib.captions_by(example, key, by)
      chances = np.cumsum([weights.get(value, 1) for value in groups])
      if not chances[-1]:
        raise BadExample(
          f"its texts are in {', '.join(groups)}, all of weight 0",
          kind="missing caption",
        )
      drawn = np.searchsorted(chances, rng.random() * chances[-1], "right")
      texts = list(groups.values())[drawn]
    else:
      texts = captions_lib.captions(example, key)
    example[out] = texts[rng.integers(len(texts))]
    return example

  return fn


def first(key: str, out: str = "text") -> Fn:
  """Sets `out` to the first of the texts at `key`; see `choice`."""

  def fn(example: Example, rng: np.random.Generator) -> Example:
    del rng
    example[out] = captions_lib.captions(example, key)[0]
    return example

  return fn


def _text(example: Example) -> str:
  """Returns the "text" that `choice` or `first` has set."""
  text = errors.pick(example, "text", "feature")
  if not isinstance(text, str):
    raise errors.UserError(
      '"text" is no text; choice or first has to come before, tokenize after'
    )
  return text


def lower() -> Fn:
  """Makes "text" lower case."""

  def fn(example: Example, rng: np.random.Generator) -> Example:
    del rng
    example["text"] = _text(example).lower()
    return example

  return fn


def tokenize(length: int, pad: int = 1, *, tokenizer: Tokenize) -> Fn:
  """Replaces "text" by its token ids, (length,) int32.

  Args:
    length: L; longer texts are cut, see tokenizer.Tokenizer.
    pad: the id of padding: 1 in SigLIP, 0 in SigLIP 2.
    tokenizer: given by parse().
  """
  _check("tokenize: length", length, 1, MAX_TOKENS)
  _check("tokenize: pad", pad, 0, 2**31 - 1)

  def fn(example: Example, rng: np.random.Generator) -> Example:
    del rng
    example["text"] = tokenizer(_text(example), length, pad)
    return example

  return fn


def regions(
  length: int,
  key: str = "objects",
  boxes: str = "bbox",
  texts: str = "text",
  p: float = 0.67,
  pad: int = 1,
  *,
  tokenizer: Tokenize,
) -> Fn:
  """Sets "target", (length,) int32 ids, for a captioning decoder (LocCa).

  The text of the image, or with probability p where something in it is, or what
  is there; see regions.target. Comes between `choice` and `tokenize`. Ops that
  cut or move the image must not be there: boxes are shares of the whole.

  Args:
    length: L; longer targets are cut.
    key: the feature with the regions.
    boxes: within it, (n, 4): top, left, bottom, right, in 0 to 1, as in TFDS.
    texts: within it, n texts.
    p: see above.
    pad: as of `tokenize`.
    tokenizer: given by parse().
  """
  _check("regions: length", length, 1, MAX_TOKENS)
  _check("regions: p", p, 0, 1)
  _check("regions: pad", pad, 0, 2**31 - 1)
  from sigjax.data.example import regions as lib  # few runs have any

  def fn(example: Example, rng: np.random.Generator) -> Example:
    text = lib.target(example, _text(example), key, (boxes, texts), p, rng)
    example["target"] = tokenizer(text, length, pad)
    return example

  return fn


def group(*features: str) -> Fn:
  """Sets "group", (G,) int32: two examples that agree in one are a true pair.

  Each number is a hash, of 31 bits, of a feature's value: bytes as they are,
  anything else as its text. So "image" has to come before `decode`, and "text"
  after `choice`. None is no value that two examples could share: it gets a
  random number. By chance, B^2 / 2^32 pairs of B values share a number.

  Args:
    *features: such as 'image', 'text' or 'concept'.
  """
  if not features:
    raise errors.UserError("group: name at least one feature, as in group('x')")

  def number(value: Any, rng: np.random.Generator) -> int:
    if value is None:
      return int(rng.integers(2**31))
    data = value if isinstance(value, bytes) else str(value).encode()
    digest = hashlib.blake2b(data, digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1

  def fn(example: Example, rng: np.random.Generator) -> Example:
    values = [errors.pick(example, name, "feature") for name in features]
    for name, value in zip(features, values):
      if isinstance(value, np.ndarray) and value.ndim:
        raise errors.UserError(
          f'group: "{name}" is an array; for an image, group has to come '
          "before decode"
        )
    numbers = [number(value, rng) for value in values]
    example["group"] = np.array(numbers, np.int32)
    return example

  return fn


# Noise (SigLIP, section 4.10).


def noise_image(p: float) -> Fn:
  """Replaces the image by noise with probability p.

  Pixels become uniform in 0..255, as in the paper. A precomputed embedding
  becomes a Gaussian vector of its norm. This is not what the locked tower makes
  of noisy pixels: embeddings of noise would be alike, these are far apart.
  """
  _check("noise_image: p", p, 0, 1)

  def fn(image: Any, rng: np.random.Generator) -> np.ndarray:
    if rng.random() >= p:
      return image
    return rng.integers(0, 256, image.shape, np.uint8)

  pixels = _on_image(fn)

  def apply(example: Example, rng: np.random.Generator) -> Example:
    image = errors.pick(example, "image", "feature")
    if getattr(image, "ndim", None) != 1:
      return pixels(example, rng)
    if rng.random() < p:
      noise = rng.normal(size=image.shape)
      norm = np.linalg.norm(image.astype(np.float64))
      example["image"] = (noise * (norm / np.linalg.norm(noise))).astype(
        image.dtype
      )
    return example

  return apply


def noise_text(p: float, pad: int = 1, *, tokenizer: Tokenize) -> Fn:
  """Replaces the ids of "text" by random ones with probability p.

  Comes after `tokenize`. Of L places, 1 to L - 1 hold ids, and as many as that
  is drawn uniformly, as is each id; then come the end and the padding. The ids
  of padding (0), end (1) and unknown (2) are not drawn.

  Args:
    p: the probability.
    pad: as of `tokenize`.
    tokenizer: given by parse().
  """
  _check("noise_text: p", p, 0, 1)
  _check("noise_text: pad", pad, 0, 2**31 - 1)

  def fn(example: Example, rng: np.random.Generator) -> Example:
    row = errors.pick(example, "text", "feature")
    if getattr(row, "dtype", None) != np.int32:
      raise errors.UserError("noise_text has to come after tokenize")
    if rng.random() < p:
      row = np.full_like(row, pad)
      n = rng.integers(1, len(row)) if len(row) > 1 else 0
      row[:n] = rng.integers(3, tokenizer.vocab_size, n)
      row[n] = 1
      example["text"] = row
    return example

  return fn


def keep(*names: str) -> Fn:
  """Drops all other features; the order of the names is that of the result."""
  return lambda example, _: {
    name: errors.pick(example, name, "feature") for name in names
  }


OPS: dict[str, Callable[..., Fn]] = {
  op.__name__: op
  for op in (
    decode,
    decode_small,
    resize,
    resize_small,
    pad_to_square,
    resize_to_patches,
    random_crop,
    central_crop,
    flip_lr,
    random_affine,
    color_gain,
    random_grey,
    random_invert,
    global_view,
    local_views,
    value_range,
    choice,
    first,
    lower,
    tokenize,
    regions,
    group,
    noise_image,
    noise_text,
    keep,
  )
}


def parse(string: str, **context: Any) -> Fn:
  """Returns the function that a pipe string describes.

  Args:
    string: op|op(arg, ...)|..., with the names of OPS and literal arguments.
    **context: what ops need besides their written arguments: tokenizer=.

  Returns:
    fn(example, rng) -> example. It does not change its argument, and raises
    BadExample for an example that cannot be used.

  Raises:
    UserError: the string is not a pipe string, an op is unknown, or its
      arguments are wrong.
  """
  fns = pipe_string.build(string, OPS, context)

  def preprocess(example: Example, rng: np.random.Generator) -> Example:
    example = dict(example)
    for fn in fns:
      example = fn(example, rng)
    return example

  return preprocess


_TEXT_OPS = ("choice", "first", "lower", "tokenize")


def check_weights(
  brief: Callable[[int], Example],
  numbers: Sequence[int] | np.ndarray,
  pp: str,
) -> None:
  """Raises UserError if `choice` weighs a value that no example has.

  Reads examples from all over the source until each value was seen.

  Args:
    brief, numbers, pp: as of cut_share.
  """
  op = inspect.signature(choice)
  for name, args, kwargs in pipe_string.calls(pp):
    given = op.bind(*args, **kwargs).arguments if name == "choice" else {}
    wanted, seen = given.get("weights") or {}, set()
    first = _spread(len(numbers), 1000)
    for place in itertools.chain(first, range(len(numbers))):
      if seen.issuperset(wanted):
        break
      with contextlib.suppress(BadExample):
        example = brief(int(numbers[place]))
        found = captions_lib.captions_by(example, given["key"], given["by"])
        seen.update(found)
    for value in wanted:
      if value not in seen:
        raise errors.UserError(
          f'choice weighs {given["by"]} "{value}"'
          f"{errors.closest(value, seen)}, but the examples have: "
          f"{', '.join(sorted(seen))}"
        )


def _spread(n: int, sample: int) -> np.ndarray:
  """Returns up to `sample` numbers below n, evenly spread."""
  return np.linspace(0, n - 1, min(sample, n)).astype(int)


def cut_share(
  brief: Callable[[int], Example],
  numbers: Sequence[int] | np.ndarray,
  pp: str,
  tokenizer: Tokenizer,
  sample: int = 1000,
) -> float:
  """Returns the share of texts that are longer than `tokenize` keeps.

  Runs only the ops of `pp` that concern texts, so images are not needed.

  Args:
    brief: fn(number) -> the example, its image left out.
    numbers: of all examples.
    pp: pipe string.
    tokenizer: of the run.
    sample: the number of examples to look at, evenly spread.

  Returns:
    A fraction; 0 if no example could be read or `pp` has no `tokenize`.
  """
  cut = []

  def count(text: str, length: int, pad: int = 1) -> np.ndarray:
    cut.append(tokenizer.count(text) > length)
    return tokenizer(text, length, pad)

  built = pipe_string.build(pp, OPS, dict(tokenizer=count))
  names = [name for name, _, _ in pipe_string.calls(pp)]
  fns = [fn for name, fn in zip(names, built) if name in _TEXT_OPS]
  rng = np.random.default_rng(0)
  for place in _spread(len(numbers), sample):
    with contextlib.suppress(BadExample):
      example = dict(brief(int(numbers[place])))
      for fn in fns:
        example = fn(example, rng)
  return float(np.mean(cut)) if cut else 0.0
