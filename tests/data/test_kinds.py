"""Sources, on a real TFDS dataset in real ArrayRecord files."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sigjax import errors
from sigjax.data import filter as filter_lib
from sigjax.data import kinds
from sigjax.data import source as source_lib
from sigjax.data.emoji import builder
from sigjax.data.example import tokenizer
from sigjax.data.faults import BadExample
from sigjax.data.formats import tfds as tfds_lib

NUM = 12
PNG = b"\x89PNG not really, so decoding it would fail "


class SourcesTestPairs(tfds.core.GeneratorBasedBuilder):
  """Record with label i: concept i // 3, flag if i is even, i % 4 captions."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(encoding_format="png"),
        "inner": {"image": tfds.features.Image(encoding_format="png")},
        "captions": tfds.features.Sequence(
          {"text": tfds.features.Text(), "id": np.int64}
        ),
        "concept": tfds.features.Text(),
        "is_flag": np.bool_,
        "label": np.int64,
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(NUM),
      "test": self._generate_examples(2),
    }

  def _generate_examples(self, n):
    for i in range(n):
      yield (
        i,
        {
          "image": PNG + bytes([i]),
          "inner": {"image": PNG + b"inner"},
          "captions": [{"text": f"É {i} {k}", "id": k} for k in range(i % 4)],
          "concept": f"c{i // 3}",
          "is_flag": i % 2 == 0,
          "label": i,
        },
      )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  builder = SourcesTestPairs(data_dir=path, file_format="array_record")
  builder.download_and_prepare()
  return path


@pytest.fixture
def source(data_dir):
  return tfds_lib.tfds("sources_test_pairs", "train", data_dir)


def labels(source):
  return [int(source[i]["label"]) for i in range(len(source))]


def test_reads_what_was_written(source):
  assert source.name == "sources_test_pairs[train]"
  assert sorted(labels(source)) == list(range(NUM))
  for i in range(NUM):
    example = source[i]
    label = int(example["label"])
    assert example["image"] == PNG + bytes([label])  # left encoded
    assert example["inner"]["image"] == PNG + b"inner"
    texts = [text.decode() for text in example["captions"]["text"]]
    assert texts == [f"É {label} {k}" for k in range(label % 4)]
    assert list(example["captions"]["id"]) == list(range(label % 4))
  with pytest.raises(IndexError):
    source[NUM]


def test_splits_and_directories(data_dir):
  name = "sources_test_pairs:1.0.0"
  assert len(tfds_lib.tfds(name, "train[:5]", data_dir)) == 5
  assert len(tfds_lib.tfds(name, "train+test", data_dir)) == NUM + 2
  path = data_dir / "sources_test_pairs" / "1.0.0"
  assert len(tfds_lib.tfds(str(path), "test")) == 2


def test_missing_dataset_says_how_to_prepare_it(tmp_path):
  with pytest.raises(errors.UserError) as e:
    tfds_lib.tfds("sources_test_pairs", "train", tmp_path)
  message = str(e.value)
  assert '"sources_test_pairs"' in message and "\n" not in message
  assert f"not prepared in {tmp_path};" in message
  command = re.search('python -c "(.*?)"', message).group(1)
  exec(command)  # pylint: disable=exec-used
  assert len(tfds_lib.tfds("sources_test_pairs", "train", tmp_path)) == NUM


def test_default_data_dir_is_named():
  with pytest.raises(errors.UserError, match=r"in .*tensorflow_datasets;"):
    tfds_lib.tfds("sources_test_absent", "train")


def test_other_format_is_refused(data_dir, tmp_path):
  path = tmp_path / "sources_test_pairs" / "1.0.0"
  path.mkdir(parents=True)
  for file in (data_dir / "sources_test_pairs" / "1.0.0").iterdir():
    (path / file.name).write_bytes(file.read_bytes())
  info = json.loads((path / "dataset_info.json").read_text())
  info["fileFormat"] = "riegeli"
  (path / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(errors.UserError, match="stored as riegeli") as e:
    tfds_lib.tfds("sources_test_pairs", "train", tmp_path)
  assert "file_format='array_record'" in str(e.value)


@pytest.mark.parametrize("split", ["val", "train[", "train[5:5]"])
def test_missing_split_names_those_there_are(data_dir, split):
  with pytest.raises(errors.UserError) as e:
    tfds_lib.tfds("sources_test_pairs", split, data_dir)
  assert f'split "{split}"; it has: ' in str(e.value)
  assert re.search(r"it has: (train, test|test, train),", str(e.value))


def test_where(source):
  flags = filter_lib.where(source, "is_flag", True)
  assert labels(flags) == [i for i in labels(source) if i % 2 == 0]
  one = filter_lib.where(flags, "concept", "c0")  # texts compare as str
  assert sorted(labels(one)) == [0, 2]
  with pytest.raises(errors.UserError, match="no example with concept='c9'"):
    filter_lib.where(source, "concept", "c9")


def test_grouped(source):
  groups = filter_lib.grouped(source, "concept")
  order = labels(source)
  assert len(groups) == NUM // 3
  found = [[order[i] for i in members] for members in groups.members]
  assert sorted(sum(found, [])) == list(range(NUM))
  assert all(len({i // 3 for i in group}) == 1 for group in found)
  assert labels(groups) == [group[0] for group in found]
  # In the order of their first records, whatever the values are.
  firsts = [int(members[0]) for members in groups.members]
  assert firsts == sorted(firsts) and groups.members[0][0] == 0


def test_pick_reaches_every_member(source):
  groups = filter_lib.grouped(source, "concept")
  rng = np.random.default_rng(0)
  picked = {groups.pick(1, rng) for _ in range(50)}
  assert picked == set(groups.members[1].tolist())
  assert {groups.pick(1) for _ in range(5)} == {int(groups.members[1][0])}


def test_where_and_grouped_commute(source):
  a = filter_lib.grouped(filter_lib.where(source, "is_flag", False), "concept")
  b = filter_lib.where(filter_lib.grouped(source, "concept"), "is_flag", False)
  members = lambda s: sorted(m.tolist() for m in s.members)
  assert members(a) == members(b)
  assert sorted(map(len, members(a))) == [1, 1, 2, 2]


def test_a_group_without_fitting_members_is_dropped(source):
  groups = filter_lib.where(filter_lib.grouped(source, "concept"), "label", 5)
  assert len(groups) == 1 and labels(groups) == [5]


def test_features_that_cannot_be_grouped_by(source):
  with pytest.raises(errors.UserError, match='"concpt".*mean "concept"'):
    filter_lib.grouped(source, "concpt")
  with pytest.raises(errors.UserError, match='"captions".*more than one value'):
    filter_lib.grouped(source, "captions")


def test_open_source(data_dir):
  source = kinds.open_source(
    "tfds",
    name="sources_test_pairs",
    split="train",
    data_dir=data_dir,
    only={"is_flag": False, "concept": "c1"},
    group_by="concept",
  )
  assert len(source) == 1 and sorted(source.members[0].tolist()) == [
    i
    for i, label in enumerate(
      labels(tfds_lib.tfds("sources_test_pairs", "train", data_dir))
    )
    if label in (3, 5)
  ]
  with pytest.raises(errors.UserError, match='source "tdfs".*"tfds"'):
    kinds.open_source("tdfs", split="train")
  with pytest.raises(errors.UserError, match='source "tfds" has no key "splt"'):
    kinds.open_source("tfds", name="x", splt="train")


def test_briefs_of_few_records_are_read_once(data_dir, monkeypatch):
  read = []

  def brief(self, i):
    read.append(i)
    if i == 2:
      raise BadExample("no", kind="damaged record")
    return real(self, i)

  real = tfds_lib.ArrayRecordRecords.brief
  monkeypatch.setattr(tfds_lib.ArrayRecordRecords, "brief", brief)
  args = dict(name="sources_test_pairs", split="train", data_dir=data_dir)
  part = kinds.open_source("tfds", **args)
  mixed = kinds.open_source(
    "mix", sources=[dict(args, kind="tfds", part=(0, 0.5))], weights=[1]
  )
  for source in part, mixed:
    first = source.brief(1)
    want = dict(first)
    first.clear()  # what a reader changes is its own
    assert source.brief(1) == want and source.brief(0) != want
    for _ in range(2):  # what cannot be read is tried again
      with pytest.raises(BadExample):
        source.brief(2)
    assert read == [1, 0, 2, 2]
    read.clear()
  # All else is as it was.
  direct = tfds_lib.tfds("sources_test_pairs", "train", data_dir)
  assert part.identity() == direct.identity()
  assert part[5].keys() == direct[5].keys() != part.brief(5).keys()
  monkeypatch.setattr(source_lib, "FEW", NUM - 1)
  large = kinds.open_source("tfds", **args)
  read.clear()
  assert large.brief(1).keys() == large.brief(1).keys() and read == [1, 1]


def test_emoji_is_prepared_first(monkeypatch, tmp_path):
  def prepare(data_dir):
    made = SourcesTestPairs(data_dir=data_dir, file_format="array_record")
    made.download_and_prepare()
    return made

  monkeypatch.setattr(builder, "prepare", prepare)
  source = kinds.open_source("emoji", split="test", data_dir=tmp_path)
  assert sorted(labels(source)) == [0, 1]
  assert source[0]["image"].startswith(PNG)
  assert (tmp_path / "sources_test_pairs").exists()


def test_all_captions(source):
  flags = filter_lib.where(source, "is_flag", True)
  want = [f"É {label} {k}" for label in labels(flags) for k in range(label % 4)]
  assert list(kinds.all_captions(flags, "captions")) == want
  groups = filter_lib.grouped(
    flags, "concept"
  )  # all members, not the first ones
  assert list(kinds.all_captions(groups, "captions")) == want


def test_tokenizer_tool(data_dir, source, tmp_path):
  def run(*args):  # as a program: flags are global to a process
    return subprocess.run(
      [
        sys.executable,
        "-m",
        "tools.train_tokenizer",
        "--source=tfds",
        "--name=sources_test_pairs",
        f"--data_dir={data_dir}",
        "--vocab_size=14",
        f"--out={tmp_path / 'tool.model'}",
        *args,
      ],
      capture_output=True,
      text=True,
      check=False,
    )

  done = run("--split=train")
  assert done.returncode == 0, done.stderr
  texts = [
    f"é {label} {k}" for label in labels(source) for k in range(label % 4)
  ]
  tokenizer.train(texts, 14, tmp_path / "want.model")
  want = (tmp_path / "want.model").read_bytes()
  assert (tmp_path / "tool.model").read_bytes() == want
  done = run("--split=nope")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "error: sources_test_pairs/1.0.0" in done.stderr


def test_tokenizer_tool_on_a_folder(tmp_path):
  texts = [f"picture of {n} things" for n in range(40)]
  (tmp_path / "captions.csv").write_text(
    "file,caption\n" + "\n".join(f"{i}.png,{t}" for i, t in enumerate(texts))
  )
  for i in range(40):
    (tmp_path / f"{i}.png").write_bytes(b"not looked at")
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "tools.train_tokenizer",
      "--source=folder",
      f"--path={tmp_path}",
      "--vocab_size=40",
      f"--out={tmp_path}/a.model",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  tokenizer.train(texts, 40, tmp_path / "want.model")
  assert (tmp_path / "a.model").read_bytes() == (
    tmp_path / "want.model"
  ).read_bytes()
