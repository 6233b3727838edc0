"""The rank of the right answer, and what chance reaches."""

from collections.abc import Hashable, Sequence
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from sigjax import sharding

BLOCK = 1024  # queries compared at a time, on all devices together


@jax.jit
def _ranks(
  queries: Float[Array, "n E"],
  keys: Float[Array, "M E"],
  right: Bool[Array, "n M"],
) -> Int[Array, " n"]:
  scores = jnp.matmul(queries, keys.T, precision="highest")
  best = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
  # Not "scores >= best": with a NaN every wrong key must count as better.
  return jnp.sum(~right & ~(scores < best), axis=1)


def ranks(
  queries: Float[np.ndarray, "N E"],
  keys: Float[np.ndarray, "M E"],
  right: Sequence[Int[np.ndarray, " r"]],
  mesh: jax.sharding.Mesh,
) -> Int[np.ndarray, " N"]:
  """Counts the wrong keys that score at least as high as the best right key.

  A tie with a wrong key counts against the query: a model whose embeddings are
  all equal ranks last, not first.

  Args:
    queries: unit rows.
    keys: unit rows.
    right: the numbers of the right keys of each query.
    mesh: the devices; each takes a share of the queries, BLOCK at a time.

  Returns:
    The rank of each query; 0 is the best, M means that no key is right.
  """
  block = max(BLOCK // mesh.size, 1) * mesh.size
  part = block // jax.process_count()
  first = part * jax.process_index()  # of this process, in each block
  found = []
  for start in range(0, len(queries), block):
    q = np.zeros((part, queries.shape[1]), queries.dtype)
    is_right = np.zeros((part, len(keys)), bool)
    mine = slice(start + first, min(start + first + part, start + block))
    q[: len(queries[mine])] = queries[mine]
    for row, numbers in enumerate(right[mine]):
      is_right[row, numbers] = True
    q, is_right = sharding.put_batch((q, is_right), mesh)
    rank = multihost_utils.process_allgather(
      _ranks(q, keys, is_right), tiled=True
    )
    found.append(np.asarray(rank)[: len(queries) - start])
  return np.concatenate(found)


def chance(k: int, right: Int[np.ndarray, " N"], total: int) -> float:
  """Returns the mean probability that k random keys hold a right one.

  Args:
    k: the number of keys drawn, without replacement.
    right: the number of right keys of each query.
    total: M, the number of keys.
  """
  values, counts = np.unique(right, return_counts=True)
  miss = [math.comb(total - int(m), k) / math.comb(total, k) for m in values]
  return float(1 - np.dot(miss, counts) / counts.sum())


def number(labels: Sequence[Any]) -> tuple[Int[np.ndarray, " N"], list[Any]]:
  """Numbers the distinct labels in order of appearance.

  Returns:
    (ids, values): values[ids[i]] == labels[i].
  """
  values: list[Hashable] = list(dict.fromkeys(labels))
  place = {v: i for i, v in enumerate(values)}
  return np.array([place[label] for label in labels], np.int32), values
