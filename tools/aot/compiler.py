"""The programs that tools.aot_compile compiles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import importlib.util
import io
import math
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.extend import core
from jax.interpreters import partial_eval
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from PIL import Image

from sigjax import build, errors, losses
from sigjax import config as config_lib
from sigjax import sharding as sharding_lib
from sigjax.data.example import preprocess
from sigjax.models import flops as flops_lib
from sigjax.models import two_towers
from sigjax.runtime import start
from tools.aot import chips, hlo, kernels

GIB = 2**30


class DoesNotFit(errors.UserError):
  """The program needs more memory than a chip has.

  Attributes:
    needed: bytes.
    available: bytes.
  """

  needed: float
  available: float

  def __init__(self, needed: float, available: float):
    super().__init__(
      f"out of memory: the program needs {needed / GIB:.2f} GiB per chip, "
      f"which has {available / GIB:.2f}; try more --microbatches"
    )
    self.needed, self.available = needed, available


class Job(NamedTuple):
  """What is compiled.

  Attributes:
    title: what it is.
    traced: jax.jit(fn).trace(arguments).
    arguments: {what: bytes per chip}.
    flops: FLOPs per chip, by formula.
    inputs: the arguments, if fn is no program itself but calls several, as with
      feed "host"; None if it is one.
  """

  title: str
  traced: Any
  arguments: Mapping[str, int]
  flops: float
  inputs: Any = None


class Compiled(NamedTuple):
  """A compiled program.

  Attributes:
    name: that of its function.
    times: how often a step runs it.
    memory: what compiled.memory_analysis() returns.
    flops: by the compiler, which counts a loop once.
    text: the HLO that runs on the chip.
    schedules: {name: schedule} of its ops that the text has no estimate for.
    torus: how many chips there are along x, y and z.
  """

  name: str
  times: int
  memory: Any
  flops: float
  text: str
  schedules: Mapping[str, str]
  torus: Sequence[int]


def open_topology(name: str) -> tuple[list[Any], chips.Chip]:
  """Returns the devices of a topology such as "v4:2x2x1", and its Chip.

  Raises:
    UserError: there is no such topology, or libtpu is not installed.
  """
  kind, _, shape = name.partition(":")
  chip = errors.pick(chips.CHIPS, kind, f"the chip of --topology {name},")
  if not re.fullmatch(r"\d+(x\d+)+", shape):
    raise errors.UserError(
      f'--topology is "{name}"; write one as v4:2x2x1, v5e:2x4, v5p:2x2x1 or '
      "v6e:2x4"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      "the TPU compiler is not installed: pip install 'sigjax[aot]'"
    )
  start.tell_libtpu()
  kernels.dump_schedules()
  # libtpu must not look for a real TPU, nor lock one.
  for key, value in dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE=chip.env,
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  ).items():
    os.environ.setdefault(key, value)
  options = dict(chip.options)
  if shape == "1x1":  # a host with one chip, such as v5e-1; others have four
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except Exception as e:  # libtpu raises several types
    raise errors.UserError(
      f"--topology {name}: {str(e).splitlines()[0]}"
    ) from e
  return list(found.devices), chip


def example_of(
  model: Mapping[str, Any],
  pp_image: str,
  pp_text: str,
  loss: Mapping[str, Any] | None = None,
  pp: str = "",
) -> dict[str, Any]:
  """Returns a preprocessed example, for its shapes.

  Args:
    model: section of the config. Precomputed embeddings are assumed to be
      bfloat16.
    pp_image: the preprocessing of images.
    pp_text: the preprocessing of texts.
    loss: section of the config. For one with positives there is a "group".
    pp: the preprocessing of training examples, whose views are made, too.
  """
  data = io.BytesIO()
  Image.new("RGB", (256, 256)).save(data, "PNG")
  image = data.getvalue()
  if model["image"].get("kind") == "precomputed":
    image = np.zeros(model["image"]["width"], jnp.bfloat16)
  # Any tokenizer will do: only the length matters.
  tokenizer = lambda text, length, pad: np.zeros(length, np.int32)
  example = {
    key: preprocess.parse(pp, tokenizer=tokenizer)(
      {key: value}, np.random.default_rng(0)
    )[key]
    for key, pp, value in (
      ("image", pp_image, image),
      ("text", pp_text, "a cat"),
    )
  }
  for op in pp.split("|"):
    if op.startswith(("global_view(", "local_views(")):
      fn = preprocess.parse(f"decode|{op}")
      made = fn(dict(image=image), np.random.default_rng(0))
      example |= {k: x for k, x in made.items() if k != "image"}
  if (loss or {}).get("positives"):
    example["group"] = np.zeros(1, np.int32)
  return example


def share(*trees: Any) -> int:
  """Returns the bytes that one device holds of trees of ShapeDtypeStructs."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(trees)
  )


def step_job(
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  microbatches: int = 1,
  model: Mapping[str, Any],
  optim: Mapping[str, Any],
  seed: int = 0,
  loss: Mapping[str, Any] | None = None,
  sharding: Sequence[Any] = sharding_lib.REPLICATED,
  lock: Sequence[str] = (),
  lora: Mapping[str, Any] | None = None,
  losses: Mapping[str, Mapping[str, Any]] | None = None,
  total_steps: int | None = None,
  total_epochs: float | None = None,
  total_examples: int | None = None,
  feed: str = "device",
  pp: str = "",
  pp_image: str,
  pp_text: str,
) -> Job:
  """Returns the train step of a config, as train.main builds it.

  Args:
    mesh: the devices to compile for.
    **others: values of the config, see train.main.
  """
  example = example_of(model, pp_image, pp_text, loss, pp)
  times = config_lib.Durations(
    batch_size,
    1_000_000,
    total_steps=total_steps,  # of any dataset
    total_epochs=total_epochs,
    total_examples=total_examples,
  )
  run = build.build(
    mesh,
    example,
    times.total_steps,
    batch_size=batch_size,
    model=model,
    optim=times.resolve(optim, "config.optim"),
    loss=loss,
    sharding=sharding,
    lock=lock,
    lora=lora,
    losses=losses,
    microbatches=microbatches,
    feed=feed,
    seed=seed,
  )
  batch = sharding_lib.abstract_batch(example, batch_size, mesh)
  stored = run.state.stored
  count = sum(x.size for x in jax.tree.leaves(stored))
  own = {"lora", *(term.kind.part for term in run.terms)}
  towers_alone = {k: x for k, x in stored.items() if k not in own}
  E = jax.eval_shape(
    run.model.apply, {"params": towers_alone}, None, batch["text"]
  )[1]
  towers = flops_lib.training(run.model, example, run.state.trained, run.terms)
  flops = batch_size * towers + loss_flops(
    batch_size, E.shape[1], **(loss or {})
  )
  title = f"train step, batch {batch_size:,} {microbatches} microbatch(es)"
  arguments = {
    f"parameters ({count / 1e6:.1f} M)": share(stored),
    "optimizer state": share(run.state.opt_state),
  }
  pieces, what, inputs = 1, "batch", None
  if run.train_step.program:
    traced = run.train_step.program.trace(run.state, batch)
  else:
    pieces, what = microbatches, "microbatch"
    inputs = (run.state, batch)
    put = lambda x, mesh: jax.device_put(x, sharding_lib.batch_sharding(mesh))
    with mock.patch.object(sharding_lib, "put_batch", put):
      traced = jax.jit(run.train_step.run).trace(*inputs)
  arguments[f"{what}: images"] = share(batch["image"]) // pieces
  arguments[f"{what}: texts"] = share(batch["text"]) // pieces
  return Job(title, traced, arguments, flops / mesh.size, inputs)


def loss_job(
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  model: Mapping[str, Any],
  loss: Mapping[str, Any] | None = None,
  pp_image: str,
  pp_text: str,
) -> Job:
  """Returns the loss with its gradients by zimg, ztxt, t and b."""
  example = example_of(model, pp_image, pp_text)
  sharding_lib.check_batch_size(batch_size, mesh)
  towers = two_towers.of_config(model, batch_size)
  batch = {key: jnp.zeros((1, *x.shape), x.dtype) for key, x in example.items()}
  zimg, ztxt, _ = jax.eval_shape(
    towers.init_with_output, jax.random.key(0), **batch
  )[0]
  loss = loss or {}
  loss_fn = losses.make(mesh, sharding_lib.AXES, **loss)
  fn = lambda *args: loss_fn(*args, key=jax.random.key(0))
  fn = jax.value_and_grad(fn, (0, 1, 2, 3))
  rows = lambda width, dtype: jax.ShapeDtypeStruct(
    (batch_size, width), dtype, sharding=sharding_lib.batch_sharding(mesh)
  )
  z = [rows(x.shape[1], loss.get("dtype", "float32")) for x in (zimg, ztxt)]
  groups = rows(1, np.int32) if loss.get("positives") else None
  scalar = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=NamedSharding(mesh, P())
  )
  return Job(
    f"loss and gradients, batch {batch_size:,}, E {zimg.shape[1]}",
    jax.jit(fn).trace(*z, scalar, scalar, groups),
    {"embeddings": share(z)},
    loss_flops(batch_size, zimg.shape[1], **loss) / mesh.size,
  )


def loss_flops(
  B: int, E: int, name: str = "sigmoid", negatives: Any = None, **_: Any
) -> int:
  """Returns the FLOPs of the logits (twice for softmax) and both gradients.

  Finding the hardest or easiest negatives takes the logits 8 times more.
  """
  products = 4 if name == "softmax" else 3
  if negatives and negatives["which"] != "random":
    products += 8
  return 2 * products * B * B * E


def traced_flops(job: Job, devices: int) -> float:
  """Returns the FLOPs per device of the products in a program, loops included.

  Rematerialisation and a second forward pass are counted. As in XLA, products
  whose results are not used are left out.
  """
  jaxpr = job.traced.jaxpr.jaxpr
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return jaxpr_flops(used) / devices


def jaxpr_flops(jaxpr: Any) -> int:
  """Returns the FLOPs of matrix products and convolutions, on all devices."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      contracted = eqn.params["dimension_numbers"][0][0]
      x = eqn.invars[0].aval.shape
      total += (
        2 * eqn.outvars[0].aval.size * math.prod(x[i] for i in contracted)
      )
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      out_dim = eqn.params["dimension_numbers"].rhs_spec[0]
      total += (
        2 * eqn.outvars[0].aval.size * (kernel.size // kernel.shape[out_dim])
      )
    times = 1
    if eqn.primitive.name == "scan":
      times = eqn.params["length"]
    elif eqn.primitive.name == "shard_map":
      # The jaxpr in it is what one place of these axes does. They are called
      # "newly_manual_axes" or "manual_axes", by version.
      (axes,) = (v for k, v in eqn.params.items() if "manual_axes" in k)
      times = math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    found = [
      sub
      for value in eqn.params.values()
      for sub in (value if isinstance(value, tuple) else (value,))
    ]
    found = [getattr(sub, "jaxpr", sub) for sub in found]
    found = [sub for sub in found if hasattr(sub, "eqns")]
    parts = [times * jaxpr_flops(sub) for sub in found]
    total += (max if eqn.primitive.name == "cond" else sum)(parts or [0])
  return total


def memory_of(device: Any) -> float:
  """Returns the bytes that a program may use on a device."""
  far_too_large = jax.ShapeDtypeStruct(
    (2**22, 2**22),
    jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  try:
    compile_traced(jax.jit(jnp.cos).trace(far_too_large))
  except DoesNotFit as e:
    return e.available
  raise errors.UserError("the compiler does not say how much memory a chip has")


def compile_job(job: Job) -> list[Compiled]:
  """Compiles the program of a job, or each of its programs.

  Raises:
    DoesNotFit: one needs too much memory.
    UserError: the compiler refuses one for another reason.
  """
  if job.inputs is None:
    return [compile_traced(job.traced)[0]]
  return list(_compile_calls(job.traced.jaxpr.jaxpr, job.inputs))


def _compile_calls(jaxpr: Any, inputs: Any) -> Iterator[Compiled]:
  """Compiles the programs that a function calls, each as often as it has to be.

  Args:
    jaxpr: that of the function; what it does itself, it does on the host.
    inputs: its arguments, ShapeDtypeStructs.
  """
  known: dict[Any, Any] = dict(zip(jaxpr.invars, jax.tree.leaves(inputs)))
  done: dict[Any, tuple[Compiled, Any]] = {}
  like = lambda x, sharding=None: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding
  )
  for eqn in jaxpr.eqns:
    results = eqn.outvars
    if eqn.primitive.name != "jit":
      # Where device_put, or jnp.zeros(device=...), puts it.
      to = *eqn.params.get("devices", ()), eqn.params.get("sharding")
      known.update((x, like(x.aval, to[0])) for x in results)
      continue
    read = lambda x: like(x.aval) if hasattr(x, "val") else known[x]
    args = [read(x) for x in eqn.invars]
    key = (id(eqn.params["jaxpr"]), *(x.sharding for x in args))
    if key not in done:
      done[key] = compile_traced(
        jax.jit(
          core.jaxpr_as_fun(eqn.params["jaxpr"]),
          donate_argnums=[
            i for i, given in enumerate(eqn.params["donated_invars"]) if given
          ],
        ).trace(*args),
        eqn.params["name"],
        times=0,
      )
    compiled, shardings = done[key]
    done[key] = compiled._replace(times=compiled.times + 1), shardings
    known.update(
      (x, like(x.aval, sharding)) for x, sharding in zip(results, shardings)
    )
  yield from (compiled for compiled, _ in done.values())


def compile_traced(
  traced: Any, name: str = "step", times: int = 1
) -> tuple[Compiled, Sequence[Any]]:
  """Compiles a program.

  Args:
    traced: jax.jit(fn).trace(arguments).
    name, times: fields of the result.

  Returns:
    (Compiled, the shardings of its results).

  Raises:
    DoesNotFit, UserError: as compile_job.
  """
  with tempfile.TemporaryDirectory() as folder:
    try:
      compiled = traced.lower().compile(
        compiler_options=dict(xla_dump_to=folder, xla_dump_hlo_as_text=True)
      )
    except jax.errors.JaxRuntimeError as e:
      sizes = re.findall(r"\(([\d.]+)([KMGT])\)", str(e))
      if "RESOURCE_EXHAUSTED" not in str(e) or len(sizes) != 2:
        raise errors.UserError(
          f"the compiler says: {str(e).splitlines()[0]}"
        ) from e
      raise DoesNotFit(
        *(float(n) * 1024 ** (1 + "KMGT".index(unit)) for n, unit in sizes)
      ) from e
    # compiled.as_text() refuses programs of v6e: "async-update".
    (file,) = pathlib.Path(folder).glob("*.after_codegen.txt")
    text = file.read_text()
  cost: Any = compiled.cost_analysis() or {}
  shardings: Any = jax.tree.leaves(compiled.output_shardings)
  coords = [device.coords for device in shardings[0].device_set]
  result = Compiled(
    name,
    times,
    compiled.memory_analysis(),
    cost.get("flops", 0.0),
    text,
    kernels.take_schedules(hlo.Program(text).without_estimate()),
    [max(along) + 1 for along in zip(*coords)],
  )
  return result, shardings


def find_batch(
  build: Callable[[int], Job],
  batch_size: int,
  smallest: int,
  report: Callable[[int, list[Compiled] | DoesNotFit], None],
) -> tuple[int, Job, list[Compiled]]:
  """Searches the largest batch that fits, to within an eighth.

  Doubles or halves the batch until one fits and its double does not, then
  bisects.

  Args:
    build: build(batch_size) -> Job.
    batch_size: the first to try.
    smallest: batches are multiples of this.
    report: report(batch_size, compiled or DoesNotFit) is called for each try.

  Returns:
    (batch_size, Job, compiled).

  Raises:
    DoesNotFit: the smallest batch does not fit.
  """
  fitting = []

  def fits(n: int) -> bool:
    job = build(n)
    try:
      compiled = compile_job(job)
    except DoesNotFit as e:
      report(n, e)
      if n == smallest:
        raise
      return False
    report(n, compiled)
    fitting.append((n, job, compiled))
    return True

  multiple = lambda n: max(round(n / smallest), 1) * smallest
  low = high = multiple(batch_size)
  if fits(low):
    while fits(high := 2 * high):
      low = high
  else:
    while not fits(low := multiple(low // 2)):
      high = low
  step = max((high - low) // 8 // smallest, 1) * smallest
  while high - low > step:
    middle = low + (high - low) // 2 // step * step
    low, high = (middle, high) if fits(middle) else (low, middle)
  return fitting[-1]
