"""Trains a SentencePiece tokenizer on the captions of a dataset.

  python -m tools.train_tokenizer --source emoji --split train \
      --captions captions --vocab_size 4000 --out tokenizer.model
  python -m tools.train_tokenizer --source tfds --name coco_captions \
      --split train --captions captions --vocab_size 32000 --out coco.model
  python -m tools.train_tokenizer --source tar \
      --path 'data/{00000..00099}.tar' --vocab_size 32000 --out own.model

The captions are lower-cased unless --nolower: train on what `lower|tokenize`
will see.
"""

import sys

from absl import app, flags

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.example import tokenizer

_SOURCE = flags.DEFINE_enum(
  "source", "emoji", sorted(set(kinds.SOURCES) - {"mix"}), "Kind."
)
_PATH = flags.DEFINE_string(
  "path", None, "The folder of folder and embeddings, the shards of others."
)
_NAME = flags.DEFINE_string("name", None, "Dataset, for --source tfds.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where datasets are.")
_SPLIT = flags.DEFINE_string(
  "split", None, "Split of tfds and emoji; train if unset."
)
_CAPTIONS = flags.DEFINE_string("captions", "captions", "Feature to read.")
_LOWER = flags.DEFINE_boolean("lower", True, "Whether to lower-case captions.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Pieces.", required=True)
_OUT = flags.DEFINE_string("out", None, "Model to write.", required=True)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]}?")
  kind = _SOURCE.value
  path = "path" if kind in ("folder", "embeddings") else "shards"
  split = "train" if kind in ("tfds", "emoji") else None
  given = {
    "name": _NAME.value,
    "split": _SPLIT.value or split,
    "data_dir": _DATA_DIR.value,
    path: _PATH.value,
  }
  try:
    source = kinds.open_source(
      kind, **{k: v for k, v in given.items() if v is not None}
    )
    texts = kinds.all_captions(source, _CAPTIONS.value)
    if _LOWER.value:
      texts = (text.lower() for text in texts)
    tokenizer.train(texts, _VOCAB_SIZE.value, _OUT.value)
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  pieces = tokenizer.Tokenizer(_OUT.value).vocab_size
  print(f"wrote {_OUT.value}: {pieces} pieces from {source.name}")


if __name__ == "__main__":
  app.run(main)
