"""Several processes, one on each host: how they find, hear and stop each other.

All of them run the same program on their own part of each batch. Process 0
alone writes what only one may write, the others wait for it. Between them are
the collectives of a step, and JAX's coordinator, a small key-value store that
process 0 serves: what is said through it needs no device, and is heard while a
device waits.
"""

import atexit
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

import jax

# There is no public way to the coordinator's keys; orbax takes this one, too.
from jax._src import distributed
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from sigjax import errors, sharding

_ENDED = "sigjax/ended"
_PATIENCE_S = 300  # as long as JAX waits for the processes to start
_DAY_MS = 24 * 3600 * 1000  # process 0 may have a tokenizer to train
_numbers = itertools.count()
_ending = threading.Lock()  # held for good by the thread that ends the process


def start(coordinator=None, num_processes=None, process_id=None):
  """Connects this process to the others, if there are to be any.

  There are if the three arguments say so, else under srun with several tasks,
  else on a TPU VM, which knows its pod. num_processes=1 alone says that there
  are none. To be called before JAX is first asked for devices.

  Args:
    coordinator: HOST:PORT, where process 0 listens.
    num_processes: how many there are.
    process_id: which of them this is, from 0.

  Raises:
    UserError: arguments that do not belong together, or the others are not
      found.
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
  elif missing:
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
  # It would take SIGTERM, which here is for StopRequest and Agreement.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as e:
    reason = str(e).strip().splitlines()[0][:200]
    raise errors.UserError(
      f"the other hosts are not found ({reason}); name them by --coordinator"
      ", --num_processes and --process_id, or give --num_processes=1 for "
      "this host alone"
    ) from e
  if jax.process_count() > 1:
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(done,))
    listener.daemon = True
    listener.start()
    # Before Python, and before it JAX's coordinator, come to their own ends.
    atexit.register(lambda: (done.set(), listener.join()))


def _reach(coordinator):
  """Waits until process 0 listens: JAX would abort if it never did."""
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


def _found():
  """Whether something that JAX knows has started several processes."""
  env = os.environ
  # A batch script's own shell has a job and its tasks, but no step.
  if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
    return True
  # libtpu may be there to compile only, so the chips are looked for. On a TPU
  # VM of one host initialize() finds that it is alone.
  platforms = env.get("JAX_PLATFORMS", "tpu").split(",")
  chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(
    "tpu" in platforms and chips and importlib.util.find_spec("libtpu")
  )


def client():
  """The coordinator's keys, of a private type of JAX's; None of one process."""
  return distributed.global_state.client


def is_multi_process():
  """Whether there are several processes."""
  return client() is not None and jax.process_count() > 1


def is_primary():
  """Whether this is the process that writes what one alone may write."""
  return jax.process_index() == 0


def process_name():
  """Returns "process PID on HOST"."""
  return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def primary_first():
  """Process 0 runs the body first, then the others do."""
  number = next(_numbers)  # the same everywhere, as the program is

  def barrier():
    if is_multi_process():
      client().wait_at_barrier(f"sigjax/primary_first/{number}", _DAY_MS)

  if not is_primary():
    barrier()
  yield
  if is_primary():
    barrier()


def broadcast(text):
  """Returns process 0's text, a str, on all processes."""
  if not is_multi_process():
    return text
  key = f"sigjax/said/{next(_numbers)}"
  if is_primary():
    client().key_value_set(key, text)
  return client().blocking_key_value_get(key, _DAY_MS)


def max_over_processes(number):
  """Returns the largest of all processes' int; waits for them."""
  if not is_multi_process():
    return number
  return int(np.max(multihost_utils.process_allgather(np.int32(number))))


class Agreement:
  """What any host has seen, all hosts get to know at the same step.

  The numbers travel over the devices, behind the step in flight, and are read
  one call later, when that step is done: nothing waits for them. On one host
  nothing travels, and the answer is at once.
  """

  def __init__(self, mesh):
    self._mesh = mesh
    self._asked = None
    self._largest = jax.jit(lambda x: jnp.max(x, axis=0))

  def __call__(self, *numbers):
    """Returns the largest of each number, int, of the call before this one."""
    if not is_multi_process():
      return numbers
    rows = np.tile(np.array(numbers, np.int32), (jax.local_device_count(), 1))
    asked, self._asked = (
      self._asked,
      self._largest(sharding.put_batch(rows, self._mesh)),
    )
    if asked is None:
      return (0,) * len(numbers)
    return tuple(np.asarray(asked.addressable_data(0)).tolist())


class StopRequest:
  """Within it, Ctrl-C and SIGTERM are noted in `signal`; a second one kills.

  signal: the signal's number, 0 if there was none.
  """

  def __init__(self):
    self.signal = 0
    self._old = {}

  def __enter__(self):
    # Python allows handlers in the main thread alone.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._old[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.signal = int(number)
    signal.signal(number, self._old[number])

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


def end_all(error):
  """Ends this process, and the others, with the line of a UserError.

  Of another exception it is the traceback, after which this process ends as
  Python would end it. Does not return.
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
    try:
      client().key_value_set(
        f"{_ENDED}/{jax.process_index()}", f"{process_name()}: {line}"
      )
    except jax.errors.JaxRuntimeError:
      pass  # there is no coordinator any more
    _leave()


def _listen(done):
  """Waits, in a thread, for the end that another process has met."""
  while not done.wait(0.5):
    try:
      said = client().key_value_dir_get(_ENDED)
    except jax.errors.JaxRuntimeError:
      continue  # the coordinator is gone: JAX ends this process
    if said and not _ending.locked():
      with _ending:
        print(f"error: stopped by {said[0][1]}", file=sys.stderr)
        _leave()


def _leave():
  """Exits once the others know: process 0 is who tells them."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client().wait_at_barrier("sigjax/leaving", 10_000)
  if is_primary():
    time.sleep(2)  # JAX aborts those who miss it before they have ended
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: that would wait for threads that wait for other hosts.
  os._exit(1)
