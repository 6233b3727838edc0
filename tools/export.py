"""Writes each tower with its weights as StableHLO, to run without sigjax.

  python -m tools.export --weights WORKDIR --out FOLDER

--weights is the name of a released model, a workdir, a folder of Hugging Face
or a file; see tools/opened.py. FOLDER then holds:

  image.stablehlo  images (B, H, W, 3), the pixels of pp_image -> (B, E) float32
  text.stablehlo   tokens (B, L) int32 -> (B, E) float32
  export.json      shapes, dtypes, pp_image, pp_text, t (the temperature) and b:
                   sigmoid(t * cosine + b) is the probability of a pair
  tokenizer.model  the SentencePiece model

B is any batch size. Rows have unit length. The same files run on CPU, CUDA and
TPU. All that reads them is JAX (and flatbuffers, pip install 'sigjax[export]'):

  from jax import export
  embed = export.deserialize(bytearray(open("image.stablehlo", "rb").read()))
  zimg = embed.call(images)
"""

import importlib.util
import json
import os
from typing import Any

from absl import flags
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from sigjax import errors
from sigjax.data.example import preprocess
from sigjax.models import two_towers
from sigjax.runtime import program
from tools import opened
from tools.embedding import tower as tower_lib
from tools.hf import config as hf_config

FLAGS = flags.FLAGS

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
  weights: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
  """Writes the folder `out`, all of it or nothing.

  Args:
    weights: see opened.open_model.
    out: the folder to make; it must not exist yet.

  Returns:
    What export.json holds.

  Raises:
    UserError: there is no such model, or the folder exists; or flatbuffers is
      not installed.
  """
  if importlib.util.find_spec("flatbuffers") is None:
    raise errors.UserError(
      "flatbuffers, with which exported functions are written, is not "
      "installed; pip install 'sigjax[export]'"
    )
  model = opened.open_model(weights)
  towers = two_towers.of_config(model.config["model"])
  params = jax.device_get(model.params)
  rng = np.random.default_rng(0)
  pp_text = preprocess.parse(model.config["pp_text"], tokenizer=model.tokenizer)
  inputs = dict(
    image=tower_lib.blank(model.config["pp_image"]),
    text=np.asarray(pp_text({"text": "a"}, rng)["text"]),
  )

  def embed(x, key):
    given: dict[str, Any] = {"image": None, "text": None, key: x}
    z = towers.apply({"params": params}, given["image"], given["text"])
    return z[0 if key == "image" else 1].astype(jnp.float32)  # pyright: ignore

  out_of = towers.apply({"params": params}, None, None)
  about = dict(
    weights=model.name,
    t=float(out_of[2]["t"][0]),  # pyright: ignore
    b=float(out_of[2]["b"][0]),  # pyright: ignore
    pp_image=model.config["pp_image"],
    pp_text=model.config["pp_text"],
    inputs={k: [["B", *x.shape], str(x.dtype)] for k, x in inputs.items()},
    platforms=PLATFORMS,
  )
  with hf_config.new_folder(out) as folder:
    for key, x in inputs.items():
      (batch,) = jax_export.symbolic_shape("b")
      like = jax.ShapeDtypeStruct((batch, *x.shape), x.dtype)
      fn = jax.jit(lambda x, key=key: embed(x, key))
      found = jax_export.export(fn, platforms=PLATFORMS)(like)
      (folder / f"{key}.stablehlo").write_bytes(found.serialize())
    hf_config.write_json(folder / "export.json", about)
    (folder / "tokenizer.model").write_bytes(model.tokenizer.model)
  return about


def main(argv: list[str]) -> None:
  """Runs the program."""
  del argv
  about = export(FLAGS.weights, FLAGS.out)
  print(f"wrote {FLAGS.out}, with export.json:\n{json.dumps(about, indent=1)}")


if __name__ == "__main__":
  flags.DEFINE_string(
    "weights", None, "A released model's name, a workdir, a folder or a file."
  )
  flags.DEFINE_string("out", None, "The folder to write.")
  flags.mark_flags_as_required(["weights", "out"])
  program.run(main)
