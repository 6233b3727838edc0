"""The program: trains, resumes and evaluates what a config describes.

python -m sigjax.train --config configs/siglip_emoji.py --workdir DIR
"""

import contextlib
import errno
import functools
import logging
import pathlib
import signal
import sys

from absl import app, flags
from clu import parameter_overview
import jax
from ml_collections import config_flags

from sigjax import (
  build,
  errors,
  evaluators,
)
from sigjax import (
  config as config_lib,
)
from sigjax import (
  sharding as sharding_lib,
)
from sigjax import (
  state as state_lib,
)
from sigjax import (
  step as step_lib,
)
from sigjax.checkpoints import restore
from sigjax.checkpoints import save as save_lib
from sigjax.data import kinds
from sigjax.data.batches import pipeline, tally
from sigjax.data.example import preprocess
from sigjax.data.example import tokenizer as tokenizer_lib
from sigjax.runtime import (
  hosts,
  logs,
  program,
)
from sigjax.runtime import (
  lock as lock_lib,
)
from sigjax.runtime import (
  metrics as metrics_lib,
)
from sigjax.runtime import progress as progress_lib

log = logging.getLogger("sigjax")


def main(
  workdir,
  *,
  batch_size,
  data,
  pp,
  pp_image,
  pp_text,
  tokenizer,
  model,
  optim,
  total_steps=None,
  total_epochs=None,
  total_examples=None,
  seed=0,
  loss=None,
  mesh=None,
  sharding=((".*", "replicate"),),
  lock=(),
  microbatches=1,
  feed="device",
  bad_fraction=tally.BAD_FRACTION,
  init=None,
  resume=None,
  checkpoints=None,
  log_every_steps=50,
  evals=None,
  eval_only=False,
):
  """Runs a config; its top-level keys are these arguments.

  Args:
    workdir: where everything of the run is kept; a run found there goes on.
    batch_size: B, over all devices.
    data: the training data, arguments of sources.open_source.
    pp: preprocessing of a training example, to "image" and "text".
    pp_image, pp_text: preprocessing of an "image" alone, and of a "text" alone,
      in evaluation and prediction.
    tokenizer: arguments of tokenizer_lib.of_run.
    model: arguments of two_towers.TwoTowers.
    optim: arguments of optim.make_optimizer.
    total_steps, total_epochs, total_examples: the length; one of them.
    seed: of initialisation, order, augmentation and dropout.
    loss: {"name": one of losses.LOSSES, and its options}, see losses.make.
    mesh: arguments of sharding.make_mesh.
    sharding: rows (regex, split) over the parameters, see sharding.SPLITS.
    lock: parts of the parameters that are not trained, such as ("img",); see
      state.py.
    microbatches: pieces in which the towers see the batch, and
    feed: where the batch waits for them, see step.make_train_step.
    bad_fraction: the most of the examples that may be unusable; the rest takes
      their place, see pipeline.train_batches.
    init: weights to start from, arguments of checkpoint.read_init.
    resume: a workdir or checkpoint of which everything is taken over.
    checkpoints: {"every_steps": .., other arguments of checkpoint.Checkpoints}.
    log_every_steps: how often metrics are written.
    evals: {name: {"type": one of EVALUATORS, "every_steps": .., its own}}; all
      run at the end, those with every_steps also during training.
    eval_only: only evaluates the newest checkpoint.

  Returns:
    The rows of the last evaluation: (name, metric, value, chance, n).

  Durations in optim, checkpoints and evals may also be given as *_epochs,
  *_examples or *_percent.
  """
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  # ---- Devices ----
  mesh = errors.call(sharding_lib.make_mesh, mesh or {}, "config.mesh")
  sharding_lib.check_batch_size(batch_size, mesh, microbatches)
  log.info(
    "%d device(s): %s, mesh %s",
    mesh.size,
    jax.devices()[0].device_kind,
    dict(mesh.shape),
  )

  # ---- Data ----
  source = errors.call(kinds.open_source, data, "config.data")
  with hosts.primary_first():  # it trains the tokenizer, the others read it
    tokenizer = errors.call(
      tokenizer_lib.of_run,
      tokenizer,
      "config.tokenizer",
      workdir / "tokenizer.model",
      functools.partial(kinds.all_captions, source),
    )
  pp = preprocess.parse(pp, tokenizer=tokenizer)
  batches = pipeline.train_batches(
    source,
    pp,
    batch_size=batch_size,
    seed=seed,
    bad_fraction=bad_fraction,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  example = pipeline.first_example(source, pp)  # for its shapes
  times = config_lib.Durations(
    batch_size,
    len(source),
    total_steps=total_steps,
    total_epochs=total_epochs,
    total_examples=total_examples,
  )
  total_steps = times.total_steps
  log.info(
    "%s: %d examples; %d steps of %d are %.1f epochs",
    source.name,
    len(source),
    total_steps,
    batch_size,
    total_steps * batch_size / len(source),
  )

  # ---- Model, loss, optimizer ----
  run = build.build(
    mesh,
    example,
    total_steps,
    batch_size=batch_size,
    model=model,
    optim=times.resolve(optim, "config.optim"),
    loss=loss,
    sharding=sharding,
    lock=lock,
    microbatches=microbatches,
    feed=feed,
    seed=seed,
  )
  vocab_size = run.model.text.get("vocab_size", tokenizer.vocab_size)
  if tokenizer.vocab_size > vocab_size:
    raise errors.UserError(
      f"config.model.text.vocab_size is {vocab_size}, but the tokenizer has "
      f"{tokenizer.vocab_size} pieces; set it to that"
    )
  if hosts.is_primary():
    (workdir / "parameters.txt").write_text(
      parameter_overview.get_parameter_overview(
        run.state.params, include_stats=False
      )
      + "\n"
    )
  log.info(
    "%.1f M parameters (parameters.txt), %.2f GFLOP per example",
    parameter_overview.count_parameters(run.state.params) / 1e6,
    flops / 1e9,
  )

  # ---- Evaluations ----
  embed = step_lib.make_embed(run.model, mesh)
  evals = times.resolve(evals or {}, "config.evals")
  eval_every = {k: v.pop("every_steps", None) for k, v in evals.items()}
  evals = {
    name: evaluators.make(
      f"config.evals.{name}",
      workdir / f"{name}.png",
      tokenizer,
      **{"pp_image": pp_image, "pp_text": pp_text, **section},
    )
    for name, section in evals.items()
  }
  for name, evaluator in evals.items():
    source.check_tower(evaluator.source.tower, f"config.evals.{name}")

  # ---- Where to start ----
  checkpoints = times.resolve(checkpoints or {}, "config.checkpoints")
  save_every = checkpoints.pop("every_steps", None) or total_steps
  saved = errors.call(
    save_lib.Checkpoints,
    checkpoints,
    "config.checkpoints",
    workdir,
    read_only=eval_only,
  )
  data_state = None
  if found := saved.restore_newest(run.state):
    state, data_state = found
  elif eval_only:
    raise errors.UserError(f"{workdir} has no checkpoint; train it first")
  elif resume:
    log.info("starting from resume=%s", resume)
    state, data_state = restore.read(resume, run.state)
  else:
    log.info("starting from %s", f"init={init}" if init else "scratch")
    given = errors.call(
      restore.read_init, init or {}, "config.init", run.state.params
    )
    state = state_lib.init_state(
      run.model, run.tx, seed, example, run.state, given, lock
    )
  if data_state is not None:
    source.check_tower(data_state.pop("tower", None), "the run until now")
    batches.set_state(data_state)

  # ---- Training ----
  first_step = int(state.step)
  if eval_only or first_step >= total_steps:
    log.info("at step %d of %d: only evaluating", first_step, total_steps)
    total_steps = first_step
  clock = metrics_lib.Clock(batch_size, flops)
  progress = progress_lib.Progress(first_step, total_steps)
  agree = hosts.Agreement(mesh)

  def report(step, metrics):
    """Waits for a step's metrics, while the next step is running."""
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not metrics_lib.finite(metrics):
      saved.wait()
      good = saved.newest()
      raise errors.UserError(
        f"stopped at step {step}: loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; the last good checkpoint is "
        + ("none" if good is None else str(saved.dir / str(good)))
      )
    clock.tick()
    rates = {}
    if step % log_every_steps == 0 or step == total_steps:
      rates = clock.read(batches.waited)
      writer.write(
        step,
        {**metrics, **rates, "bad_examples": sum(batches.faults().values())},
      )
    progress.update(step, metrics, **rates)

  def evaluate(step, names):
    rows = [
      (name, *row)
      for name in names
      for row in evals[name].run(functools.partial(embed, state.params), mesh)
    ]
    if rows:
      writer.write(
        step, {f"{name}/{metric}": value for name, metric, value, _, _ in rows}
      )
    clock.start()  # this was no training time
    return rows

  # However it ends: what is being saved is saved, what is open is closed.
  with (
    metrics_lib.Writer(workdir, None if eval_only else first_step) as writer,
    saved,
    contextlib.closing(batches),
  ):
    with hosts.StopRequest() as stop, progress:
      running = None  # (step, metrics) of the step not yet read
      for step in range(first_step + 1, total_steps + 1):
        state, metrics = run.train_step(state, next(batches))
        if running:
          report(*running)
        running = step, metrics

        # On all hosts at the same step, though only one may have noticed.
        stopping, save_failed = agree(stop.signal, saved.failed())
        if save_failed:
          saved.wait()  # says so, and makes room; the next one may succeed
        save = step % save_every == 0 or step == total_steps or stopping
        due = [
          name
          for name, every in eval_every.items()
          if every and step % every == 0 and step < total_steps
        ]
        if save or due:
          report(*running)  # nothing is kept of a step that was not finite
          running = None
        if save:
          saved.save(
            step, state, {**batches.get_state(), "tower": source.tower}, {}
          )
        if stopping:
          saved.check(step)
          sys.exit(
            f"{signal.Signals(stopping).name}: saved step {step} and "
            "stopped; the same command goes on from there"
          )
        for row in evaluate(step, due) if due else []:
          progress.write(
            "step {}: {} {} {:.1%} (chance {:.1%}, n {})".format(step, *row)
          )
    rows = evaluate(total_steps, evals)
    if total_steps > first_step:
      saved.check(total_steps)

  # ---- Results ----
  for line in metrics_lib.table(
    [
      (f"{name} {metric}", f"{value:.1%}", f"{by_chance:.2%}", n)
      for name, metric, value, by_chance, n in rows
    ],
    (f"step {total_steps}", "value", "chance", "n"),
  ):
    if hosts.is_primary():
      print(line)
  return rows


# ---- The command line ----

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with its argument: FILE.py[:key=value,...].",
  lock_config=True,
)
flags.DEFINE_string(
  "workdir", None, "Where the run is kept; workdirs/NAME_OF_CONFIG if unset."
)
flags.DEFINE_bool(
  "eval_only", False, "Only evaluate the workdir's newest checkpoint."
)

flags.DEFINE_string(
  "coordinator",
  None,
  "Of several hosts: HOST:PORT on which process 0 "
  "listens. Slurm and TPU pods need none of these three.",
)
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def run(argv):
  """What app.run calls."""
  del argv
  workdir = pathlib.Path(
    FLAGS.workdir or config_lib.default_workdir(FLAGS["config"].config_filename)
  )
  logs.quiet_libraries()
  try:
    hosts.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    logs.show_in_training()
    workdir.mkdir(parents=True, exist_ok=True)
    # Evaluation alone writes nothing that a run beside it does.
    with (
      contextlib.nullcontext() if FLAGS.eval_only else lock_lib.hold(workdir)
    ):
      config_lib.check_same(
        FLAGS.config, hosts.broadcast(FLAGS.config.to_json_best_effort())
      )
      if hosts.is_primary() and not FLAGS.eval_only:
        config_lib.keep_config(FLAGS.config, workdir / "config.json")
      errors.call(
        main,
        FLAGS.config.to_dict(),
        "config",
        workdir,
        eval_only=FLAGS.eval_only,
      )
  except OSError as e:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hosts.end_all(
      errors.UserError(
        f"{e.filename or workdir}: {e.strerror}; make room, the same "
        "command goes on"
      )
      if full
      else e
    )
  except (Exception, KeyboardInterrupt) as e:  # the others must not wait
    hosts.end_all(e)


if __name__ == "__main__":
  app.run(
    run,
    flags_parser=lambda argv: program.parse_flags(argv, program.config_given),
  )
