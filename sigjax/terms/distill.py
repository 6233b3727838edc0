"""Self-distillation and masked prediction (SigLIP 2, arXiv 2502.14786).

The teacher is an exponential moving average of the image tower and of the heads
below. It sees one global view of an image, the student

- several local views: the teacher's whole image is to be recognised in each of
  them (SILC, arXiv 2310.13355; DINO, arXiv 2104.14294);
- the global view, half of whose patches are hidden: what the teacher sees there
  is to be predicted (TIPS, arXiv 2410.16512; iBOT, arXiv 2111.07832).

The views come from the preprocessing ops global_view and local_views. The pair
loss does not see them.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sigjax import errors, prototypes, sharding, terms
from sigjax.models import flops, transformer, two_towers, vit
from sigjax.models.two_towers import TwoTowers


class Head(nn.Module):
  """(.., W) -> (.., bottleneck), and prototypes (bottleneck, K).

  DINO's: two hidden layers with GELU, then a layer without.
  """

  hidden: int
  bottleneck: int
  prototypes: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... W"]) -> tuple[Array, Array]:
    init = nn.initializers.truncated_normal(0.02)
    dense = lambda n: nn.Dense(n, dtype=self.dtype, kernel_init=init)
    for _ in range(2):
      x = transformer.gelu(dense(self.hidden)(x))
    x = dense(self.bottleneck)(x)
    shape = (self.bottleneck, self.prototypes)
    return x, self.param("prototypes", init, shape)

  @nn.nowrap
  def flops(self, width: int) -> int:
    """Returns the FLOPs of a vector of W numbers, to its logits."""
    rest = self.hidden + self.prototypes
    return 2 * (width * self.hidden + self.hidden**2 + self.bottleneck * rest)


class Distill(terms.Kind):
  """Both losses, with one teacher: type="distill".

  Args:
    what: see terms.Kind.
    model: the towers.
    span: the steps over which the teacher's momentum rises to 1.
    views: the weight of the local views' loss; 0: it is not computed.
    masks: the weight of the masked patches' loss; 0: it is not computed.
    hidden_share: the share of a view's patches that is hidden.
    momentum: of the teacher at the first step; it rises to 1 along half a
      cosine (SILC: from .996).
    centre_momentum: of the running mean of the teacher's logits.
    temperature, teacher_temperature: see prototypes.distillation.
    prototypes, patch_prototypes: K of views and of patches.
    hidden, bottleneck: widths of the heads' layers.
    chunk: of how many vectors of the teacher a device holds logits at a time.

  Raises:
    UserError: the image tower is none of pixels at one resolution, or an
      argument is out of its range.
  """

  part, teaches = "distill", "img"

  def __init__(
    self,
    what: str,
    model: TwoTowers,
    span: terms.Span,
    *,
    views: float = 1.0,
    masks: float = 0.25,
    hidden_share: float = 0.5,
    momentum: float = 0.996,
    centre_momentum: float = 0.9,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    prototypes: int = 65_536,
    patch_prototypes: int = 32_768,
    hidden: int = 2048,
    bottleneck: int = 256,
    chunk: int = 256,
  ):
    tower = two_towers.image_tower(model)
    if not isinstance(tower, vit.ViT):
      raise errors.UserError(
        f"{what} compares views of one size, which an image tower of kind "
        f'"{model.image["kind"]}" does not see: take "vit", or leave it out'
      )
    for name, value, low, high in (
      ("views", views, 0, float("inf")),
      ("masks", masks, 0, float("inf")),
      ("hidden_share", hidden_share, 0, 1),
      ("momentum", momentum, 0, 1),
      ("centre_momentum", centre_momentum, 0, 1),
    ):
      if not low <= value <= high:
        raise errors.UserError(
          f"{what}.{name} is {value}, but has to be from {low} to {high}"
        )
    if not views and not masks:
      raise errors.UserError(
        f"{what}: views and masks are both 0, so that there is nothing to "
        "compute: leave it out"
      )
    head = lambda k: Head(hidden, bottleneck, k, model.dtype)
    self._heads = {}
    if views:
      self._heads["view"] = head(prototypes)
    if masks:
      self._heads["patch"] = head(patch_prototypes)
    self._weights = dict(view=views, patch=masks)
    self._tower, self._size = tower, tower.sizes()
    self._what, self._mesh, self._span = what, model.mesh, span
    self._share, self._momentum = hidden_share, momentum
    self._centre_momentum, self._chunk = centre_momentum, chunk
    self._temperatures = temperature, teacher_temperature

  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    needed = ["global", "local"] if "view" in self._heads else ["global"]
    for name in needed:
      if name not in batch:
        raise errors.UserError(
          f"{self._what} needs examples with {' and '.join(needed)}: put the "
          f"op {name}_view{'s' if name == 'local' else ''} between decode and "
          "resize in the pp of its phase, and keep what it makes"
        )
    self._hidden(batch["global"])  # raises
    keys = jax.random.split(key, 3)
    x = jnp.zeros((1, self._size.width))
    params: dict[str, Any] = {
      name: head.init(k, x)["params"]
      for k, (name, head) in zip(keys, self._heads.items())
    }
    if "patch" in self._heads:  # iBOT: what stands in a hidden patch's place
      draw = nn.initializers.normal(0.02)
      params["token"] = draw(keys[2], (self._size.width,), jnp.float32)
    return params

  def hold(self, params: dict) -> dict:
    teacher = {"img": params["img"], self.part: dict(params[self.part])}
    teacher[self.part].pop("token", None)  # its patches are all there
    wide = lambda x: jnp.asarray(x, jnp.float32)
    return dict(teacher=jax.tree.map(wide, teacher), centre=self.nothing())

  def nothing(self) -> dict:
    """Returns {head: (K,)}, the sums of the teacher's logits."""
    heads = self._heads.items()
    return {k: jnp.zeros(head.prototypes, jnp.float32) for k, head in heads}

  def after(self, held: dict, params: dict, means: Any, step: Any) -> dict:
    first, last = self._span
    done = jnp.clip((step - first + 1) / max(last - first, 1), 0, 1)
    rest = (1 - self._momentum) * (1 + jnp.cos(jnp.pi * done)) / 2
    now = self.hold(params)["teacher"]
    move = lambda by: lambda old, new: old + by * (new - old)
    new = 1 - self._centre_momentum
    return dict(
      teacher=jax.tree.map(move(rest), held["teacher"], now),
      centre=jax.tree.map(move(new), held["centre"], means),
    )

  def __call__(
    self,
    params: dict,
    held: dict,
    out: Mapping[str, Array],
    batch: Mapping,
    keys: Array,
  ) -> tuple[Float[Array, ""], dict]:
    teacher = held["teacher"]
    views = batch["global"]
    theirs = self._see(teacher["img"], views)
    total, sums = jnp.zeros((), jnp.float32), {}
    if "view" in self._heads:
      local = batch["local"]
      n, count = local.shape[:2]
      x = local.reshape(n * count, *local.shape[2:])
      student = self._see(params["img"], x)["pre_logits"]
      student = student.reshape(n, count, -1)
      found = self._compare("view", params, held, student, theirs["pre_logits"])
      total, sums["view"] = total + found[0], found[1]
    if "patch" in self._heads:
      places, mask = self._draw(batch["global"], keys)
      token = params[self.part]["token"]
      seen = self._see(params["img"], views, hidden=(mask, token))
      # Said so, or XLA would gather the rows of all devices.
      take = sharding.on_each_device(
        lambda x, at: jnp.take_along_axis(x, at[..., None], axis=1), self._mesh
      )
      patches, wanted = (
        take(self._patches(x), places).reshape(-1, x["encoded"].shape[2])
        for x in (seen, theirs)
      )
      found = self._compare("patch", params, held, patches[:, None], wanted)
      count = places.shape[1]  # an example's loss is the mean over its patches
      total, sums["patch"] = total + found[0] / count, found[1] / count
    return total, sums

  def flops(self, out: Mapping[str, Any], batch: Mapping) -> int:
    tower, width = self._tower, self._size.width
    view = flops.vit(tower, *batch["global"].shape[1:])
    total = view
    if head := self._heads.get("view"):
      count = batch["local"].shape[1]
      local = flops.vit(tower, *batch["local"].shape[2:])
      total += 3 * count * (local + head.flops(width)) + head.flops(width)
    if head := self._heads.get("patch"):
      count = self._hidden(batch["global"])[1]
      total += 3 * view + 4 * count * head.flops(width)
    return total

  # ---- Parts ----

  def _see(self, params: dict, views: Array, hidden: Any = None) -> dict:
    """Returns the tower's intermediates of views of any size."""
    grid = self._grid(views.shape)
    if "pos_embedding" in params:
      table = vit.resized_positions(params["pos_embedding"], grid)
      params = {**params, "pos_embedding": table}
    # After a reshape XLA splits rows over some of the devices alone.
    views = sharding.split_rows(views, self._mesh)
    found: Any = self._tower.apply({"params": params}, views, hidden=hidden)
    return found[1]

  def _compare(
    self, name: str, params: dict, held: dict, student: Array, teacher: Array
  ) -> tuple[Array, Array]:
    """Returns the weighted loss of a head, and the teacher's logits; sums."""
    head = self._heads[name]
    own: Any = head.apply({"params": params[self.part][name]}, student)
    of: Any = held["teacher"][self.part][name]
    theirs: Any = head.apply({"params": of}, teacher)
    value, seen = prototypes.distillation(
      own[0],
      theirs[0],
      own[1],
      theirs[1],
      held["centre"][name],
      temperature=self._temperatures[0],
      teacher_temperature=self._temperatures[1],
      chunk=self._chunk,
      mesh=self._mesh,
    )
    return self._weights[name] * value, seen

  def _draw(self, views: Array, keys: Array) -> tuple[Int[Array, "n M"], Any]:
    """Returns the numbers of hidden patches, and the mask (n, P) of them."""
    patches, count = self._hidden(views)
    ranks = jax.vmap(lambda key: jax.random.permutation(key, patches))(keys)
    return jnp.argsort(ranks, axis=1)[:, :count], ranks < count

  def _hidden(self, views: Any) -> tuple[int, int]:
    """Returns how many patches a view has, and how many of them are hidden."""
    rows, columns = self._grid(views.shape)
    count = round(rows * columns * self._share)
    if "patch" in self._heads and not 0 < count < rows * columns:
      raise errors.UserError(
        f"{self._what}.hidden_share is {self._share}: of {rows} x {columns} "
        f"patches that hides {count}"
      )
    return rows * columns, count

  def _grid(self, shape: Any) -> tuple[int, int]:
    side = self._tower.patch()
    return shape[1] // side, shape[2] // side

  def _patches(self, out: Mapping[str, Array]) -> Array:
    """Returns the patches' vectors, without that of "cls"."""
    cls = self._tower.pool_type == "tok"
    return out["encoded"][:, 1:] if cls else out["encoded"]
