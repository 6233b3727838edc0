"""FLOPs of the towers' matrix products; a multiply and an add are 2.

The losses, elementwise operations and what remat computes again are not
counted: MFU is about the work that a step needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sigjax.models import two_towers
from sigjax.models.text import TextTransformer
from sigjax.models.transformer import Sizes
from sigjax.models.vit import ViT


def training(
  model: two_towers.TwoTowers,
  example: Mapping,
  trained: Any,
  terms: Sequence[Any] = (),
) -> int:
  """Returns the FLOPs of training per example.

  Args:
    model: the towers.
    example: dict(image=(H, W, C), (N, 3 p^2 + 2) of NaFlex or (W,), text=(L,)),
      for its shapes. Padding counts like patches: it is computed, too.
    trained: the parameters that are trained. A tower without any costs its
      forward pass alone, others three times as much, low-rank adapters too:
      their gradients go through those of whole kernels.
    terms: the losses beside the pair loss, see terms.make.
  """
  total = 0
  if terms:
    batch = {k: jnp.asarray(x)[None] for k, x in example.items()}
    init = lambda key: model.init_with_output(
      key, batch["image"], batch["text"]
    )
    found: Any = jax.eval_shape(init, jax.random.key(0))
    (_, _, out), _ = found
    total = sum(term.kind.flops(out, batch) for term in terms)
  adapted = trained.get("lora", {})
  for tower, count in forward(model, example).items():
    learns = jax.tree.leaves([x.get(tower, {}) for x in (trained, adapted)])
    total += count * (3 if learns else 1)
  return total


def forward(model: two_towers.TwoTowers, example: Mapping) -> dict[str, int]:
  """Returns the FLOPs of one example forwards, {"img": int, "txt": int}."""
  image, text = two_towers.image_tower(model), two_towers.text_tower(model)
  assert isinstance(text, TextTransformer)
  if isinstance(image, ViT):
    img = vit(image, *example["image"].shape)
  elif model.image.get("kind") == "naflex":
    img = _naflex(image, *example["image"].shape)
  else:  # precomputed embeddings
    (width,) = example["image"].shape
    img = 2 * width * (model.out_dim[0] or 0)
  return {"img": img, "txt": _text(text, *example["text"].shape)}


def vit(tower: ViT, height: int, width: int, channels: int) -> int:
  """Returns the FLOPs of an image forwards."""
  size, patch = tower.sizes(), tower.patch()
  patches = (height // patch) * (width // patch)
  total = 2 * patches * patch * patch * channels * size.width
  total += _encoder(size, patches + (tower.pool_type == "tok"))
  if tower.pool_type == "map":
    total += _map_head(size, patches)
  return total + 2 * size.width * (tower.out_dim or 0)


def _naflex(tower: Any, patches: int, numbers: int) -> int:
  size = tower.sizes()
  # A patch's pixels, without its row and column; its position from 16 x 16.
  total = 2 * patches * (numbers - 2 + 16 * 16) * size.width
  total += _encoder(size, patches)
  if tower.pool_type == "map":
    total += _map_head(size, patches)
  return total + 2 * size.width * (tower.out_dim or 0)


def _text(tower: TextTransformer, length: int) -> int:
  size = tower.sizes()
  total = _encoder(size, length)
  total += 2 * length * tower.bottleneck * size.width
  if tower.pool_type == "map":
    total += _map_head(size, length)
  return total + 2 * size.width * (tower.out_dim or 0)


def _encoder(size: Sizes, length: int) -> int:
  width, depth, mlp_dim, _ = size
  per_token = 4 * width * width + 2 * width * mlp_dim + 2 * length * width
  return 2 * depth * length * per_token


def _map_head(size: Sizes, length: int) -> int:
  width, _, mlp_dim, heads = size
  logits_and_means = 2 * length * width * heads
  return 2 * (logits_and_means + 3 * width * width + 2 * width * mlp_dim)
