"""The script for TPU VMs: what it would run, without a cloud."""

import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).parents[2] / "tools/tpu_vm.sh"


def dry_run(*args, **env):
  return subprocess.run(
    [SCRIPT, "--dry_run", *args],
    env={"PATH": os.environ["PATH"], **env},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_commands():
  made = dry_run("create", "a", ZONE="z", TYPE="v4-32")
  assert "queued-resources create a --node-id=a --zone=z" in made.stdout
  assert "--accelerator-type=v4-32" in made.stdout
  for what in ("install", "logs", "delete"):
    assert "--zone=z" in dry_run(what, "a", ZONE="z").stdout
  run = dry_run("run", "a", "--config", "x y.py", ZONE="z")
  assert run.returncode == 0 and "--worker=all" in run.stdout
  assert "sigjax.train" in run.stdout


def test_mistakes_are_one_line():
  for args, env in ((["create", "a"], {}), (["make", "a"], {"ZONE": "z"})):
    done = dry_run(*args, **env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
