"""A picture for people: images with their five best captions."""

import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sigjax import errors
from sigjax.data.example import images
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.evaluators import Embed, Row, retrieval

SIDE, WIDTH, LINE, GAP = 112, 400, 20, 12  # pixels: image, cell, text, margin


class Picture:
  """Draws examples and their best captions to a PNG.

  Args:
    tokenizer: of the run.
    path: the PNG to write.
    count: the number of examples, evenly spread over the split.
    best: the number of captions of each.
    **options: keyword arguments of Retrieval.
  """

  source: Source

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    path: pathlib.Path,
    count: int = 24,
    best: int = 5,
    **options: Any,
  ):
    self._retrieval: retrieval.Retrieval = errors.call(
      retrieval.Retrieval, options, "config of the picture", tokenizer
    )
    self.source = self._retrieval.source
    self._path, self._count, self._best = path, count, best

  def run(self, embed: Embed, mesh: jax.sharding.Mesh) -> list[Row]:
    """Writes the picture. Returns no rows."""
    del mesh
    r = self._retrieval
    zimg, ztxt = r.embed(embed)
    chosen = np.unique(np.linspace(0, len(zimg) - 1, self._count).astype(int))
    columns = 3
    rows = -(-len(chosen) // columns)
    sheet = Image.new(
      "RGB", (columns * WIDTH + GAP, rows * (SIDE + GAP) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for place, i in enumerate(chosen):
      y, x = divmod(place, columns)
      x, y = GAP + x * WIDTH, GAP + y * (SIDE + GAP)
      image = Image.fromarray(images.decode(r.source[int(i)]["image"]))
      sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
      for line, j in enumerate(np.argsort(-ztxt @ zimg[i])[: self._best]):
        right = r.text_ids[j] == r.image_ids[i]
        top = y + line * LINE + 4
        if right:
          draw.rectangle(
            (x + SIDE + 6, top - 1, x + WIDTH - GAP, top + 17),
            fill=(205, 240, 205),
          )
        text = full = r.texts[j]["text"]
        while draw.textlength(text, font) > WIDTH - SIDE - 2 * GAP - 16:
          full = full[:-1]
          text = full.rstrip() + "…"
        draw.text(
          (x + SIDE + 10, top),
          text,
          font=font,
          fill=(0, 90, 0) if right else (90, 90, 90),
        )
    if jax.process_index() == 0:
      sheet.save(self._path)
    return []
