"""Tar shards that Python's tarfile wrote, as img2dataset lays them out."""

import concurrent.futures
import io
import json
import tarfile

import fsspec
import numpy as np
from PIL import Image
import pytest

from sigjax import errors
from sigjax.data import faults, kinds
from sigjax.data import filter as filter_lib


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("SIGJAX_CACHE", str(tmp_path / "cache"))


def picture(i, kind="JPEG", size=None):
  """An encoded image of (8 + i % 5) x 8 pixels that only i has."""
  rng = np.random.default_rng(i)
  pixels = rng.integers(0, 256, (8, 8 + i % 5, 3), np.uint8)
  data = io.BytesIO()
  image = Image.fromarray(pixels)
  (image.resize(size) if size else image).save(data, kind)
  return data.getvalue()


def write(path, members, form=tarfile.PAX_FORMAT):
  """Writes [(name, bytes)] to a tar; None for the data makes a folder."""
  with tarfile.open(path, "w", format=form) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      if data is None:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
      else:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def sample(i, **fields):
  """The members of a sample as img2dataset writes them."""
  fields = {
    "caption": f"né {i}",
    "width": 8 + i % 5,
    "height": 8,
    "similarity": i / 100,
    "key": f"{i:09d}",
    "language": "en" if i % 2 else "de",
    **fields,
  }
  return [
    (f"{i:09d}.jpg", picture(i)),
    (f"{i:09d}.json", json.dumps(fields).encode()),
    (f"{i:09d}.txt", f"né {i}".encode()),
  ]


@pytest.fixture
def folder(tmp_path):
  """Shards 00000.tar to 00002.tar of samples 0-19, 20-39, 40-49."""
  path = tmp_path / "data"
  path.mkdir()
  for shard, numbers in enumerate([range(20), range(20, 40), range(40, 50)]):
    write(path / f"{shard:05d}.tar", sum(map(sample, numbers), []))
  return path


def opened(path, **kwargs):
  return kinds.open_source("tar", shards=str(path), **kwargs)


def test_captions_by_language(tmp_path):
  several = {"en": "a cat", "sw": ["paka", "nyau"]}
  write(tmp_path / "a.tar", sample(1, caption=several) + sample(2))
  for captions in ("caption", None):  # the .txt comes first
    source = opened(tmp_path / "a.tar", captions=captions, json=("language",))
    assert source[1]["captions"] == ["né 2"] and source[1]["language"] == "de"
    if captions:
      assert source[0]["captions"] == ["a cat", "paka", "nyau"]
      assert source[0]["language"] == ["en", "sw", "sw"]
      swahili = filter_lib.where(source, "language", "sw")
      assert swahili[0]["captions"] == ["paka", "nyau"] and len(swahili) == 1


def keys(source):
  return [source[i]["key"] for i in range(len(source))]


@pytest.mark.parametrize(
  "pattern",
  ["*.tar", "{00000..00002}.tar", "0000{0,1,2}.tar", "00{0,1}0{0..2}.tar"],
)
def test_reads_what_was_written(folder, pattern):
  source = opened(folder / pattern)
  assert len(source) == 50 and source.name == f"tar[{folder / pattern}]"
  assert set(source.faults) <= {"vanished shard"}
  for i in range(50):
    assert source[i] == {
      "key": f"{i:09d}",
      "image": picture(i),
      "captions": [f"né {i}"],
    }
    brief = source.brief(i)
    assert brief == {"key": f"{i:09d}", "captions": [f"né {i}"]}
  for i in (50, -1):
    with pytest.raises(IndexError):
      source.records[i]


def test_several_patterns(folder):
  source = kinds.open_source(
    "tar",
    shards=[
      str(folder / "00002.tar"),
      str(folder / "0000[01].tar"),
      str(folder / "00002.tar"),
    ],
  )  # named twice, there once
  assert keys(source)[:11] == [f"{i:09d}" for i in [*range(40, 50), 0]]
  assert len(source) == 50 and source.name.endswith("00002.tar, ...]")


def test_json_features(folder):
  source = opened(folder / "*.tar", json=("width", "similarity", "nope"))
  assert source[33]["width"] == 11 and source[33]["similarity"] == 0.33
  assert source[33]["nope"] is None and "height" not in source[33]
  assert source[33]["image"] == picture(33)


def test_filters(folder):
  def kept(**only):
    source = opened(folder / "*.tar", only=only)
    return [int(key) for key in keys(source)]

  assert kept(width=(11, None)) == [i for i in range(50) if i % 5 >= 3]
  assert kept(similarity=(0.1, 0.2)) == list(range(10, 21))
  assert kept(language="en", width=8) == [5, 15, 25, 35, 45]
  assert kept(caption_length=(None, 4)) == list(range(10))
  with pytest.raises(errors.UserError, match="no example with language='fr'"):
    kept(language="fr")
  with pytest.raises(errors.UserError, match='"langage" is not known'):
    kept(langage="en")
  assert kept(width=(11, 11)) == list(range(3, 50, 5))  # as kept before


def test_size_from_the_image_where_no_json_has_it(tmp_path):
  write(
    tmp_path / "a.tar",
    [
      member
      for i in range(10)
      for member in [
        (f"{i}.png", picture(i, "PNG") if i != 3 else b"no image"),
        (f"{i}.txt", b"text"),
      ]
    ],
  )
  source = opened(tmp_path / "a.tar", only=dict(width=(11, None)))
  assert keys(source) == ["4", "8", "9"]
  assert source.faults == {"undecodable image": 1}


def test_captions_of_json(tmp_path):
  write(
    tmp_path / "a.tar",
    [
      ("a.jpg", b"A"),
      ("a.json", b'{"caption": "ca", "alt": ["1", "2"]}'),
      ("b.jpg", b"B"),
      ("b.json", b'{"alt": "x"}'),
      ("b.txt", b"tb"),
      ("c.jpg", b"C"),
      ("c.json", b'{"caption": 7}'),
      ("d.jpg", b"D"),
      ("d.json", b'{"caption": '),
      ("e.jpg", b"E"),
      ("e.json", b"[1]"),
      ("f.jpg", b"F"),
      ("f.json", b'{"a": ' * 100_000),
    ],
  )
  source = opened(tmp_path / "a.tar")
  assert source[0]["captions"] == ["ca"] and source[1]["captions"] == ["tb"]
  for i, kind in (
    (2, "missing caption"),
    (3, "JSON does not parse"),
    (4, "JSON does not parse"),
    (5, "JSON does not parse"),
  ):
    with pytest.raises(faults.BadExample) as e:
      source[i]
    assert e.value.kind == kind and "a.tar: " in str(e.value)
  source = opened(tmp_path / "a.tar", captions="alt")
  assert source[0]["captions"] == ["1", "2"] and source[1]["captions"] == ["x"]


LONG = "f" * 120 + "/" + "é" * 90


@pytest.mark.parametrize(
  "form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_long_names_and_other_members(tmp_path, form):
  long = LONG if form != tarfile.USTAR_FORMAT else "f" * 120 + "/" + "g" * 80
  write(
    tmp_path / "a.tar",
    [
      ("./sub", None),
      ("./sub/x.y.webp", picture(1, "WEBP")),
      ("./sub/x.y.txt", b"one"),
      ("README", b"not a sample"),
      (f"{long}.PNG", picture(2, "PNG")),
      (f"{long}.txt", b"two"),
      (f"{long}.npz", b"an embedding"),
      ("z.jpeg", picture(3)),
      ("z.txt", b""),
    ],
    form,
  )
  source = opened(tmp_path / "a.tar")
  assert keys(source) == ["./sub/x.y", long, "z"] and not source.faults
  assert [source[i]["image"] for i in range(3)] == [
    picture(1, "WEBP"),
    picture(2, "PNG"),
    picture(3),
  ]
  assert source[1]["captions"] == ["two"] and source[2]["captions"] == [""]


def member(name, data, size, kind=b"0"):
  """A member whose header's field for the size is `size`."""
  block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
  block[124:136] = size.ljust(12, b"\0")
  block[148:157] = b" " * 8 + kind
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block) + data + bytes(-len(data) % 512)


def extended(data):
  """A pax header for the member after it."""
  info = tarfile.TarInfo("pax")
  info.type, info.size = tarfile.XHDTYPE, len(data)
  return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(512 - len(data))


def test_sizes_in_binary_and_in_pax_headers(tmp_path):
  image = picture(0)
  (tmp_path / "a.tar").write_bytes(
    member("a.jpg", image, b"\x80" + len(image).to_bytes(11))
    + extended(b"19 size=0000000003\n")
    + member("a.txt", b"abc", b"%011o\0" % 0)
    + bytes(1024)
  )
  source = opened(tmp_path / "a.tar")
  assert source[0] == {"key": "a", "image": image, "captions": ["abc"]}


@pytest.mark.parametrize(
  "bad",
  [
    member("c.jpg", b"", b"-0000001000\0"),  # leads back
    member("c.jpg", b"", b"not a number"),
    extended(b"0 size=1\n"),
    extended(b"size\n"),
    extended(b"7\n"),
    extended(b"9 size=x\n"),
    extended(b"11 size=-9\n") + member("b.jpg", b"", b"0"),
    member("c", b"", b"-0000003000\0", b"L"),
  ],
)
def test_headers_without_sense_end_a_shard(tmp_path, bad):
  good = member("a.jpg", b"A", b"1") + member("a.txt", b"t", b"1")
  (tmp_path / "a.tar").write_bytes(
    good + bad + member("d.txt", b"A", b"1") + bytes(1024)
  )
  source = opened(tmp_path / "a.tar")
  assert keys(source) == ["a"] and source.faults == {"truncated shard": 1}


def test_a_name_that_appears_again_is_another_sample(tmp_path):
  def names(*names):
    write(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    source = opened(tmp_path / "a.tar")
    return [
      (source[i]["image"].decode(), *source[i]["captions"])
      for i in range(len(source))
    ], source.faults

  pairs = ["a.jpg", "a.txt", "b.jpg", "b.txt"]
  want = [("a.jpg", "a.txt"), ("b.jpg", "b.txt")]
  assert names(*pairs) == (want, {})
  assert names(*pairs, "a.jpg") == (want, {"missing caption": 1})
  assert names(*pairs, "a.txt") == (want, {"missing image": 1})
  assert names(*pairs, "a.png", "a.txt") == (want + [("a.png", "a.txt")], {})
  assert names("a.jpg", "a.png", "a.txt") == (
    [("a.png", "a.txt")],
    {"missing caption": 1},
  )
  assert names("a.jpg", "b.jpg", "b.txt", "a.txt") == (
    [("b.jpg", "b.txt")],
    {"missing caption": 1, "missing image": 1},
  )
  # What is no member of a sample, or a member that is not read, is passed over.
  assert names("v.1/a.jpg", "v.1/README", "v.1/a.txt")[0]
  assert names("a.jpg", "a.npz", "a.txt") == (want[:1], {})
  assert names("._a.jpg", "a.jpg", "._a.txt", "a.txt") == (want[:1], {})


def test_filters_do_not_depend_on_the_first_sample(tmp_path):
  write(
    tmp_path / "a.tar",
    [
      *[("a.jpg", b"A"), ("a.txt", b"a")],
      *[("b.jpg", b"B"), ("b.json", b"{"), ("b.txt", b"b")],
      *sample(0),
      *sample(1, language="fr"),
      *sample(2, language=None),
    ],
  )
  for _ in range(2):
    source = opened(tmp_path / "a.tar", only=dict(language="fr"))
    assert keys(source) == [f"{1:09d}"]


def test_large_numbers_stay_exact_beside_missing_ones(tmp_path):
  ids = [2**53, 2**53 + 1, None, 2**53]
  samples = [sample(i, id=x) for i, x in enumerate(ids)]
  write(tmp_path / "a.tar", sum(samples, []))
  for _ in range(2):  # read, and from the kept values
    assert len(opened(tmp_path / "a.tar", group_by="id")) == 3


@pytest.mark.parametrize("size", [512, 1024, 1025])
def test_a_shard_that_ends_with_its_last_member(tmp_path, size):
  good = member("a.jpg", b"A", b"1") + member("a.txt", b"t", b"1")
  last = member("b.txt", b"b", b"1")
  image = member("b.jpg", b"x" * size, b"%o" % size)
  header = len(image) - -(-size // 512) * 512
  path = tmp_path / "a.tar"
  # Its data is there to the last byte: it is used, though the end is missing.
  path.write_bytes(good + last + image[: header + size])
  source = opened(path)
  assert keys(source) == ["a", "b"] and len(source[1]["image"]) == size
  assert source.faults == {"truncated shard": 1}
  # A byte is missing: it is not.
  path.write_bytes(good + last + image[: header + size - 1])
  source = opened(path)
  assert keys(source) == ["a"]
  assert source.faults == {"missing image": 1, "truncated shard": 1}


def test_missing_members_are_counted_and_named(tmp_path, caplog):
  write(
    tmp_path / "a.tar",
    [
      ("a.jpg", b"A"),
      ("b.txt", b"b"),
      ("c.jpg", b"C"),
      ("c.txt", b"c"),
      ("d.txt", b"d"),
      ("d.json", b"{}"),
      ("e.npz", b""),
    ],
  )
  source = opened(tmp_path / "a.tar")
  assert keys(source) == ["c"]
  assert source.faults == {"missing caption": 1, "missing image": 2}
  lines = [r.getMessage() for r in caplog.records]
  assert f"{tmp_path}/a.tar: 2 x missing image, such as b" in lines
  assert f"{tmp_path}/a.tar: 1 x missing caption, such as a" in lines
  assert opened(tmp_path / "a.tar").faults == source.faults  # from the index
  write(tmp_path / "b.tar", [("a.jpg", b"A"), ("b.jpg", b"B")])
  with pytest.raises(errors.UserError, match="no example.*2 x missing caption"):
    opened(tmp_path / "b.tar")


@pytest.mark.parametrize(
  "past, left, wrong",
  [
    (512, 10, {}),  # the first zeros after the last caption suffice
    (0, 10, {"truncated shard": 1}),
    (-700, 10, {"truncated shard": 1}),  # of the .txt; the .json has it, too
    (-1500, 9, {"truncated shard": 1, "missing caption": 1}),
    (-2600, 9, {"truncated shard": 1}),
  ],
)
def test_a_truncated_shard(folder, past, left, wrong):
  path = folder / "00002.tar"
  data = path.read_bytes()
  end = len(data.rstrip(b"\0"))  # in the block of the last caption
  end += -end % 512
  path.write_bytes(data[: end + past])
  source = opened(path)
  assert source.faults == wrong and len(source) == left
  assert source[left - 1]["image"] == picture(39 + left)


def test_what_is_no_tar(tmp_path):
  (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
  (tmp_path / "b.tar").write_bytes(b"")
  for name in "ab":
    with pytest.raises(errors.UserError, match="no example.*1 x truncated"):
      opened(tmp_path / f"{name}.tar")


def test_damage_within_a_shard_ends_it(folder):
  path = folder / "00000.tar"
  with tarfile.open(path) as tar:
    offset = tar.getmembers()[30].offset  # the first of sample 10
  data = bytearray(path.read_bytes())
  data[offset + 5] ^= 1  # in its name: the checksum shows it
  path.write_bytes(data)
  source = opened(folder / "*.tar")
  assert len(source) == 40
  assert source.faults == {"truncated shard": 5}  # the others have 20 and 10


def test_remote(folder, monkeypatch):
  system = fsspec.filesystem("memory")
  for file in folder.iterdir():
    system.pipe(f"/bucket/{file.name}", file.read_bytes())
  try:
    for pattern, wrong in (
      ("*", {}),
      ("{00000..00003}", {"vanished shard": 17}),  # their mean
    ):
      source = opened(
        f"memory://bucket/{pattern}.tar",
        part=(0.2, 1),
        only=dict(width=(11, None)),
      )
      want = [
        i
        for i in range(50)
        if i % 5 >= 3
        and i in filter_lib.part(opened(folder / "*.tar"), (0.2, 1)).members
      ]
      assert [int(key) for key in keys(source)] == want
      assert source.faults == wrong
      for i, number in enumerate(want):
        assert source[i]["image"] == picture(number)
    system.rm("/bucket/00002.tar")
    monkeypatch.setattr(
      "sigjax.data.shards.files.time.sleep", None
    )  # no second try
    with pytest.raises(faults.BadExample) as e:
      source.records[49]
    assert e.value.kind == "unreadable shard"
  finally:
    system.store.clear()


def test_vanished_shards(folder, caplog):
  source = opened(folder / "{00000..00004}.tar")
  assert len(source) == 50 and source.faults == {"vanished shard": 2 * 17}
  assert f"such as {folder}/00003.tar" in caplog.text
  with pytest.raises(errors.UserError, match="none of 2 tar shards is there"):
    opened(folder / "{8,9}.tar")
  with pytest.raises(errors.UserError, match=r"no tar shards at .*/x\*.tar"):
    opened(folder / "x*.tar")


def test_shards_that_change_after_indexing(folder):
  opened(folder / "*.tar")
  source = opened(folder / "*.tar")  # from the index: no shard is open yet

  def kind(i):
    with pytest.raises(faults.BadExample) as e:
      source.records[i]
    return e.value.kind

  (folder / "00002.tar").unlink()
  assert kind(45) == "unreadable shard"
  first = folder / "00000.tar"
  first.write_bytes(first.read_bytes()[:4096])
  assert source[0]["image"] == picture(0) and kind(19) == "unreadable shard"
  second = folder / "00001.tar"
  second.write_bytes(second.read_bytes()[512:])  # everything has moved
  assert kind(20) == "unreadable shard"


def test_a_shard_that_was_written_anew(folder):
  source = opened(folder / "*.tar")
  for size, i in ((0, 0), (700, 20)):  # at the same place, of another size
    write(
      folder / f"{i // 20:05d}.tar",
      [
        (f"{i:09d}.jpg", picture(i) + b"x" * size),
        *sample(i)[1:],
        *sum(map(sample, range(i + 1, i + 20)), []),
      ],
    )
  assert source[0]["image"] == picture(0)  # nothing of it has changed
  with pytest.raises(faults.BadExample, match="changed after") as e:
    source[20]
  assert e.value.kind == "unreadable shard"


def test_links_have_no_data_whatever_they_say(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for name, data in (("a.jpg", picture(0)), ("b", None), ("a.txt", b"text")):
      info = tarfile.TarInfo(name)
      info.size = 1000 if data is None else len(data)
      info.type = tarfile.LNKTYPE if data is None else tarfile.REGTYPE
      tar.fileobj.write(
        info.tobuf(tarfile.GNU_FORMAT)
        + (data or b"")
        + bytes(-len(data or b"") % 512)
      )
    tar.offset = tar.fileobj.tell()
  with tarfile.open(tmp_path / "a.tar") as tar:
    assert tar.getnames() == ["a.jpg", "b", "a.txt"]
  source = opened(tmp_path / "a.tar")
  assert source[0]["captions"] == ["text"] and not source.faults


@pytest.mark.parametrize(
  "caption, kind",
  [
    (b"caf\xe9", "caption not UTF-8"),
    (b"x" * 65537, "caption too long"),
    (b"x" * 100_000, "caption too long"),
  ],
)
def test_captions_that_cannot_be(tmp_path, caption, kind):
  write(
    tmp_path / "a.tar",
    [("a.jpg", b"A"), ("a.txt", caption), ("b.jpg", b"B"), ("b.txt", b"b")],
  )
  source = opened(tmp_path / "a.tar")
  with pytest.raises(faults.BadExample) as e:
    source[0]
  assert e.value.kind == kind and source[1]["captions"] == ["b"]
  assert list(kinds.all_captions(source, "captions")) == ["b"]
  source = opened(tmp_path / "a.tar", only=dict(caption_length=(0, 9)))
  assert keys(source) == ["b"] and source.faults == {kind: 1}


def test_many_threads_read_at_once(folder):
  source = opened(folder / "*.tar")
  order = np.random.default_rng(0).integers(50, size=3000).tolist()
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    for i, found in zip(order, threads.map(source.records.__getitem__, order)):
      assert found["image"] == picture(i) and found["key"] == f"{i:09d}"
