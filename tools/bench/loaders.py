"""Compares our loading with tf.data's and webdataset's, for tools.benchmark.

All three read the same tar shards (500 x 375 JPEGs with captions, as
img2dataset writes them), decode, resize the shorter side to 224, crop 224 x 224
at random, tokenize the captions and make batches. They take turns in one
process.

The time is processor time of all threads. It says what one core can do, however
busy the machine is. webdataset runs in the process itself, so its time contains
no copies between processes. tf.data cannot read tar files, so it gets a Python
generator. It resizes without antialiasing, its default, and does all else in
C++.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import io
import json
import pathlib
import tarfile
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from tools.bench import timing

SIZE, LENGTH, BATCH = 224, 16, 64
WIDTH, HEIGHT = 500, 375  # like most photos of ImageNet and Flickr
PP = (
  f"decode_small({SIZE})|random_crop({SIZE})|choice('captions')|lower"
  f"|tokenize({LENGTH})|keep('image','text')"
)
WORDS = [
  "a",
  "the",
  "cat",
  "dog",
  "red",
  "green",
  "house",
  "tree",
  "on",
  "in",
  "with",
  "of",
  "photo",
  "picture",
  "street",
  "car",
  "blue",
  "sky",
  "water",
  "man",
  "woman",
  "two",
]


def photo(rng: np.random.Generator) -> bytes:
  """Returns a JPEG with the statistics of a photo: soft forms and grain."""
  y, x = np.mgrid[:HEIGHT, :WIDTH][..., None]
  image = 128 + rng.normal(size=(HEIGHT, WIDTH, 3)) * 6
  for _ in range(12):
    fy, fx = rng.exponential(0.02, 2)
    image += (
      rng.normal(size=3) * 30 * np.sin(fy * y + fx * x + rng.uniform(0, 6))
    )
  data = io.BytesIO()
  Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
    data, "JPEG", quality=87
  )
  return data.getvalue()


def write_shards(
  folder: pathlib.Path, count: int, shards: int = 4, photos: int = 64
) -> list[str]:
  """Writes examples to tar files and returns their paths.

  Args:
    folder: where the files are written.
    count: the number of examples.
    shards: the number of files.
    photos: the number of different pictures.
  """
  rng = np.random.default_rng(0)
  images = [photo(rng) for _ in range(photos)]
  for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
      for i in numbers.tolist():
        about = json.dumps(dict(width=WIDTH, height=HEIGHT)).encode()
        text = " ".join(rng.choice(WORDS, 10)).encode()
        for ext, data in (
          ("jpg", images[i % photos]),
          ("json", about),
          ("txt", text),
        ):
          info = tarfile.TarInfo(f"{i:09d}.{ext}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))
  return sorted(map(str, folder.glob("*.tar")))


def ours(
  paths: Sequence[str], tokenizer: tokenizer_lib.Tokenizer, threads: int
) -> Any:
  """Returns an endless iterator over batches, by our pipeline."""
  source = kinds.open_source("tar", shards=paths)
  return pipeline.train_batches(
    source,
    preprocess.parse(PP, tokenizer=tokenizer),
    batch_size=BATCH,
    seed=0,
    num_threads=threads,
  )


def tf_data(
  paths: Sequence[str], tokenizer: tokenizer_lib.Tokenizer, threads: int
) -> Iterator[Any]:
  """Returns the same by tf.data."""
  try:
    import tensorflow as tf  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise errors.UserError(
      "the comparison needs tensorflow, which is not installed; "
      "pip install 'sigjax[loaders]'"
    ) from None

  def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""

  def read() -> Iterator[tuple[bytes, bytes]]:
    image = b""
    for path in paths:
      with tarfile.open(path) as tar:
        for member in tar:
          if member.name.endswith(".jpg"):
            image = contents(tar, member)
          elif member.name.endswith(".txt"):
            yield image, contents(tar, member)

  def prepare(image, text):
    image = tf.io.decode_jpeg(image, channels=3)
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.cast(tf.round(size * SIZE / tf.reduce_min(size)), tf.int32)
    image = tf.image.resize(image, size)
    image = tf.image.random_crop(image, (SIZE, SIZE, 3))
    return tf.cast(tf.round(image), tf.uint8), tf.strings.lower(text)

  def tokenize(image, texts):
    ids = tf.numpy_function(
      lambda rows: np.stack([tokenizer(row.decode(), LENGTH) for row in rows]),
      [texts],
      tf.int32,
    )
    return dict(image=image, text=ids)

  text = tf.TensorSpec((), tf.string)
  data = (
    tf.data.Dataset.from_generator(read, output_signature=(text, text))
    .repeat()
    .shuffle(256)
  )
  data = data.map(prepare, num_parallel_calls=threads).batch(BATCH)
  data = data.map(tokenize).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  return data.with_options(options).as_numpy_iterator()


def webdataset(
  paths: Sequence[str], tokenizer: tokenizer_lib.Tokenizer, threads: int
) -> Iterator[Any]:
  """Returns the same by webdataset."""
  del threads  # webdataset has none; processes would be torch's
  try:
    import webdataset as wds  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise errors.UserError(
      "the comparison needs webdataset, which is not installed; "
      "pip install 'sigjax[loaders]'"
    ) from None
  rng = np.random.default_rng(0)

  def prepare(sample):
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize(
      [round(n * scale) for n in image.size], Image.Resampling.BILINEAR
    )
    left, top = (int(rng.integers(n - SIZE + 1)) for n in image.size)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    text = tokenizer(sample["txt"].decode().lower(), LENGTH)
    return np.asarray(image), text

  data = wds.WebDataset(paths, shardshuffle=False).repeat().shuffle(256)
  return iter(data.map(prepare).batched(BATCH))


def settle() -> None:
  """Waits until all threads of this process are idle."""
  while True:
    before = time.process_time()
    time.sleep(0.05)
    if time.process_time() - before < 2e-3:
      return


LOADERS: dict[str, Callable[..., Any]] = {
  "sigjax": ours,
  "tf.data": tf_data,
  "webdataset": webdataset,
}


def loaders(*, threads: int, batches: int, rounds: int) -> list[timing.Row]:
  """Returns a row for each loader.

  Args:
    threads: the number of loading threads of sigjax and tf.data.
    batches: batches that are timed in a round.
    rounds: how often each loader is timed.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    paths = write_shards(folder, 8 * BATCH)
    tokenizer_lib.train(
      [f"{a} {b}" for a in WORDS for b in WORDS], 60, folder / "tokenizer.model"
    )
    tokenizer = tokenizer_lib.Tokenizer(folder / "tokenizer.model")
    streams = {
      name: make(paths, tokenizer, threads) for name, make in LOADERS.items()
    }
    for stream in streams.values():
      next(stream)  # now its threads are running
    settle()

    def pull(stream: Iterator[Any]) -> float:
      start = time.process_time()
      for _ in range(batches):
        next(stream)
      settle()  # the threads refill their buffers, which is part of the work
      return (time.process_time() - start) / (batches * BATCH)

    times: Any = timing.interleave(
      {name: functools.partial(pull, s) for name, s in streams.items()}, rounds
    )
    streams["sigjax"].close()
  median = {name: np.median(x) for name, x in times.items()}
  return [
    dict(
      stage=name,
      **timing.spread(x, "us"),
      per_core=1 / median[name],
      vs_sigjax=median[name] / median["sigjax"],
    )
    for name, x in times.items()
  ]
