"""Losses beside the pair loss: the terms of config.losses.

A term is a function of the towers' intermediates and the batch, with parameters
of its own beside the towers'. It is a sum over examples, divided by B, so that
it comes out the same however the batch is split, over devices or microbatches.
"""

from collections.abc import Callable, Mapping
import inspect
from typing import Any, NamedTuple, Protocol
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sigjax import errors
from sigjax.models.two_towers import TwoTowers


class Kind(Protocol):
  """What a section's type names; it is made from (what, model, **arguments).

  `what` is the section's name in errors, such as "config.losses.caption".

  Attributes:
    part: the name of its parameters in the tree, such as "dec".
  """

  part: str

  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    """Returns its parameters from scratch.

    Args:
      key: of jax.random.
      out: the towers' intermediates, of one example.
      batch: that example, dict(image=(1, ..), text=(1, L)).

    Raises:
      UserError: the towers or the texts are none that it can use.
    """
    ...

  def __call__(
    self, params: dict, out: Mapping[str, Array], batch: Mapping, keys: Array
  ) -> Float[Array, ""]:
    """Returns the sum of these examples' losses, float32.

    Args:
      params: from init.
      out: the towers' intermediates, see TwoTowers.
      batch: the examples, n rows each.
      keys: (n,) of jax.random, for what is drawn for an example.
    """
    ...

  def flops(self, out: Mapping[str, Any], batch: Mapping) -> int:
    """Returns the FLOPs of an example forwards; arguments as of init."""
    ...


class Term(NamedTuple):
  """A section of config.losses.

  Attributes:
    name: the section's; its metric is called so.
    weight: of the loss, beside the pair loss's 1.
    from_steps: before this step the weight is 0.
    kind: what is computed.
  """

  name: str
  weight: float
  from_steps: int
  kind: Kind

  def weight_at(self, step: Any) -> Float[Array, ""]:
    """Returns the weight in a step, of which the first is 0."""
    on = jnp.asarray(step) >= self.from_steps
    return jnp.where(on, jnp.float32(self.weight), jnp.float32(0))

  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    """Returns {part: parameters}, see Kind.init."""
    return {self.kind.part: self.kind.init(self._own(key), out, batch)}

  def total(
    self,
    params: dict,
    out: Mapping[str, Array],
    batch: Mapping,
    key: Array,
    places: Int[Array, " n"],
  ) -> Float[Array, ""]:
    """Returns the sum of these examples' losses, float32.

    Args:
      params: all parameters.
      out, batch: see Kind.
      key: of the step.
      places: the rows' numbers in the whole batch. What is drawn for an example
        depends on them, not on the examples beside it.
    """
    key = self._own(key)
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    return self.kind(params[self.kind.part], out, batch, keys)

  def _own(self, key: Array) -> Array:
    """Returns a key that no other term has, whatever terms there are."""
    return jax.random.fold_in(key, zlib.crc32(self.name.encode()))


def _caption() -> Callable[..., Kind]:
  from sigjax.terms import caption

  return caption.Caption


# The choices of a section's type; each is imported when it is named.
TERMS: dict[str, Callable[[], Callable[..., Kind]]] = {"caption": _caption}

# The metrics of a step that are not of a term.
TAKEN = ("step", "loss", "t", "b", "pos_logit", "neg_logit", "lr")


def make(
  sections: Mapping[str, Mapping[str, Any]], model: TwoTowers
) -> tuple[Term, ...]:
  """Returns the terms of config.losses.

  Args:
    sections: {name: {"type": one of TERMS, arguments of `term`}}, durations in
      steps.
    model: the towers.

  Raises:
    UserError: an unknown type, an argument that it does not take, a name that
      is another metric's, or two terms with the same parameters.
  """
  found: dict[str, Term] = {}
  for name, section in sections.items():
    what = f"config.losses.{name}"
    if name in TAKEN or name.endswith("_norm") or "/" in name:
      raise errors.UserError(f"{what}: a metric is called so; rename it")
    section = dict(section)
    kind = errors.pick(TERMS, section.pop("type", None), f"{what}.type")()
    own = {k: section.pop(k) for k in list(section) if k not in _shared()}
    it = errors.call(kind, own, what, what, model)
    if it.part in found:
      raise errors.UserError(
        f"{what} has the same parameters as config.losses."
        f"{found[it.part].name}: take one of them out"
      )
    found[it.part] = term(name, it, **section)
  return tuple(found.values())


def term(
  name: str, kind: Kind, *, weight: float = 1.0, from_steps: int = 0
) -> Term:
  """Returns a term; the keywords are those of every section.

  Args:
    name, kind: see Term.
    weight: of the loss (SigLIP 2: 1 for captions).
    from_steps: before this step the weight is 0; in a config also from_percent
      and other units.

  Raises:
    UserError: the weight is no number from 0 on.
  """
  if (
    isinstance(weight, bool)
    or not isinstance(weight, (int, float))
    or (not 0 <= weight < float("inf"))
  ):
    raise errors.UserError(
      f"config.losses.{name}.weight is {weight!r}, but has to be a number "
      "from 0 on"
    )
  return Term(name, float(weight), from_steps or 0, kind)


def _shared() -> list[str]:
  return list(inspect.signature(term).parameters)[2:]
