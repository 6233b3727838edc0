"""To Hugging Face's folders and back, against the real transformers."""

import json
import os
import subprocess
import sys
import types

import cpu_devices
import hf_case  # beside this file
import jax
import numpy as np
import pytest
import safetensors.numpy

from sigjax import errors, state, terms, trees
from sigjax.checkpoints import restore, save
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.models import two_towers
from sigjax.weights import npz
from tools import convert_from_hf, convert_to_hf, predict


@pytest.mark.parametrize("name", ["siglip_tiny", "siglip2_tiny_scan"])
def test_golden_there_and_back(hf, tmp_path, name):
  torch, transformers = hf
  scan = name.endswith("scan")
  config = hf_case.write_config(tmp_path)
  hf_case.convert_golden(tmp_path, name)
  model, info = transformers.SiglipModel.from_pretrained(
    tmp_path / "hf", output_loading_info=True
  )
  assert not any(info.values()), info
  with safetensors.safe_open(tmp_path / "hf/model.safetensors", "np") as f:
    assert f.metadata() == {"format": "pt"}  # older versions ask for it
  want = dict(np.load(hf_case.GOLDEN / f"{name}_io.npz"))
  with torch.no_grad():
    got = model(
      input_ids=torch.from_numpy(want["text"]).long(),
      pixel_values=torch.from_numpy(want["image"].transpose(0, 3, 1, 2)),
      return_loss=True,
    )
  for key, value in dict(
    zimg=got.image_embeds,
    ztxt=got.text_embeds,
    loss=got.loss,
    logits=got.logits_per_image,
  ).items():
    np.testing.assert_allclose(value, want[key], atol=1e-4, err_msg=key)

  notes = convert_from_hf.convert(tmp_path / "hf", tmp_path / "back", scan)
  assert not notes
  hf_case.same_arrays(
    tmp_path / "back/params.npz", np.load(hf_case.GOLDEN / f"{name}.npz")
  )
  back = json.loads((tmp_path / "back/config.json").read_text())
  two_towers.TwoTowers(**back["model"])
  tokenizer = tokenizer_lib.Tokenizer(tmp_path / "back/tokenizer.model")
  for key, value in ("image", hf_case.png(0, 40, 50)), ("text", "A Photo."):
    np.testing.assert_array_equal(
      *(
        hf_case.ours(pp[f"pp_{key}"], key, [value], tokenizer)
        for pp in (back, config)
      )
    )


def test_unequal_towers_from_pixels_and_words_to_logits(hf, tmp_path):
  torch, transformers = hf
  config = hf_case.write_config(
    tmp_path,
    dict(width=24, depth=3, num_heads=2, mlp_dim=40, patch_size=7),
    dict(width=36, depth=1, num_heads=4, mlp_dim=50, vocab_size=111),
    res=30,
    length=9,
    out_dim=[None, 24],
  )  # 30 // 7: the rest is not seen
  model = two_towers.TwoTowers(**config["model"])
  params = hf_case.random_params(model, 30, 9)
  npz.save_params(tmp_path / "w.npz", params)
  convert_to_hf.convert(tmp_path / "w.npz", tmp_path / "hf")
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf")
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
  assert type(theirs).__name__ == "SiglipModel"
  pngs = [
    hf_case.png(i, *size)
    for i, size in enumerate(((30, 30), (20, 61), (77, 9)))
  ]
  inputs = processor(
    text=hf_case.TEXTS,
    images=hf_case.pictures(pngs),
    padding="max_length",
    truncation=True,
    return_tensors="pt",
  )
  with torch.no_grad():
    got = theirs(**inputs)

  tokenizer = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.model")
  image = hf_case.ours(config["pp_image"], "image", pngs)
  text = hf_case.ours(config["pp_text"], "text", hf_case.TEXTS, tokenizer)
  np.testing.assert_array_equal(inputs["input_ids"], text)
  np.testing.assert_allclose(
    inputs["pixel_values"], image.transpose(0, 3, 1, 2), atol=1e-5
  )
  zimg, ztxt, out = model.apply({"params": params}, image, text)
  assert np.ptp(zimg @ ztxt.T) > 0.1  # texts and images are told apart
  np.testing.assert_allclose(got.image_embeds, zimg, atol=1e-4)
  np.testing.assert_allclose(got.text_embeds, ztxt, atol=1e-4)
  np.testing.assert_allclose(
    got.logits_per_image, zimg @ ztxt.T * out["t"][0] + out["b"][0], atol=1e-4
  )
  convert_from_hf.convert(tmp_path / "hf", tmp_path / "back")
  hf_case.same_arrays(tmp_path / "back/params.npz", np.load(tmp_path / "w.npz"))


@pytest.mark.parametrize("bias", ["relative", "none", -2.5])
def test_each_kind_of_bias_becomes_b(tmp_path, bias):
  hf_case.write_config(tmp_path, bias=bias)
  params = trees.flatten(npz.load_params(hf_case.GOLDEN / "siglip_tiny.npz"))
  del params["b"]
  if bias == "relative":
    params["r"] = np.full(1, 0.5, np.float32)
  npz.save_params(tmp_path / "w.npz", trees.unflatten(params))
  convert_to_hf.convert(tmp_path / "w.npz", tmp_path / "hf")
  found = safetensors.numpy.load_file(tmp_path / "hf/model.safetensors")
  want = {"relative": -0.5 * np.exp(params["t"]), "none": 0.0}.get(bias, bias)
  np.testing.assert_allclose(found["logit_bias"], want, rtol=1e-6)
  assert found["logit_bias"].shape == (1,)


@pytest.mark.parametrize(
  "pp",
  [
    "decode|resize(32,method='bicubic')|value_range(-1,1)|keep('image')",
    "decode|resize(32,32,'lanczos')|value_range(0,1)",
    "decode|resize(32,method='nearest')|value_range(-0.5,2.0)",
    "decode|resize(32,method='area')",
  ],
)
def test_pixels(hf, tmp_path, pp):
  _, transformers = hf
  hf_case.write_config(tmp_path, pp_image=pp)
  hf_case.convert_golden(tmp_path)
  pngs = [
    hf_case.png(i, *args)
    for i, args in enumerate(
      ((32, 32), (100, 37), (9, 20), (50, 50, "L"), (50, 50, "P"))
    )
  ]
  got = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")(
    images=hf_case.pictures(pngs), return_tensors="np"
  )["pixel_values"]
  want = hf_case.ours(pp, "image", pngs)
  if want.dtype == np.uint8:  # what the model does with bytes
    want = (want / 127.5 - 1).astype(np.float32)
  np.testing.assert_allclose(got.transpose(0, 2, 3, 1), want, atol=1e-5)
  back, note = convert_from_hf.pp_image(tmp_path / "hf", 32)
  np.testing.assert_allclose(hf_case.ours(back, "image", pngs), want, atol=1e-5)
  assert note is None


def test_a_run_is_as_good_as_a_file(tmp_path):
  """And its decoder is kept beside the model."""
  config = hf_case.write_config(
    tmp_path, image=dict(scan=True), text=dict(scan=True)
  )
  params = hf_case.random_params(
    two_towers.TwoTowers(**config["model"]), 32, 12
  )
  checkpoints = save.Checkpoints(tmp_path).open()
  for step, extra in (2, 0), (4, 1):
    checkpoints.save(
      step,
      types.SimpleNamespace(
        stored={
          **jax.tree.map(lambda x, extra=extra: x + extra, params),
          "dec": {"pos_embedding": np.full((1, 2, 3), step, np.float32)},
        },
        step=np.int32(step),
        opt_state={},
        held={},
      ),
      {},
      {},
    )
  checkpoints.close()
  npz.save_params(tmp_path / "w.npz", params)
  arrays = [
    convert_to_hf.convert(tmp_path / weights, tmp_path / str(i))
    or safetensors.numpy.load_file(tmp_path / f"{i}/model.safetensors")
    for i, weights in enumerate((".", "checkpoints/2", "w.npz"))
  ]
  assert set(arrays[0]) == set(arrays[1]) == set(arrays[2])
  for name, value in arrays[2].items():
    np.testing.assert_array_equal(arrays[1][name], value)
    np.testing.assert_array_equal(arrays[0][name], value + 1)
  decoder = dict(np.load(tmp_path / "1/decoder.npz"))
  assert set(decoder) == {"params/dec/pos_embedding"}
  assert np.all(decoder["params/dec/pos_embedding"] == 2)
  assert not (tmp_path / "2/decoder.npz").exists()


@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_there_and_back(tmp_path, scan):
  """The arrays, what starts from them, and the captions."""
  (tmp_path / "here").mkdir()
  config = hf_case.write_config(
    tmp_path / "here",
    image=dict(scan=scan),
    text=dict(scan=scan),
    pp_image="decode|resize(32)|value_range(-1,1)|keep('image')",
  )
  model = two_towers.TwoTowers(**config["model"])
  (term,) = terms.make({"words": dict(type="caption", depth=2)}, model)
  example = dict(
    image=np.zeros((32, 32, 3), np.float32), text=np.zeros(12, np.int32)
  )
  shapes = state.param_shapes(model, example, terms=(term,))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes
  )
  file = tmp_path / "here/params.npz"
  npz.save_params(file, params, scan)
  convert_to_hf.convert(file, tmp_path / "hf")
  decoder = dict(np.load(tmp_path / "hf/decoder.npz"))
  assert "params/dec/EncDecBlock1/MLP/Dense_0/kernel" in decoder
  convert_from_hf.convert(tmp_path / "hf", tmp_path / "back", scan)
  hf_case.same_arrays(tmp_path / "back/params.npz", np.load(file))
  about = json.loads((tmp_path / "back/config.json").read_text())
  assert about["losses"]["caption"]["depth"] == 2

  given = restore.read_init(shapes, tmp_path / "back/params.npz")
  for name, x in trees.flatten(params).items():
    np.testing.assert_array_equal(given[name], x)
  pixels = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
  if scan:
    return
  got, want = [
    predict.Predictor(tmp_path / x).captions(pixels) for x in ("hf", "here")
  ]
  assert len({text for text, _ in want}) > 1
  for (text, log_p), (text_here, log_p_here) in zip(got, want):
    assert text == text_here
    assert log_p == pytest.approx(log_p_here, abs=1e-4)

  file = tmp_path / "hf/decoder.npz"
  for change, says in (
    ({"params/dec/pos_embedding": np.zeros((1, 9, 7))}, r"not \(1, 9, 48"),
    ({"params/img/x": np.zeros(3)}, 'parameters of "dec" alone'),
    ({"params/dec/LogitsDense/bias": np.zeros(7)}, "not of this model"),
  ):
    np.savez(file, **{**decoder, **change})
    with pytest.raises(errors.UserError, match=says) as e:
      convert_from_hf.convert(tmp_path / "hf", tmp_path / "wrong")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(image=dict(pool_type="gap"), text=dict(pool_type="map")),
      "SiglipModel cannot express model.image.pool_type 'gap' (it has 'map'); "
      "model.text.pool_type 'map' (it has 'last')",
    ),
    (dict(text=dict(bottleneck=7)), "bottleneck 7"),
    (dict(image=dict(posemb="sincos2d")), "posemb 'sincos2d'"),
    (dict(out_dim=[48, 48]), "an image head"),
    (dict(out_dim=[None, None]), "a text tower without head"),
    (dict(out_dim=[None, 40]), "embeddings of 40 numbers"),
    (dict(image=dict(widht=3)), 'has no key "widht"'),
    (dict(res=40), "img/pos_embedding is (1, 16, 48), not (1, 25, 48)"),
    (dict(length=8), "txt/pos_embedding is (1, 12, 48), not (1, 8, 48)"),
    (dict(image=dict(depth=3)), "missing img/Transformer/encoderblock_2/"),
    (dict(text=dict(vocab_size=20)), "pieces, but model.text.vocab_size is 20"),
    (dict(pp_text="tokenize(12, pad=5)"), "pads with 5, which is a piece"),
    (
      dict(pp_image="decode|resize(32)|central_crop(32)|value_range(-1,1)"),
      "cannot be expressed by transformers' SiglipProcessor, only: decode|res",
    ),
    (dict(pp_image="decode|resize(32,40)|value_range(-1,1)"), "to a square"),
    (
      dict(pp_image="decode|resize(32)|value_range(1,1)"),
      "value_range(1, 1) is empty",
    ),
    (dict(pp_text=None), 'config.json: the config has no "pp_text"'),
    (dict(pp_text="choice('a')|tokenize(12)"), "cannot be expressed"),
    (dict(pp_text="lower|tokenise(12)"), 'did you mean "tokenize"'),
    (dict(pp_text="tokenize(12)|lower"), "cannot be expressed"),
  ],
  ids=str,
)
def test_what_cannot_be_expressed_is_refused(tmp_path, change, message):
  hf_case.write_config(tmp_path, **change)
  with pytest.raises(errors.UserError) as e:
    hf_case.convert_golden(tmp_path)
  assert message in str(e.value)
  assert sorted(os.listdir(tmp_path)) == ["config.json", "tokenizer.model"]


def test_precomputed_images_are_refused(tmp_path):
  config = hf_case.write_config(tmp_path)
  config["model"]["image"] = dict(kind="precomputed", width=48)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="model.image.kind 'precomputed'"):
    hf_case.convert_golden(tmp_path)


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
  hf_case.write_config(tmp_path)
  with monkeypatch.context() as patch:

    def full(*_):
      raise OSError("disk full")

    patch.setattr(convert_to_hf.config_lib, "write_json", full)
    with pytest.raises(errors.UserError, match="cannot write .*hf: disk full"):
      hf_case.convert_golden(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["config.json", "tokenizer.model"]
  hf_case.convert_golden(tmp_path)
  with pytest.raises(errors.UserError, match="hf exists: delete it"):
    hf_case.convert_golden(tmp_path)
  with pytest.raises(errors.UserError, match="hf exists: delete it"):
    convert_from_hf.convert(tmp_path / "hf", tmp_path / "hf")


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_without_the_packages(tmp_path, monkeypatch, package):
  hf_case.write_config(tmp_path)
  for name in package, f"{package}.numpy":
    monkeypatch.setitem(sys.modules, name, None)
  message = (
    f"{package} is not installed; it comes with transformers: "
    r"pip install 'sigjax\[hf\]'$"
  )
  with pytest.raises(errors.UserError, match=message):
    hf_case.convert_golden(tmp_path)
  if package == "safetensors":
    with pytest.raises(errors.UserError, match=message):
      convert_from_hf.read_arrays(hf_case.GOLDEN)


def test_a_file_in_a_bucket_is_no_run(tmp_path, monkeypatch):
  asked = []

  def load(path):
    asked.append(path)
    raise errors.UserError("no bucket here")

  monkeypatch.setattr(convert_to_hf.npz, "load_params", load)
  with pytest.raises(errors.UserError, match="no bucket here"):
    convert_to_hf.convert("gs://bucket/w.npz", tmp_path / "out")
  assert asked == ["gs://bucket/w.npz"]


def test_commands(tmp_path):
  hf_case.write_config(tmp_path)
  (tmp_path / "w.npz").write_bytes(
    (hf_case.GOLDEN / "siglip_tiny.npz").read_bytes()
  )
  ask = lambda *args: subprocess.run(
    [sys.executable, "-m", *args],
    cwd=hf_case.ROOT,
    text=True,
    check=False,
    capture_output=True,
    env={**os.environ, "XLA_FLAGS": cpu_devices.xla_flags(1)},
  )
  done = ask(
    "tools.convert_to_hf",
    "--weights",
    f"{tmp_path}/w.npz",
    "--out",
    f"{tmp_path}/hf",
  )
  assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path}/hf\n"), (
    done.stderr
  )
  done = ask(
    "tools.convert_from_hf",
    "--folder",
    f"{tmp_path}/hf",
    "--out",
    f"{tmp_path}/back",
    "--scan",
  )
  assert done.returncode == 0 and '"patch_size": 8' in done.stdout, done.stderr
  assert "params/img/Transformer/encoderblock/LayerNorm_0/bias" in np.load(
    tmp_path / "back/params.npz"
  )


def test_files_that_are_missing_are_named(tmp_path):
  with pytest.raises(errors.UserError, match=f"{tmp_path}/none"):
    convert_to_hf.convert(f"{tmp_path}/none", tmp_path / "out")
  with pytest.raises(errors.UserError, match=f"{tmp_path}/none"):
    convert_from_hf.convert(f"{tmp_path}/none", tmp_path / "out")
