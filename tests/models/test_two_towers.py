"""Both towers against the original implementation's results."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import errors, trees
from sigjax.models import flops, two_towers
from sigjax.weights import npz

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FILES = ["siglip_tiny", "siglip2_tiny_scan"]
MODEL = dict(image={}, text={})  # of which only temperature and bias are made


def tiny(image=(), text=(), **kwargs):
  """Returns the model of the golden files; image and text add to its keys."""
  both = dict(width=48, depth=2, mlp_dim=96, num_heads=3)
  return two_towers.TwoTowers(
    image={**both, "patch_size": 8, **dict(image)},
    text={**both, "vocab_size": 97, **dict(text)},
    out_dim=(None, 48),
    **kwargs,
  )


def golden(name, model):
  """Returns the parameters of a golden file for a model, and its io file."""
  io = dict(np.load(GOLDEN / f"{name}_io.npz"))
  like = jax.eval_shape(model.init, jax.random.key(0), io["image"], io["text"])[
    "params"
  ]
  return npz.load_params(GOLDEN / f"{name}.npz", like), io


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_golden_results(name, scan):
  model = tiny(image={"scan": scan}, text={"scan": scan})
  params, io = golden(name, model)
  zimg, ztxt, out = jax.jit(model.apply)(
    {"params": params}, io["image"], io["text"]
  )
  logits = zimg @ ztxt.T * out["t"][0] + out["b"][0]
  signs = 2 * np.eye(len(logits)) - 1
  got = dict(
    zimg=zimg,
    ztxt=ztxt,
    t=out["t"],
    b=out["b"],
    logits=logits,
    loss=np.logaddexp(0, -signs * logits).sum() / len(logits),
    pre_logits_img=out["img/pre_logits"],
  )
  assert set(got) == set(io) - {"image", "text"}
  for key, value in got.items():
    np.testing.assert_allclose(
      value, io[key], rtol=1e-5, atol=1e-5, err_msg=key
    )


def test_scan_and_remat_change_no_gradient():
  def gradients(scan, remat):
    model = tiny(text=dict(scan=scan, remat=remat))
    params, io = golden("siglip_tiny", model)

    def loss(txt):
      _, ztxt, _ = model.apply(
        {"params": {**params, "txt": txt}}, None, io["text"]
      )
      return jnp.sum(ztxt**3)

    return trees.flatten(jax.jit(jax.grad(loss))(params["txt"]))

  want = gradients(False, "none")
  got = gradients(True, "full")
  for name, leaf in got.items():
    layers = (
      np.stack(
        [
          want[name.replace("encoderblock/", f"encoderblock_{i}/")]
          for i in range(2)
        ]
      )
      if "encoderblock/" in name
      else want[name]
    )
    np.testing.assert_allclose(leaf, layers, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_remat_computes_again(tower):
  def products(remat):
    model = tiny(**{tower: {"remat": remat, "scan": True}})
    args = dict(image=None, text=None)
    args[tower] = dict(
      image=jnp.zeros((1, 32, 32, 3)), text=jnp.zeros((1, 12), jnp.int32)
    )[tower]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **args))
    grad = jax.grad(
      lambda params: sum(
        z.sum() for z in model.apply(params, **args)[:2] if z is not None
      )
    )
    jaxpr = jax.make_jaxpr(grad)(params).jaxpr
    return [e.primitive.name for e in operations(jaxpr)].count("dot_general")

  # Of a block's 8 products, "full" repeats all that a gradient needs and
  # "dots" the attention weights.
  assert products("none") < products("dots") < products("full")


def operations(jaxpr):
  """Yields every equation of a jaxpr, inner ones included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from operations(inner)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_is_the_dtype_of_every_product(scan):
  # Backwards too; LayerNorm, softmax and GELU stay in float32.
  model = tiny(
    image={"scan": scan},
    dtype="bfloat16",
    text={"scan": scan, "pool_type": "map", "bottleneck": 4},
  )
  model = model.clone(out_dim=(8, 8))
  image, text = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 12), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), image, text)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}

  def loss(params):
    zimg, ztxt, out = model.apply(params, image, text)
    assert zimg.dtype == ztxt.dtype == out["t"].dtype == jnp.float32
    return zimg.sum() + ztxt.sum()

  for fn in loss, jax.grad(loss):
    seen = {}
    for eqn in operations(jax.make_jaxpr(fn)(params).jaxpr):
      dtypes = seen.setdefault(eqn.primitive.name, [])
      dtypes.extend(str(v.aval.dtype) for v in eqn.invars)
    assert set(seen["dot_general"]) == {"bfloat16"}
    assert set(seen["rsqrt"]) == {"float32"}  # LayerNorm
    assert set(seen["exp"]) == {"float32"}  # softmax
    assert set(seen["tanh"]) == {"float32"}  # GELU


def test_one_tower_alone():
  model = tiny()
  params, io = golden("siglip_tiny", model)
  zimg, ztxt, out = jax.jit(model.apply)({"params": params}, None, io["text"])
  assert zimg is None and not any(key.startswith("img") for key in out)
  np.testing.assert_allclose(ztxt, io["ztxt"], atol=1e-5)
  # No parameter of the other tower is needed.
  del params["txt"]
  jax.eval_shape(model.apply, {"params": params}, io["image"], None)


def test_scalars_and_norms():
  model = tiny(text=dict(depth=1), temperature_init=7.0, bias_init=-3.0)
  text = jnp.ones((2, 12), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), None, text)
  assert trees.flatten(variables["params"])["t"].shape == (1,)
  np.testing.assert_allclose(variables["params"]["t"], np.log([7]), rtol=1e-6)
  _, ztxt, out = jax.jit(model.apply)(variables, None, text)
  np.testing.assert_allclose(out["t"], [7], rtol=1e-6)
  np.testing.assert_array_equal(out["b"], [-3])
  np.testing.assert_allclose(np.linalg.norm(ztxt, axis=1), 1, rtol=1e-6)
  raw = out["txt/pre_logits"] @ variables["params"]["txt"]["head"]["kernel"]
  np.testing.assert_allclose(out["txt/norm"] * ztxt, raw, atol=1e-5)

  variables = jax.eval_shape(
    model.clone(bias="none").init, jax.random.key(0), None, text
  )
  assert "b" not in variables["params"]


@pytest.mark.parametrize(
  "bias, more, b",
  [
    ("none", {}, 0.0),
    (-2.5, {}, -2.5),
    ("learned", dict(b=-3.0), -3.0),
    ("relative", dict(r=0.5), -2.0),
  ],
)
def test_kinds_of_bias(bias, more, b):
  params = {k: jnp.full(1, x) for k, x in dict(t=np.log(4), **more).items()}
  out = tiny(bias=bias).apply({"params": params}, None, None)
  np.testing.assert_allclose(out[2]["b"], [b], rtol=1e-6)


def test_bias_at_the_start():
  def start(**kwargs):
    model = two_towers.of_config({**MODEL, **kwargs}, 1001)
    variables = model.init(jax.random.key(0), None, None)
    out = model.apply(variables, None, None)
    return sorted(variables["params"]), float(out[2]["b"][0])

  auto = pytest.approx(np.log(1 / 1001 / (1 - 1 / 1001)))  # logit(1 / B)
  assert start(bias_init="auto") == (["b", "t"], auto)
  assert start(bias="relative", bias_init="auto") == (["r", "t"], auto)
  assert start(bias="relative") == (["r", "t"], pytest.approx(-10))
  assert start(bias=-2.5) == (["t"], -2.5)
  # Of an earlier version: no b, and no key "bias".
  assert start(bias_init=None) == (["t"], 0)
  assert two_towers.of_config({**MODEL, "bias_init": "auto"}).bias_init == 0


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(bias="relativ"), 'bias "relativ" is not known.*"relative"'),
    (dict(bias_init="ten"), "bias_init has to be a number or"),
    (dict(bias_init="auto"), "batch_size of at least 2"),
  ],
)
def test_a_wrong_bias(change, message):
  with pytest.raises(errors.UserError, match=message):
    two_towers.of_config({**MODEL, **change}, 1)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(image={"widht": 3}), 'model.image has no key "widht".*"width"'),
    (dict(text={"patch_size": 3}), 'model.text has no key "patch_size"'),
    (dict(image={"dtype": "bfloat16"}), 'model.image has no key "dtype"'),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(errors.UserError, match=message):
    jax.eval_shape(
      tiny(**kwargs).init,
      jax.random.key(0),
      jnp.zeros((1, 32, 32, 3)),
      jnp.zeros((1, 12), jnp.int32),
    )


@pytest.mark.parametrize(
  "image, text",
  [
    (dict(pool_type="map"), dict(bottleneck=16)),
    (dict(pool_type="tok"), dict(pool_type="map")),
  ],
)
def test_flops_are_those_xla_counts(image, text):
  sizes = dict(width=384, depth=1, num_heads=6)
  model = two_towers.TwoTowers(
    image=dict(patch_size=4, **sizes, **image),
    text=dict(vocab_size=97, **sizes, **text),
    out_dim=(32, 32),
  )
  shapes = (2, 96, 80, 3), (2, 320)
  args = (
    jax.ShapeDtypeStruct(shapes[0], "float32"),
    jax.ShapeDtypeStruct(shapes[1], "int32"),
  )
  params = jax.eval_shape(model.init, jax.random.key(0), *args)
  image, text = (x.shape[1:] for x in args)
  example = dict(image=np.zeros(image), text=np.zeros(text))
  got = flops.forward(model, example)
  for name, inputs in dict(img=(args[0], None), txt=(None, args[1])).items():
    cost = jax.jit(model.apply).lower(params, *inputs).compile().cost_analysis()
    # XLA adds what is not a matmul; that is little at this width.
    assert 0.97 < 2 * got[name] / cost["flops"] <= 1, name


def test_bytes_are_mapped_to_the_range():
  model = tiny()
  params, io = golden("siglip_tiny", model)
  image = (
    np.random.default_rng(0)
    .integers(0, 256, io["image"].shape)
    .astype(np.uint8)
  )
  apply = jax.jit(lambda x: model.apply({"params": params}, x, None)[0])
  np.testing.assert_allclose(
    apply(image), apply((image / 127.5 - 1).astype(np.float32)), atol=1e-6
  )
