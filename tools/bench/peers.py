"""Compares our train step with transformers' and open_clip's on a CPU.

All three train the same model from the same weights on the same batch of noise,
in float32: two towers of width 384 and depth 6, images of 64 pixels in patches
of 16, texts of 16 tokens, the sigmoid loss, AdamW. The first and the last
loss of each are in the table. The first is the same in all; the last differs in
the third figure after the point, since weight decay is of all parameters in
PyTorch, and of kernels in ours.

The time is processor time of all threads. It says what one core can do, however
busy the machine is; the time that has passed is beside it. PyTorch's AdamW is
the fused one, its fastest.
"""

from collections.abc import Callable, Sequence
import functools
import importlib
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from sigjax import errors, trees
from sigjax.weights import npz
from tools.bench import step as step_lib
from tools.bench import timing
from tools.hf import names

BATCH, SIZE, PATCH, LENGTH, VOCAB = 64, 64, 16, 16, 32_000
WIDTH, DEPTH, HEADS, MLP, EPS = 384, 6, 6, 1536, 1e-6
LR, WD, BETAS = 1e-3, 1e-4, (0.9, 0.95)
TOWER = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_dim=MLP)
CONFIG: dict[str, Any] = dict(
  batch_size=BATCH,
  total_steps=1000,
  model=dict(
    image=dict(TOWER, patch_size=PATCH),
    text=dict(TOWER, vocab_size=VOCAB),
    out_dim=(None, WIDTH),
  ),
  pp_image=f"decode|resize({SIZE})|keep('image')",
  pp_text=f"lower|tokenize({LENGTH})|keep('text')",
  optim=dict(lr=LR, wd=WD, options=dict(b1=BETAS[0], b2=BETAS[1])),
)


def peers(devices: Sequence[Any], *, rounds: int = 10) -> list[timing.Row]:
  """Returns a row for each of the three.

  Args:
    devices: the devices to use, of a CPU.
    rounds: how often each is timed.

  Raises:
    UserError: torch, transformers or open_clip_torch is not installed.
  """
  try:
    import torch

    for name in OTHERS:
      importlib.import_module(name)
  except ImportError as e:
    raise errors.UserError(
      f"{e}: pip install torch transformers open_clip_torch"
    ) from None
  make, init, batch, _ = step_lib.step_parts(devices, **CONFIG)
  state = init()
  params = jax.tree.map(np.asarray, state.trained)
  models = {name: load(params) for name, load in OTHERS.items()}
  torch.set_num_threads(timing.machine(devices)["cores"])
  fn, abstract = make({}, 1)
  fn = fn.lower(abstract, batch).compile()
  held = [state]

  def ours() -> float:
    held[0], metrics = fn(held[0], batch)
    return float(metrics["loss"])

  image = np.asarray(batch["image"], np.float32).transpose(0, 3, 1, 2)
  pair = (
    torch.tensor(image * (2 / 255) - 1),
    torch.tensor(np.asarray(batch["text"], np.int64)),
  )
  runs = {"sigjax": ours}
  for name, model in models.items():
    runs[name] = _in_torch(model, *pair)
  seen: dict[str, list[float]] = {name: [] for name in runs}

  def timed(name: str) -> np.ndarray:
    start = time.process_time(), time.perf_counter()
    seen[name].append(runs[name]())
    end = time.process_time(), time.perf_counter()
    return np.subtract(end, start)

  cases = {name: functools.partial(timed, name) for name in runs}
  times: Any = timing.interleave(cases, rounds)
  middle = {name: np.median(x, axis=0) for name, x in times.items()}
  rows = []
  for name, x in times.items():
    ours_cpu, ours_wall = middle["sigjax"] / middle[name]
    rows.append(
      dict(
        code=name,
        **timing.spread(x[:, 0], "ms"),
        ours=ours_cpu,
        wall_ms=1e3 * middle[name][1],
        ours_wall=ours_wall,
        first_loss=seen[name][0],
        last_loss=seen[name][-1],
      )
    )
  return rows


def _in_torch(model: Any, image: Any, text: Any) -> Callable[[], float]:
  """Returns fn() -> loss, a step of a model(image, text) -> loss."""
  import torch

  optim = torch.optim.AdamW(
    # PyTorch's weight decay is a multiple of the learning rate.
    model.parameters(),
    lr=LR,
    weight_decay=WD / LR,
    betas=BETAS,
    fused=True,
  )

  def step() -> float:
    optim.zero_grad(set_to_none=True)
    loss = model(image, text)
    loss.backward()
    optim.step()
    return float(loss.detach())

  return step


def _transformers(params: Any) -> Any:
  """Returns transformers' model with our parameters and its own loss."""
  import torch
  import transformers

  sizes = dict(
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    layer_norm_eps=EPS,
  )
  text = dict(
    sizes,
    vocab_size=VOCAB,
    max_position_embeddings=LENGTH,
    projection_size=WIDTH,
  )
  vision = dict(sizes, image_size=SIZE, patch_size=PATCH)
  config = transformers.SiglipConfig(text_config=text, vision_config=vision)

  class Model(transformers.SiglipModel):
    def forward(self, image, text):
      return (
        super().forward(input_ids=text, pixel_values=image, return_loss=True)
      ).loss

  model = Model(config)
  flat = names.to_theirs(trees.flatten(params))
  model.load_state_dict({k: torch.tensor(x) for k, x in flat.items()})
  return model.train()


def _open_clip(params: Any) -> Any:
  """Returns open_clip's towers with our parameters and its own loss.

  The towers are as in its SigLIP models, the image tower timm's, in this size.
  """
  from open_clip import convert, transformer  # pyright: ignore
  from open_clip.loss import SigLipLoss  # pyright: ignore
  from timm.models import vision_transformer  # pyright: ignore
  import torch
  from torch import nn

  how = dict(
    act_layer=functools.partial(nn.GELU, approximate="tanh"),
    norm_layer=functools.partial(nn.LayerNorm, eps=EPS),
  )

  class Model(nn.Module):
    visual: Any
    text: Any

    def __init__(self):
      super().__init__()
      self.visual = nn.Module()
      self.visual.trunk = vision_transformer.VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        class_token=False,
        global_pool="map",
        num_classes=0,
        **how,
      )
      self.text = transformer.TextTransformer(
        context_length=LENGTH,
        vocab_size=VOCAB,
        width=WIDTH,
        heads=HEADS,
        layers=DEPTH,
        mlp_ratio=MLP / WIDTH,
        output_dim=WIDTH,
        no_causal_mask=True,
        pool_type="last",
        proj_type="linear",
        proj_bias=True,
        **how,
      )
      self.logit_scale = nn.Parameter(torch.zeros(()))
      self.logit_bias = nn.Parameter(torch.zeros(()))

    def forward(self, image, text):
      towers = self.visual.trunk(image), self.text(text)
      z = (nn.functional.normalize(x, dim=-1) for x in towers)
      return SigLipLoss()(*z, self.logit_scale.exp(), self.logit_bias)

  model: Any = Model()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.npz"
    npz.save_params(path, params)
    convert.load_big_vision_weights(model, str(path))
  return model.train()


OTHERS = dict(transformers=_transformers, open_clip=_open_clip)
