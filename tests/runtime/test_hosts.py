"""Several processes: they train like one, stop together, and save together."""

import os
import resource
import shutil
import signal
import socket
import time
import types

import jax
import numpy as np
import pytest
import train_program
from train_program import lines, params

from sigjax import errors, sharding
from sigjax.runtime import hosts, lock


class Program:
  """The program, once on each of several "hosts"."""

  def __init__(self, workdir, config, processes, devices, each=(), cwds=None):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    self.hosts = []
    for i in range(processes):
      flags = (
        []
        if processes == 1
        else [
          f"--coordinator=localhost:{port}",
          f"--num_processes={processes}",
          f"--process_id={i}",
        ]
      )
      flags += each[i] if each else ()
      cwd = cwds[i] if cwds else None
      self.hosts.append(
        train_program.start(workdir, config, devices, flags, cwd)
      )
    self.metrics = workdir / "metrics.jsonl"

  def wait_for_line(self, count):
    while (
      not self.metrics.exists() or self.metrics.read_text().count("\n") < count
    ):
      for p in self.hosts:
        assert p.poll() is None, p.communicate()
      time.sleep(0.02)

  def end(self, *codes):
    """Returns [(stdout, stderr)] of the ended processes."""
    said = [p.communicate(timeout=150) for p in self.hosts]
    for p, code, (_, err) in zip(self.hosts, codes or [0] * len(said), said):
      assert p.returncode == code, err
    return said


def assert_near(a, b):
  """To rounding; Adam's eps in the config keeps it from growing."""
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=2e-6, err_msg=name)


def config_of(tiny_config, **more):
  config = dict(tiny_config, total_steps=9, **more)
  config["optim"] = dict(config["optim"], options=dict(eps=1e-3))
  return config


def go_on(old, step, new):
  """A workdir that holds a step of another, and what was written till then."""
  new.mkdir()
  (new / "checkpoints").mkdir()
  shutil.copytree(old / f"checkpoints/{step}", new / f"checkpoints/{step}")
  for name in ("metrics.jsonl", "tokenizer.model", "config.json"):
    shutil.copy(old / name, new)


def test_two_processes_train_like_one_and_take_over_from_any(
  tmp_path, tiny_config
):
  """Losses, parameters, checkpoints, evaluation; and 1x8 -> 1x4 -> 2x2."""
  config = config_of(
    tiny_config,
    sharding=((".*", "fsdp"),),
    mesh=dict(data=-1, fsdp=2),
    checkpoints=dict(every_steps=3, keep=None),
  )
  del config["evals"]["zeroshot"]
  config["evals"]["picture"] = dict(
    config["evals"]["retrieval"], type="picture", captions="captions"
  )
  whole, two, four, last = (
    tmp_path / x for x in ("whole", "two", "four", "last")
  )
  a = Program(whole, config, 1, 8)
  b = Program(two, config, 2, 2)
  a.end()
  (out, _), (other, _) = b.end()
  assert "retrieval image->text" in out and "retrieval" not in other
  go_on(whole, 3, four)
  Program(four, config, 1, 4).end()
  go_on(four, 6, last)
  (out, _), _ = Program(last, config, 2, 2).end()
  assert f"resuming from {last}/checkpoints/6" in out

  want = lines(whole)
  assert [x["step"] for x in want if "loss" in x] == list(range(1, 10))
  for workdir in (two, four, last):
    got = lines(workdir)
    assert [x["step"] for x in got] == [x["step"] for x in want]
    for x, y in zip(got, want):
      for key in y.keys() - {
        "examples_per_second",
        "data_wait_percent",
        "examples_per_second_per_device",
      }:
        near = pytest.approx(y[key], rel=1e-5, abs=1e-5)
        assert x[key] == near, (workdir, key)
    assert_near(params(workdir), params(whole))
    assert (workdir / "picture.png").exists()
  assert {p.name for p in (two / "checkpoints").iterdir()} == {"3", "6", "9"}


def test_sigterm_at_one_host_stops_both(tmp_path, tiny_config):
  config = dict(tiny_config, total_steps=3000, evals={})
  program = Program(tmp_path / "a", config, 2, 1)
  program.wait_for_line(3)
  program.hosts[1].send_signal(signal.SIGTERM)
  said = program.end(1, 1)
  steps = {err.strip().splitlines()[-1] for _, err in said}
  (line,) = steps  # the same step on both
  assert line.startswith("SIGTERM: saved step ")
  saved = {p.name for p in (tmp_path / "a/checkpoints").iterdir()}
  assert saved == {line.split()[3]}


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_at_one_host_stops_both(tmp_path, tiny_config, wrong):
  cwds = [tmp_path / "0", tmp_path / "1"]
  for cwd in cwds:
    cwd.mkdir()
  (cwds[1 - wrong] / "data").symlink_to(tiny_config["data"]["data_dir"])
  config = dict(
    tiny_config, evals={}, data=dict(tiny_config["data"], data_dir="data")
  )
  said = Program(tmp_path / "a", config, 2, 1, cwds=cwds).end(1, 1)
  line = said[wrong][1].strip().splitlines()[-1]
  assert line.startswith('error: dataset "shapes" is not prepared in data')
  assert "Traceback" not in said[wrong][1]
  last = said[1 - wrong][1].strip().splitlines()[-1]
  assert last.startswith("error: stopped by process ")
  assert last.endswith(line.removeprefix("error: "))
  assert not (tmp_path / "a").exists()  # a refused command leaves nothing


def test_another_config_at_one_host(tmp_path, tiny_config):
  program = Program(
    tmp_path / "a", tiny_config, 2, 1, each=[(), ("--config.batch_size=48",)]
  )
  (_, a), (_, b) = program.end(1, 1)
  other = f"process {program.hosts[1].pid} on {socket.gethostname()}"
  for err in (a, b):
    assert (
      err.strip()
      .splitlines()[-1]
      .endswith(
        f"config.batch_size is 48 on {other}, but 24 on process 0; start all "
        "processes with the same config and the same data"
      )
    )


def test_a_host_that_is_killed_stops_the_other(tmp_path, tiny_config):
  config = dict(tiny_config, total_steps=3000, evals={})
  program = Program(tmp_path / "a", config, 2, 1)
  program.wait_for_line(3)
  program.hosts[1].kill()
  for p in program.hosts:
    p.communicate(timeout=150)
    assert p.returncode != 0


def test_a_save_that_fails_at_one_host_fails_at_both(tmp_path, tiny_config):
  """Process 1 may write no more, then may again: the run goes on."""
  config = dict(
    tiny_config, total_steps=60, evals={}, checkpoints=dict(every_steps=20)
  )
  program = Program(tmp_path / "a", config, 2, 1)
  program.wait_for_line(3)
  limit = lambda size: resource.prlimit(
    program.hosts[1].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
  )
  limit(1000)
  program.wait_for_line(35)
  limit(resource.RLIM_INFINITY)
  (out, _), (_, err) = program.end()
  assert "step 20 could not be saved: another host could not write" in out
  assert "step 20 could not be saved: File too large" in err
  folder = tmp_path / "a/checkpoints"
  assert {p.name for p in folder.iterdir()} == {"40", "60"}


def test_two_runs_on_one_workdir(tmp_path, tiny_config):
  """The second one is refused, and changes nothing; then the lock is free."""
  config = dict(tiny_config, total_steps=3000, evals={})
  first = Program(tmp_path / "a", config, 1, 1)
  first.wait_for_line(2)
  before = (tmp_path / "a/config.json").read_text()
  ((_, err),) = Program(tmp_path / "a", dict(config, seed=1), 1, 1).end(1)
  assert err.strip() == (
    f"error: {tmp_path}/a is being written by process "
    f"{first.hosts[0].pid} on {socket.gethostname()}; wait for it, stop it, "
    "or give another --workdir"
  )
  assert (tmp_path / "a/config.json").read_text() == before
  first.hosts[0].kill()
  first.end(-9)
  with (
    lock.hold(tmp_path / "a"),
    pytest.raises(errors.UserError, match=f"process {os.getpid()} on"),
    lock.hold(tmp_path / "a"),
  ):
    pass
  with lock.hold(tmp_path / "a"):
    pass


@pytest.mark.parametrize(
  "args, message",
  [
    (dict(coordinator="a:1"), "give --num_processes and --process_id, too"),
    (dict(num_processes=2), "give --coordinator and --process_id, too"),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "is 0 to 1"),
    (dict(coordinator="a", num_processes=2, process_id=0), "HOST:PORT, such"),
  ],
)
def test_arguments_that_do_not_belong_together(args, message):
  with pytest.raises(errors.UserError, match=message):
    hosts.start(**args)


def test_a_coordinator_that_is_not_there(monkeypatch):
  monkeypatch.setattr(hosts, "_PATIENCE_S", 0)
  with pytest.raises(
    errors.UserError,
    match=(
      r"localhost:1 does not answer \(Connection refused\); start process 0"
    ),
  ):
    hosts.start("localhost:1", 2, 1)


@pytest.mark.parametrize(
  "env, found",
  [
    ({}, False),
    (dict(SLURM_JOB_ID="1", SLURM_NTASKS="2"), False),  # sbatch, not srun
    (dict(SLURM_STEP_NODELIST="n1", SLURM_NTASKS="1"), False),
    (dict(SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="2"), True),
    (dict(chips="/dev/accel0"), False),  # JAX_PLATFORMS=cpu
    (dict(chips="/dev/accel0", JAX_PLATFORMS="tpu,cpu"), True),
    (dict(chips="/dev/accel0", JAX_PLATFORMS="tpu", libtpu=""), False),
  ],
)
def test_when_there_are_several_processes(monkeypatch, env, found):
  """Nobody is waited for on a machine of its own."""
  chips, libtpu = env.get("chips"), env.get("libtpu", "here")
  for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"):
    monkeypatch.delenv(name, raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(
    hosts.glob,
    "glob",
    lambda pattern: [chips] if chips and "accel" in pattern else [],
  )
  monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda _: libtpu)
  started = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args: started.append(args)
  )
  hosts.start()
  hosts.start(num_processes=1)  # whatever there is, this one stays alone
  assert started == [(None,) * 3] * found


def test_each_process_has_a_run_of_the_mesh():
  devices = np.array(
    [
      types.SimpleNamespace(process_index=p, id=i)
      for i, p in enumerate([0, 1, 0, 1, 1, 0])
    ]
  )
  got = sharding.by_process(devices.reshape(3, 2))
  assert [d.process_index for d in got.flat] == [0, 0, 0, 1, 1, 1]
  assert [d.id for d in got.flat] == [0, 2, 5, 1, 3, 4]
  assert got.shape == (3, 2)
