"""Runs a study: a grid of training runs, several seeds each, and their table.

  python -m tools.study studies/batch_size.py --parallel 2

Each run trains in a folder of its own, OUT/runs/NAME. What is finished is not
run again: after an interruption the same command goes on. After each run the
table (OUT/table.txt and table.md), a CSV file with all seeds and a plot are
written anew. A run that fails is marked in the table; the others go on.

A study is a file with a function get_study(); see tools/grid/plan.py and the
files in studies/.
"""

from collections.abc import Sequence
import logging
import os
import pathlib
import sys
import time

from absl import flags
import tqdm

from sigjax import errors
from sigjax.runtime import files, program
from tools.bench import report as bench_report
from tools.grid import plan, results, worker
from tools.grid.plan import Job, Study

log = logging.getLogger("sigjax")


def run(
  path: str | os.PathLike[str],
  *,
  out: str | os.PathLike[str] | None = None,
  parallel: int = 1,
  seeds: Sequence[int] | None = None,
) -> list[results.Outcome]:
  """Runs what is not yet finished of a study; writes and prints its results.

  Args:
    path: the study's file.
    out: where its runs and results go; workdirs/studies/NAME if None.
    parallel: how many runs train at a time, in a process and with a share of
      the cores each. On an accelerator: 1.
    seeds: instead of the study's own.

  Raises:
    UserError: the study is none, or a run that others start from has failed.
  """
  bench_report.check_matplotlib("the plot of a study")
  study = plan.read(path)
  if seeds is not None:
    study = plan.with_seeds(study, seeds)
  name = pathlib.Path(path).stem
  out = pathlib.Path(out or f"workdirs/studies/{name}").absolute()
  out.mkdir(parents=True, exist_ok=True)
  first, jobs = plan.jobs(study, out)
  to_do = [job for job in [*first, *jobs] if not job.result.exists()]
  log.info(
    "%s: %d runs, of which %d are finished; results in %s",
    name,
    len(first) + len(jobs),
    len(first) + len(jobs) - len(to_do),
    out,
  )
  failed: dict[pathlib.Path, str] = {}
  total = len(first) + len(jobs)
  # Estimates from the runs of this call alone: finished ones took no time.
  with tqdm.tqdm(total=total, initial=total - len(to_do), unit="run") as bar:
    for part in (first, jobs):
      part = [job for job in part if job in to_do]
      start = time.monotonic()
      for job, error in worker.run_all(part, parallel, out / "cache"):
        if error:
          failed[job.workdir] = error
          log.error("%s, seed %d failed: %s", job.name, job.seed, error)
        else:
          seconds = time.monotonic() - start
          log.info("%s, seed %d, after %.0f s", job.name, job.seed, seconds)
        bar.update()
        report(out, name, study, jobs, failed)
      if failed and part and part[0] in first:
        raise errors.UserError(
          "the others start from a run that failed: "
          + "; ".join(failed.values())
        )
  found = report(out, name, study, jobs, failed)
  print(results.text(study, found))
  return found


def report(
  out: pathlib.Path,
  name: str,
  study: Study,
  jobs: Sequence[Job],
  failed: dict[pathlib.Path, str],
) -> list[results.Outcome]:
  """Writes the tables, the CSV file and the plot of what is finished."""
  from tools.grid import plot

  found = results.outcomes(study, jobs, failed)
  files.write(out / "table.txt", results.text(study, found) + "\n")
  tables = results.table(study, found), results.versus_table(study, found)
  files.write(
    out / "table.md", "\n\n".join(map(results.markdown, tables)).strip() + "\n"
  )
  results.write_csv(out / f"{name}.csv", study, found)
  if any(o.seconds for o in found):
    plot.draw(out / f"{name}.png", study, found)
  return found


FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
  """Runs the program."""
  if len(argv) != 2:
    raise errors.UserError("give a study, such as studies/batch_size.py")
  try:
    seeds = FLAGS.seeds and [int(seed) for seed in FLAGS.seeds]
  except ValueError:
    raise errors.UserError(
      f"--seeds takes whole numbers, such as 0,1,2, not {','.join(FLAGS.seeds)}"
    ) from None
  options = dict(out=FLAGS.out, parallel=FLAGS.parallel, seeds=seeds)
  try:
    found = run(argv[1], **options)
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command goes on with what is left")
  if any(o.errors for o in found):
    sys.exit("error: some runs failed, see above; the same command tries again")


if __name__ == "__main__":
  flags.DEFINE_string("out", None, "A folder for runs and results.")
  flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1)
  flags.DEFINE_list("seeds", None, "Seeds, in place of the study's own.")
  FLAGS.set_gnu_getopt(True)  # flags may follow the study
  program.run(main, lambda rest: None)
