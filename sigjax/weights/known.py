"""The released checkpoints by name: their URLs and what the files hold.

Names, sizes and scores are those of the models' own publications: SigLIP (arXiv
2303.15343), SigLIP 2 (arXiv 2502.14786), AugReg (arXiv 2106.10270).

Models take square images of `resolution` pixels with values in [-1, 1], NaFlex
ones up to `patches` patches of an image of any aspect ratio; and lower-cased
texts.

No digests of the files are published. A file is compared with the MD5 that its
server sends, over https, and every array with the shape in the model.
"""

import os
import re
from typing import Any, NamedTuple

from sigjax import errors


class Known(NamedTuple):
  """A released checkpoint.

  Attributes:
    url: the .npz file.
    model: keyword arguments of two_towers.TwoTowers, in the form of the file,
      unrolled or scan. AugReg models have `image` only.
    resolution: H and W of images in pixels; None of NaFlex.
    text_length: L in tokens; None without a text tower.
    tokenizer: a name in vocabulary.NAMES; None without a text tower.
    scores: published ones in percent: ImageNet zero-shot accuracy "imagenet",
      COCO recall@1 "i2t" (finding the text of an image) and "t2i"; None if
      there are none.
    patches: of NaFlex, the most patches of an image; otherwise None.
  """

  url: str
  model: dict[str, Any]
  resolution: int | None
  text_length: int | None
  tokenizer: str | None
  scores: dict[str, float] | None
  patches: int | None = None


# The width of a tower, which is also E, the size of the embeddings.
_WIDTH = {"B": 768, "L": 1024, "So400m": 1152, "g-opt": 1536}


def _scores(imagenet: float, i2t: float, t2i: float) -> dict[str, float]:
  return dict(imagenet=imagenet, i2t=i2t, t2i=t2i)


def _siglip(
  file: str,
  variant: str,
  resolution: int,
  scores: tuple[float, float, float] | None = None,
  text_length: int = 64,
) -> Known:
  """SigLIP: English, unrolled blocks. Scores: ImageNet, I->T, T->I."""
  size = variant.partition("/")[0]
  return Known(
    f"gs://big_vision/siglip/webli_en_{file}.npz",
    dict(
      image=dict(variant=variant, pool_type="map"),
      text=dict(variant=size, vocab_size=32_000),
      out_dim=(None, _WIDTH[size]),
    ),
    resolution,
    text_length,
    "c4_en",
    scores and _scores(*scores),
  )


def _siglip2(
  variant: str, resolution: int, scores: tuple[float, float, float]
) -> Known:
  """SigLIP 2: 256k vocabulary, stacked blocks. Scores: ImageNet, T->I, I->T."""
  size, patch = variant.split("/")
  imagenet, t2i, i2t = scores
  return Known(
    f"gs://big_vision/siglip2/siglip2_{size.lower()}{patch}_{resolution}.npz",
    dict(
      image=dict(variant=variant, pool_type="map", scan=True),
      # The g-opt image tower has the text tower of So400m.
      text=dict(
        variant="So400m" if size == "g-opt" else size,
        vocab_size=256_000,
        scan=True,
      ),
      out_dim=(None, _WIDTH[size]),
    ),
    resolution,
    64,
    "gemma",
    _scores(imagenet, i2t, t2i),
  )


def _naflex(variant: str, scores: tuple[float, float, float]) -> Known:
  """SigLIP 2 for images of any aspect ratio. Scores: with 256 patches."""
  size, patch = variant.split("/")
  imagenet, t2i, i2t = scores
  return Known(
    f"gs://big_vision/siglip2/siglip2_{size.lower()}{patch}_naflex.npz",
    dict(
      image=dict(kind="naflex", variant=variant, pool_type="map", scan=True),
      text=dict(variant=size, vocab_size=256_000, scan=True),
      out_dim=(None, _WIDTH[size]),
    ),
    None,
    64,
    "gemma",
    _scores(imagenet, i2t, t2i),
    patches=256,
  )


def _augreg(variant: str, recipe: str) -> Known:
  """An AugReg ViT, trained on ImageNet-21k at 224 pixels."""
  file = f"{variant.replace('/', '_')}-i21k-300ep-lr_0.001-{recipe}"
  return Known(
    f"gs://vit_models/augreg/{file}-do_0.0-sd_0.0.npz",
    dict(image=dict(variant=variant, pool_type="tok")),
    224,
    None,
    None,
    None,
  )


KNOWN: dict[str, Known] = {
  "siglip/b16_224": _siglip(
    "b16_224_63724782", "B/16", 224, (76.2, 64.4, 47.2)
  ),
  "siglip/b16_256": _siglip(
    "b16_256_60500360", "B/16", 256, (76.7, 65.1, 47.4)
  ),
  "siglip/b16_384": _siglip(
    "b16_384_68578854", "B/16", 384, (78.6, 67.5, 49.7)
  ),
  "siglip/b16_512": _siglip(
    "b16_512_68580893", "B/16", 512, (79.2, 67.6, 50.4)
  ),
  "siglip/l16_256": _siglip(
    "l16_256_60552751", "L/16", 256, (80.5, 69.5, 51.1)
  ),
  "siglip/l16_384": _siglip(
    "l16_384_63634585", "L/16", 384, (82.1, 70.6, 52.7)
  ),
  "siglip/so400m14_224": _siglip(
    "so400m_224_57633886", "So400m/14", 224, text_length=16
  ),
  "siglip/so400m14_384": _siglip(
    "so400m_384_58765454", "So400m/14", 384, (83.2, 70.2, 52.0)
  ),
  "siglip/b16_256_i18n": Known(
    "gs://big_vision/siglip/webli_i18n_b16_256_66117334.npz",
    dict(
      image=dict(variant="B/16", pool_type="map"),
      text=dict(variant="B", vocab_size=250_000),
      out_dim=(None, 768),
    ),
    256,
    64,
    "mc4",
    None,
  ),
  # It has more rows than its vocabulary has pieces, and no text head.
  "siglip/so400m16_256_i18n": Known(
    "gs://big_vision/siglip/webli_i18n_so400m_16_256_78061115.npz",
    dict(
      image=dict(variant="So400m/16", pool_type="map"),
      text=dict(variant="So400m", vocab_size=256_000),
      out_dim=(None, None),
    ),
    256,
    64,
    "mc4",
    None,
  ),
  "siglip2/b32_256": _siglip2("B/32", 256, (74.0, 47.2, 63.7)),
  "siglip2/b16_224": _siglip2("B/16", 224, (78.2, 52.1, 68.9)),
  "siglip2/b16_256": _siglip2("B/16", 256, (79.1, 53.2, 69.7)),
  "siglip2/b16_384": _siglip2("B/16", 384, (80.6, 54.6, 71.4)),
  "siglip2/b16_512": _siglip2("B/16", 512, (81.2, 55.2, 71.2)),
  "siglip2/b16_naflex": _naflex("B/16", (78.5, 51.1, 67.3)),
  "siglip2/l16_256": _siglip2("L/16", 256, (82.5, 54.7, 71.5)),
  "siglip2/l16_384": _siglip2("L/16", 384, (83.1, 55.3, 71.4)),
  "siglip2/l16_512": _siglip2("L/16", 512, (83.5, 55.2, 72.1)),
  "siglip2/so400m14_224": _siglip2("So400m/14", 224, (83.2, 55.1, 71.5)),
  "siglip2/so400m14_384": _siglip2("So400m/14", 384, (84.1, 55.8, 71.7)),
  "siglip2/so400m16_256": _siglip2("So400m/16", 256, (83.4, 55.4, 71.5)),
  "siglip2/so400m16_384": _siglip2("So400m/16", 384, (84.1, 56.0, 71.2)),
  "siglip2/so400m16_512": _siglip2("So400m/16", 512, (84.3, 56.0, 71.3)),
  "siglip2/so400m16_naflex": _naflex("So400m/16", (83.5, 55.1, 71.2)),
  "siglip2/g-opt16_256": _siglip2("g-opt/16", 256, (84.5, 55.7, 72.5)),
  "siglip2/g-opt16_384": _siglip2("g-opt/16", 384, (85.0, 56.1, 72.8)),
  "augreg/Ti_16": _augreg("Ti/16", "aug_none-wd_0.03"),
  "augreg/S_32": _augreg("S/32", "aug_none-wd_0.1"),
  "augreg/S_16": _augreg("S/16", "aug_light1-wd_0.03"),
  "augreg/B_32": _augreg("B/32", "aug_light1-wd_0.1"),
  "augreg/B_16": _augreg("B/16", "aug_medium1-wd_0.1"),
  "augreg/B_8": _augreg("B/8", "aug_medium2-wd_0.1"),
  "augreg/L_16": _augreg("L/16", "aug_strong1-wd_0.1"),
}


def get(name: str) -> Known:
  """Returns the released checkpoint of a name.

  Raises:
    UserError: there is none.
  """
  return errors.pick(KNOWN, name, "checkpoint")


def name_of(weights: str) -> str:
  """Returns the name of the released checkpoint that `weights` is, or "".

  Args:
    weights: a name in KNOWN; or a file or URL that is called as a released one,
      unless a config.json beside it says what it is.
  """
  if weights in KNOWN:
    return weights
  folder, file = os.path.split(weights)
  if os.path.exists(os.path.join(folder, "config.json")):
    return ""
  return _names_of_files().get(file, "")


def _names_of_files() -> dict[str, str]:
  """Returns {file: name} of KNOWN."""
  return {os.path.basename(it.url): name for name, it in KNOWN.items()}


def pp_image(
  name: str, resolution: int | None = None, patches: int | None = None
) -> str:
  """Returns the preprocessing of a model's images.

  Args:
    name: in KNOWN.
    resolution: H and W in pixels; None: those of the model.
    patches: of NaFlex, the most patches of an image; None: those of the model.

  Raises:
    UserError: `resolution` of a NaFlex model, or `patches` of another one.
  """
  it = get(name)
  if it.patches is None:
    if patches is not None:
      raise errors.UserError(
        f"{name} takes square images, whose size is a resolution in pixels "
        "(--resolution), not a number of patches"
      )
    return f"decode|resize({resolution or it.resolution})|keep('image')"
  if resolution is not None:
    raise errors.UserError(
      f"{name} takes images of any aspect ratio, whose size is a number of "
      "patches (--patches), not a resolution"
    )
  side = it.model["image"]["variant"].partition("/")[2]
  return (
    f"decode|resize_to_patches({patches or it.patches},{side})|keep('image')"
  )


def pp_text(name: str) -> str:
  """Returns the preprocessing of a model's texts.

  Gemma's padding, in SigLIP 2, is 0; the others pad with the end of text, 1.
  """
  it = get(name)
  pad = ",pad=0" if it.tokenizer == "gemma" else ""
  return f"lower|tokenize({it.text_length}{pad})|keep('text')"


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
  """Returns (path or URL, part or "") of what a config names as weights.

  Args:
    path: a path, URL or name in KNOWN, with or without ":img" at its end.
  """
  name, part = str(path), ""
  if found := re.fullmatch(r"(.*?):([A-Za-z_][\w/]*)", name, re.DOTALL):
    name, part = found.groups()
  return get(name).url if name in KNOWN else name, part


def names() -> str:
  """Returns words that list KNOWN, for an error."""
  return f"known are: {', '.join(KNOWN)}"


def no_file(path: str) -> str:
  """Returns the error for a path where there is no file."""
  name = _names_of_files().get(os.path.basename(path))
  if name:
    return f'there is no file {path}; the name "{name}" would fetch it'
  if path.endswith(".npz"):
    return (
      f"there is no file {path}; give the path of a file, or the name of a "
      "released checkpoint, such as siglip/b16_256"
    )
  return (
    f'there is no file "{path}", nor is that the name of a released '
    f"checkpoint{errors.closest(path, KNOWN)}; {names()}"
  )
