"""Studies: real runs in real processes, known statistics, one-line errors."""

import csv
import json
import math
import multiprocessing
import pathlib
import threading
import time

import pytest

from sigjax import errors, train
from tools import study as study_lib
from tools.grid import plan, results
from tools.grid.plan import Study

STUDY = """
import json
import pathlib
from ml_collections import ConfigDict
from tools.grid.plan import Study, grid

def make(loss):
  config = json.loads(pathlib.Path({path!r}).read_text())
  config["loss"] = dict(name=loss)
  config["init"] = dict(path="{{start}}")
  return ConfigDict(config)

def get_study():
  return Study(
    question="Which?", paper="Both.",
    runs=grid(make, loss=("sigmoid", "softmax", "sigmiod")),
    metrics={{"top-1 %": "zeroshot/*top-1", "b": "b"}},
    x="loss", line="loss", versus=("sigmoid", "softmax"), seeds=(0, 1),
    prepare=dict(start=ConfigDict(json.loads(pathlib.Path({path!r}).read_text()))),
    curves=("grad_norm",),
  )
"""


@pytest.fixture
def path(tmp_path, tiny_config) -> pathlib.Path:
  """Returns the file of a study of two losses, and a third that is none."""
  pytest.importorskip("matplotlib", reason="pip install -e '.[bench]'")
  config = dict(tiny_config, total_steps=2)
  config["evals"] = dict(zeroshot=config["evals"]["zeroshot"])
  (tmp_path / "config.json").write_text(json.dumps(config))
  found = tmp_path / "which.py"
  found.write_text(STUDY.format(path=str(tmp_path / "config.json")))
  return found


def kill_a_worker(out: pathlib.Path) -> None:
  """Kills the process that trains softmax, seed 0, as soon as it does."""
  while not list(out.glob("runs/loss=softmax,seed=0-*/log.txt")):
    time.sleep(0.01)
  for child in multiprocessing.active_children():
    child.kill()


def test_goes_on_after_failures_and_runs_nothing_twice(path, tmp_path):
  out = tmp_path / "out"
  killer = threading.Thread(target=kill_a_worker, args=(out,))
  killer.start()
  found = study_lib.run(path, out=out)
  killer.join()
  failed = {o.labels["loss"]: o.errors for o in found if o.errors}
  assert set(failed) == {"softmax", "sigmiod"}
  assert "ended by SIGKILL" in failed["softmax"][0]
  assert 'did you mean "sigmoid"' in failed["sigmiod"][1]
  assert "1, 1 failed" in (out / "table.txt").read_text()
  times = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
  assert len(times) == 1 + 2 + 1  # start, sigmoid, one of softmax

  found = study_lib.run(path, out=out)
  again = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
  assert len(again) == len(times) + 1
  assert times.items() <= again.items()

  # The same run by itself gives the same values.
  study = plan.read(path)
  [job] = [
    job
    for job in plan.jobs(study, out)[1]
    if job.labels == dict(loss="softmax") and job.seed == 1
  ]
  errors.call(train.main, job.config, "config", tmp_path / "alone")
  lines = (tmp_path / "alone/metrics.jsonl").read_text().splitlines()
  last = json.loads(lines[1])
  with open(out / "which.csv") as f:
    [row] = [
      row
      for row in csv.DictReader(f)
      if (row["loss"], row["seed"]) == ("softmax", "1")
    ]
  assert float(row["b"]) == last["b"]
  assert (out / "which.png").stat().st_size > 10_000
  table = (out / "table.md").read_text()
  assert table.count("| sigmoid |") == table.count("| softmax |") == 1
  assert table.count("| 0, 2 failed |") == 1


def outcome(values, **labels):
  return results.Outcome(labels, {"m": values}, {}, {}, 0, {})


def test_interval_is_students():
  mean, half = results.interval([1.0, 2.0, 3.0])
  # 4.302653 is the 97.5 % quantile of t with 2 degrees of freedom.
  assert mean == 2
  assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
  mean, half = results.interval([5.0])
  assert mean == 5
  assert math.isnan(half)


def test_differences_are_taken_seed_by_seed():
  study = Study(
    "q", "p", [], {"m": "m"}, x="B", line="loss", versus=("new", "old")
  )
  found = [
    outcome({0: 1.0, 1: 5.0, 2: 9.0}, loss="old", B=8),
    outcome({0: 2.0, 1: 6.0, 3: 0.0}, loss="new", B=8),
    outcome({0: 7.0}, loss="new", B=16),
  ]
  # Seeds 0 and 1 are shared, and in both the difference is 1.
  assert results.differences(study, found) == [
    {"B": 8, "metric": "m", "mean": 1.0, "half": 0.0, "n": 2}
  ]


RUN = "Run(dict(a=1), ConfigDict())"
WRONG = {
  "no function get_study": "x = 1",
  "has to be a Study": "def get_study(): return 1",
  "no runs, no seeds": (
    'def get_study(): return Study("", "", [], {"a": "a"}, "a")'
  ),
  "their labels have to differ": (
    f'def get_study(): return Study("", "", [{RUN}, {RUN}], {{"a": "a"}}, "a")'
  ),
  "has no label b": (
    f'def get_study(): return Study("", "", [{RUN}], {{"m": "a"}}, "b")'
  ),
  "a is a label and a metric": (
    f'def get_study(): return Study("", "", [{RUN}], {{"a": "a"}}, "a")'
  ),
  "versus has 3": (
    f'def get_study(): return Study("", "", [{RUN}], {{"m": "a"}}, "a", "a",'
    " (1, 3))"
  ),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_in_a_study_are_named(tmp_path, message):
  path = tmp_path / "wrong.py"
  path.write_text(
    "from ml_collections import ConfigDict\n"
    f"from tools.grid.plan import Run, Study\n{WRONG[message]}\n"
  )
  with pytest.raises(errors.UserError, match=message):
    plan.read(path)
  with pytest.raises(errors.UserError, match=r'did you mean ".*wrong.py"'):
    plan.read(tmp_path / "wrnog.py")


@pytest.mark.parametrize(
  "path",
  sorted(pathlib.Path(__file__).parents[2].glob("studies/[a-z]*.py")),
  ids=lambda path: path.stem,
)
def test_the_projects_studies_can_be_read(path):
  if path.stem == "common":
    return
  study = plan.read(path)
  jobs = plan.jobs(study, pathlib.Path("out"))[1]
  assert len(jobs) == len(study.runs) * len(study.seeds)
  assert len({job.workdir for job in jobs}) == len(jobs)
  for job in jobs:  # the runs they start from are filled in
    for name in study.prepare:
      assert f"{{{name}}}" not in str(job.config)
