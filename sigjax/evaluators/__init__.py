"""Evaluations by name. Each is given an `embed` function, never a model."""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float
import numpy as np

from sigjax import errors
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source


class Embed(Protocol):
  """Embeds a batch of images or of texts.

  Returns:
    zimg, ztxt, each (B, E) with unit rows, or None for an input not given.
  """

  def __call__(
    self, *, image: Any = None, text: Any = None
  ) -> tuple[
    Float[Array | np.ndarray, "B E"] | None,
    Float[Array | np.ndarray, "B E"] | None,
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

  def run(self, embed: Embed, mesh: jax.sharding.Mesh) -> list[Row]:
    """Returns the results; every process calls it.

    Args:
      embed: the model.
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


def _picture() -> Callable[..., Evaluator]:
  from sigjax.evaluators import picture

  return picture.Picture


EVALUATORS = dict(retrieval=_retrieval, zeroshot=_zeroshot, picture=_picture)


def make(
  what: str,
  path: pathlib.Path,
  tokenizer: Tokenizer,
  options: dict[str, Any],
) -> Evaluator:
  """Builds the evaluator of one section of config.evals.

  Args:
    what: the section's name in errors, such as "config.evals.retrieval".
    path: the PNG that a picture is written to.
    tokenizer: of the run.
    options: "type", a name in EVALUATORS, and the evaluator's own arguments.

  Raises:
    UserError: the type is unknown, or an argument is.
  """
  options = dict(options)
  name = options.pop("type", None)
  evaluator = errors.pick(EVALUATORS, name, f"{what}.type")()
  extra = {"path": path} if name == "picture" else {}
  return errors.call(evaluator, options, what, tokenizer, **extra)
