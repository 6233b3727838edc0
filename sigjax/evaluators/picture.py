"""A picture for people: images with their best captions."""

import pathlib

import jax
from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sigjax import errors
from sigjax.data.example import images
from sigjax.data.source import Source
from sigjax.evaluators import Row, retrieval
from sigjax.evaluators.embedder import Embedder

COLUMNS = 3
SIDE, WIDTH, LINE, GAP = 112, 420, 20, 12  # pixels: image, cell, text, margin
INK, GREEN, LIGHT_GREEN = (90, 90, 90), (0, 90, 0), (205, 240, 205)
LEGEND = (
  "Each image with its best captions; the number is their cosine similarity."
)


class Picture:
  """Draws examples and their best captions to a PNG.

  Args:
    path: the PNG to write.
    data, pp_image, pp_text, bad_fraction, captions, group, batch_size: see
      Retrieval.
    count: the number of examples, evenly spread over the split.
    best: the number of captions of each.
    shown: the images to draw, where the examples hold embeddings: the same
      examples in the same order. None: those of the examples.

  Attributes:
    path: the PNG; the primary process has written it when run() returns.
  """

  source: Source
  path: pathlib.Path

  def __init__(
    self,
    *,
    path: pathlib.Path,
    data: Source,
    pp_image: str,
    pp_text: str,
    bad_fraction: float,
    captions: str = "captions",
    group: str | None = None,
    batch_size: int = 256,
    count: int = 24,
    best: int = 5,
    shown: Source | None = None,
  ):
    self._retrieval = retrieval.Retrieval(
      data=data,
      pp_image=pp_image,
      pp_text=pp_text,
      bad_fraction=bad_fraction,
      captions=captions,
      group=group,
      batch_size=batch_size,
    )
    self.source = self._retrieval.source
    self._shown = self.source if shown is None else shown
    if len(self._shown) != len(self.source):
      raise errors.UserError(
        f"{self._shown.name}, to be shown, has {len(self._shown)} images for "
        f"the {len(self.source)} of {self.source.name}; they have to be the "
        "same examples"
      )
    self.path, self._count, self._best = path, count, best

  def run(self, embedder: Embedder, mesh: jax.sharding.Mesh) -> list[Row]:
    """Writes the picture. Returns no rows."""
    del mesh
    zimg, ztxt, use_image, use_text = self._retrieval.embed(embedder)
    if jax.process_index() > 0:
      return []
    numbers = np.flatnonzero(use_image)
    # Of equal captions one is shown.
    distinct = {self._retrieval.texts[j]: j for j in np.flatnonzero(use_text)}
    texts = np.array(list(distinct.values()))
    right, _ = self._retrieval.right(numbers, texts)
    places = np.linspace(0, len(numbers) - 1, self._count).astype(int)
    cells = []
    for place in np.unique(places).tolist():
      number = int(numbers[place])
      scores = ztxt[texts] @ zimg[number]
      cells.append(
        (
          images.decode(self._shown[number]["image"]),
          [
            (self._retrieval.texts[texts[j]], scores[j], j in right[place])
            for j in np.argsort(-scores)[: self._best]
          ],
        )
      )
    with self.path.open("wb") as f:
      _draw(cells).save(f, "PNG")
    return []


def _draw(
  cells: list[tuple[UInt8[np.ndarray, "h w 3"], list[tuple[str, float, bool]]]],
) -> Image.Image:
  """Draws images with (caption, score, whether it is right) beside them."""
  lines = max([len(captions) for _, captions in cells], default=0)
  height = max(SIDE, lines * LINE + 4) + GAP
  rows = -(-len(cells) // COLUMNS)
  sheet = Image.new(
    "RGB", (COLUMNS * WIDTH + GAP, rows * height + 2 * GAP + LINE), "white"
  )
  draw = ImageDraw.Draw(sheet)
  font = ImageFont.load_default(14)
  draw.text((GAP, GAP - 4), LEGEND, font=font, fill=INK)
  x = GAP + draw.textlength(LEGEND, font) + GAP
  draw.rectangle((x, GAP - 5, x + 86, GAP + 13), fill=LIGHT_GREEN)
  draw.text((x + 4, GAP - 4), "a right one", font=font, fill=GREEN)
  for place, (pixels, captions) in enumerate(cells):
    row, column = divmod(place, COLUMNS)
    left, top = GAP + column * WIDTH, GAP + LINE + row * height
    # The whole image, in its own shape, on a grey square.
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill="#eeeeee")
    h, w = pixels.shape[:2]
    scale = SIDE / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    sheet.paste(
      small, (left + (SIDE - size[0]) // 2, top + (SIDE - size[1]) // 2)
    )
    for line, (caption, score, right) in enumerate(captions):
      x, y = left + SIDE + 10, top + line * LINE + 4
      if right:
        draw.rectangle(
          (x - 4, y - 1, left + WIDTH - GAP, y + 17), fill=LIGHT_GREEN
        )
      fill = GREEN if right else INK
      draw.text((x, y), f"{score:.2f}", font=font, fill=fill)
      room = WIDTH - SIDE - GAP - 10 - 40
      draw.text(
        (x + 38, y), _cut(caption, draw, font, room), font=font, fill=fill
      )
  return sheet


def _cut(
  text: str,
  draw: ImageDraw.ImageDraw,
  font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
  room: float,
) -> str:
  """Returns as much of a text as fits into `room` pixels, as one line."""
  text = whole = " ".join(text.split())[:200]
  while draw.textlength(text, font) > room:
    whole = whole[:-1]
    text = whole.rstrip() + "…"
  return text
