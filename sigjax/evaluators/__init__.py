"""Evaluations by name. Each is given embeddings, never a model."""

from collections.abc import Callable, Mapping
import inspect
import json
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float
import numpy as np

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.source import Source

if TYPE_CHECKING:
  from sigjax.evaluators.embedder import Embedder


class Embed(Protocol):
  """Embeds a batch of images or of texts.

  Returns:
    zimg, ztxt: (B, E) with unit rows; None for an input not given.
    features: (B, W), the image tower's output before its head, not normalised;
      None without images.
  """

  def __call__(
    self, *, image: Any = None, text: Any = None
  ) -> tuple[
    Float[Array | np.ndarray, "B E"] | None,
    Float[Array | np.ndarray, "B E"] | None,
    Float[Array | np.ndarray, "B W"] | None,
  ]: ...


class Row(NamedTuple):
  """One result.

  Attributes:
    metric: its name.
    value: a fraction, 0 to 1.
    chance: the value that random embeddings reach on average.
    n: the number of queries: images, or texts.
    left_out: the number of further queries that cannot be used, such as images
      that cannot be decoded.
  """

  metric: str
  value: float
  chance: float
  n: int
  left_out: int = 0

  def count(self) -> str:
    """Returns n for people, as "481" or "478, 3 left out"."""
    return f"{self.n}" + f", {self.left_out} left out" * bool(self.left_out)

  def __str__(self) -> str:
    return (
      f"{self.metric} {self.value:.1%} "
      f"(chance {self.chance:.2%}, n {self.count()})"
    )


class Evaluator(Protocol):
  """What config.evals names.

  Attributes:
    source: the examples it evaluates on.
  """

  source: Source

  def run(self, embedder: "Embedder", mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the results; every process calls it.

    Args:
      embedder: embeds with the model; evaluations of one round share it.
      mesh: the devices to compute on.
    """
    ...


# An evaluation is imported when a config names it.


def _retrieval() -> Callable[..., Evaluator]:
  from sigjax.evaluators import retrieval

  return retrieval.Retrieval


def _zeroshot() -> Callable[..., Evaluator]:
  from sigjax.evaluators import zeroshot

  return zeroshot.ZeroShot


def _fewshot() -> Callable[..., Evaluator]:
  from sigjax.evaluators import fewshot

  return fewshot.FewShot


def _xm3600() -> Callable[..., Evaluator]:
  from sigjax.evaluators import xm3600

  return xm3600.xm3600


def _foreground() -> Callable[..., Evaluator]:
  from sigjax.evaluators import dense

  return dense.Foreground


def _captions() -> Callable[..., Evaluator]:
  from sigjax.evaluators import captioning

  return captioning.Captions


def _picture() -> Callable[..., Evaluator]:
  from sigjax.evaluators import picture

  return picture.Picture


EVALUATORS = dict(
  retrieval=_retrieval,
  zeroshot=_zeroshot,
  fewshot=_fewshot,
  xm3600=_xm3600,
  foreground=_foreground,
  captions=_captions,
  picture=_picture,
)


DATA = ("data", "data_test", "shown")  # arguments that are sources


def make(
  what: str,
  path: pathlib.Path,
  options: Mapping[str, Any],
  shared: Mapping[str, Any],
  opened: dict[str, Source] | None = None,
) -> Evaluator:
  """Builds the evaluator of one section of config.evals.

  Args:
    what: the section's name in errors, such as "config.evals.retrieval".
    path: the PNG that a picture is written to.
    options: "type", a name in EVALUATORS, and the evaluator's own arguments.
      Those of DATA may be arguments of kinds.open_source.
    shared: arguments for evaluators that take them, unless in options.
    opened: {arguments: source}; evaluators that are made with the same dict
      share sources.

  Raises:
    UserError: the type is unknown, or an argument is; or there is no such data.
  """
  opened = {} if opened is None else opened
  options = dict(options)
  name = options.pop("type", None)
  evaluator = errors.pick(EVALUATORS, name, f"{what}.type")()
  taken = inspect.signature(evaluator).parameters
  options = {k: v for k, v in shared.items() if k in taken} | options
  for key in DATA:
    section = options.get(key)
    if isinstance(section, Mapping) and key in taken:
      arguments = json.dumps(section, sort_keys=True, default=repr)
      if arguments not in opened:
        opened[arguments] = errors.call(
          kinds.open_source, section, f"{what}.{key}"
        )
      options[key] = opened[arguments]
  extra = {"path": path} if name == "picture" else {}
  return errors.call(evaluator, options, what, **extra)
