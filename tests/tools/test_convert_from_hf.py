"""Folders of Hugging Face's own, against the real transformers."""

import json
import sys

import hf_case  # beside this file
import numpy as np
import pytest
import safetensors.numpy

from sigjax import errors
from sigjax.models import two_towers
from sigjax.weights import npz
from tools import convert_from_hf
from tools.hf import config as config_lib


def theirs_at(path, transformers, **kwargs):
  """Saves a random SiglipModel of a size of its own; returns it."""
  torch = sys.modules["torch"]
  torch.manual_seed(0)
  model = transformers.SiglipModel(
    transformers.SiglipConfig(
      text_config=dict(
        hidden_size=36,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=50,
        vocab_size=71,
        max_position_embeddings=10,
        projection_size=24,
      ),
      vision_config=dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=30,
        patch_size=7,
      ),
    )
  )
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.eval().save_pretrained(path, **kwargs)
  return model


@pytest.mark.parametrize(
  "shards, dtype",
  [("5GB", "float32"), ("20KB", "float32"), ("5GB", "bfloat16")],
)
def test_their_own_folders(hf, tmp_path, shards, dtype):
  torch, transformers = hf
  theirs = theirs_at(tmp_path / "hf", transformers, max_shard_size=shards)
  if dtype == "bfloat16":
    theirs.bfloat16().save_pretrained(tmp_path / "hf")
  file = tmp_path / "hf/model.safetensors"
  assert file.exists() == (shards == "5GB")
  if file.exists():  # as older versions wrote it
    safetensors.numpy.save_file(
      {
        **safetensors.numpy.load_file(file),
        "text_model.embeddings.position_ids": np.arange(10)[None],
      },
      file,
    )
  notes = convert_from_hf.convert(tmp_path / "hf", tmp_path / "out")
  assert [note.split(":")[0] for note in notes] == [
    "pp_image",
    "pp_text",
    "tokenizer.model",
  ]
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert set(config) == {"model"}
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (3, 30, 30, 3)).astype(np.float32)
  text = rng.integers(0, 71, (4, 10)).astype(np.int32)
  with torch.no_grad():
    want = theirs.float()(
      input_ids=torch.from_numpy(text).long(),
      pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2)),
    )
  stored = dict(np.load(tmp_path / "out/params.npz"))
  assert {x.dtype for x in stored.values()} == {np.dtype("float32")}
  params = npz.load_params(tmp_path / "out/params.npz")
  zimg, ztxt, out = two_towers.TwoTowers(**config["model"]).apply(
    {"params": params}, image, text
  )
  np.testing.assert_allclose(want.image_embeds, zimg, atol=1e-4)
  np.testing.assert_allclose(want.text_embeds, ztxt, atol=1e-4)
  np.testing.assert_allclose(
    want.logits_per_image, zimg @ ztxt.T * out["t"][0] + out["b"][0], atol=1e-4
  )


def test_the_defaults_of_their_config(hf, tmp_path):
  _, transformers = hf
  for given in (
    {},
    dict(
      text_config=dict(hidden_size=24, num_attention_heads=3),
      vision_config=dict(image_size=64),
    ),
  ):
    (tmp_path / "config.json").write_text(
      json.dumps({**given, "model_type": "siglip"})
    )
    want = transformers.AutoConfig.from_pretrained(tmp_path)
    model, size, length = config_lib.read_config(tmp_path / "config.json")
    sizes = lambda part: dict(
      width=part.hidden_size,
      depth=part.num_hidden_layers,
      mlp_dim=part.intermediate_size,
      num_heads=part.num_attention_heads,
    )
    assert model == dict(
      image=dict(
        sizes(want.vision_config),
        pool_type="map",
        patch_size=want.vision_config.patch_size,
      ),
      text=dict(
        sizes(want.text_config),
        pool_type="last",
        vocab_size=want.text_config.vocab_size,
      ),
      out_dim=[None, want.text_config.projection_size],
    )
    assert size == want.vision_config.image_size
    assert length == want.text_config.max_position_embeddings


def test_theirs_that_do_not_fit(tmp_path):
  hf_case.write_config(tmp_path)
  hf = tmp_path / "hf"
  hf_case.convert_golden(tmp_path)

  def message():
    with pytest.raises(errors.UserError) as e:
      convert_from_hf.convert(hf, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    return str(e.value)

  config = json.loads((hf / "config.json").read_text())
  for change, text in [
    (dict(model_type="clip"), 'model_type "clip" is not known'),
    (
      dict(vision_config=dict(config["vision_config"], vision_use_head=False)),
      "vision_use_head False cannot be expressed, only True",
    ),
    (
      dict(text_config=dict(config["text_config"], hidden_act="gelu")),
      "hidden_act 'gelu' cannot",
    ),
    (
      dict(vision_config=dict(config["vision_config"], image_size=[32, 40])),
      "image_size of vision_config is [32, 40], but has to be a whole",
    ),
    (
      dict(text_config=dict(config["text_config"], projection_size=40)),
      "embeddings of 40 numbers",
    ),
  ]:
    (hf / "config.json").write_text(json.dumps({**config, **change}))
    assert text in message()
  (hf / "config.json").write_text(json.dumps(config))

  whole = (hf / "model.safetensors").read_bytes()
  arrays = safetensors.numpy.load(whole)
  arrays["logit_scales"] = arrays.pop("logit_scale")
  name = "vision_model.head.attention.in_proj_weight"
  arrays[name] = arrays[name][:47]
  safetensors.numpy.save_file(arrays, hf / "model.safetensors")
  text = message()
  for line in (
    f"{hf} does not fit its config.json in 3 arrays: ",
    'missing logit_scale (1,) (did you mean "logit_scales"?)',
    "left over logit_scales (1,)",
    f"shape of {name} is (47, 48), not (144, 48)",
  ):
    assert line in text
  (hf / "model.safetensors").write_bytes(whole[:-9])
  assert "cannot read" in message()
  (hf / "model.safetensors").unlink()
  assert "has no model.safetensors; load it in transformers" in message()
  (hf / "model.safetensors.index.json").write_text(
    json.dumps(dict(weight_map=dict(logit_scale="model-1.safetensors")))
  )
  assert "has no model-1.safetensors, which model.safetensors.ind" in message()
  (hf / "config.json").unlink()
  assert "cannot read" in message() and "config.json" in message()


BICUBIC = (
  "decode|resize(224, method='bicubic')|value_range(-1.0, 1.0)|keep('image')"
)


@pytest.mark.parametrize(
  "given, pp_image, note",
  [
    ({}, BICUBIC, None),
    (dict(resample=3, rescale_factor=1 / 255), BICUBIC, None),
    (dict(resample=2), BICUBIC.replace("bicubic", "bilinear"), None),
    (
      dict(resample=2, image_mean=[0] * 3, image_std=[1] * 3),
      BICUBIC.replace("bicubic", "bilinear").replace("-1.0", "0.0"),
      None,
    ),
    (dict(size=dict(height=32, width=32)), None, "size of"),
    (dict(resample=7, do_resize=False), None, "do_resize, resample of"),
    (dict(image_mean=[0.5, 0.4, 0.3]), None, "image_mean of"),
    (dict(image_std=[0.5, 0.4, 0.3]), None, "image_std of"),
  ],
  ids=str,
)
def test_their_image_processors(tmp_path, given, pp_image, note):
  given = dict(given, image_processor_type="SiglipImageProcessor")
  for file, value in [
    ("processor_config", dict(image_processor=given)),
    ("preprocessor_config", given),
  ]:
    (tmp_path / f"{file}.json").write_text(json.dumps(value))
    got, why = convert_from_hf.pp_image(tmp_path, 224)
    assert got == pp_image
    assert why is None if note is None else why.startswith(note)


@pytest.mark.parametrize(
  "given, pp_text, note",
  [
    (
      dict(tokenizer_class="SiglipTokenizer", pad_token="</s>"),
      "lower|tokenize(12)|keep('text')",
      "removes punctuation",
    ),
    (
      dict(
        tokenizer_class="SiglipTokenizer", pad_token="</s>", do_lower_case=False
      ),
      "tokenize(12)|keep('text')",
      "punctuation",
    ),
    (
      dict(tokenizer_class="GemmaTokenizer", pad_token=dict(content="<pad>")),
      "lower|tokenize(12, pad=0)|keep('text')",
      "None",
    ),
    (
      dict(tokenizer_class="T5Tokenizer", pad_token="[P]"),
      "tokenize(12, pad=7)|keep('text')",
      "None",
    ),
    (dict(tokenizer_class="T5Tokenizer"), None, "which token is the padding"),
  ],
  ids=str,
)
def test_their_tokenizers(tmp_path, given, pp_text, note):
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
  (tmp_path / "tokenizer.json").write_text(
    json.dumps(dict(added_tokens=[dict(content="[P]", id=7)]))
  )
  got, why = convert_from_hf.pp_text(tmp_path, 12)
  assert got == pp_text and note in str(why)


ODD = (None, True, -1, 0, 10**6, 10**400, 1.5, float("nan"), "x", [], [1], {})


def odd_values(value):
  """Yields copies of a JSON value in which one part is something odd."""
  yield from ODD
  items = value.items() if isinstance(value, dict) else enumerate(value)
  if isinstance(value, (dict, list)):
    for key, inner in items:
      for odd in odd_values(inner) if isinstance(inner, (dict, list)) else ODD:
        copy = value.copy()
        copy[key] = odd
        yield copy


SMALL = dict(
  hidden_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  intermediate_size=8,
)
HF_CONFIG = dict(
  model_type="siglip",
  text_config=dict(
    SMALL, vocab_size=9, max_position_embeddings=4, projection_size=8
  ),
  vision_config=dict(SMALL, image_size=8, patch_size=4),
)


def test_odd_values_in_their_config(tmp_path):
  """A million layers, a list for a number, ...: one line, at once."""
  path = tmp_path / "config.json"
  refused = 0
  for value in odd_values(HF_CONFIG):
    path.write_text(json.dumps(value))
    try:
      model, size, length = config_lib.read_config(path)
      assert size * length * model["image"]["depth"] < 10**6
      two_towers.TwoTowers(**model)
    except errors.UserError as e:
      refused += 1
      assert "\n" not in str(e) and str(path) in str(e) and len(str(e)) < 300
  assert refused > 100
  path.write_text("[" * 100_000)
  with pytest.raises(errors.UserError, match="is not a JSON file of keys"):
    config_lib.read_config(path)


@pytest.mark.parametrize(
  "name, good, read",
  [
    (
      "preprocessor_config.json",
      dict(
        convert_from_hf.PIXEL_DEFAULTS,
        image_processor=dict(convert_from_hf.PIXEL_DEFAULTS),
      ),
      lambda folder: convert_from_hf.pp_image(folder, 224),
    ),
    (
      "tokenizer_config.json",
      dict(tokenizer_class="T5Tokenizer", pad_token=dict(content="[P]")),
      lambda folder: convert_from_hf.pp_text(folder, 12),
    ),
    (
      "tokenizer.json",
      dict(added_tokens=[dict(content="[P]", id=7)], normalizer={}),
      lambda folder: convert_from_hf.pp_text(folder, 12),
    ),
    (
      "model.safetensors.index.json",
      dict(weight_map=dict(a="b.safetensors", b="../b.safetensors")),
      lambda folder: (None, convert_from_hf.read_arrays(folder)),
    ),
  ],
)
def test_odd_values_in_their_other_files(tmp_path, name, good, read):
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(dict(tokenizer_class="T5Tokenizer", pad_token="[P]"))
  )
  for value in odd_values(good):
    (tmp_path / name).write_text(json.dumps(value))
    try:
      string, note = read(tmp_path)
      assert string is None or note is None
      assert "nan" not in str(string) and "inf" not in str(string)
    except errors.UserError as e:
      assert "\n" not in str(e)


def test_weights_outside_of_the_folder(tmp_path):
  folder = tmp_path / "hf"
  folder.mkdir()
  safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "a.safetensors")
  (folder / "model.safetensors.index.json").write_text(
    json.dumps(dict(weight_map=dict(a="../a.safetensors")))
  )
  with pytest.raises(errors.UserError, match="has to give a file name"):
    convert_from_hf.read_arrays(folder)
