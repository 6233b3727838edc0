"""Embeddings computed before, in both forms of a folder."""

import json

import ml_dtypes
import numpy as np
import pytest

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import captions, preprocess
from sigjax.data.formats import embeddings

Z = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
LINES = [
  {"captions": ["a cat", "Katze"], "label": 1},
  "a dog",
  ["a cow", "Kühe"],
  {"captions": ["a pig"], "label": 2},
  "one\ttab",
]


def write(path, z=Z, lines=LINES, info=None, end="\n"):
  path.mkdir(exist_ok=True)
  np.save(path / "embeddings.npy", z)
  (path / "captions.jsonl").write_text(
    "\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + end
  )
  if info:
    (path / "info.json").write_text(json.dumps(info))
  return str(path)


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
@pytest.mark.parametrize("end", ["", "\n"])
def test_rows_of_any_program(tmp_path, dtype, end):
  z = Z.astype(embeddings.DTYPES[dtype])
  source = kinds.open_source(
    "embeddings", path=write(tmp_path / "x", z, end=end)
  )
  assert len(source) == 5 and source.name == "x" and source.tower is None
  for i, row in enumerate(z):
    assert source[i]["image"].dtype == z.dtype
    assert source[i]["image"].tobytes() == row.tobytes()
  assert source[0]["label"] == 1
  assert [captions.captions(source[i], "captions") for i in range(5)] == [
    ["a cat", "Katze"],
    ["a dog"],
    ["a cow", "Kühe"],
    ["a pig"],
    ["one\ttab"],
  ]


def test_captions_by_language(tmp_path):
  lines = [{"captions": {"en": "a cat", "de": ["Katze", "Kater"]}}] * 5
  source = kinds.open_source("embeddings", path=write(tmp_path, Z, lines))
  assert source[4]["captions"] == ["a cat", "Katze", "Kater"]
  assert source[4]["language"] == ["en", "de", "de"]


def test_rows_make_batches(tmp_path):
  source = kinds.open_source("embeddings", path=write(tmp_path, Z))
  pp = preprocess.parse("keep('image')")
  (batch,) = pipeline.eval_batches(source, pp, batch_size=8)
  np.testing.assert_array_equal(batch["image"][:5], Z)


def test_what_the_folder_says_of_its_tower(tmp_path):
  info = dict(
    tower="CLIP 1234",
    pp_image="decode|resize(8)",
    label_names={"label": ["none", "cat", "pig"]},
  )
  path = write(tmp_path, info=info)
  source = kinds.open_source(
    "embeddings", path=path, tower="CLIP", pp_image="decode|resize(8)"
  )
  assert source.tower == "CLIP 1234"
  assert source.label_names == info["label_names"]
  chosen = kinds.open_source("embeddings", path=path, only=dict(label=1))
  assert chosen.tower == "CLIP 1234" and len(chosen) == 1
  for wrong in dict(tower="CLIP 2"), dict(pp_image="decode|resize(9)"):
    with pytest.raises(errors.UserError, match="but the config wants"):
      kinds.open_source("embeddings", path=path, **wrong)


def test_folders_that_are_none(tmp_path):
  def message(path):
    with pytest.raises(errors.UserError) as e:
      kinds.open_source("embeddings", path=str(path))
    assert "\n" not in str(e.value)
    return str(e.value)

  assert "has neither index.json nor" in message(tmp_path / "none")
  path = tmp_path / "x"
  write(path, Z[:4])
  assert "has 4 rows, captions.jsonl 5 lines" in message(path)
  write(path, Z[:, None])
  assert "is float32 (5, 1, 7)" in message(path)
  write(path, Z.astype(np.int32))
  assert "is int32" in message(path)
  write(path)
  whole = (path / "embeddings.npy").read_bytes()
  for size in 0, 50, len(whole) - 4:
    (path / "embeddings.npy").write_bytes(whole[:size])
    assert "cannot be read" in message(path)
  write(path, lines=[])
  (path / "captions.jsonl").write_bytes(b"")
  assert "cannot be read" in message(path)
  write(path)
  (path / "captions.jsonl").write_text("{\n" * 5)
  source = kinds.open_source("embeddings", path=str(path))
  with pytest.raises(errors.UserError, match="line 3 of captions.jsonl"):
    source[2]  # pylint: disable=pointless-statement
  (path / "index.json").write_text('{"count": ')
  assert "index.json is damaged" in message(path)


def test_plain_values():
  value = {
    "a": b"Gr\xc3\xbcn",
    "b": np.int64(3),
    "c": np.array([[1.5]]),
    "d": [np.bool_(True), np.array([b"x"], object)],
    "e": "é",
  }
  assert embeddings.plain(value) == {
    "a": "Grün",
    "b": 3,
    "c": [[1.5]],
    "d": [True, ["x"]],
    "e": "é",
  }
  assert json.loads(embeddings.encode(value)) == embeddings.plain(value)


def test_storage():
  assert embeddings.storage(118_287, 1024, "float16") == 118_287 * 2048
  assert embeddings.DTYPES["bfloat16"] == ml_dtypes.bfloat16
