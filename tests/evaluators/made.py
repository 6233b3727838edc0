"""Sources, embeddings and evaluators that tests make."""

import jax.numpy as jnp
import numpy as np

from sigjax.data import kinds
from sigjax.evaluators.embedder import Embedder

RAW = dict(
  pp_image="keep('image')",
  pp_text="keep('text')",
  batch_size=16,
  bad_fraction=0.01,
)


def run(evaluator, embed, mesh, tokenizer=None):
  return evaluator.run(Embedder(embed, tokenizer), mesh)


def unit(rng, *shape):
  z = rng.normal(size=shape).astype(np.float32)
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def opened(monkeypatch, source, kind="made"):
  monkeypatch.setitem(kinds.SOURCES, kind, lambda: lambda: source)
  return dict(kind=kind)


def embed_by_number(zimg, text_of=None, calls=None):
  """Embeds image i as zimg[i] and a text as text_of(text).

  Preprocessing has to hand over the number as "image" and the text as it is.
  The features are zimg, too. What is embedded is appended to calls.
  """

  def embed(image=None, text=None):
    if calls is not None:
      calls.append(np.asarray(image if text is None else text).tolist())
    if text is None:
      z = jnp.asarray(zimg[np.asarray(image)])
      return z, None, z
    blank = np.zeros(zimg.shape[1], np.float32)  # a row past the end
    z = np.stack([text_of(str(t)) if t else blank for t in text])
    return None, jnp.asarray(z), None

  return embed
