"""Tar shards, as WebDataset and img2dataset write them, with random access.

Members whose names differ only in what follows the last dot are one sample:
000000000.jpg, 000000000.txt, 000000000.json. What is kept of a sample is where
its members are, found from the headers alone; one read then gives the sample.
"""

import json as json_lib

import numpy as np

from sigjax.data import faults
from sigjax.data import source as source_lib
from sigjax.data.example import captions as captions_lib
from sigjax.data.faults import BadExample
from sigjax.data.formats import tar_headers
from sigjax.data.formats.tar_headers import BLOCK, Damaged
from sigjax.data.shards import files, index

IMAGES = ("jpg", "jpeg", "png", "webp")
# A member's place in blocks of 512 bytes, its size in bytes. `head` is where
# the image's headers begin, `lead` of them before its data; no text or no json
# is at 0, where no member's data can be.
_ROW = np.dtype(
  [
    (name, "<u2" if name == "lead" else "<u4")
    for name in ("head", "lead", "image", "text_at", "text", "json_at", "json")
  ]
)


def _samples(window):
  """Reads a shard's headers.

  Returns:
    {name without extension: {"image", "txt" or "json": (head, data, size)}},
    in bytes and in the order of first members, and whether the shard is whole.
  """
  samples, at = {}, 0
  while True:
    try:
      found = tar_headers.member(window, at)
    except Damaged:
      return samples, False
    if found is None:
      return samples, True
    name, data, size = found
    end = data + size
    if end > window.size:
      return samples, False
    if name:
      key, _, ending = name.rpartition(b".")
      ending = ending.decode("latin-1").lower()
      part = "image" if ending in IMAGES else ending
      if key and part in ("image", "txt", "json"):
        samples.setdefault(key, {})[part] = at, data, size
    at = -(-end // BLOCK) * BLOCK


def _build(opened, number, size):
  """Builds the index of a tar; see shards.Kind."""
  samples, whole = _samples(files.Window(opened, number, size))
  rows, wrong = [], {}
  for key, parts in samples.items():
    head, data, image = parts.get("image", (0, 0, 0))
    _, text_at, text = parts.get("txt", (0, 0, 0))
    _, json_at, json = parts.get("json", (0, 0, 0))
    fault = (
      "missing image"
      if not data
      else "missing caption"
      if not text_at and not json_at
      else "oversized member"
      if max(
        image,
        text,
        json,
        max(data, text_at, json_at) // BLOCK,
        (data - head) << 7,
      )
      >= 2**32
      else None
    )
    if fault:
      faults.merge(wrong, {fault: (1, key.decode(errors="replace"))})
    else:
      rows.append(
        (
          head // BLOCK,
          (data - head) // BLOCK,
          image,
          text_at // BLOCK,
          text,
          json_at // BLOCK,
          json,
        )
      )
  if not whole:
    faults.merge(wrong, {"truncated shard": (1, opened.paths[number])})
  return np.array(rows, _ROW), wrong


_INDEX = index.Kind("samples", _ROW, _build)


def _parsed(data, where):
  """Returns the object that a sample's .json holds."""
  try:
    found = json_lib.loads(data)
  except (ValueError, RecursionError) as e:
    raise BadExample(
      f"{where}: its .json does not parse: {e}", kind="JSON does not parse"
    ) from e
  if not isinstance(found, dict):
    raise BadExample(
      f"{where}: its .json is no object", kind="JSON does not parse"
    )
  return found


class Records:
  """Samples of tar shards; see tar()."""

  def __init__(self, shards, captions, json):
    self._shards = shards
    self._captions, self._json = captions, json
    self._index = shards.index(_INDEX)

  def __len__(self):
    return len(self._index)

  def __getitem__(self, i):
    return self._read(i, with_image=True)

  def brief(self, i):
    """Returns the example without its image, and without reading that."""
    return self._read(i, with_image=False)

  def _read(self, i, with_image):
    number, row = self._index.locate(i)
    head, lead, image, text_at, text, json_at, json = row
    from_json = bool(self._captions) or not text_at
    path = self._shards.paths[number]
    if text > captions_lib.MAX_CAPTION and not from_json:
      raise BadExample(
        f"{path}: a caption of {text} bytes", kind="caption too long"
      )
    lead *= BLOCK
    spans = [(head * BLOCK, lead + image if with_image else lead)]
    if not from_json:
      spans.append((text_at * BLOCK, text))
    if json_at and (from_json or self._json):
      spans.append((json_at * BLOCK, json))
    first, *others = self._shards.files.spans(number, spans)
    name = self._name(path, first, lead, image)
    example = {"key": name}
    if with_image:
      example["image"] = first[lead:]
    if not from_json:
      example["captions"] = [captions_lib.caption(others[0])]
    if from_json or self._json:
      fields = {}
      if json_at:
        fields = _parsed(others[-1], f"{path}: {name}")
      if from_json:
        example["captions"] = self._of_json(fields, f"{path}: {name}")
      for key in self._json:
        example[key] = fields.get(key)
    return example

  def _name(self, path, data, lead, image):
    """Returns a sample's name, from the headers that precede its image."""
    try:
      name, at, size = tar_headers.member(
        lambda start, n: data[start : start + n], 0
      )
      if name and (at, size) == (lead, image):
        return name.decode(errors="replace").rpartition(".")[0]
    except (Damaged, TypeError):
      pass
    raise BadExample(
      f"{path} changed after it was indexed", kind="unreadable shard"
    )

  def _of_json(self, fields, where):
    """Returns the captions that a sample's .json holds."""
    key = self._captions or "caption"
    value = fields.get(key)
    texts = [value] if isinstance(value, str) else value
    if (
      not isinstance(texts, list)
      or not texts
      or not all(isinstance(text, str) for text in texts)
    ):
      raise BadExample(
        f'{where}: its .json has no text at "{key}"', kind="missing caption"
      )
    return list(map(captions_lib.caption, texts))

  def column(self, name):
    """Yields arrays of what the .json of all samples have at `name`, in order.

    None if the first sample's has no such key. It is read once and kept as an
    index is.
    """

    def fields(read, row):
      json_at, json = row[-2:]
      data = read(json_at * BLOCK, json) if json_at else b"{}"
      return _parsed(data, self._shards.what)

    def build(opened, number, size):
      window = files.Window(opened, number, size)
      values = []
      for row in self._index.of_shard(number).tolist():
        try:
          values.append(fields(window, row).get(name))
        except BadExample:
          values.append(None)  # fits no filter
      return source_lib.as_column(values, name, self._shards.what), {}

    number, row = self._index.locate(0)
    first = fields(lambda *at: self._shards.files.read(number, *at), row)
    if name not in first:
      return None
    return self._shards.column(
      index.Kind(f"json-{name}", np.dtype(float), build)
    )


def tar(shards, captions=None, json=()):
  """Tar shards of images with captions: WebDataset, img2dataset.

  An example is a sample with an image (.jpg, .jpeg, .png, .webp) and a caption:
  {"image": bytes, "captions": [str], "key": the sample's name}.

  Args:
    shards: paths, local or in a bucket, with globs and brace lists:
      "data/{00000..00099}.tar", "gs://bucket/*.tar", or a list of such.
    captions: the key of the .json that holds the caption, or several; None for
      the .txt or, where there is none, the "caption" of the .json.
    json: keys of the .json that become features, such as ("width", "url"), None
      where a sample has no such. A filter (`only`) needs none of them here.

  Returns:
    A Source; its `faults` count samples without an image or a caption, and
    shards that are cut or not there.

  Raises:
    UserError: nothing is there.
  """
  paths = files.expand(shards, "tar shards")
  found = index.Shards(paths, "tar shards")
  records = Records(found, captions, tuple(json))
  return source_lib.Source(
    source_lib.brief_name("tar", shards),
    records,
    faults=faults.counts(found.faults),
  )
