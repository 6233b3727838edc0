"""What a study consists of: runs, seeds, and what is compared.

A file studies/NAME.py has a function get_study() -> Study. Its runs are configs
that differ in what their labels say; each is trained once for each seed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from sigjax import errors


@dataclasses.dataclass(frozen=True)
class Run:
  """One config of a study, trained once for each seed.

  Attributes:
    labels: what tells it from the study's other runs, such as
      dict(loss="sigmoid", batch_size=256).
    config: the whole config. A string in it may name the workdir of a run in
      Study.prepare, as in "{tower}".
  """

  labels: Mapping[str, Any]
  config: ConfigDict

  @property
  def name(self) -> str:
    """The labels in one word, for logs and folders."""
    text = ",".join(f"{k}={v}" for k, v in self.labels.items())
    return re.sub(r"[^\w.=,-]+", "_", text)


@dataclasses.dataclass(frozen=True)
class Study:
  """A question and the runs that answer it.

  Attributes:
    question: what is asked, in a sentence.
    paper: what the paper found, in a sentence, with its section.
    runs: see Run; `grid` makes them.
    metrics: {name in the table: its key in metrics.jsonl}; the value is that of
      the run's last step. A key may hold "*". Fractions are shown in percent
      if the name ends in "%".
    x: the label along the plot's axis. Numbers are placed on a log scale.
    line: the label that tells the plot's lines apart; None for one line.
    versus: two values of `line`: the table shows the first minus the second,
      seed by seed, wherever all other labels are equal.
    seeds: one training run for each.
    prepare: {name: config} of runs that come first, once, whose workdirs the
      others start from.
    curves: keys of metrics.jsonl that are drawn over the steps.
    curve_steps: the last step of the curves; None for the whole run.
  """

  question: str
  paper: str
  runs: Sequence[Run]
  metrics: Mapping[str, str]
  x: str
  line: str | None = None
  versus: tuple[Any, Any] | None = None
  seeds: Sequence[int] = (0, 1, 2)
  prepare: Mapping[str, ConfigDict] = dataclasses.field(default_factory=dict)
  curves: Sequence[str] = ()
  curve_steps: int | None = None


def grid(make: Callable[..., ConfigDict], **labels: Sequence[Any]) -> list[Run]:
  """Returns a run for each combination of label values.

  Args:
    make: fn(**labels) -> the config of a run.
    **labels: {label: its values}.
  """
  combinations = itertools.product(*labels.values())
  found = [dict(zip(labels, values)) for values in combinations]
  return [Run(chosen, make(**chosen)) for chosen in found]


class Job:
  """One training run: a config with a seed, and the folder it belongs in.

  Attributes:
    name: for people.
    labels: of its Run; empty for a run in Study.prepare.
    seed: config.seed.
    config: the whole config, as the keyword arguments of train.main.
    workdir: where it trains. The folder's name holds a digest of the config, so
      that an edited study does not mistake an old run for its own.
  """

  def __init__(
    self,
    out: pathlib.Path,
    name: str,
    labels: Mapping[str, Any],
    seed: int,
    config: Mapping[str, Any],
  ):
    self.name, self.labels, self.seed = name, dict(labels), seed
    self.config = {**config, "seed": seed}
    text = json.dumps(self.config, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    # File systems allow 255 bytes.
    self.workdir = out / "runs" / f"{name[:150]},seed={seed}-{digest}"

  @property
  def result(self) -> pathlib.Path:
    """The file that says that the run is finished, and its metrics."""
    return self.workdir / "result.json"


def jobs(study: Study, out: pathlib.Path) -> tuple[list[Job], list[Job]]:
  """Returns (jobs of study.prepare, jobs of study.runs for each seed)."""
  first = {
    name: Job(out, name, {}, 0, config.to_dict())
    for name, config in study.prepare.items()
  }
  workdirs = {f"{{{name}}}": job.workdir for name, job in first.items()}
  found = [
    Job(
      out, run.name, run.labels, seed, _filled(run.config.to_dict(), workdirs)
    )
    for seed in study.seeds
    for run in study.runs
  ]
  return list(first.values()), found


def _filled(value: Any, workdirs: Mapping[str, pathlib.Path]) -> Any:
  """Replaces "{name}" in all strings by the workdir of that run."""
  if isinstance(value, dict):
    return {key: _filled(x, workdirs) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_filled(x, workdirs) for x in value)
  if isinstance(value, str):
    for name, workdir in workdirs.items():
      value = value.replace(name, str(workdir))
  return value


def read(path: str | os.PathLike[str]) -> Study:
  """Returns the study of a file.

  Raises:
    UserError: there is no such file, it has no get_study(), or the study is
      not one: no runs or seeds, two runs with equal labels, or a label or a
      value that no run has.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    known = sorted(str(p) for p in path.parent.glob("[a-z]*.py"))
    raise errors.UserError(
      f"there is no study {path}{errors.closest(str(path), known)}; those of "
      "the project are in studies/"
    )
  spec: Any = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_study"):
    raise errors.UserError(f"{path} has no function get_study()")
  study = module.get_study()
  _check(study, path)
  return study


def with_seeds(study: Study, seeds: Sequence[int]) -> Study:
  """Returns the study with other seeds."""
  if not seeds or len(set(seeds)) < len(seeds):
    raise errors.UserError(f"the seeds {list(seeds)} are not distinct numbers")
  return dataclasses.replace(study, seeds=tuple(seeds))


def _check(study: Any, path: pathlib.Path) -> None:
  def refuse(what: str) -> None:
    raise errors.UserError(f"{path}: {what}")

  if not isinstance(study, Study):
    refuse(f"get_study() returns {type(study).__name__}, but has to be a Study")
  if not study.runs or not study.seeds or not study.metrics:
    refuse("the study has no runs, no seeds or no metrics")
  names = [run.name for run in study.runs]
  for name in names:
    if names.count(name) > 1:
      refuse(f"two runs have the labels {name}; their labels have to differ")
  for name in study.metrics:
    if any(name in run.labels for run in study.runs):
      refuse(f"{name} is a label and a metric; rename one")
  for label in (study.x, study.line):
    for run in study.runs if label else ():
      if label not in run.labels:
        refuse(f"the run {run.name} has no label {label}")
  if study.versus and study.line:
    found = {run.labels[study.line] for run in study.runs}
    for value in study.versus:
      if value not in found:
        refuse(f"versus has {value!r}, but no run has {study.line}={value!r}")
  elif study.versus:
    refuse("versus needs line: the label whose values it compares")
