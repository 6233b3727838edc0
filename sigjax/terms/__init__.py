"""Losses beside the pair loss: the terms of config.losses.

A term is a function of the towers' intermediates and the batch, with parameters
of its own beside the towers'. It is a sum over examples, divided by B, so that
it comes out the same however the batch is split, over devices or microbatches.
What it keeps from step to step without training it, such as a teacher, is in
TrainState.held.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
import inspect
from types import MappingProxyType
from typing import Any, NamedTuple
import zlib

import jax
from jaxtyping import Array, Float, Int

from sigjax import errors
from sigjax.models.two_towers import TwoTowers


class Span(NamedTuple):
  """The steps of a term: from the first one, which is 0, to the run's last."""

  first: int
  last: int


class Kind(abc.ABC):
  """What a section's type names; made from (what, model, span, **arguments).

  `what` is the section's name in errors, such as "config.losses.caption".

  Attributes:
    part: the name of its parameters in the tree, and of what it holds, such as
      "dec".
    teaches: the tower that it is no use to lock, "img" or "txt"; or "".
  """

  part: str
  teaches = ""

  @abc.abstractmethod
  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    """Returns its parameters from scratch.

    Args:
      key: of jax.random.
      out: the towers' intermediates, of one example.
      batch: that example, dict(image=(1, ..), text=(1, L), ..).

    Raises:
      UserError: the towers or the examples are none that it can use.
    """

  @abc.abstractmethod
  def __call__(
    self,
    params: dict,
    held: dict,
    out: Mapping[str, Array],
    batch: Mapping,
    keys: Array,
  ) -> tuple[Float[Array, ""], Any]:
    """Returns the sum of these examples' losses, and what `after` is to know.

    Args:
      params: all parameters: params[self.part] are its own.
      held: what it holds.
      out: the towers' intermediates, see TwoTowers.
      batch: the examples, n rows each.
      keys: (n,) of jax.random, for what is drawn for an example.

    Returns:
      float32 (); and a tree like `nothing()`, of sums over the examples.
    """

  @abc.abstractmethod
  def flops(self, out: Mapping[str, Any], batch: Mapping) -> int:
    """Returns the FLOPs of training on an example; arguments as of init."""

  def hold(self, params: dict) -> dict:
    """Returns what it holds at first, given all parameters; {} for nothing."""
    del params
    return {}

  def nothing(self) -> Any:
    """Returns the sums over no examples, a tree of zeros; {} for none."""
    return {}

  def after(self, held: dict, params: dict, means: Any, step: Any) -> dict:
    """Returns what it holds after a step.

    Args:
      held: what it held until then.
      params: all parameters, updated.
      means: over the batch, of what was summed.
      step: the number of the step; the first of the run is 0.
    """
    del params, means, step
    return held


class Term(NamedTuple):
  """A section of config.losses.

  Attributes:
    name: the section's; its metric is called so.
    weight: of the loss, beside the pair loss's 1.
    kind: what is computed.
  """

  name: str
  weight: float
  kind: Kind

  def init(self, key: Array, out: Mapping[str, Any], batch: Mapping) -> dict:
    """Returns {part: parameters}, see Kind.init."""
    return {self.kind.part: self.kind.init(self._own(key), out, batch)}

  def total(
    self,
    params: dict,
    held: dict,
    out: Mapping[str, Array],
    batch: Mapping,
    key: Array,
    places: Int[Array, " n"],
  ) -> tuple[Float[Array, ""], Any]:
    """Returns the sum of these examples' losses and other sums, see Kind.

    Args:
      params: all parameters.
      held: what all terms hold, by the part.
      out, batch: see Kind.
      key: of the step.
      places: the rows' numbers in the whole batch. What is drawn for an example
        depends on them, not on the examples beside it.
    """
    key = self._own(key)
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    return self.kind(params, held.get(self.kind.part, {}), out, batch, keys)

  def _own(self, key: Array) -> Array:
    """Returns a key that no other term has, whatever terms there are."""
    return jax.random.fold_in(key, zlib.crc32(self.name.encode()))


def _caption() -> Callable[..., Kind]:
  from sigjax.terms import caption

  return caption.Caption


def _distill() -> Callable[..., Kind]:
  from sigjax.terms import distill

  return distill.Distill


# The choices of a section's type; each is imported when it is named.
TERMS: dict[str, Callable[[], Callable[..., Kind]]] = {
  "caption": _caption,
  "distill": _distill,
}

# The metrics of a step that are not of a term.
TAKEN = ("step", "loss", "t", "b", "pos_logit", "neg_logit", "lr")


def make(
  sections: Mapping[str, Mapping[str, Any]],
  model: TwoTowers,
  spans: Mapping[str, Span] = MappingProxyType({}),
) -> tuple[Term, ...]:
  """Returns the terms of config.losses.

  Args:
    sections: {name: {"type": one of TERMS, arguments of `term`}}.
    model: the towers.
    spans: {name: Span} of terms whose arguments change with the step.

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
    span = spans.get(name, Span(0, 1))
    it = errors.call(kind, own, what, what, model, span)
    if it.part in found:
      raise errors.UserError(
        f"{what} has the same parameters as config.losses."
        f"{found[it.part].name}: take one of them out"
      )
    found[it.part] = term(name, it, **section)
  return tuple(found.values())


def term(name: str, kind: Kind, *, weight: float = 1.0) -> Term:
  """Returns a term; the keywords are those of every section.

  Args:
    name, kind: see Term.
    weight: of the loss (SigLIP 2: 1 for captions).

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
  return Term(name, float(weight), kind)


def check_lock(term: Term, lock: Sequence[str]) -> None:
  """Raises UserError if config.lock leaves a term nothing to learn."""
  if term.kind.teaches in lock:
    raise errors.UserError(
      f'config.losses.{term.name} is there to train "{term.kind.teaches}", '
      "but config.lock locks it: take one of them out"
    )


def _shared() -> list[str]:
  return list(inspect.signature(term).parameters)[2:]
