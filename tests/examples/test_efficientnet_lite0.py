"""The example's network against PyTorch, on the same random weights."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from sigjax.data import kinds

PATH = pathlib.Path(__file__).parents[2] / "examples/efficientnet_lite0.py"
torch = pytest.importorskip("torch", reason="compared with PyTorch")


@pytest.fixture(scope="module", name="example")
def fixture_example():
  spec = importlib.util.spec_from_file_location("efficientnet_lite0", PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module", name="weights")
def fixture_weights():
  """A state_dict of the network's layers, with few channels."""
  rng = torch.Generator().manual_seed(0)
  random = lambda *shape: torch.randn(*shape, generator=rng)
  out = {}

  def conv(name, norm, *shape):
    # Some are stored with their channels last, as some of the real ones are.
    kernel = random(*shape) * (2 / np.prod(shape[1:])) ** 0.5
    out[f"{name}.weight"] = kernel.contiguous(memory_format=torch.channels_last)
    out[f"{norm}.weight"] = random(shape[0]).abs() + 0.5
    out[f"{norm}.bias"] = random(shape[0]) * 0.1
    out[f"{norm}.running_mean"] = random(shape[0]) * 0.1
    out[f"{norm}.running_var"] = random(shape[0]).abs() + 0.5
    out[f"{norm}.num_batches_tracked"] = torch.tensor(7)

  conv("_conv_stem", "_bn0", 6, 3, 3, 3)
  width = 6
  for i in range(16):
    # A residual connection where the width stays; 5 x 5 here and there.
    new, k = (width if i % 3 else width + 1), (5 if i % 4 == 3 else 3)
    inside, block = (2 * width if i else width), f"_blocks.{i}."
    if i:
      conv(f"{block}_expand_conv", f"{block}_bn0", inside, width, 1, 1)
    conv(f"{block}_depthwise_conv", f"{block}_bn1", inside, 1, k, k)
    conv(f"{block}_project_conv", f"{block}_bn2", new, inside, 1, 1)
    width = new
  conv("_conv_head", "_bn1", 20, width, 1, 1)
  return out


def by_torch(weights, images):
  """Embeddings of images (B, 3, H, W), layer by layer."""
  f = torch.nn.functional

  def layer(x, conv, norm, stride=1, act=True):
    w = weights[f"{conv}.weight"]
    pads = []
    for n in x.shape[:1:-1]:  # as TensorFlow pads, the last dimension first
      need = max((-(-n // stride) - 1) * stride + w.shape[-1] - n, 0)
      pads += [need // 2, need - need // 2]
    x = f.conv2d(
      f.pad(x, pads),
      w,
      stride=stride,
      groups=x.shape[1] if w.shape[1] == 1 else 1,
    )
    x = f.batch_norm(
      x,
      *(
        weights[f"{norm}.{k}"]
        for k in ("running_mean", "running_var", "weight", "bias")
      ),
      eps=1e-3,
    )
    return f.relu6(x) if act else x

  x = layer(images, "_conv_stem", "_bn0", 2)
  for i in range(16):
    block, y = f"_blocks.{i}.", x
    if i:
      y = layer(y, f"{block}_expand_conv", f"{block}_bn0")
    y = layer(
      y,
      f"{block}_depthwise_conv",
      f"{block}_bn1",
      2 if i in (1, 3, 5, 11) else 1,
    )
    y = layer(y, f"{block}_project_conv", f"{block}_bn2", act=False)
    x = x + y if x.shape == y.shape else y
  return layer(x, "_conv_head", "_bn1").mean((2, 3)).numpy()


def test_the_network_is_pytorchs(example, weights, tmp_path):
  torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
  read = example.read_pth(tmp_path / "w.pth")
  assert set(read) == set(weights)
  for name, want in weights.items():
    np.testing.assert_array_equal(read[name], want.numpy(), name)
  images = (
    np.random.default_rng(0).normal(size=(3, 50, 50, 3)).astype(np.float32)
  )
  want = by_torch(weights, torch.from_numpy(images.transpose(0, 3, 1, 2)))
  with jax.numpy_rank_promotion("allow"):  # as outside of these tests
    got = example.network(read)(images)
  assert np.median(np.ptp(want, axis=0)) > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_foreign_pickles_are_refused(example, tmp_path):
  torch.save(
    {"x": pathlib.PurePosixPath("a")},
    tmp_path / "w.pth",
    _use_new_zipfile_serialization=False,
  )
  with pytest.raises(example.pickle.UnpicklingError, match="not expected here"):
    example.read_pth(tmp_path / "w.pth")


def test_what_it_writes_is_a_source(example, shapes_dir, tmp_path):
  source = kinds.open_source(
    "tfds", name="shapes", split="test", data_dir=str(shapes_dir)
  )
  apply = lambda images: images.reshape(len(images), -1)[:, :5]
  pp = "decode|resize(8)|value_range(-1,1)|keep('image')"
  example.embed(source, apply, pp, tmp_path / "test", dict(tower="ours"))
  found = kinds.open_source("embeddings", path=str(tmp_path / "test"))
  assert len(found) == 48 and found.tower == "ours"
  for i in (0, 31, 32, 47):
    assert found[i]["image"].shape == (5,)
    assert found[i]["concept"] == source[i]["concept"].decode()
    assert found[i]["label"] == source[i]["label"]
  before = (tmp_path / "test/info.json").stat().st_mtime_ns
  example.embed(source, None, pp, tmp_path / "test", {})  # is there already
  assert (tmp_path / "test/info.json").stat().st_mtime_ns == before
  assert json.loads((tmp_path / "test/info.json").read_text())["tower"]
