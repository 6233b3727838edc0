"""Embeds one source, part by part; a part that is complete is never redone."""

import json
import pathlib
from typing import Any

from array_record.python import array_record_module  # pyright: ignore
import numpy as np
import tqdm

from sigjax import errors
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.faults import BadExample, Tally
from sigjax.data.formats import embeddings
from sigjax.data.source import Source
from sigjax.runtime import files
from tools.embedding.tower import Tower


class Job:
  """The embeddings of one source, in one folder.

  The records of the source are split into parts of part_size. Each part becomes
  one ArrayRecord file with a record for every example that can be used.

  Args:
    path: the folder.
    source: the examples to embed.
    tower: the image tower.
    dtype: a name in embeddings.DTYPES, in which embeddings are stored.
    part_size: examples per part.
    bad_fraction: the largest fraction of examples that may be unusable.

  Attributes:
    parts: the number of parts.
    bad: the numbers of the examples that could not be used.
    tally: counts them by kind.

  Raises:
    UserError: the folder was begun with another tower, dtype, ..., or the
      source itself left out too many examples.
  """

  path: pathlib.Path
  parts: int
  bad: set[int]
  tally: Tally

  def __init__(
    self,
    path: pathlib.Path,
    source: Source,
    tower: Tower,
    dtype: str,
    part_size: int,
    bad_fraction: float,
  ):
    self.path, self._source, self._tower = path, source, tower
    self._dtype, self._part_size = embeddings.DTYPES[dtype], part_size
    self._count = len(source)
    self.parts = -(-self._count // part_size)
    self._pp = preprocess.parse(tower.pp_image)
    self.tally, self.bad = Tally(bad_fraction, source), set()
    self._about = dict(
      source=source.name,
      count=self._count,
      width=tower.width,
      dtype=dtype,
      tower=tower.checksum,
      pp_image=tower.pp_image,
      part_size=part_size,
      label_names=source.label_names,
    )
    path.mkdir(parents=True, exist_ok=True)
    file = path / "job.json"
    if file.exists():
      found = json.loads(file.read_text())
      for key, value in self._about.items():
        if found.get(key) != value:
          raise errors.UserError(
            f"{path} was begun with {key} {found.get(key)}, now it is "
            f"{value}; give another --out, or delete that folder"
          )
    files.write(file, json.dumps(self._about, indent=1))

  def file(self, i: int) -> pathlib.Path:
    """Returns the path of part i."""
    return self.path / f"embeddings-{i:05d}-of-{self.parts:05d}.array_record"

  def size(self, i: int) -> int:
    """Returns how many examples of the source are in part i."""
    return min(self._part_size, self._count - i * self._part_size)

  def records(self, i: int) -> int | None:
    """Returns the number of records of part i, or None if it is not complete.

    The number is 0 if no example of the part could be used.
    """
    if not self.file(i).exists():
      return None
    reader = array_record_module.ArrayRecordReader(str(self.file(i)))
    # ok() is False if the file was cut short; opening it raises nothing.
    return reader.num_records() if reader.ok() else None

  def run(self, i: int, batch_size: int, bar: tqdm.tqdm) -> None:
    """Computes part i and writes its file.

    Args:
      i: the number of the part.
      batch_size: images per batch, over all devices of the tower.
      bar: advances by one for each example.
    """
    first = i * self._part_size
    part = self._source.replaced(
      records=_Lenient(self._source),
      members=np.arange(first, first + self.size(i))[:, None],
    )
    with files.replacing(self.file(i)) as aside:
      writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1")

      def write_rows(batch, z):
        z = np.asarray(z).astype(self._dtype)
        for features, row in zip(batch["features"], z):
          if features:  # neither unusable nor a row past the end
            writer.write(features + row.tobytes())
        bar.update(int(batch["_mask"].sum()))

      held = None  # is written while the devices compute the next batch
      for batch in pipeline.eval_batches(
        part, self._with_features, batch_size=batch_size, bad_fraction=1
      ):
        z = self._tower(batch.pop("image"))
        if held:
          write_rows(*held)
        held = batch, z
      if held:
        write_rows(*held)
      writer.close()

  def _with_features(self, example, rng) -> dict[str, Any]:
    """Preprocesses the image; the other features become one text."""
    record, fault = example.pop("_record"), example.pop("_fault")
    try:
      if fault:
        raise fault
      image = self._pp(example, rng)["image"]
    except BadExample as e:
      # A record may be read twice, to learn the shape of examples.
      if record not in self.bad:
        self.bad.add(record)
        name = self._source.name_of(record)
        self.tally.bad(BadExample(f"{name}: {e}", e.kind))
      return {"image": self._tower.blank, "features": np.asarray(b"")}
    self.tally.good()
    rest = {k: v for k, v in example.items() if k != "image"}
    return {"image": image, "features": np.asarray(embeddings.encode(rest))}

  def finish(self) -> int | None:
    """Writes index.json if all parts are complete.

    Returns:
      The number of embeddings; None if parts are missing.

    Raises:
      UserError: no example of any part could be used.
    """
    counts = []
    for i in range(self.parts):
      count = self.records(i)
      if count is None:
        return None
      counts.append(count)
    if not sum(counts):
      raise errors.UserError(
        f"{self.path}: none of the {self._count} examples of "
        f"{self._source.name} can be used"
      )
    shards = [
      dict(
        file=self.file(i).name, count=count, bytes=self.file(i).stat().st_size
      )
      for i, count in enumerate(counts)
    ]
    index = dict(
      self._about,
      count=sum(counts),
      shards=shards,
      made_by=self._tower.made_by,
    )
    files.write(self.path / embeddings.INDEX, json.dumps(index, indent=1))
    return sum(counts)


class _Lenient:
  """Records of a source with their number, and with the fault of bad ones."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self):
    return len(self._source.records)

  def __getitem__(self, i):
    try:
      return {**self._source.read(i), "_record": i, "_fault": None}
    except BadExample as e:
      return {"_record": i, "_fault": e}
