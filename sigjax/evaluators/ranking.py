"""Embedding a whole dataset, and the rank of the right answer."""

from collections.abc import Hashable, Sequence
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from sigjax import sharding
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed

BLOCK = 1024  # queries compared at a time, on all devices together


class Texts:
  """Texts as the records of a Source."""

  def __init__(self, texts: Sequence[str]):
    self._texts = texts

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, i: int) -> dict[str, str]:
    return dict(text=self._texts[i])


def embed_all(
  embed: Embed,
  source: Source,
  pp: str,
  tokenizer: Tokenizer,
  batch_size: int,
  bad_fraction: float,
) -> tuple[Float[np.ndarray, "N E"], Bool[np.ndarray, " N"]]:
  """Embeds every example of a source once, in order.

  Args:
    embed: the model.
    source: N examples.
    pp: preprocessing string that keeps "image" or "text".
    tokenizer: for its tokenize op.
    batch_size: B.
    bad_fraction: the largest fraction of examples that may be unusable.

  Returns:
    The embeddings, float32, and which of them are of usable examples. Every
    process gets all of them.
  """
  fn = preprocess.parse(pp, tokenizer=tokenizer)
  rows, usable = [], []
  for batch in pipeline.eval_batches(
    source,
    fn,
    batch_size=batch_size,
    bad_fraction=bad_fraction,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ):
    mask = batch.pop("_mask")
    zimg, ztxt = embed(**batch)
    z = zimg if ztxt is None else ztxt
    z, mask = multihost_utils.process_allgather((z, mask), tiled=True)
    rows.append(np.asarray(z))
    usable.append(np.asarray(mask))
  n = len(source)  # the last batch may go on past it
  return np.concatenate(rows)[:n], np.concatenate(usable)[:n]


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
