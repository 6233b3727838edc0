"""Embedding a whole dataset, and the rank of the right answer."""

import math

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from sigjax import sharding
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess

BLOCK = 1024  # queries compared at a time, on all devices together


def embed_all(embed, source, pp, tokenizer, batch_size):
  """Embeds every example of a source once, in order.

  Args:
    embed: fn(image=..., text=...) -> (zimg, ztxt), (B, E) or None.
    source: a data source.
    pp: preprocessing string that keeps "image" or "text".
    tokenizer: for its tokenize op.
    batch_size: B.

  Returns:
    (N, E) float32 numpy array, on every process.
  """
  fn = preprocess.parse(pp, tokenizer=tokenizer)
  rows = []
  for batch in pipeline.eval_batches(
    source,
    fn,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ):
    mask = batch.pop("_mask")
    zimg, ztxt = embed(**batch)
    z = zimg if ztxt is None else ztxt
    z, mask = multihost_utils.process_allgather((z, mask), tiled=True)
    rows.append(np.asarray(z)[np.asarray(mask)])
  return np.concatenate(rows)


@jax.jit
def _ranks(queries, keys, query_ids, key_ids):
  scores = jnp.matmul(queries, keys.T, precision="highest")
  right = query_ids[:, None] == key_ids[None, :]
  best = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
  # Not "scores >= best": with a NaN every wrong key must count as better.
  return jnp.sum(~right & ~(scores < best), axis=1)


def ranks(queries, keys, query_ids, key_ids, mesh):
  """How many wrong keys score at least as high as each query's best right one.

  A tie counts against the query, so that equal embeddings are worth nothing.

  Args:
    queries: (N, E), keys: (M, E): unit rows.
    query_ids: (N,), key_ids: (M,) int: a key is right where they are equal.
    mesh: the queries are split over it, BLOCK at a time.

  Returns:
    (N,) int array; 0 is the best. M where a query has no right key.
  """
  block = max(BLOCK // mesh.size, 1) * mesh.size
  part = block // jax.process_count()
  found = []
  for start in range(0, len(queries), block):
    q, ids = queries[start : start + block], query_ids[start : start + block]
    short = block - len(q)
    q, ids = np.pad(q, ((0, short), (0, 0))), np.pad(ids, (0, short))
    mine = slice(part * jax.process_index(), part * (jax.process_index() + 1))
    q, ids = sharding.put_batch((q[mine], ids[mine]), mesh)
    rank = multihost_utils.process_allgather(
      _ranks(q, keys, ids, key_ids), tiled=True
    )
    found.append(np.asarray(rank)[: block - short])
  return np.concatenate(found)


def chance(k, right, total):
  """Mean probability that one of `right` keys is among k drawn of `total`.

  Args:
    k: how many are drawn.
    right: (N,) int, the number of right keys of each query.
    total: M.
  """
  values, counts = np.unique(right, return_counts=True)
  miss = [math.comb(total - int(m), k) / math.comb(total, k) for m in values]
  return float(1 - np.dot(miss, counts) / counts.sum())


def number(labels):
  """Returns (ids, values): ids[i] is the place of labels[i] among values."""
  values = list(dict.fromkeys(labels))
  place = {v: i for i, v in enumerate(values)}
  return np.array([place[label] for label in labels], np.int32), values
