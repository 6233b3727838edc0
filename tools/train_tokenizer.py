"""Trains a SentencePiece tokenizer on the captions of a dataset.

  python -m tools.train_tokenizer --source emoji --vocab_size 4000 \
      --out tokenizer.model
  python -m tools.train_tokenizer --source tfds --name coco_captions \
      --split train --vocab_size 32000 --out coco.model
  python -m tools.train_tokenizer --source tar \
      --path 'data/{00000..00099}.tar' --vocab_size 32000 --out own.model

The captions are lower-cased first, because `lower|tokenize` will lower-case
them in training, too. If your preprocessing has no `lower`, give --nolower.
"""

from absl import flags

from sigjax.data import kinds
from sigjax.data.example import tokenizer
from sigjax.runtime import program

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  kind = FLAGS.source
  has_splits = kind in ("tfds", "emoji")
  path = "path" if kind in ("folder", "embeddings") else "shards"
  given = {
    "name": FLAGS.name,
    "split": FLAGS.split or ("train" if has_splits else None),
    "data_dir": FLAGS.data_dir,
    path: FLAGS.path,
  }
  source = kinds.open_source(
    kind, **{k: v for k, v in given.items() if v is not None}
  )
  texts = kinds.all_captions(source, FLAGS.captions)
  if FLAGS.lower:
    texts = (text.lower() for text in texts)
  tokenizer.train(
    texts,
    FLAGS.vocab_size,
    FLAGS.out,
    FLAGS.character_coverage,
    FLAGS.byte_fallback,
  )
  pieces = tokenizer.Tokenizer(FLAGS.out).vocab_size
  print(f"wrote {FLAGS.out}: {pieces} pieces from {source.name}")


if __name__ == "__main__":
  flags.DEFINE_enum(
    "source", "emoji", sorted(set(kinds.SOURCES) - {"mix"}), "Kind of source."
  )
  flags.DEFINE_string(
    "path", None, "The folder (folder, embeddings) or shards (tar, parquet)."
  )
  flags.DEFINE_string("name", None, "The dataset, for --source tfds.")
  flags.DEFINE_string("data_dir", None, "The folder of TFDS's datasets.")
  flags.DEFINE_string(
    "split", None, "The split, for tfds and emoji; train if not given."
  )
  flags.DEFINE_string("captions", "captions", "The feature with the captions.")
  flags.DEFINE_boolean("lower", True, "Lower-cases the captions.")
  flags.DEFINE_integer(
    "vocab_size", None, "The number of pieces.", lower_bound=1
  )
  flags.DEFINE_float(
    "character_coverage",
    tokenizer.CHARACTER_COVERAGE,
    "The share of letters whose characters become pieces; 1 for many scripts.",
  )
  flags.DEFINE_boolean(
    "byte_fallback", False, "Encodes characters that are no piece as bytes."
  )
  flags.DEFINE_string("out", None, "The file to write.")
  flags.mark_flags_as_required(["vocab_size", "out"])
  program.run(main)
