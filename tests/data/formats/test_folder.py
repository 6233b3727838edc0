"""Folders of images with a table of captions."""

import concurrent.futures
import csv
import io
import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
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


@pytest.mark.parametrize("layout", ["long", "columns", "parallel", "nested"])
def test_captions_with_a_language_each(folder, layout):
  """The same examples, however the table is laid out."""
  want = [(0, "a", "en"), (0, "b", "en"), (0, "c", "th"), (2, "d", "th")]
  captions, end = None, "jsonl"
  if layout == "long":
    end = "csv"
    rows = ["file,caption,language", *(f"{i}.jpg,{t},{k}" for i, t, k in want)]
  elif layout == "columns":
    captions = {"en": "english", "th": "thai"}
    rows = [
      {"file": "0.jpg", "english": ["a", "b"], "thai": "c"},
      {"file": "2.jpg", "english": None, "thai": "d"},
    ]
  elif layout == "parallel":
    rows = [
      {
        "file": "0.jpg",
        "caption": ["a", "b", "c"],
        "language": ["en", "en", "th"],
      },
      {"file": "2.jpg", "caption": ["d"], "language": ["th"]},
    ]
  else:
    rows = [
      {"file": "0.jpg", "caption": {"en": ["a", "b"], "th": "c"}},
      {"file": "2.jpg", "caption": {"th": ["d", ""]}},
    ]
  rows = [x if isinstance(x, str) else json.dumps(x) for x in rows]
  (folder / f"captions.{end}").write_text("\n".join(rows))
  found = opened(folder, captions=captions)
  assert [source["file"] for source in found] == ["0.jpg", "2.jpg"]
  assert found[0]["captions"] == ["a", "b", "c"]
  assert found[0]["language"] == ["en", "en", "th"]
  assert found[1]["captions"] == ["d"] and found[1]["language"] == ["th"]
  assert set(found[0]) - {"english", "thai"} == {
    "image",
    "file",
    "captions",
    "language",
  }
  thai = opened(folder, captions=captions, only=dict(language="th"))
  assert [x["captions"] for x in thai] == [["c"], ["d"]]
  each = opened(folder, captions=captions, element="caption")
  assert [(x["file"], x["captions"], x["language"]) for x in each] == [
    (f"{i}.jpg", [text], [language]) for i, text, language in want
  ]
  if layout == "columns":
    with pytest.raises(errors.UserError, match='"thia" is not .*mean "thai"'):
      opened(folder, captions={"th": "thia"})


def test_csv(folder):
  (folder / "captions.csv").write_bytes(CSV.encode())
  source = opened(folder)
  assert len(source) == 10 and not source.faults
  assert source.name == f"folder[{folder}]"
  for i in range(10):
    want = {
      "file": name(i),
      "captions": [f'né, "{i}"'],
      "tag": ["xy"[i % 2]],
      "score": [i / 10 if i else None],
    }
    if i == 0:
      want["captions"].append("another one")
      want["tag"].append("z")
      want["score"].append(7.0)
    assert source.brief(i) == want
    assert source[i] == {**want, "image": image(i)}

  def kept(**only):
    return [source["file"] for source in opened(folder, only=only)]

  assert kept(score=(0.8, None)) == [name(i) for i in (0, 8, 9)]
  assert kept(caption_length=(None, 7)) == [
    name(i) for i in range(1, 10)
  ]  # all captions have to fit
  assert kept(tag="x", caption_length=(None, 7)) == [
    name(i) for i in (0, 2, 4, 6, 8)
  ]
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
  assert opened(folder, table="sub.csv")[0]["file"] == "6.jpg"


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
    ("captions.json", "{}", 'no lists "images" and "annotations"'),
    ("captions.json", "[1]", "each of its list has to be an object"),
    ("captions.json", '{"images": [1], "annotations": []}', 'each of "images"'),
    ("captions.json", "[" * 100_000, "captions.json does not parse"),
  ],
)
def test_tables_that_cannot_be(folder, table, text, message):
  (folder / table).write_bytes(text.encode("latin-1"))
  with pytest.raises(errors.UserError, match=message) as e:
    opened(folder)
  assert "\n" not in str(e.value)


def test_a_named_table_has_to_be_there(folder):
  with pytest.raises(errors.UserError, match="looked for t.csv "):
    opened(folder, table="t.csv")
  (folder / "t.txt").write_text("file,caption\n")
  with pytest.raises(errors.UserError, match="t.txt is none of .csv, "):
    opened(folder, table="t.txt")
  with pytest.raises(errors.UserError, match="give table='t.csv'"):
    opened(folder, captions="t.csv")


def test_missing_folders_and_tables_are_named(folder):
  with pytest.raises(errors.UserError, match=r"no folder .*/none; check"):
    opened(folder / "none")
  with pytest.raises(errors.UserError, match="is a file, not a folder; give"):
    opened(folder / "0.jpg")
  with pytest.raises(errors.UserError, match="no table of captions.*txt besid"):
    opened(folder)
  (folder / "nothing").mkdir()
  with pytest.raises(errors.UserError, match="nothing has no pictures and no"):
    opened(folder / "nothing")
  for split in ("train", "test"):
    (folder / split).mkdir()
    (folder / split / "metadata.csv").write_text("file_name,text\n1.jpg,a\n")
  with pytest.raises(errors.UserError, match="choose one: table='test/metada"):
    opened(folder)


def captions(source):
  return {source[i]["file"]: source[i]["captions"] for i in range(len(source))}


WANT = {"0.jpg": ["a; b", "c"], "2.jpg": ["d\te"], "odd/1.jpg": ["f, g"]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_and_encodings(folder, delimiter, encoding, caplog):
  caplog.set_level("INFO", "sigjax")
  out = io.StringIO()
  writer = csv.writer(out, delimiter=delimiter)
  writer.writerow(["filepath", " title"])  # open_clip's names
  for file, texts in WANT.items():
    writer.writerows([[f"./{file}", text] for text in texts])
  (folder / "x.csv").write_bytes(out.getvalue().encode(encoding))
  source = opened(folder)
  assert captions(source) == WANT and not source.faults
  assert 'column "filepath" has the images, "title" the captions' in caplog.text
  assert ("separated by" in caplog.text) == (delimiter != ",")


def test_tsv(folder):
  rows = "".join(f"{f}\t{t}\n" for f, ts in WANT.items() for t in ts)
  (folder / "train.tsv").write_text("filepath\ttitle\n" + rows)
  source = opened(folder)  # the only table; it has a row with three fields
  assert captions(source)["0.jpg"] == ["a; b", "c"]
  assert source.faults == {"malformed row": 1}


def test_malformed_rows_are_faults_that_name_the_line(folder, caplog):
  (folder / "captions.csv").write_text(
    "file,caption\n"
    "0.jpg,a cat, on a mat\n"  # line 2
    "2.jpg,fine\n"
    '4.jpg,"not closed\n'  # line 4
    "6.jpg,fine too\n"
    'odd/1.jpg,"closed" not at the end\n'
    'odd/3.jpg,"of two\nlines"\n'
    '8.jpg,"not closed either\n'
    "odd/5.jpg,the last\n"
  )
  source = opened(folder)
  assert captions(source) == {
    "2.jpg": ["fine"],
    "6.jpg": ["fine too"],
    "odd/3.jpg": ["of two\nlines"],
    "odd/5.jpg": ["the last"],
  }
  assert source.faults == {"malformed row": 4}
  assert "4 x malformed row, such as line 2" in caplog.text
  (folder / "captions.csv").write_text("file,caption\n" + "x,y,z\n" * 1002)
  with pytest.raises(errors.UserError, match="captions.csv is no CSV: 1001"):
    opened(folder)


def test_ids_of_a_csv_stay_what_they_are(folder):
  columns = {
    "zeros": ("007", "7", ""),
    "large": (str(2**53 + 1), str(2**53), "1"),
    "number": ("3", "", "-4"),
    "real": ("3", ".5", "1e3"),
    "word": ("nan", "1_0", "1"),
  }
  rows = zip(*columns.values())
  (folder / "captions.csv").write_text(
    f"file,caption,{','.join(columns)}\n"
    + "".join(f"{2 * i}.jpg,x,{','.join(row)}\n" for i, row in enumerate(rows))
  )
  source = opened(folder)
  found = {k: [source[i][k] for i in range(3)] for k in columns}
  assert found == {
    "zeros": ["007", "7", None],
    "large": [str(2**53 + 1), str(2**53), "1"],
    "number": [3, None, -4],
    "real": [3.0, 0.5, 1000.0],
    "word": ["nan", "1_0", "1"],
  }
  assert len(opened(folder, group_by="large")) == 3


def test_a_column_belongs_to_the_caption(folder):
  (folder / "captions.csv").write_text(
    "file,caption,language,year\n"
    "0.jpg,a cat,en,1\n0.jpg,eine Katze,de,1\n"
    "2.jpg,ein Hund,de,2\n"
    "4.jpg,une vache,fr,3\n4.jpg,a cow,en,3\n4.jpg,one cow,en,3\n"
  )
  source = opened(folder)
  assert len(source) == 3 and source[0]["year"] == 1
  assert source[0]["language"] == ["en", "de"]
  only = opened(folder, only=dict(language="en"))
  assert captions(only) == {"0.jpg": ["a cat"], "4.jpg": ["a cow", "one cow"]}
  assert only[0]["language"] == "en" and only[1]["image"] == image(4)
  assert only.records.identity != source.records.identity
  only = opened(folder, only=dict(language=["fr", "de"], year=(2, None)))
  assert captions(only) == {"2.jpg": ["ein Hund"], "4.jpg": ["une vache"]}
  with pytest.raises(errors.UserError, match="with language='es'.*: de, en"):
    opened(folder, only=dict(language="es"))
  with pytest.raises(errors.UserError, match="cannot be grouped by it"):
    opened(folder, group_by="language")
  assert len(opened(folder, only=dict(language="en"), group_by="language")) == 1


def test_part_divides_images(folder):
  (folder / "captions.csv").write_text(
    "file,caption\n" + "".join(f"{name(i % 10)},{i}\n" for i in range(50))
  )
  some, others = (opened(folder, part=p) for p in ((0, 0.5), (0.5, 1)))
  some, others = set(captions(some)), set(captions(others))
  assert some and others and not some & others and len(some | others) == 10


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_hugging_face_imagefolder(folder, ending, caplog):
  caplog.set_level("INFO", "sigjax")
  rows = dict(file_name=["1.jpg", "3.jpg"], text=["one", "three"], id=[7, 8])
  path = folder / f"odd/metadata.{ending}"
  if ending == "parquet":
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
  elif ending == "csv":
    path.write_text("file_name,text,id\n1.jpg,one,7\n3.jpg,three,8\n")
  else:
    path.write_text(
      '{"id": 7, "file_name": "1.jpg", "text": "one"}\n'
      '{"file_name": "3.jpg", "text": "three"}\n'
    )
  source = opened(folder)  # the table is below the path
  assert captions(source) == {"odd/1.jpg": ["one"], "odd/3.jpg": ["three"]}
  assert source[0]["id"] == 7 and "the images are in odd/" in caplog.text
  assert captions(opened(folder / "odd")) == {
    "1.jpg": ["one"],
    "3.jpg": ["three"],
  }
  path.write_bytes(b"PAR1 \n" if ending == "parquet" else b"file_name,text\n")
  with pytest.raises(errors.UserError, match=f"metadata.{ending}") as e:
    opened(folder / "odd")
  assert "\n" not in str(e.value)


def test_coco(folder):
  (folder / "annotations").mkdir()
  images = [
    dict(id=10 * i, file_name=f"{i}.jpg", width=i, height=8, license=1)
    for i in (1, 3, 5, 11)
  ]
  notes = [
    dict(id=k, image_id=i, caption=text)
    for k, (i, text) in enumerate(
      [(30, "three"), (10, "one"), (30, "3"), (50, " "), (110, "x"), (99, "y")]
    )
  ]
  (folder / "annotations" / "captions_val2017.json").write_text(
    json.dumps(dict(info={}, images=images, annotations=notes))
  )
  want = {"3.jpg": ["three", "3"], "1.jpg": ["one"]}
  source = opened(folder)  # as COCO is unpacked
  assert captions(source) == {f"odd/{k}": v for k, v in want.items()}
  assert source.faults == {"missing image": 2, "missing caption": 1}
  assert len(opened(folder, only=dict(width=(2, None)))) == 1
  source = opened(folder / "odd", table="../annotations/captions_val2017.json")
  assert captions(source) == want


def test_texts_beside_the_images(folder, caplog):
  caplog.set_level("INFO", "sigjax")
  for i, text in {0: b"zero\n", 1: "né".encode(), 2: b" ", 3: b"\xff"}.items():
    (folder / name(i)).with_suffix(".txt").write_bytes(text)
  source = opened(folder)
  assert captions(source) == {"0.jpg": ["zero"], "odd/1.jpg": ["né"]}
  assert source.faults == {"caption not UTF-8": 1, "missing caption": 7}
  assert "captions are in .txt files" in caplog.text


def test_other_columns_and_json_lists(folder):
  rows = [
    {"photo": "0.jpg", "file": "x", "alt": ["a", "b"]},
    {"photo": "2.jpg"},
  ]
  (folder / "captions.json").write_text(json.dumps(rows))
  source = opened(folder, image="photo", captions="alt")
  assert captions(source) == {"0.jpg": ["a", "b"]}
  assert source.faults == {"missing caption": 1}
  with pytest.raises(errors.UserError, match='"foto".*mean "photo"'):
    opened(folder, image="foto", captions="alt")


def test_linked_folders_are_followed_but_not_in_circles(folder):
  outside = folder.parent / f"{folder.name} outside"
  outside.mkdir()
  (outside / "a.jpg").write_bytes(image(20))
  (outside / "a.txt").write_text("linked")
  (folder / "link").symlink_to(outside)
  (outside / "back").symlink_to(folder)
  assert captions(opened(folder)) == {"link/a.jpg": ["linked"]}
  (folder / "captions.csv").write_text("file,caption\nlink/a.jpg,x\n")
  source = opened(folder)
  assert source[0]["image"] == image(20) and not source.faults


def test_identity(folder):
  (folder / "captions.csv").write_text("file,caption\n0.jpg,a\n2.jpg,b\n")
  found = opened(folder).records.identity
  assert opened(folder).records.identity == found
  (folder / "4.jpg").write_bytes(b"not in the table")
  assert opened(folder).records.identity == found
  (folder / "2.jpg").write_bytes(b"of another size")
  assert opened(folder).records.identity != found


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
