"""The page of tools.search: a text or a picture, and the best pictures.

It is served to this machine alone, sends nothing elsewhere, and shows small
copies: no file of the folder can be asked for by its path.
"""

import os
import pathlib
from typing import Any

from jaxtyping import UInt8
import numpy as np

from sigjax import errors
from sigjax.data.example import images
from sigjax.data.faults import BadExample
from tools.searching import finder as finder_lib
from tools.searching.finder import Finder, Found

SIDE = 320  # of the copies, the shorter side in pixels
# Of the gallery: all of it is seen, in as many columns as there is room for,
# and captions stand below the pictures, not on them.
CSS = """
.grid-wrap {max-height: none !important}
.grid-container {
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important}
.thumbnail-lg img {padding-bottom: 28px}
.thumbnail-lg .caption-label {
  left: 0; right: 0; bottom: 0; max-width: 100%; border: 0}
"""
HINT = "Type a text, or drop a picture."

# What the page shows: (picture, caption) of each, and a line of text.
Shown = tuple[list[tuple[UInt8[np.ndarray, "h w 3"], str]], str]


class Answers:
  """What the page answers.

  Args:
    finder: finds the pictures.
    count: how many are shown.
  """

  def __init__(self, finder: Finder, count: int):
    self._finder, self._count = finder, count

  def by_text(self, text: str) -> Shown:
    """Returns the pictures that fit a text best."""
    if not text.strip():
      return [], HINT
    found = self._finder.by_text(text, self._count)
    return self._shown(
      found, f"The best for “{text.strip()}”, with their probabilities."
    )

  def by_picture(self, file: str | None) -> Shown:
    """Returns the pictures most like the one in a file."""
    if file is None:
      return [], HINT
    try:
      found = self._finder.by_picture(
        pathlib.Path(file).read_bytes(), self._count
      )
    except BadExample as e:
      return [], f"This picture cannot be used: {e}"
    return self._shown(found, "The most similar, with their cosines.")

  def _shown(self, found: list[Found], line: str) -> Shown:
    shown = []
    for it in found:
      try:
        data = (self._finder.pictures.folder / it.file).read_bytes()
        small = images.decode_small(data, SIDE)
      except (OSError, BadExample):
        continue  # gone, or changed since the start
      score = finder_lib.percent(it.probability) or f"{it.cosine:.3f}"
      shown.append((small, f"{score}  {it.file}"))
    if len(shown) < len(found):
      line += f" {len(found) - len(shown)} cannot be shown any more."
    return shown, line


def check_gradio() -> None:
  """Raises UserError if Gradio is not installed."""
  try:
    import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as e:
    if e.name != "gradio":
      raise
    raise errors.UserError(
      "the page needs Gradio, which is not installed: pip install -e '.[demo]'"
      '; or ask without it: --query "a red car"'
    ) from e


def build(finder: Finder, count: int) -> Any:
  """Returns the page, a gradio.Blocks."""
  import gradio as gr  # pyright: ignore[reportMissingImports]

  answers = Answers(finder, count)
  with gr.Blocks(
    title="sigjax search",
    analytics_enabled=False,
    delete_cache=(3600, 3600),  # seconds; of the copies in the temporary folder
  ) as page:
    gr.Markdown(
      f"### {len(finder.pictures.files):,} pictures in "
      f"`{finder.pictures.folder}`, by "
      f"`{finder.name.removeprefix(f'{os.getcwd()}/')}`"
    )
    with gr.Row():
      with gr.Column(scale=1, min_width=240):
        text = gr.Textbox(
          label="Text", placeholder="a red car", autofocus=True, max_lines=2
        )
        button = gr.Button("Search", variant="primary")
        picture = gr.Image(
          label="Or a picture",
          type="filepath",
          image_mode=None,  # the file as it is
          sources=["upload", "clipboard"],
          height=240,
        )
      with gr.Column(scale=3):
        line = gr.Markdown(HINT)
        gallery = gr.Gallery(
          show_label=False,
          object_fit="contain",
          format="jpeg",
          buttons=["fullscreen"],
        )
    shown = [gallery, line]
    gr.on(
      [text.submit, button.click],
      answers.by_text,
      text,
      shown,
      api_name="by_text",
    ).then(lambda: None, outputs=picture, api_visibility="private")
    picture.upload(
      answers.by_picture, picture, shown, api_name="by_picture"
    ).then(lambda: "", outputs=text, api_visibility="private")
  return page


def serve(finder: Finder, port: int, count: int) -> None:
  """Serves the page until the program is interrupted."""
  import gradio as gr  # pyright: ignore[reportMissingImports]

  page = build(finder, count)
  page.launch(
    prevent_thread_lock=True,
    server_name="127.0.0.1",
    server_port=port,
    share=False,
    quiet=True,
    ssr_mode=False,
    footer_links=[],
    css=CSS,
    # No fonts from a server.
    theme=gr.themes.Default(
      font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ),
  )
  print(f"page: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
  page.block_thread()
