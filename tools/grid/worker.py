"""Processes that train the jobs of a study, one after the other.

A worker stays alive between jobs, and all share a compilation cache: runs that
differ in their seed alone are compiled once. It is JAX_COMPILATION_CACHE_DIR
if that is set.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import signal
import time
import traceback
from typing import Any

from sigjax.runtime import files, metrics
from tools.grid.plan import Job


def run_all(
  jobs: Sequence[Job], parallel: int, cache: pathlib.Path
) -> Iterator[tuple[Job, str | None]]:
  """Trains jobs, several at a time; yields each with its error as it ends.

  Args:
    jobs: what to train. Those that have a result are not to be among them.
    parallel: the number of workers. With several, each has its share of the
      processor's cores.
    cache: the folder of compiled programs.

  Yields:
    (job, error): error is None, or one line that says why the job failed.
  """
  waiting = list(jobs)[::-1]
  shares = _shares(parallel)
  workers = [_Worker(share, cache) for share in shares[: len(jobs)]]
  try:
    for worker in workers:
      worker.start(waiting.pop())
    while busy := [worker.pipe for worker in workers if worker.job]:
      for pipe in connection.wait(busy):
        worker = next(w for w in workers if w.pipe is pipe)
        job, error = worker.finish()
        if not worker.alive():  # it was killed: the next job needs another
          workers.remove(worker)
          worker = _Worker(worker.cores, cache)
          workers.append(worker)
        if waiting:
          worker.start(waiting.pop())
        yield job, error
  finally:
    for worker in workers:
      worker.end()


def _shares(parallel: int) -> list[list[int] | None]:
  """Returns the cores of each worker; None leaves all to it."""
  if parallel == 1 or not hasattr(os, "sched_getaffinity"):
    return [None] * parallel
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::parallel] or cores for i in range(parallel)]


class _Worker:
  """A process that trains one job at a time."""

  def __init__(self, cores: list[int] | None, cache: pathlib.Path):
    self.cores, self.job = cores, None
    context = multiprocessing.get_context("spawn")
    self.pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(theirs, cores, str(cache))
    )
    self._process.start()
    theirs.close()

  def start(self, job: Job) -> None:
    self.job = job
    with contextlib.suppress(BrokenPipeError):  # finish() notices
      self.pipe.send((str(job.workdir), job.config))

  def finish(self) -> tuple[Job, str | None]:
    """Returns the job that has ended, and its error if it failed."""
    job, self.job = self.job, None
    assert job is not None
    try:
      return job, self.pipe.recv()
    except (EOFError, ConnectionError):
      self._process.join()
      code = self._process.exitcode or 0
      why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
      return job, f"its process ended by {why}; see {job.workdir}/log.txt"

  def alive(self) -> bool:
    return self._process.exitcode is None

  def end(self) -> None:
    """Ends the process; a job that is training saves first."""
    self.pipe.close()
    if self.job:
      with contextlib.suppress(ProcessLookupError, TypeError):
        os.kill(self._process.pid or 0, signal.SIGTERM)
    self._process.join()


def _serve(pipe: Any, cores: list[int] | None, cache: str) -> None:
  """What a worker does: trains what arrives until the pipe is closed."""
  # Ctrl-C reaches all processes of a terminal. The parent ends the workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if cores:
    os.sched_setaffinity(0, cores)  # before JAX counts them
  import jax

  settings: Any = jax.config
  if not settings.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  while True:
    try:
      workdir, config = pipe.recv()
    except EOFError:
      return
    pipe.send(_train(pathlib.Path(workdir), config))


def _train(workdir: pathlib.Path, config: dict[str, Any]) -> str | None:
  """Trains one job, its output in log.txt; returns its error, if any."""
  import jax

  from sigjax import errors, train
  from sigjax.runtime import lock, program

  workdir.mkdir(parents=True, exist_ok=True)
  with (
    open(workdir / "log.txt", "a", buffering=1) as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    program.quiet_libraries()
    program.show_log()
    start = time.monotonic()
    try:
      with lock.hold(workdir):
        errors.call(train.main, config, "config", workdir)
    except errors.UserError as e:
      return str(e)
    except Exception as e:  # the other runs of the study go on
      traceback.print_exc()
      return f"{type(e).__name__}; see {workdir}/log.txt"
    finally:
      jax.clear_caches()  # the programs of one config serve no other
    seconds = time.monotonic() - start
  result = {"metrics": last_values(workdir), "seconds": seconds}
  files.write(workdir / "result.json", json.dumps(result, indent=1))
  return None


def last_values(workdir: pathlib.Path) -> dict[str, float]:
  """Returns the last value of each metric in a workdir's metrics.jsonl."""
  found = {}
  for row in metrics.read(workdir):
    found.update(row)
  return found
