"""Folders of images with a table of captions."""

import concurrent.futures
import json

import fsspec
import numpy as np
import pytest

from sigjax import errors
from sigjax.data import faults, kinds


def image(i):
  return np.random.default_rng(i).bytes(100 + i)


@pytest.fixture
def folder(tmp_path):
  """Pictures 0.jpg to 9.jpg, the odd ones in a folder of their own."""
  (tmp_path / "odd").mkdir()
  for i in range(10):
    (tmp_path / name(i)).write_bytes(image(i))
  return tmp_path


def name(i):
  return f"odd/{i}.jpg" if i % 2 else f"{i}.jpg"


CSV = "".join(
  ["\ufefffile,caption,score,tag\r\n"]
  + [
    f'{name(i)},"né, ""{i}""",{i / 10 if i else ""},{"xy"[i % 2]}\r\n'
    for i in range(10)
  ]
  + ["0.jpg,another one,7,z\r\n"]
)


def opened(path, **kwargs):
  return kinds.open_source("folder", path=str(path), **kwargs)


def test_csv(folder):
  (folder / "captions.csv").write_bytes(CSV.encode())
  source = opened(folder)
  assert len(source) == 10 and not source.faults
  assert source.name == f"folder[{folder}]"
  for i in range(10):
    want = {
      "file": name(i),
      "captions": [f'né, "{i}"'],
      "tag": "xy"[i % 2],
      "score": i / 10 if i else None,
    }
    want["captions"] += ["another one"] * (i == 0)
    assert source.brief(i) == want
    assert source[i] == {**want, "image": image(i)}

  def kept(**only):
    return [source["file"] for source in opened(folder, only=only)]

  assert kept(score=(0.8, None)) == [name(8), name(9)]
  assert kept(tag="x", caption_length=(None, 7)) == [
    name(i) for i in (2, 4, 6, 8)
  ]  # all captions have to fit
  assert kept(file=["0.jpg", "odd/1.jpg"]) == ["0.jpg", "odd/1.jpg"]


@pytest.mark.parametrize(
  "table, file, text",
  [
    ("metadata.jsonl", "file_name", "text"),
    ("captions.jsonl", "image", "captions"),
  ],
)
def test_jsonl(folder, table, file, text):
  rows = [
    {file: f"./{name(i)}", text: [f"a{i}", f"b{i}"] if i else "a0", "width": i}
    for i in range(10)
  ]
  (folder / table).write_text(
    "\n".join(json.dumps(row) for row in rows) + "\n\n"
  )
  source = opened(folder)
  assert [source[i]["captions"] for i in range(10)] == [["a0"]] + [
    [f"a{i}", f"b{i}"] for i in range(1, 10)
  ]
  assert source[3]["image"] == image(3) and source[3]["width"] == 3
  assert len(opened(folder, only=dict(width=(3, 5)))) == 3


def test_which_table(folder):
  (folder / "metadata.csv").write_text("file_name,text\n1.jpg,a\n2.jpg,b\n")
  assert opened(folder)[0]["file"] == "2.jpg"
  (folder / "captions.jsonl").write_text('{"file": "4.jpg", "text": "c"}')
  assert opened(folder)[0]["file"] == "4.jpg"
  (folder / "sub.csv").write_text("image,caption\n6.jpg,d\n")
  assert opened(folder, captions="sub.csv")[0]["file"] == "6.jpg"


def test_rows_that_are_left_out(folder, caplog):
  outside = folder.parent / "outside.jpg"
  outside.write_bytes(b"x")
  (folder / "captions.jsonl").write_text(
    "\n".join(
      map(
        json.dumps,
        [
          {"file": "0.jpg", "caption": "a"},
          {"file": "7.jpg", "caption": "b"},
          {"file": "2.jpg", "caption": ""},
          {"file": "4.jpg", "caption": None},
          {"caption": "c"},
          {"file": "../outside.jpg", "caption": "d"},
          {"file": str(outside), "caption": "e"},
          {"file": "6.jpg", "caption": 7},
        ],
      )
    )
  )
  source = opened(folder)
  assert [source[i]["file"] for i in range(len(source))] == ["0.jpg"]
  assert source.faults == {"missing image": 4, "missing caption": 3}
  assert "captions.jsonl: 4 x missing image, such as 7.jpg" in caplog.text


@pytest.mark.parametrize(
  "table, text, message",
  [
    ("captions.csv", "file,captoin\na,b\n", "no column caption or captions or"),
    ("captions.csv", "a,b\n", "has 0 rows, none with an image"),
    ("captions.csv", "file,caption\nx.jpg,b\n", "1 rows, .*instance, x.jpg"),
    ("captions.csv", "file,caption\n0.jpg,caf\xe9\n", "is not UTF-8"),
    ("captions.jsonl", '{"file": 1}\n{"file"\n', "line 2 does not parse"),
    ("captions.jsonl", "[1]", "line 1 has to be an object"),
    ("other.csv", "file,caption\n0.jpg,b\n", "no table of captions in"),
  ],
)
def test_tables_that_cannot_be(folder, table, text, message):
  (folder / table).write_bytes(text.encode("latin-1"))
  with pytest.raises(errors.UserError, match=message) as e:
    opened(folder)
  assert "\n" not in str(e.value)


def test_a_named_table_has_to_be_there(folder):
  with pytest.raises(errors.UserError, match="looked for t.csv;"):
    opened(folder, captions="t.csv")
  (folder / "t.txt").write_text("file,caption\n")
  with pytest.raises(errors.UserError, match="neither .csv nor .jsonl"):
    opened(folder, captions="t.txt")


def test_at_reading(folder):
  (folder / "captions.csv").write_text(
    "file,caption\n0.jpg,a\n2.jpg," + "x" * 65537 + "\n"
  )
  source = opened(folder)
  (folder / "0.jpg").unlink()
  for i, kind in enumerate(["missing image", "caption too long"]):
    with pytest.raises(faults.BadExample) as e:
      source[i]
    assert e.value.kind == kind


def test_many_threads_read_at_once(folder):
  (folder / "captions.csv").write_bytes(CSV.encode())
  source = opened(folder)
  order = np.random.default_rng(0).integers(10, size=1000).tolist()
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    for i, found in zip(order, threads.map(source.records.__getitem__, order)):
      assert found["image"] == image(i) and found["file"] == name(i)


def test_remote(folder):
  system = fsspec.filesystem("memory")
  system.pipe({f"/b/{name(i)}": image(i) for i in range(9)})
  system.pipe("/b/captions.csv", CSV.encode())
  try:
    source = opened("memory://b/")
    assert len(source) == 9 and source.faults == {"missing image": 1}
    assert [source[i]["image"] for i in range(9)] == list(map(image, range(9)))
  finally:
    system.store.clear()
