"""Images that are decoded once and stay in memory."""

import contextlib

import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import images, preprocess

PP = (
  "decode|random_affine|color_gain(0.3)|random_grey(0.5)|random_invert(0.5)"
  "|flip_lr|choice('captions')|keep('image','text')"
)


@pytest.fixture
def folder(tmp_path):
  """Ten pictures with a tag of the third each; 9.png is damaged."""
  noise = np.random.default_rng(0).integers(0, 256, (10, 8, 6, 3), np.uint8)
  rows = ["file,caption,tag"]
  for i, image in enumerate(noise):
    Image.fromarray(image).save(tmp_path / f"{i}.png")
    rows += [f"{i}.png,a {i},{i // 3}", f"{i}.png,b {i},{i // 3}"]
  damaged = (tmp_path / "9.png").read_bytes()[:60]
  (tmp_path / "9.png").write_bytes(damaged)
  (tmp_path / "captions.csv").write_text("\n".join(rows))
  return tmp_path


def opened(path, **kwargs):
  return kinds.open_source("folder", path=str(path), group_by="tag", **kwargs)


def batches(source, pp=PP):
  made = pipeline.train_batches(
    source, preprocess.parse(pp), batch_size=2, seed=1, bad_fraction=0.5
  )
  with contextlib.closing(made):
    return [next(made) for _ in range(24)]


def test_batches_are_the_same_and_images_are_decoded_once(folder, monkeypatch):
  want = batches(opened(folder))
  calls = []

  def decode(data):
    calls.append(data)
    return real(data)

  real = images.decode
  monkeypatch.setattr(images, "decode", decode)
  source = opened(folder, in_memory=True)
  for _ in range(2):
    for got, expected in zip(batches(source), want, strict=True):
      np.testing.assert_array_equal(got["image"], expected["image"])
      assert got["text"].tolist() == expected["text"].tolist()
  whole = [x for x in calls if len(x) > 60]
  assert len(set(whole)) == 9
  # Two threads may decode the same one at the same time.
  assert len(whole) < 2 * 9


def test_what_else_the_source_knows_stays(folder):
  plain, kept = opened(folder), opened(folder, in_memory=True)
  assert kept.identity() == plain.identity() and len(kept) == len(plain) == 4
  image = kept[1]["image"].pixels
  changed = kept[1]
  changed["captions"] = "mine"
  assert kept[1]["captions"] == plain[1]["captions"]
  np.testing.assert_array_equal(kept[1]["image"].pixels, image)


def test_mistakes(folder):
  source = opened(folder, in_memory=True)
  pp = PP.replace("decode", "decode_small(8)")
  with pytest.raises(errors.UserError, match=r"decode\|resize_small\(8\)"):
    batches(source, pp)
