"""What tools.benchmark times of loading: ours, tf.data and webdataset.

All three read the same tar shards (500 x 375 JPEGs with captions, as
img2dataset writes them), decode, resize the shorter side to 224, cut 224 x 224
out at random, tokenize the captions and make batches. In one process, in turns.

Timed is processor time, all threads counted: it is what a core can do, whatever
else the machine does meanwhile. webdataset runs in the process itself, so that
its time holds no copies between processes; tf.data has no reader of tars and is
given one as a Python generator, resizes without antialiasing, its default, and
all that it can do in C++ it does there.
"""

import functools
import io
import json
import pathlib
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

from sigjax import errors
from sigjax.data import kinds
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from tools.bench import timing

SIZE, LENGTH, BATCH = 224, 16, 64
WIDTH, HEIGHT = 500, 375  # as most photos of ImageNet and Flickr
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


def photo(rng):
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


def write_shards(folder, count, shards=4, photos=64):
  """Writes `count` examples of `photos` different pictures to tar files."""
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


def ours(paths, tokenizer, threads):
  """An endless iterator of batches by our pipeline."""
  source = kinds.open_source("tar", shards=paths)
  return pipeline.train_batches(
    source,
    preprocess.parse(PP, tokenizer=tokenizer),
    batch_size=BATCH,
    seed=0,
    num_threads=threads,
  )


def tf_data(paths, tokenizer, threads):
  """The same by tf.data."""
  try:
    import tensorflow as tf
  except ImportError:
    raise errors.UserError(
      "tf.data is compared with, but tensorflow is not installed; "
      "pip install 'sigjax[loaders]'"
    ) from None

  def read():
    for path in paths:
      with tarfile.open(path) as tar:
        for member in tar:
          if member.name.endswith(".jpg"):
            image = tar.extractfile(member).read()
          elif member.name.endswith(".txt"):
            yield image, tar.extractfile(member).read()

  def prepare(image, text):
    image = tf.io.decode_jpeg(image, channels=3)
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.cast(tf.round(size * SIZE / tf.reduce_min(size)), tf.int32)
    image = tf.image.resize(image, size)
    image = tf.image.random_crop(image, (SIZE, SIZE, 3))
    return tf.cast(tf.round(image), tf.uint8), tf.strings.lower(text)

  def tokenize(image, texts):
    ids = tf.numpy_function(
      lambda rows: np.stack([tokenizer(r.decode(), LENGTH) for r in rows]),
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


def webdataset(paths, tokenizer, threads):
  """The same by webdataset."""
  del threads  # it has none; processes are torch's
  try:
    import webdataset as wds
  except ImportError:
    raise errors.UserError(
      "webdataset is compared with, but not installed; "
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


def settle():
  """Waits until no thread of this process works any more."""
  while True:
    before = time.process_time()
    time.sleep(0.05)
    if time.process_time() - before < 2e-3:
      return


LOADERS = {"sigjax": ours, "tf.data": tf_data, "webdataset": webdataset}


def loaders(*, threads, batches, rounds):
  """Rows for each loader.

  Args:
    threads: that load; of sigjax and tf.data.
    batches: that are timed in a round.
    rounds: how often.
  """
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    paths = write_shards(folder, 8 * BATCH)
    tokenizer_lib.train(
      [f"{a} {b}" for a in WORDS for b in WORDS], 60, folder / "tokenizer.model"
    )
    tokenizer = tokenizer_lib.Tokenizer(folder / "tokenizer.model")
    streams = {
      name: make(paths, tokenizer, threads) for name, make in LOADERS.items()
    }
    for stream in streams.values():
      next(stream)  # its threads have begun
    settle()

    def pull(stream):
      start = time.process_time()
      for _ in range(batches):
        next(stream)
      settle()  # its threads fill up what was taken from their buffers
      return (time.process_time() - start) / (batches * BATCH)

    times = timing.interleave(
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
