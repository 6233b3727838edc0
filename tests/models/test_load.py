"""Reading and writing the layouts of released files."""

import jax
import ml_dtypes
import numpy as np
import pytest

from sigjax import errors
from sigjax import trees
from sigjax.models import load


def tower(pos=4, cls=False, layers=2, scan=False, prefix="", seed=0):
  """Returns flat parameters of a small image tower, of random numbers."""
  names = {"embedding/kernel": (2, 2, 3, 6), "pos_embedding": (1, pos, 6),
           "Transformer/encoder_norm/scale": (6,)}
  if cls:
    names["cls"] = (1, 1, 6)
  for i in range(layers):
    names[f"Transformer/encoderblock_{i}/LayerNorm_1/scale"] = (6,)
    names[f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel"] = (6, 9)
  rng = np.random.default_rng(seed)
  flat = {prefix + k: rng.normal(size=s).astype(np.float32)
          for k, s in names.items()}
  if scan:
    for tail in "LayerNorm_1/scale", "MlpBlock_0/Dense_0/kernel":
      block = f"{prefix}Transformer/encoderblock"
      flat[f"{block}/{tail}"] = np.stack(
          [flat.pop(f"{block}_{i}/{tail}") for i in range(layers)])
  return flat


def write(path, flat):
  np.savez(path, **flat)
  return str(path)


def same(tree, flat):
  got = trees.flatten(tree)
  assert set(got) == set(flat)
  for name, value in flat.items():
    assert got[name].dtype == np.float32, name
    assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("before", ["", "params/"])
@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("of_model", [False, True])
def test_either_form_into_either_form(tmp_path, before, of_file, of_model):
  # Eleven layers: "10" must come after "9", not after "1".
  towers = [tower(layers=11, scan=of_file, prefix=f"{before}{n}/", seed=i)
            for i, n in enumerate(("img", "txt"))]
  path = write(tmp_path / "a.npz", towers[0] | towers[1])
  want = {**tower(layers=11, scan=of_model, prefix="img/"),
          **tower(layers=11, scan=False, prefix="txt/", seed=1)}
  same(load.load_params(path, trees.unflatten(want)), want)
  part = tower(layers=11, scan=of_model)
  same(load.load_params(path + ":img", trees.unflatten(part)), part)


def test_without_a_model_names_stay(tmp_path):
  flat = tower(scan=True)
  flat["embedding/kernel"] = flat["embedding/kernel"].astype(ml_dtypes.bfloat16)
  got = load.load_params(write(tmp_path / "a.npz", flat))
  same(got, {k: v.astype(np.float32) for k, v in flat.items()})


@pytest.mark.parametrize("scan", [False, True])
def test_saved_is_what_is_loaded(tmp_path, scan):
  path = tmp_path / "new" / "a.npz"
  flat = tower(layers=11, scan=not scan)
  load.save_params(path, trees.unflatten(flat), scan=scan)
  first = path.read_bytes()
  same(load.load_params(path, trees.unflatten(flat)), flat)
  with np.load(path) as stored:
    names = set(stored.files)
  assert names == {
      "params/" + name for name in tower(layers=11, scan=scan)}
  load.save_params(path, load.load_params(path), scan=scan)
  assert path.read_bytes() == first
  assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  load.save_params(path, trees.unflatten(tower()))
  before = path.read_bytes()

  def fail(f, **arrays):
    f.write(b"half")
    raise OSError("disk full")
  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError):
    load.save_params(path, trees.unflatten(tower(seed=1)))
  assert path.read_bytes() == before


def test_old_vit_file(tmp_path):
  # A file as AugReg's: counters over all layers of a block, positions in a
  # module of their own, a first position row that belongs to cls, and a head.
  want = tower(pos=4, cls=True)
  row = np.full((1, 1, 6), 2, np.float32)
  old = {name.replace("LayerNorm_1", "LayerNorm_2")
         .replace("MlpBlock_0", "MlpBlock_3"): value
         for name, value in want.items()}
  old["Transformer/posembed_input/pos_embedding"] = np.concatenate(
      [row, old.pop("pos_embedding")], axis=1)
  old["cls"] = want["cls"] - row
  old["head/kernel"] = np.ones((6, 7), np.float32)
  path = write(tmp_path / "a.npz", old)
  got = trees.flatten(
      load.load_params(path, trees.unflatten(want), dont_load=["head/.*"]))
  np.testing.assert_allclose(got.pop("cls"), want.pop("cls"), atol=1e-6)
  same(got, want)
  # A model with another pooling has no cls.
  got = load.load_params(
      path, trees.unflatten(want), dont_load=["head/.*", "cls"])
  same(got, want)


def test_positions_at_another_resolution(tmp_path):
  # A plane is what bilinear interpolation reproduces, inside of the borders.
  def plane(side):
    centre = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(centre, centre, indexing="ij")
    return np.stack([x, y, x + y, 1 + 0 * x, x - y, 2 * y], -1)
  flat = tower(pos=64)
  flat["pos_embedding"] = plane(8).reshape(1, 64, 6).astype(np.float32)
  path = write(tmp_path / "a.npz", flat)
  for side in 4, 12, 16:
    got = load.load_params(path, trees.unflatten(tower(pos=side**2)))
    got = got["pos_embedding"].reshape(side, side, 6)
    np.testing.assert_allclose(got[2:-2, 2:-2], plane(side)[2:-2, 2:-2],
                               atol=1e-6)
    np.testing.assert_allclose(
        got.mean((0, 1)), plane(side).mean((0, 1)), atol=1e-6)
  with pytest.raises(errors.UserError, match="shape of pos_embedding"):
    load.load_params(path, trees.unflatten(tower(pos=15)))
  text = {k: v for k, v in flat.items() if k != "embedding/kernel"}
  like = {k: v for k, v in tower(pos=16).items() if k != "embedding/kernel"}
  path = write(tmp_path / "text.npz", text)
  with pytest.raises(errors.UserError, match="shape of pos_embedding"):
    load.load_params(path, trees.unflatten(like))


def test_dont_load_keeps_what_the_model_has(tmp_path):
  flat = tower(scan=True)
  path = write(tmp_path / "a.npz", tower(seed=1))
  like = trees.unflatten(flat)
  got = load.load_params(
      path, like, dont_load=["Transformer/encoderblock/.*", "pos_emb.*"])
  assert got["pos_embedding"] is like["pos_embedding"]
  got = trees.flatten(got)
  want = flat | {k: v for k, v in tower(seed=1).items()
                 if k in ("embedding/kernel", "Transformer/encoder_norm/scale")}
  same(got, want)
  # With shapes alone, what is not loaded stays a shape.
  like = jax.eval_shape(lambda: like)
  got = load.load_params(path, like, dont_load=["Transformer/.*"])
  assert got["Transformer"] == like["Transformer"]


def test_everything_that_does_not_fit_is_listed(tmp_path):
  want = tower()
  flat = dict(want)
  flat["embeding/kernel"] = flat.pop("embedding/kernel")
  flat["pos_embedding"] = flat["pos_embedding"][..., :5]
  del flat["Transformer/encoderblock_1/LayerNorm_1/scale"]
  path = write(tmp_path / "a.npz", flat)
  with pytest.raises(errors.UserError) as e:
    load.load_params(path, trees.unflatten(want))
  first, *rest = str(e.value).splitlines()
  assert first.startswith(f"{path} does not fit the model in 4 arrays: ")
  lines = "\n".join([first] + rest)
  for line in (
      'missing embedding/kernel (2, 2, 3, 6) (did you mean "embeding/kernel"?)',
      "missing Transformer/encoderblock_1/LayerNorm_1/scale (6,)",
      "shape of pos_embedding is (1, 4, 5), not (1, 4, 6)",
      "left over embeding/kernel (2, 2, 3, 6)"):
    assert line in lines


def test_a_layer_too_few_or_of_another_shape(tmp_path):
  like = trees.unflatten(tower(layers=3, scan=True))
  path = write(tmp_path / "a.npz", tower(layers=2))
  with pytest.raises(errors.UserError, match=r"is \(2, 6\), not \(3, 6\)"):
    load.load_params(path, like)
  flat = tower(layers=3)
  flat["Transformer/encoderblock_1/LayerNorm_1/scale"] = np.ones(5)
  path = write(tmp_path / "b.npz", flat)
  with pytest.raises(errors.UserError, match="the layers of Transformer/enc"):
    load.load_params(path, like)


def test_files_that_cannot_be_read(tmp_path):
  def message(path):
    with pytest.raises(errors.UserError) as e:
      load.load_params(path, {"a": np.ones(1)})
    assert "\n" not in str(e.value)
    return str(e.value)

  missing = message(tmp_path / "siglip2_b16_224.npz")
  assert "gsutil cp gs://big_vision/siglip2/siglip2_b16_224.npz" in missing
  path = write(tmp_path / "a.npz", tower())
  whole = (tmp_path / "a.npz").read_bytes()
  assert 'has no part "imgg"' in message(path + ":imgg")
  # Cut short, damaged inside, empty, of another kind.
  damaged = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
  for content in whole[:-40], whole[:100], damaged, b"", b"some text":
    (tmp_path / "a.npz").write_bytes(content)
    assert "is not a .npz file, or not a whole one" in message(path)
  np.save(tmp_path / "b.npy", np.ones(3))
  assert "is not a .npz file" in message(tmp_path / "b.npy")
  assert "cannot read" in message(tmp_path)


def test_a_foreign_file(tmp_path):
  path = write(tmp_path / "a.npz", {"names": np.array(["x", "y"])})
  with pytest.raises(errors.UserError, match="left over names"):
    load.load_params(path, trees.unflatten(tower()))
