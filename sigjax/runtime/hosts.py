"""Several processes, one on each host: how they find and stop each other.

All of them run the same program, each on its own part of every batch. The
primary process, number 0, writes what only one may write while the others wait.
They communicate in two ways. The collectives of a step run on the devices.
JAX's coordinator is a small key-value store that the primary process serves: it
needs no device, so messages arrive even while a device waits.
"""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import glob
import importlib.util
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, NoReturn

import jax

# JAX has no public access to the coordinator's keys; orbax uses this one too.
from jax._src import distributed
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from sigjax import errors, sharding

_ENDED = "sigjax/ended"
_PATIENCE_S = 300  # as long as JAX waits for the processes to start
_DAY_MS = 24 * 3600 * 1000  # the primary may have a tokenizer to train
_numbers = itertools.count()
_ending = threading.Lock()  # the thread that ends the process never releases it

# What this process undoes before it ends with the others; see lock.hold.
before_leaving: list[Callable[[], None]] = []


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Connects this process to the others, if there are any.

  There are others if the three arguments are given, under srun with several
  tasks, and on a TPU VM, which knows its pod. num_processes=1 alone means that
  there are none. Has to be called before JAX is first asked for devices.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: the number of processes.
    process_id: the number of this one, from 0.

  Raises:
    UserError: the arguments do not belong together, or the other processes are
      not found.
  """
  if num_processes == 1 and coordinator is None and not process_id:
    return
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [f"--{k}" for k, v in given.items() if v is None]
  if len(missing) == 3:
    if not _found():
      return
  elif coordinator is None or num_processes is None or process_id is None:
    raise errors.UserError(
      "--coordinator, --num_processes and --process_id belong together; "
      f"give {' and '.join(missing)}, too"
    )
  elif not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"--process_id is {process_id}, but with --num_processes="
      f"{num_processes} it is 0 to {num_processes - 1}"
    )
  elif not coordinator.rpartition(":")[2].isdigit():
    raise errors.UserError(
      f'--coordinator is "{coordinator}", but has to be HOST:PORT, such as '
      f"{socket.gethostname()}:8476"
    )
  if coordinator and process_id:
    _reach(coordinator)
  # That service would catch SIGTERM, which StopRequest catches here.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as e:
    reason = str(e).strip().splitlines()[0][:200]
    raise errors.UserError(
      f"the other hosts are not found ({reason}); give --coordinator, "
      "--num_processes and --process_id, or --num_processes=1 for this host "
      "alone"
    ) from e
  if jax.process_count() > 1:
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(done,))
    listener.daemon = True
    listener.start()
    # At exit this runs before JAX's coordinator is shut down.
    atexit.register(lambda: (done.set(), listener.join()))


def _reach(coordinator: str) -> None:
  """Waits until process 0 listens; JAX itself would abort this process."""
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + _PATIENCE_S
  while True:
    try:
      return socket.create_connection((host, int(port)), 5).close()
    except OSError as e:
      if time.monotonic() > end:
        raise errors.UserError(
          f"--coordinator={coordinator} does not answer ({e.strerror or e}); "
          "start process 0 there"
        ) from e
    time.sleep(0.2)


def _found() -> bool:
  """Returns whether Slurm or a TPU pod has started several processes."""
  env = os.environ
  # A batch script's own shell has a job and its tasks, but no step.
  if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
    return True
  # libtpu may be installed only to compile, so the chips are looked for. On a
  # TPU VM of one host initialize() finds that it is alone.
  platforms = env.get("JAX_PLATFORMS", "tpu").split(",")
  chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(
    "tpu" in platforms and chips and importlib.util.find_spec("libtpu")
  )


def client() -> Any:
  """Returns the client of JAX's coordinator; its type is private to JAX.

  It is None if start() found no other processes.
  """
  return distributed.global_state.client


def is_multi_process() -> bool:
  """Returns whether there are several processes."""
  return client() is not None and jax.process_count() > 1


def is_primary() -> bool:
  """Returns whether this is process 0, which writes what only one may write."""
  return jax.process_index() == 0


def process_name() -> str:
  """Returns "process PID on HOST"."""
  return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
  """The primary process runs the body first, then the others do."""
  number = next(_numbers)  # equal on all processes: they run the same program

  def barrier() -> None:
    if is_multi_process():
      client().wait_at_barrier(f"sigjax/primary_first/{number}", _DAY_MS)

  if not is_primary():
    barrier()
  yield
  if is_primary():
    barrier()


def broadcast(text: str) -> str:
  """Returns the primary process's text on all processes."""
  if not is_multi_process():
    return text
  key = f"sigjax/said/{next(_numbers)}"
  if is_primary():
    client().key_value_set(key, text)
  return client().blocking_key_value_get(key, _DAY_MS)


def max_over_processes(number: int) -> int:
  """Returns the largest number of all processes, after waiting for them."""
  if not is_multi_process():
    return number
  return int(np.max(multihost_utils.process_allgather(np.int32(number))))


class Agreement:
  """Takes the max over all processes of a few numbers at every step.

  What one host has noticed, such as a signal, all hosts then know at the same
  step. The numbers travel over the devices, behind the step that is running.
  They are returned one call later, so that nothing waits for them. A single
  process gets its own numbers at once.

  Args:
    mesh: from sharding.make_mesh.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh = mesh
    self._before = None
    self._max = jax.jit(lambda x: jnp.max(x, axis=0))

  def __call__(self, *numbers: int) -> tuple[int, ...]:
    """Returns the max of each number of the call before; 0 at the first."""
    if not is_multi_process():
      return numbers
    rows = np.tile(np.array(numbers, np.int32), (jax.local_device_count(), 1))
    before = self._before
    self._before = self._max(sharding.put_batch(rows, self._mesh))
    if before is None:
      return (0,) * len(numbers)
    return tuple(np.asarray(before.addressable_data(0)).tolist())


class StopRequest:
  """A context in which Ctrl-C and SIGTERM are only noted.

  The second signal acts as it did outside of the context.

  Attributes:
    signal: the number of the signal that came, or 0.
  """

  signal: int

  def __init__(self):
    self.signal = 0
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._old[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = int(number)
    signal.signal(number, self._old[number])

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


def end_all(error: BaseException) -> NoReturn:
  """Ends this process and all others, because of an error in this one.

  A UserError is printed as its line, any other exception with its traceback.
  The other processes print the same line.
  """
  user = isinstance(error, errors.UserError)
  if not is_multi_process():
    if user:
      sys.exit(f"error: {error}")
    raise error
  with _ending:
    if not user:
      traceback.print_exception(error)
    line = " ".join(str(error).split())
    if not user:
      line = f"{type(error).__name__}: {line}"
    print(f"error: {line}", file=sys.stderr)
    # Without a coordinator there is nobody to tell.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client().key_value_set(
        f"{_ENDED}/{jax.process_index()}", f"{process_name()}: {line}"
      )
    _leave()


def _listen(done: threading.Event) -> None:
  """Ends this process, from a thread, when another one calls end_all."""
  while not done.wait(0.5):
    try:
      said = client().key_value_dir_get(_ENDED)
    except jax.errors.JaxRuntimeError:
      continue  # the coordinator is gone: JAX ends this process
    if said and not _ending.locked():
      with _ending:
        print(f"error: stopped by {said[0][1]}", file=sys.stderr)
        _leave()


def _leave() -> NoReturn:
  """Exits, the primary process last: it serves the coordinator."""
  for undo in before_leaving:
    undo()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client().wait_at_barrier("sigjax/leaving", 10_000)
  if is_primary():
    time.sleep(2)  # JAX aborts processes that lose it before they have exited
  sys.stdout.flush()
  sys.stderr.flush()
  # sys.exit would wait for threads, which wait for other hosts.
  os._exit(1)
