"""Finds pictures in a folder by words, or by another picture.

  python -m tools.search --weights siglip2/b16_256 --path pictures
  python -m tools.search --weights WORKDIR --path pictures \\
    --query "a red car"

The first command serves a page on this machine alone, which needs Gradio (pip
install -e '.[demo]'): type a text or drop a picture. The second prints the
best pictures. Both look at all pictures in the folder and the folders in it.

--weights is the name of a released model, a workdir, a folder of Hugging Face
or a file; see tools/opened.py. Each picture is embedded once, on one device;
the embeddings are kept in ~/.cache/sigjax/search (or $SIGJAX_CACHE). Later only
new and changed pictures are embedded, and those that are gone are dropped.

Pictures found by words have the cosine s and the probability sigmoid(t * s + b)
of the pair; see tools/predict.py, which also says what --tower is. Pictures
found by a picture have the cosine alone: t and b were not learned for these.
"""

import errno
import socket

from absl import flags
from ml_collections import config_flags

from sigjax import errors
from sigjax.runtime import metrics, program
from tools.predict import Predictor
from tools.searching import finder as finder_lib
from tools.searching import page
from tools.searching import pictures as pictures_lib
from tools.searching.finder import Finder, Found

FLAGS = flags.FLAGS


def table(found: list[Found]) -> list[str]:
  """Returns lines for people, of pictures found by words."""
  return metrics.table(
    [
      (it.file, rank, f"{it.cosine:.3f}", finder_lib.percent(it.probability))
      for rank, it in enumerate(found, start=1)
    ],
    ("picture", "rank", "cosine", "probability"),
  )


def check_port(port: int) -> None:
  """Raises UserError if a port of this machine cannot be served."""
  with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      s.bind(("127.0.0.1", port))
    except OSError as e:
      why = "is in use" if e.errno == errno.EADDRINUSE else e.strerror
      raise errors.UserError(
        f"port {port} of this machine {why}; give another one by --port"
      ) from e


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  if FLAGS.query is None:  # what can fail at once comes first
    page.check_gradio()
    check_port(FLAGS.port)
  tower = FLAGS.tower.to_dict() if FLAGS.tower else None
  predictor = Predictor(FLAGS.weights, tower)
  pictures = pictures_lib.embed(FLAGS.path, predictor)
  print(f"model: {predictor.name}")
  print(
    f"pictures: {len(pictures.files)} in {pictures.folder}; files embedded "
    f"now: {pictures.embedded}; left out: {len(pictures.left_out)}"
  )
  finder = Finder(predictor, pictures)
  if FLAGS.query is None:
    page.serve(finder, FLAGS.port, FLAGS.best)
  else:
    print("\n".join(table(finder.by_text(FLAGS.query, FLAGS.best))))


if __name__ == "__main__":
  flags.DEFINE_string(
    "weights", None, "A released model's name, a workdir, a folder or a file."
  )
  flags.DEFINE_string("path", None, "The folder of pictures.")
  flags.DEFINE_string("query", None, "Prints what fits this text best.")
  flags.DEFINE_integer("best", 12, "How many are shown.", lower_bound=1)
  flags.DEFINE_integer(
    "port", 7860, "Of the page.", lower_bound=1, upper_bound=65535
  )
  config_flags.DEFINE_config_file(
    "tower", None, "The config of the tower, if images were precomputed."
  )
  flags.mark_flags_as_required(["weights", "path"])
  program.run(main)
