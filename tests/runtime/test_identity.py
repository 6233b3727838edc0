"""Hosts with different data or configs do not train together."""

import pathlib
import socket
import subprocess
import sys

import pytest

from sigjax import errors
from sigjax.runtime import identity

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import sys
from sigjax.runtime import hosts, identity
port, number, records = map(int, sys.argv[1:])
hosts.start(f"localhost:{port}", 2, number)
try:
  identity.check_hosts("the run", {"pp": "decode", "data": {"records": 9}})
  print("the same")
  identity.check_hosts("config.data", {"parts": [{"records": records}]})
  hosts.broadcast("")
  hosts.max_over_processes(0)  # waits for the other host
except Exception as e:
  hosts.end_all(e)
"""


def test_a_host_that_lacks_a_shard_stops_both():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(port), str(i), str(40 - i)],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]
  said = [run.communicate(timeout=120) for run in runs]
  assert [run.returncode for run in runs] == [1, 1], said
  line = (
    f"config.data.parts[0].records is 39 on process {runs[1].pid} on "
    f"{socket.gethostname()}, but 40 on process 0; start all processes with "
    "the same config and the same data"
  )
  for out, err in said:
    assert out == "the same\n" and "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith(line)


def test_an_identity_survives_json():
  made = identity.of_run(
    data={"n": 1}, tokenizer="a", pp="decode", model={"out_dim": (None, 3)}
  )
  assert made["model"] == {"out_dim": [None, 3]}


def test_a_key_that_another_version_has_is_no_difference():
  parts = dict(data=1, tokenizer="a", pp="decode")
  was = identity.of_run(**parts, model={"image": {"width": 8}})
  now = identity.of_run(**parts, model={"image": {"width": 8, "new": 1}})
  identity.check_resumed("run", was, now)
  other = identity.of_run(**parts, model={"image": {"width": 9}})
  with pytest.raises(errors.UserError, match=r"config.model.image.width was 8"):
    identity.check_resumed("run", was, other)
