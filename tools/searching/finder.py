"""Finds the pictures that fit a text, or another picture, best."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tools.predict import Predictor
from tools.searching.pictures import Pictures


class Found(NamedTuple):
  """A picture that was found.

  Attributes:
    file: its path within the folder.
    cosine: of its embedding and that of what was asked.
    probability: sigmoid(t * cosine + b); None if a picture was asked.
  """

  file: str
  cosine: float
  probability: float | None


class Finder:
  """Finds the pictures of a folder.

  Args:
    predictor: embeds what is asked.
    pictures: the same predictor's embeddings of the pictures.

  Attributes:
    name: the model's, for people.
    pictures: the same.
  """

  name: str
  pictures: Pictures

  def __init__(self, predictor: Predictor, pictures: Pictures):
    self.name, self.pictures = predictor.name, pictures
    self._predictor = predictor

  def by_text(self, text: str, count: int) -> list[Found]:
    """Returns the `count` pictures that fit a text best, the best one first."""
    rows, cosine = self._best(self._predictor.text(text), count)
    probability = np.asarray(
      self._predictor.probability(jnp.asarray(cosine)[None])
    )[0]
    return [
      Found(self.pictures.files[i], float(s), float(p))
      for i, s, p in zip(rows, cosine, probability)
    ]

  def by_picture(self, data: bytes, count: int) -> list[Found]:
    """Returns the `count` pictures most like an encoded image.

    Raises:
      BadExample: it cannot be decoded.
    """
    rows, cosine = self._best(self._predictor.image(data), count)
    return [
      Found(self.pictures.files[i], float(s), None)
      for i, s in zip(rows, cosine)
    ]

  def _best(self, query: Array, count: int):
    return best(self.pictures.z, np.asarray(query), count)


def best(
  z: Float[np.ndarray, "N E"], query: Float[np.ndarray, " E"], count: int
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Returns the rows with the largest products, and these.

  Args:
    z: unit rows, float32: NumPy multiplies float16 many times slower.
    query: a unit row, float32.
    count: how many; n is N if there are fewer.
  """
  cosine = z @ query
  count = min(count, len(z))
  rows = np.argpartition(-cosine, count - 1)[:count]
  rows = rows[np.lexsort((rows, -cosine[rows]))]
  return rows, cosine[rows]


def percent(probability: float | None) -> str:
  """Returns a probability for people, "" for None."""
  return "" if probability is None else f"{100 * probability:.2g}%"
