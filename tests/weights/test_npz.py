"""Reading and writing the layouts of released files."""

import contextlib
import pathlib
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from sigjax import errors, trees
from sigjax.models import text as text_lib
from sigjax.models import vit
from sigjax.weights import npz

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def tower(pos=4, cls=False, layers=2, scan=False, prefix="", seed=0):
  """Returns flat parameters of a small image tower, of random numbers."""
  names = {
    "embedding/kernel": (2, 2, 3, 6),
    "pos_embedding": (1, pos, 6),
    "Transformer/encoder_norm/scale": (6,),
  }
  if cls:
    names["cls"] = (1, 1, 6)
  for i in range(layers):
    names[f"Transformer/encoderblock_{i}/LayerNorm_1/scale"] = (6,)
    names[f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel"] = (6, 9)
  rng = np.random.default_rng(seed)
  flat = {
    prefix + k: rng.normal(size=s).astype(np.float32) for k, s in names.items()
  }
  if scan:
    for tail in "LayerNorm_1/scale", "MlpBlock_0/Dense_0/kernel":
      block = f"{prefix}Transformer/encoderblock"
      flat[f"{block}/{tail}"] = np.stack(
        [flat.pop(f"{block}_{i}/{tail}") for i in range(layers)]
      )
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
  towers = [
    tower(layers=11, scan=of_file, prefix=f"{before}{n}/", seed=i)
    for i, n in enumerate(("img", "txt"))
  ]
  path = write(tmp_path / "a.npz", towers[0] | towers[1])
  want = {
    **tower(layers=11, scan=of_model, prefix="img/"),
    **tower(layers=11, scan=False, prefix="txt/", seed=1),
  }
  same(npz.load_params(path, trees.unflatten(want)), want)
  part = tower(layers=11, scan=of_model)
  same(npz.load_params(path + ":img", trees.unflatten(part)), part)


def test_without_a_model_names_stay(tmp_path):
  flat = tower(scan=True)
  flat["embedding/kernel"] = flat["embedding/kernel"].astype(ml_dtypes.bfloat16)
  got = npz.load_params(write(tmp_path / "a.npz", flat))
  same(got, {k: v.astype(np.float32) for k, v in flat.items()})


@pytest.mark.parametrize("scan", [False, True])
def test_saved_is_what_is_loaded(tmp_path, scan):
  path = tmp_path / "new" / "a.npz"
  flat = tower(layers=11, scan=not scan)
  npz.save_params(path, trees.unflatten(flat), scan=scan)
  first = path.read_bytes()
  same(npz.load_params(path, trees.unflatten(flat)), flat)
  with np.load(path) as stored:
    names = set(stored.files)
  assert names == {"params/" + name for name in tower(layers=11, scan=scan)}
  npz.save_params(path, npz.load_params(path), scan=scan)
  assert path.read_bytes() == first
  assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("name", ["siglip_tiny", "siglip2_tiny_scan"])
def test_a_released_file_is_written_as_it_was(tmp_path, name):
  scan = name.endswith("scan")
  with np.load(GOLDEN / f"{name}.npz") as f:
    want = dict(f)
  params = npz.load_params(GOLDEN / f"{name}.npz")
  for i, tree in enumerate((params, jax.tree.map(jax.numpy.asarray, params))):
    npz.save_params(tmp_path / f"{i}.npz", tree, scan=scan)
    with np.load(tmp_path / f"{i}.npz", allow_pickle=False) as f:
      got = dict(f)
    assert set(got) == set(want)
    for key, value in want.items():
      assert key.startswith("params/")
      assert got[key].dtype == value.dtype and got[key].shape == value.shape
      assert got[key].tobytes() == value.tobytes(), key
  # And by way of the other form.
  npz.save_params(tmp_path / "other.npz", params, scan=not scan)
  with np.load(tmp_path / "other.npz") as f:
    assert not set(f.files) & {k for k in want if "encoderblock" in k}
  npz.save_params(
    tmp_path / "back.npz", npz.load_params(tmp_path / "other.npz"), scan=scan
  )
  assert (tmp_path / "back.npz").read_bytes() == (
    tmp_path / "0.npz"
  ).read_bytes()


@pytest.mark.parametrize("name", ["siglip_tiny", "siglip2_tiny_scan"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_released_tower_alone(name, scan):
  io = dict(np.load(GOLDEN / f"{name}_io.npz"))
  sizes = dict(width=48, depth=2, mlp_dim=96, num_heads=3, scan=scan)
  for part, tower_of, inputs, want in (
    ("img", vit.ViT(patch_size=8, **sizes), io["image"], io["zimg"]),
    (
      "txt",
      text_lib.TextTransformer(vocab_size=97, out_dim=48, **sizes),
      io["text"],
      io["ztxt"],
    ),
  ):
    like = jax.eval_shape(tower_of.init, jax.random.key(0), inputs)["params"]
    params = npz.load_params(GOLDEN / f"{name}.npz:{part}", like)
    z, _ = jax.jit(tower_of.apply)({"params": params}, inputs)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(z, want, rtol=1e-5, atol=1e-5)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  npz.save_params(path, trees.unflatten(tower()))
  before = path.read_bytes()

  def fail(f, **arrays):
    f.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(errors.UserError, match="cannot write .*a.npz: No space"):
    npz.save_params(path, trees.unflatten(tower(seed=1)))
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_old_vit_file(tmp_path):
  # A file as AugReg's: counters over all layers of a block, positions in a
  # module of their own, a first position row that belongs to cls, and a head.
  want = tower(pos=4, cls=True)
  row = np.full((1, 1, 6), 2, np.float32)
  old = {
    name.replace("LayerNorm_1", "LayerNorm_2").replace(
      "MlpBlock_0", "MlpBlock_3"
    ): value
    for name, value in want.items()
  }
  old["Transformer/posembed_input/pos_embedding"] = np.concatenate(
    [row, old.pop("pos_embedding")], axis=1
  )
  old["cls"] = want["cls"] - row
  old["head/kernel"] = np.ones((6, 7), np.float32)
  path = write(tmp_path / "a.npz", old)
  got = trees.flatten(
    npz.load_params(path, trees.unflatten(want), dont_load=["head/.*"])
  )
  np.testing.assert_allclose(got.pop("cls"), want.pop("cls"), atol=1e-6)
  same(got, want)
  # A model with another pooling has no cls.
  got = npz.load_params(
    path, trees.unflatten(want), dont_load=["head/.*", "cls"]
  )
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
    got = npz.load_params(path, trees.unflatten(tower(pos=side**2)))
    got = got["pos_embedding"].reshape(side, side, 6)
    np.testing.assert_allclose(
      got[2:-2, 2:-2], plane(side)[2:-2, 2:-2], atol=1e-6
    )
    np.testing.assert_allclose(
      got.mean((0, 1)), plane(side).mean((0, 1)), atol=1e-6
    )
  with pytest.raises(errors.UserError, match="shape of pos_embedding"):
    npz.load_params(path, trees.unflatten(tower(pos=15)))
  # NaFlex tables are 2-D: a height is not a number of patches.
  flat["pos_embedding"] = flat["pos_embedding"].reshape(4, 16, 6)
  path = write(tmp_path / "naflex.npz", flat)
  with pytest.raises(errors.UserError, match=r"is \(4, 16, 6\), not \(1, 64"):
    npz.load_params(path, trees.unflatten(tower(pos=64)))


@pytest.mark.parametrize("part", ["", ":txt"])
def test_texts_of_another_length(tmp_path, caplog, part):
  def text(length, width=6):
    prefix = "" if part else "txt/"
    return {
      f"{prefix}Embed_0/embedding": np.ones((9, width), np.float32),
      f"{prefix}pos_embedding": np.arange(
        length * width, dtype=np.float32
      ).reshape(1, length, width),
    }

  caplog.set_level("INFO", logger="sigjax")
  full = {f"txt/{k.removeprefix('txt/')}": v for k, v in text(9).items()}
  path = write(tmp_path / "a.npz", full)
  name = f"{'' if part else 'txt/'}pos_embedding"
  # 4 and 16 are squares: no grid of patches is made of them.
  same(npz.load_params(path + part, trees.unflatten(text(4))), text(4))
  assert caplog.messages == [f"{name}: the first 4 of 9 positions"]
  with pytest.raises(errors.UserError) as e:
    npz.load_params(path + part, trees.unflatten(text(16)))
  assert "is for texts of 9 tokens, the model for 16" in str(e.value)
  assert "\n" not in str(e.value)
  got = npz.load_params(path + part, trees.unflatten(text(16)), [name])
  same(got, text(16))
  with pytest.raises(errors.UserError, match=r"is \(1, 9, 6\), not \(1, 4, 7"):
    npz.load_params(path + part, trees.unflatten(text(4, width=7)))


def test_dont_load_keeps_what_the_model_has(tmp_path):
  flat = tower(scan=True)
  path = write(tmp_path / "a.npz", tower(seed=1))
  like = trees.unflatten(flat)
  got = npz.load_params(
    path, like, dont_load=["Transformer/encoderblock/.*", "pos_emb.*"]
  )
  assert got["pos_embedding"] is like["pos_embedding"]
  got = trees.flatten(got)
  want = flat | {
    k: v
    for k, v in tower(seed=1).items()
    if k in ("embedding/kernel", "Transformer/encoder_norm/scale")
  }
  same(got, want)
  # With shapes alone, what is not loaded stays a shape.
  like = jax.eval_shape(lambda: like)
  got = npz.load_params(path, like, dont_load=["Transformer/.*"])
  assert got["Transformer"] == like["Transformer"]


def test_everything_that_does_not_fit_is_listed(tmp_path):
  want = tower()
  flat = dict(want)
  flat["embeding/kernel"] = flat.pop("embedding/kernel")
  flat["pos_embedding"] = flat["pos_embedding"][..., :5]
  del flat["Transformer/encoderblock_1/LayerNorm_1/scale"]
  path = write(tmp_path / "a.npz", flat)
  with pytest.raises(errors.UserError) as e:
    npz.load_params(path, trees.unflatten(want))
  first, *rest = str(e.value).splitlines()
  assert first.startswith(f"{path} does not fit the model in 4 arrays: ")
  lines = "\n".join([first] + rest)
  for line in (
    'missing embedding/kernel (2, 2, 3, 6) (did you mean "embeding/kernel"?)',
    "missing Transformer/encoderblock_1/LayerNorm_1/scale (6,)",
    "shape of pos_embedding is (1, 4, 5), not (1, 4, 6)",
    "left over embeding/kernel (2, 2, 3, 6)",
  ):
    assert line in lines


def test_one_that_does_not_fit(tmp_path):
  flat = tower() | {"head/kernel": np.ones(1)}
  path = write(tmp_path / "a.npz", flat)
  with pytest.raises(errors.UserError, match="in 1 array: left over head/kern"):
    npz.load_params(path, trees.unflatten(tower()))


def test_a_layer_too_few_or_of_another_shape(tmp_path):
  like = trees.unflatten(tower(layers=3, scan=True))
  path = write(tmp_path / "a.npz", tower(layers=2))
  with pytest.raises(errors.UserError, match=r"is \(2, 6\), not \(3, 6\)"):
    npz.load_params(path, like)
  flat = tower(layers=3)
  flat["Transformer/encoderblock_1/LayerNorm_1/scale"] = np.ones(5)
  path = write(tmp_path / "b.npz", flat)
  with pytest.raises(errors.UserError, match="the layers of Transformer/enc"):
    npz.load_params(path, like)
  # As many as there have to be, but not the first ones.
  flat = {
    k.replace("block_2", "block_3"): v for k, v in tower(layers=3).items()
  }
  path = write(tmp_path / "c.npz", flat)
  with pytest.raises(errors.UserError, match="there are only layers 0, 1, 3"):
    npz.load_params(path, like)


def test_files_that_cannot_be_read(tmp_path):
  def message(path):
    with pytest.raises(errors.UserError) as e:
      npz.load_params(path, {"a": np.ones(1)})
    assert "\n" not in str(e.value)
    return str(e.value)

  assert 'the name "siglip2/b16_224" would fetch it' in message(
    tmp_path / "siglip2_b16_224.npz:img"
  )
  assert "there is no file" in message(tmp_path / "x.npz")
  assert '(did you mean "siglip/b16_256"?); known are: siglip/b16_224, ' in (
    message("siglip/b16_265:img")
  )
  path = write(tmp_path / "a.npz", tower())
  whole = (tmp_path / "a.npz").read_bytes()
  assert 'has no part "imgg"' in message(path + ":imgg")
  # Cut short, damaged inside, empty, of another kind.
  damaged = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
  for content in whole[:-40], whole[:100], damaged, b"", b"some text":
    (tmp_path / "a.npz").write_bytes(content)
    assert "is not a .npz file, or not a whole one" in message(path)
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as f:
    f.writestr("img/x.txt", "some text")  # As PyTorch's files, for one.
  assert "is not a .npz file" in message(path + ":img")
  np.save(tmp_path / "b.npy", np.ones(3))
  assert "is not a .npz file" in message(tmp_path / "b.npy")
  assert "cannot read" in message(tmp_path)


@pytest.mark.parametrize("before", ["", "params/"])
def test_of_a_part_nothing_else_is_read(tmp_path, before):
  path = write(
    tmp_path / "a.npz",
    tower(prefix=f"{before}img/")
    | {f"{before}txt/kernel": np.full(9, 7, np.float32)},
  )
  whole = (tmp_path / "a.npz").read_bytes()
  values = np.full(9, 7, np.float32).tobytes()
  assert whole.count(values) == 1
  (tmp_path / "a.npz").write_bytes(whole.replace(values, values[::-1]))
  same(npz.load_params(path + ":img"), tower())
  for part in "", ":txt":
    with pytest.raises(errors.UserError, match="not a whole one"):
      npz.load_params(path + part)


def test_no_damaged_byte_is_loaded(tmp_path):
  flat = {
    "img/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "t": np.ones(1, np.float32),
  }
  like = trees.unflatten(flat)
  path = write(tmp_path / "a.npz", flat)
  whole = (tmp_path / "a.npz").read_bytes()
  refused = 0
  for i in range(len(whole)):
    (tmp_path / "a.npz").write_bytes(
      whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :]
    )
    try:
      same(npz.load_params(path, like), flat)  # Of dates, for one.
    except errors.UserError:
      refused += 1
  assert refused > len(whole) / 2


def test_a_foreign_file(tmp_path):
  path = write(tmp_path / "a.npz", {"names": np.array(["x", "y"])})
  with pytest.raises(errors.UserError, match="left over names"):
    npz.load_params(path, trees.unflatten(tower()))


def test_values_that_are_no_numbers(tmp_path):
  for bad in (np.array(["x", "y"]), np.ones(2, bool), np.ones(2, complex)):
    path = write(tmp_path / "a.npz", {"a": bad, "b": np.ones(2)})
    one = np.ones(2, np.float32)
    with pytest.raises(errors.UserError, match="a.npz: a has values of type"):
      npz.load_params(path, {"a": one, "b": one})
    same(npz.load_params(path, {"b": one}, dont_load=["a"]), {"b": one})


def member(header, data=b"", version=1):
  """Returns the bytes of an .npy file with any header."""
  text = str(header).encode()
  size = len(text).to_bytes(2 if version == 1 else 4, "little")
  return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def npy(shape, descr="<f4", order=False):
  return dict(descr=descr, fortran_order=order, shape=shape)


PETA = 2**50


@pytest.mark.parametrize(
  "data",
  [
    member(npy((PETA,)), bytes(8)),
    member(npy((PETA, PETA)), bytes(8)),
    member(npy((2**40, 2**24)), b""),  # 2**64 values: 0 in an int64
    member(npy((-1,)), bytes(8)),
    member(npy((-2, -1)), bytes(8)),
    member(npy((PETA, 0))),
    member(npy((2, "3")), bytes(24)),
    member(npy((2.0,)), bytes(8)),
    member(npy((2,), "O"), bytes(8)),
    member(npy((2,), f"V{PETA}"), bytes(8)),
    member(npy((2,), "no"), bytes(8)),
    member(npy((PETA,), "V0")),
    member(npy((2,)), bytes(8), version=2)[:-1],
    member(npy((2,)), bytes(8), version=3),
    member("(" * 5000, bytes(8)),
    member("{" * 50, bytes(8)),
    member('  """', bytes(8)),
    member("[" + "1," * 20000 + "]", bytes(8), version=2),
    member({}, bytes(8)),
    b"",
    b"\x93NUMPY",
  ],
)
def test_sizes_that_a_file_claims(tmp_path, data):
  """They cost nothing, and end in one line."""
  for i, compression in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
    path = tmp_path / f"{i}.npz"
    with zipfile.ZipFile(path, "w", compression) as f:
      f.writestr("a.npy", data)
    with pytest.raises(errors.UserError, match="is not a .npz file, or not a"):
      npz.load_params(path)


def test_sizes_that_the_list_of_members_claims(tmp_path):
  """The header's claim of 4 PB agrees with that of the zip file."""
  data = member(npy((PETA,)), bytes(8))
  path = tmp_path / "a.npz"
  for compression in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA:
    with zipfile.ZipFile(path, "w", compression) as f:
      f.writestr("a.npy", data)
      info = f.getinfo("a.npy")
      info.file_size = 4 * PETA + len(data) - 8
      f.filelist = [info]
    with pytest.raises(errors.UserError, match="is not a .npz file, or not a"):
      npz.load_params(path)


@pytest.mark.parametrize("seed", range(3))
def test_foreign_bytes_end_in_one_line(tmp_path, seed):
  """Altered files are refused, or hold what they held."""
  rng = np.random.default_rng(seed)
  flat = tower(pos=4, cls=True, layers=1, scan=seed == 1)
  like = trees.unflatten(flat)
  path = tmp_path / "a.npz"
  (np.savez_compressed if seed == 2 else np.savez)(path, **flat)
  whole = path.read_bytes()
  refused = 0
  for _ in range(400):
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
      at = int(rng.integers(len(data)))
      match rng.integers(5):
        case 0:
          data[at] = int(rng.integers(256))
        case 1:
          del data[at : at + int(rng.integers(1, 50))]
        case 2:
          data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case 3:
          data[at : at + 4] = b"\xff" * 4
        case 4:
          other = int(rng.integers(len(data)))
          data[at : at + 30] = data[other : other + 30]
    path.write_bytes(data)
    try:
      got = npz.load_params(path, like)
    except errors.UserError:
      refused += 1
    else:
      same(got, flat)
  assert refused > 200


@pytest.mark.parametrize("seed", range(2))
def test_foreign_arrays_end_in_one_line(tmp_path, seed):
  """Names, shapes and types of every kind, in a file that is whole."""
  rng = np.random.default_rng(seed)
  names = [
    *tower(pos=4, cls=True),
    *tower(scan=True),
    "Transformer/encoderblock_99999999999999999999/LayerNorm_1/scale",
    "Transformer/encoderblock_7/LayerNorm_1/scale",
    "params/cls",
    "pos_embedding/cls",
    "Embed_0/embedding",
    "/",
    "a//b",
  ]
  want = tower(pos=4, cls=True, scan=seed == 1)
  for i in range(150):
    # Some are right, so that what follows is tried as well.
    flat = {k: v for k, v in want.items() if rng.random() < 0.8}
    for _ in range(rng.integers(1, 4)):
      shape = tuple(rng.integers(0, 7, rng.integers(0, 5)).tolist())
      kind = rng.choice(
        ["f4", "f2", "i8", "?", "c8", "U3", "M8[s]", "V2", "V3"]
      )
      flat[str(rng.choice(names))] = np.zeros(shape, str(kind))
    path = write(tmp_path / f"{i}.npz", flat)
    for like in (None, trees.unflatten(want)):
      with contextlib.suppress(errors.UserError):
        npz.load_params(path, like, dont_load=["cls"] if i % 2 else [])


@pytest.mark.parametrize(
  "shapes, expected",
  [
    (dict(cls=(1, 1, 5), pos_embedding=(1, 5, 6)), "shape of cls"),
    (dict(cls=(7,), pos_embedding=(1, 5, 6)), "shape of cls"),
    (dict(pos_embedding=(1, 0, 6)), "shape of pos_embedding"),
    ({"Transformer/encoderblock/LayerNorm_1/scale": ()}, "left over"),
  ],
)
def test_foreign_shapes_are_listed(tmp_path, shapes, expected):
  want = tower(pos=4, cls=True)
  flat = want | {k: np.ones(s, np.float32) for k, s in shapes.items()}
  with pytest.raises(errors.UserError, match=expected):
    npz.load_params(write(tmp_path / "a.npz", flat), trees.unflatten(want))


def test_positions_at_a_lower_resolution_are_averaged(tmp_path):
  """Columns of 0 1 1 0 become their mean; the middle alone would be 1."""
  flat = tower(pos=64)
  stripes = np.tile([0, 1, 1, 0], 16).reshape(1, 64, 1)
  flat["pos_embedding"] = (stripes * np.ones(6)).astype(np.float32)
  path = write(tmp_path / "a.npz", flat)
  got = npz.load_params(path, trees.unflatten(tower(pos=4)))["pos_embedding"]
  np.testing.assert_allclose(got, 0.5, atol=0.05)
