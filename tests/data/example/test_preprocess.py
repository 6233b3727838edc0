"""Preprocessing ops, against images whose pixels are known by construction."""

import hashlib
import io
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.data.example import preprocess


def encode(image, **kwargs):
  data = io.BytesIO()
  image.save(data, **{"format": "PNG", **kwargs})
  return data.getvalue()


def apply(string, seed=0, **example):
  return preprocess.parse(string)(example, np.random.default_rng(seed))


def on_image(string, image, seed=0):
  return apply(string, seed, image=image)["image"]


def noise(*shape):
  return np.random.default_rng(7).integers(0, 256, shape, np.uint8)


# Decoding.

GREY = noise(5, 7)
RGB = noise(5, 7, 3)


def test_decode_rgb_and_grey():
  image = on_image("decode", encode(Image.fromarray(RGB)))
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, RGB)
  image = on_image("decode", encode(Image.fromarray(GREY)))
  np.testing.assert_array_equal(image, GREY[..., None].repeat(3, -1))
  bits = GREY > 99
  image = on_image("decode", encode(Image.fromarray(bits)))
  np.testing.assert_array_equal(image[..., 1], bits * 255)


def test_decode_puts_transparent_pixels_on_white():
  rgba = np.concatenate([RGB, np.full((5, 7, 1), 255, np.uint8)], -1)
  rgba[0, 0, 3] = 0
  rgba[1, 1] = 0, 100, 200, 102  # 0.4 of it, 0.6 of white
  image = on_image("decode", encode(Image.fromarray(rgba)))
  want = RGB.copy()
  want[0, 0] = 255
  want[1, 1] = 153, 193, 233
  np.testing.assert_array_equal(image, want)
  grey = np.stack([GREY, np.full_like(GREY, 255)], -1)
  grey[2, 3, 1] = 0
  image = on_image("decode", encode(Image.fromarray(grey)))
  want = GREY.copy()
  want[2, 3] = 255
  np.testing.assert_array_equal(image[..., 0], want)


def test_decode_palette():
  colors = [(10, 20, 30), (200, 100, 0), (1, 2, 3)]
  indices = GREY % 3
  image = Image.fromarray(indices)
  image.putpalette(sum(colors, ()))
  got = on_image("decode", encode(image))
  np.testing.assert_array_equal(got, np.array(colors, np.uint8)[indices])
  got = on_image("decode", encode(image, transparency=1))
  colors[1] = (255, 255, 255)
  np.testing.assert_array_equal(got, np.array(colors, np.uint8)[indices])
  got = on_image("decode", encode(image, transparency=b"\xff\x00\xff"))
  np.testing.assert_array_equal(got, np.array(colors, np.uint8)[indices])


def test_decode_16_bits_is_scaled_not_clipped():
  deep = GREY.astype(np.uint16) * 257
  data = encode(Image.fromarray(deep))
  assert Image.open(io.BytesIO(data)).mode == "I;16"
  np.testing.assert_array_equal(
    on_image("decode", data), GREY[..., None].repeat(3, -1)
  )


def test_decode_cmyk():
  white = Image.new("CMYK", (4, 3))
  assert (on_image("decode", encode(white, format="TIFF")) == 255).all()


def test_decode_refuses_damaged_images():
  whole = encode(Image.fromarray(noise(64, 64, 3)))
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  jpeg = encode(Image.fromarray(noise(64, 64, 3)), format="JPEG")
  huge = bytearray(encode(Image.fromarray(RGB), format="BMP"))
  huge[20] = huge[24] = 1  # 65,536 pixels more on each side, says the header
  for data in (
    b"",
    b"text",
    whole[:40],
    whole[: len(whole) // 2],
    bytes(flipped),
    jpeg[: len(jpeg) // 2],
    bytes(huge),
  ):
    with pytest.raises(preprocess.BadExample, match="cannot be decoded"):
      on_image("decode", data)
  with pytest.raises(errors.UserError, match="needs an encoded") as e:
    on_image("decode|decode", whole)
  assert not isinstance(e.value, preprocess.BadExample)  # but a bad pipe


# Sizes.


def test_resize_area_is_the_mean_and_nearest_repeats():
  image = noise(8, 6, 3)
  blocks = image.reshape(4, 2, 3, 2, 3).astype(float).mean((1, 3))
  got = on_image("resize(4, 3, 'area')", image)
  np.testing.assert_allclose(got, blocks, atol=1.01)  # rounded per axis
  got = on_image("resize(16, 12, method='nearest')", image)
  np.testing.assert_array_equal(got, image.repeat(2, 0).repeat(2, 1))
  assert on_image("resize(5)", image).shape == (5, 5, 3)
  assert on_image("resize(6, 8)", image).shape == (6, 8, 3)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos", "area"])
def test_shrinking_is_antialiased(method):
  checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
  got = on_image(f"resize(16, method={method!r})", checks.astype(np.uint8))
  assert got.min() >= 120 and got.max() <= 135


def test_resize_small_keeps_the_aspect():
  assert on_image("resize_small(20)", noise(40, 60, 3)).shape == (20, 30, 3)
  assert on_image("resize_small(20)", noise(10, 5, 3)).shape == (40, 20, 3)
  assert on_image("resize_small(20)", noise(20, 20, 3)).shape == (20, 20, 3)


def test_pad_to_square():
  got = on_image("pad_to_square(9)", RGB)
  assert got.shape == (7, 7, 3)
  np.testing.assert_array_equal(got[1:6], RGB)
  assert (got[0] == 9).all() and (got[6] == 9).all()
  got = on_image("pad_to_square", np.moveaxis(RGB, 0, 1))
  np.testing.assert_array_equal(got[:, 1:6], np.moveaxis(RGB, 0, 1))
  assert (got[:, 0] == 255).all() and (got[:, 6] == 255).all()
  square = noise(6, 6, 3)
  np.testing.assert_array_equal(on_image("pad_to_square", square), square)


PLACES = np.stack([*np.indices((9, 7)), np.zeros((9, 7))], -1).astype(np.uint8)


def test_central_crop():
  got = on_image("central_crop(5, 3)", PLACES)
  np.testing.assert_array_equal(got, PLACES[2:7, 2:5])


def test_random_crop_is_contiguous_and_goes_everywhere():
  corners = set()
  for seed in range(200):
    got = on_image("random_crop(7, 4)", PLACES, seed)
    top, left, _ = map(int, got[0, 0])
    np.testing.assert_array_equal(got, PLACES[top : top + 7, left : left + 4])
    corners.add((top, left))
  assert corners == {(y, x) for y in range(3) for x in range(4)}
  np.testing.assert_array_equal(on_image("random_crop(9, 7)", PLACES), PLACES)


@pytest.mark.parametrize("op", ["random_crop(8)", "central_crop(8)"])
def test_crop_larger_than_the_image(op):
  with pytest.raises(preprocess.BadExample, match="8x8 fits an image of 9x7"):
    on_image(op, PLACES)


# Augmentation.


def test_flip_lr():
  np.testing.assert_array_equal(on_image("flip_lr(1.0)", RGB), RGB[:, ::-1])
  np.testing.assert_array_equal(on_image("flip_lr(0.0)", RGB), RGB)
  flips = sum(
    (on_image("flip_lr", RGB, seed) != RGB).any() for seed in range(400)
  )
  assert 150 < flips < 250


def test_random_affine_zooms_about_the_centre():
  np.testing.assert_array_equal(
    on_image("random_affine((1, 1), 0)", noise(16, 16, 3)), noise(16, 16, 3)
  )
  black = np.zeros((16, 16, 3), np.uint8)
  want = np.full((16, 16), 200)
  want[4:12, 4:12] = 0
  got = on_image("random_affine((0.5, 0.5), 0.0, fill=200)", black)
  assert got.shape == black.shape
  np.testing.assert_array_equal(got[..., 1], want)
  blocks = noise(2, 2, 3).repeat(8, 0).repeat(8, 1)
  got = on_image("random_affine((2, 2), 0)", blocks)
  # Twice as large, the seams of the blocks are still in the middle.
  for rows in (slice(0, 6), slice(10, 16)):
    for cols in (slice(0, 6), slice(10, 16)):
      np.testing.assert_array_equal(got[rows, cols], blocks[rows, cols])


def test_random_affine_shifts_up_to_its_fraction():
  image = np.full((40, 40, 3), 255, np.uint8)
  image[18:22, 18:22] = 0
  moves = []
  for seed in range(200):
    got = 255 - on_image("random_affine((1, 1), 0.25)", image, seed)[..., 0]
    weight = got / got.sum()
    y, x = np.indices(got.shape)
    moves.append([(weight * y).sum() - 19.5, (weight * x).sum() - 19.5])
  moves = np.array(moves)
  assert np.abs(moves).max() <= 10.1
  assert (moves.max(0) > 8).all() and (moves.min(0) < -8).all()
  assert np.abs(moves.mean(0)).max() < 1.5


def test_color_gain():
  np.testing.assert_array_equal(on_image("color_gain(0.0)", RGB), RGB)
  image = np.full((2, 2, 3), 100, np.uint8)
  gains = (
    np.array(
      [on_image("color_gain(0.5)", image, seed)[0, 0] for seed in range(100)]
    )
    / 100
  )
  assert 0.5 <= gains.min() < 0.55 and 1.45 < gains.max() <= 1.5
  assert np.corrcoef(gains.T)[0, 1] < 0.5  # the channels are independent
  bright = on_image("color_gain(0.9)", np.full((2, 2, 3), 250, np.uint8))
  assert bright.max() == 255  # stops at the top, and does not start anew


def test_random_grey_and_invert():
  luma = RGB @ np.array([0.299, 0.587, 0.114])
  got = on_image("random_grey(1.0)", RGB)
  assert got.shape == RGB.shape and got.dtype == np.uint8
  np.testing.assert_allclose(got, luma[..., None].repeat(3, -1), atol=1)
  np.testing.assert_array_equal(on_image("random_invert(1.0)", RGB), 255 - RGB)
  for op in ("random_grey", "random_invert"):
    np.testing.assert_array_equal(on_image(f"{op}(0.0)", RGB), RGB)
    hits = sum(
      (on_image(f"{op}(0.25)", RGB, s) != RGB).any() for s in range(400)
    )
    assert 70 < hits < 130


def test_value_range():
  image = np.array([[[0, 51, 255]]], np.uint8)
  got = on_image("value_range(-1, 1)", image)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, [[[-1, -0.6, 1]]], atol=1e-6)
  np.testing.assert_allclose(
    on_image("value_range(0, 1.0)", image), [[[0, 0.2, 1]]], atol=1e-6
  )


# Text.


@pytest.mark.parametrize(
  "captions",
  [
    ["a", "é", "c"],
    [b"a", "é".encode(), b"c"],
    np.array([b"a", "é".encode(), b"c"], object),
    {"text": [b"a", "é".encode(), b"c"], "id": [1, 2, 3]},
  ],
)
def test_choice_takes_any_caption(captions):
  seen = [
    apply("choice('captions')", seed, captions=captions)["text"]
    for seed in range(60)
  ]
  assert {text: seen.count(text) > 8 for text in set(seen)} == {
    "a": True,
    "é": True,
    "c": True,
  }
  assert apply("first('captions', 'name')", captions=captions)["name"] == "a"


def test_choice_draws_a_language_first():
  example = dict(
    captions=["a", None, "b", "c", "d"],
    language=["en", "xx", "en", b"th", "en"],
  )

  def share(op, n=2000, **features):
    fn, rng = preprocess.parse(op), np.random.default_rng(0)
    texts = [fn({**example, **features}, rng)["text"] for _ in range(n)]
    return {text: texts.count(text) / n for text in set(texts)}

  near = lambda want: pytest.approx(want, abs=0.04)
  sixth = 1 / 6
  assert share("choice('captions')") == near(dict.fromkeys("abcd", 0.25))
  assert share("choice('captions', by='language')") == near(
    dict(a=sixth, b=sixth, d=sixth, c=0.5)
  )
  # Those that are not named have weight 1.
  assert share("choice('captions',by='language',weights={'en':3})") == near(
    dict(a=0.25, b=0.25, d=0.25, c=0.25)
  )
  none = "choice('captions',by='language',weights={'en':0})"
  assert share(none, 50) == {"c": 1}
  # One value for all texts.
  one = share("choice('captions',by='language')", language="en")
  assert one == near(dict.fromkeys("abcd", 0.25))
  with pytest.raises(errors.UserError, match="all of weight 0"):
    share(none, 1, language="en")
  with pytest.raises(errors.UserError, match='2 values at "language" for 5'):
    share(none, 1, language=["en", "th"])


@pytest.mark.parametrize(
  "args, message",
  [
    ("weights={'en':1}", "weights need by="),
    ("by='language',weights={'en':'x'}", "weight of 'en' is 'x'; give"),
    ("by='language',weights={'en':-1}", "has to be from 0"),
    ("by='language',weights=('en',1)", "weights cannot be"),
  ],
)
def test_weights_that_cannot_be(args, message):
  with pytest.raises(errors.UserError, match=message):
    preprocess.parse(f"choice('captions',{args})")


def test_a_language_that_no_example_has_is_told_at_the_start():
  examples = [
    dict(captions=["a"], language=["sw" if i else "en"]) for i in (1, 0, 1)
  ]
  check = lambda op: preprocess.check_weights(
    examples.__getitem__, range(3), f"decode|{op}|tokenize(4)"
  )
  check("choice('captions', by='language', weights={'en': 2, 'sw': 0})")
  check("choice('captions')")
  with pytest.raises(errors.UserError, match=r'"sv" .*mean "sw".*have: en, sw'):
    check("choice('captions', 'text', 'language', {'sv': 2})")


@pytest.mark.parametrize("op", ["choice", "first"])
def test_one_caption(op):
  assert apply(f"{op}('c')", c=b"one")["text"] == "one"
  assert apply(f"{op}('c')", c="one")["text"] == "one"
  for empty in ([], {"text": []}, "", None, [" ", None]):
    with pytest.raises(errors.UserError, match="no text"):
      apply(f"{op}('c')", c=empty)


def test_lower_tokenize_keep():
  tokenizer = lambda text, length, pad: np.array(
    [ord(c) for c in text][:length]
  )
  fn = preprocess.parse(
    "first('a|b')|lower|tokenize(3)|keep('text','image')", tokenizer=tokenizer
  )
  out = fn({"image": 1, "other": 2, "a|b": "XYZÉ"}, None)
  assert list(out) == ["text", "image"]
  assert out["text"].tolist() == [ord(c) for c in "xyz"]


# Noise.


def test_noise_on_pixels():
  image = np.full((9, 7, 3), 77, np.uint8)
  fn, rng = preprocess.parse("noise_image(0.3)"), np.random.default_rng(0)
  found = [fn({"image": image}, rng)["image"] for _ in range(1000)]
  noisy = np.stack([x for x in found if (x != image).any()])
  assert len(noisy) / 1000 == pytest.approx(0.3, abs=0.05)
  assert noisy.dtype == np.uint8 and noisy.shape[1:] == image.shape
  counts = np.bincount(noisy.ravel(), minlength=256)
  assert counts.min() > 0.7 * noisy.size / 256  # uniform in 0..255
  assert (image == 77).all()
  for wrong in (b"encoded", image / np.float32(255)):
    with pytest.raises(errors.UserError, match="needs uint8 pixels"):
      apply("noise_image(1.0)", image=wrong)
  with pytest.raises(errors.UserError, match="has to be from 0 to 1"):
    preprocess.parse("noise_image(1.5)")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_noise_on_embeddings(dtype):
  z = np.linspace(0, 1, 400).astype(dtype)
  fn, rng = preprocess.parse("noise_image(0.5)"), np.random.default_rng(1)
  found = [fn({"image": z}, rng)["image"] for _ in range(400)]
  noisy = [x for x in found if (x != z).any()]
  assert len(noisy) / 400 == pytest.approx(0.5, abs=0.1)
  for x in noisy:
    assert x.dtype == dtype and x.shape == z.shape
    norms = [np.linalg.norm(v.astype(np.float64)) for v in (x, z)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
  unit = np.stack(noisy).astype(np.float64) / norms[1]
  assert abs(unit[0] @ unit[1]) < 0.2 and abs(unit.mean()) < 1e-3


class Words:
  """A tokenizer of 20 ids."""

  vocab_size = 20

  def __call__(self, text, length, pad=1):
    row = np.full(length, pad, np.int32)
    row[:2] = 9, 1
    return row


@pytest.mark.parametrize("pad", [1, 0])
def test_noise_on_texts(pad):
  fn = preprocess.parse(
    f"tokenize(6, {pad})|noise_text(0.4, {pad})", tokenizer=Words()
  )
  rng = np.random.default_rng(0)
  rows = np.stack([fn({"text": "x"}, rng)["text"] for _ in range(4000)])
  assert rows.dtype == np.int32
  same = (rows == Words()("x", 6, pad)).all(1)
  # One in 5 * 17 noisy ones is the text itself.
  assert np.mean(~same) == pytest.approx(0.4 * (1 - 1 / 85), abs=0.03)
  lengths, ids = [], []
  for row in rows[~same]:
    n = list(row).index(1)  # the end
    lengths.append(n)
    ids.extend(row[:n])
    assert (row[n + 1 :] == pad).all()
  # Uniform: 1 to 5 ids, each from 3 to 19; those of length 1 lack the text's 9.
  assert np.bincount(lengths)[2:] / len(lengths) == pytest.approx(
    [0.2] * 4, abs=0.04
  )
  assert np.bincount(lengths)[:1] == [0]
  assert set(ids) == set(range(3, 20))
  assert np.bincount(ids)[3:].min() > 0.6 * len(ids) / 17
  with pytest.raises(errors.UserError, match="after tokenize"):
    preprocess.parse("noise_text(1.0)|tokenize(6)", tokenizer=Words())(
      {"text": "x"}, rng
    )
  one = preprocess.parse("tokenize(2)|noise_text(1.0)", tokenizer=Words())
  assert one({"text": "x"}, rng)["text"][1] == 1


# Pipe strings.

ALL = (
  "decode|resize(20)|random_crop(16)|random_affine|flip_lr"
  "|color_gain(0.5)|random_grey(0.5)|random_invert(0.5)|value_range(-1,1)"
  "|choice('captions')|keep('image','text')"
)


def test_only_rng_is_random_and_the_example_is_left_alone():
  example = {
    "image": encode(Image.fromarray(noise(24, 24, 3))),
    "captions": list("abcdefgh"),
    "name": "x",
  }
  before = dict(example)
  fn = preprocess.parse(ALL)
  outs = []
  for seed in (0, 0, 1):
    np.random.seed(len(outs))
    outs.append(fn(example, np.random.default_rng(seed)))
  assert example == before
  assert outs[0]["image"].shape == (16, 16, 3)
  np.testing.assert_array_equal(outs[0]["image"], outs[1]["image"])
  assert outs[0]["text"] == outs[1]["text"]
  assert np.abs(outs[0]["image"] - outs[2]["image"]).mean() > 0.05


@pytest.mark.parametrize(
  "string, message",
  [
    ("decode|resise(64)", r'op "resise" is not known \(did you mean "resize"'),
    ("resize", r"op resize\(height: int.*missing a required .* 'height'"),
    ("resize(1, 2, 'area', 4)", r"op resize\(.*too many positional"),
    ("resize(64, methd='area')", r"op resize\(.*unexpected.*'methd'"),
    ("resize(64, method='cubic')", r'method "cubic" .*did you mean "bicubic"'),
    ("resize('64')", r"op resize\(.*height cannot be '64'"),
    ("resize_small(9, 'cubic')", 'method "cubic"'),
    ("keep('image', 3)", r"op keep\(.*cannot be 3"),
    ("resize(size)", r'"resize\(size\)" have to be plain values'),
    ("tokenize(16)", 'op "tokenize" needs a tokenizer'),
    ("tokenize(16, tokenizer=3)", 'op "tokenize" needs a tokenizer'),
    ("decode||flip_lr", r"not of the form op\|op"),
    ("", r"not of the form op\|op"),
    ("decode|64", '"64" in "decode|64" is not an op'),
    ("decode + lower", "is not an op"),
    ("__import__('os').system('x')", "is not an op"),
    (None, "preprocessing is a text"),
    ("resize({[]: 1})", "have to be plain values"),
    ("resize(\0)", r"not of the form op\|op"),
    ("resize(" + "9" * 5000 + ")", r"not of the form op\|op"),
    ("lower" + "|lower" * 20_000, r"not of the form op\|op"),
    ("keep(" + "[" * 5000, r"not of the form op\|op"),
    ("resize(True)", "height cannot be True"),
    ("resize(0)", "resize: height is 0, but has to be from 1 to 8192"),
    ("resize(8, 0)", "resize: width is 0, but has to be from 1"),
    ("resize(100000)", "resize: height is 100000"),
    ("resize_small(0)", "resize_small: size is 0"),
    ("decode_small(-3)", "decode_small: size is -3"),
    ("random_crop(0)", "random_crop: height is 0"),
    ("central_crop(8, 0)", "central_crop: width is 0"),
    ("pad_to_square(256)", "pad_to_square: fill is 256"),
    ("flip_lr(1.5)", "flip_lr: p is 1.5, but has to be from 0 to 1"),
    ("random_grey(-1)", "random_grey: p is -1"),
    ("random_invert(2)", "random_invert: p is 2"),
    ("color_gain(3)", "color_gain: amount is 3"),
    ("value_range(-1, 1e999)", "value_range: high is inf"),
    ("random_affine((1, 2, 3))", "scale is .*two numbers"),
    ("random_affine((0, 1))", r"scale\[0\] is 0"),
    ("random_affine((2, 1))", r"scale\[1\] is 1"),
    ("random_affine((1, 1), 2)", "shift is 2"),
  ],
)
def test_mistakes_in_pipe_strings(string, message):
  with pytest.raises(errors.UserError, match=message) as e:
    preprocess.parse(string)
  assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("length", [0, -1, 10**12])
def test_a_text_has_a_length(length):
  with pytest.raises(errors.UserError, match=f"tokenize: length is {length}"):
    preprocess.parse(f"tokenize({length})", tokenizer=len)


@pytest.mark.parametrize(
  "string, message",
  [
    ("resize(8)", "decode has to come before it"),
    (
      "decode|value_range(0,1)|resize(8)",
      "value_range or resize_to_patches after",
    ),
    ("first('n')|keep('image')|flip_lr", "decode has to come before it"),
    ("keep('n')|decode", 'feature "image" is not known'),
    ("lower", 'feature "text" is not known'),
    ("first('n')|tokenize(3)|lower", "tokenize after"),
  ],
)
def test_mistakes_in_the_order_of_ops(string, message):
  fn = preprocess.parse(string, tokenizer=lambda *_: np.zeros(3))
  data = encode(Image.fromarray(RGB))
  with pytest.raises(errors.UserError, match=message):
    fn(dict(image=data, n="x"), np.random.default_rng(0))


def test_no_pipe_string_raises_anything_but_user_error():
  rng = np.random.default_rng(0)
  pieces = [*"|(),.=-\"'[]{}*_0123456789 \0\n\\#é", "1e9", "None", "lambda:0"]
  pieces += [*preprocess.OPS, "**", "f''", "'image'", "(1, 2)", "height="]
  good = 0
  for _ in range(4000):
    string = ALL
    for _ in range(rng.integers(1, 4)):
      a, b = sorted(rng.integers(0, len(string) + 1, 2))
      b = min(b, a + 3)
      string = string[:a] + str(rng.choice(pieces)) + string[b:]
    try:
      preprocess.parse(string)
      good += 1
    except errors.UserError as e:
      assert "\n" not in str(e)
  assert 10 < good < 3900  # neither all survive nor none


def test_missing_feature_is_named():
  for op in ("choice('caption')", "first('caption')", "keep('caption')"):
    with pytest.raises(errors.UserError, match='"caption".*"captions"'):
      apply(op, captions=["a"])


def test_group():
  group = lambda pp, seed=0, **example: apply(pp, seed, **example)["group"]
  pp = "choice('captions')|group('image','text')"
  one = group(pp, image=b"x", captions="a cat")
  assert one.dtype == np.int32 and one.shape == (2,) and (one >= 0).all()
  # The same in each process and each version: the first bits of BLAKE2b.
  digests = [hashlib.blake2b(x, digest_size=4) for x in (b"x", b"a cat")]
  assert one.tolist() == [int(x.hexdigest(), 16) // 2 for x in digests]
  other = group(pp, seed=1, image=b"y", captions="a cat")
  assert other[0] != one[0] and other[1] == one[1]
  ids = [group("group('n')", n=n)[0] for n in (1, np.int64(1), 2, 1.5, "1")]
  assert ids[0] == ids[1] == ids[4] and len(set(ids)) == 3
  # No value is like no other.
  none = [group("group('n')", seed=i, n=None)[0] for i in (0, 1)]
  assert none[0] != none[1]
  kept = apply("group('n')|keep('group')", n=1)
  assert list(kept) == ["group"]


@pytest.mark.parametrize(
  "pp, says",
  [
    ("group", "at least one feature"),
    ("group('imag')", '"imag" is not known.*"image"'),
    ("decode|group('image')", "before decode"),
  ],
)
def test_what_cannot_be_grouped(pp, says):
  with pytest.raises(errors.UserError, match=says):
    apply(pp, image=encode(Image.fromarray(RGB)))


def test_patch_grids():
  path = pathlib.Path(__file__).parents[2] / "golden/naflex_sizes.json"
  for h, w, _, length, *grid in json.loads(path.read_text()):
    assert list(preprocess.patch_grid(h, w, length)) == grid, (h, w, length)


def test_resize_to_patches():
  image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
  fn = preprocess.parse("resize_to_patches(17,8)")
  out = fn({"image": image}, np.random.default_rng(0))["image"]
  assert out.shape == (17, 194) and out.dtype == np.int16
  for y in range(3):
    for x in range(5):
      row = out[5 * y + x]
      patch = image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
      np.testing.assert_array_equal(row[:-2].reshape(8, 8, 3), patch)
      assert row[-2:].tolist() == [y, x]
  assert (out[15:, :-2] == 0).all() and (out[15:, -2:] == -1).all()
  with pytest.raises(errors.UserError, match="are more than 89478485 pixels"):
    preprocess.parse("resize_to_patches(16384,99)")
