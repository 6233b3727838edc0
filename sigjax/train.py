"""The program: trains, resumes and evaluates what a config describes.

  python -m sigjax.train --config configs/siglip_emoji.py --workdir DIR
"""

import contextlib
import functools
import logging
import pathlib
import signal
import sys
import threading

from absl import app
from absl import flags
from absl import logging as absl_logging
from clu import parameter_overview
import jax
from ml_collections import config_flags
import numpy as np

from sigjax import checkpoint
from sigjax import config as config_lib
from sigjax import errors
from sigjax import evaluators
from sigjax import losses
from sigjax import metrics as metrics_lib
from sigjax import optim as optim_lib
from sigjax import sharding as sharding_lib
from sigjax import step as step_lib
from sigjax.data import pipeline
from sigjax.data import preprocess
from sigjax.data import sources
from sigjax.data import tokenizer as tokenizer_lib
from sigjax.models import two_towers

log = logging.getLogger("sigjax")


def main(workdir, *, batch_size, data, pp, pp_image, pp_text, tokenizer, model,
         optim, total_steps=None, total_epochs=None, total_examples=None,
         seed=0, loss=None, mesh=None, sharding=((".*", "replicate"),),
         microbatches=1, feed="device", init=None, resume=None,
         checkpoints=None, log_every_steps=50, evals=None, eval_only=False):
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
    microbatches: pieces in which the towers see the batch, and
    feed: where the batch waits for them, see step.make_train_step.
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
  log.info("%d device(s): %s, mesh %s", mesh.size,
           jax.devices()[0].device_kind, dict(mesh.shape))

  # ---- Data ----
  source = errors.call(sources.open_source, data, "config.data")
  tokenizer = errors.call(
      tokenizer_lib.of_run, tokenizer, "config.tokenizer",
      workdir / "tokenizer.model",
      functools.partial(sources.all_captions, source))
  pp = preprocess.parse(pp, tokenizer=tokenizer)
  batches = pipeline.train_batches(
      source, pp, batch_size=batch_size, seed=seed,
      process_index=jax.process_index(), process_count=jax.process_count())
  example = pp(source[0], np.random.default_rng(0))  # for its shapes
  times = config_lib.Durations(
      batch_size, len(source), total_steps=total_steps,
      total_epochs=total_epochs, total_examples=total_examples)
  total_steps = times.total_steps
  log.info("%s: %d examples; %d steps of %d are %.1f epochs", source.name,
           len(source), total_steps, batch_size,
           total_steps * batch_size / len(source))

  # ---- Model, loss, optimizer ----
  model = errors.call(two_towers.TwoTowers, model, "config.model")
  shapes = step_lib.param_shapes(model, example)
  optim = times.resolve(optim, "config.optim")
  tx, lr_fn = errors.call(
      optim_lib.make_optimizer, optim, "config.optim", shapes, total_steps)
  if tokenizer.vocab_size > model.text.get("vocab_size", tokenizer.vocab_size):
    raise errors.UserError(
        f"config.model.text.vocab_size is {model.text['vocab_size']}, but the "
        f"tokenizer has {tokenizer.vocab_size} pieces; set it to that")
  frozen = optim_lib.frozen_mask(shapes, optim.get("frozen"))
  train_step = step_lib.make_train_step(
      model, tx, lr_fn,
      losses.make(mesh, sharding_lib.AXES, **(loss or {})), mesh, seed=seed,
      frozen=frozen, microbatches=microbatches, feed=feed)
  abstract = step_lib.abstract_state(shapes, tx, mesh, sharding)
  flops = sum(
      # Backwards it is twice the forward pass, if anything is trained.
      value * (1 if all(jax.tree.leaves(frozen[tower])) else 3)
      for tower, value in two_towers.flops(
          model, (1, *example["image"].shape), (1, *example["text"].shape)
      ).items())
  (workdir / "parameters.txt").write_text(
      parameter_overview.get_parameter_overview(
          shapes, include_stats=False) + "\n")
  log.info("%.1f M parameters (parameters.txt), %.2f GFLOP per example",
           parameter_overview.count_parameters(shapes) / 1e6, flops / 1e9)

  # ---- Evaluations ----
  embed = step_lib.make_embed(model, mesh)
  evals = times.resolve(evals or {}, "config.evals")
  eval_every = {k: v.pop("every_steps", None) for k, v in evals.items()}
  evals = {name: evaluators.make(
      f"config.evals.{name}", workdir / f"{name}.png", tokenizer,
      **{"pp_image": pp_image, "pp_text": pp_text, **section})
           for name, section in evals.items()}

  # ---- Where to start ----
  checkpoints = times.resolve(checkpoints or {}, "config.checkpoints")
  save_every = checkpoints.pop("every_steps", None) or total_steps
  saved = errors.call(
      checkpoint.Checkpoints, checkpoints, "config.checkpoints", workdir)
  data_state = None
  if saved.newest() is not None:
    log.info("going on from %s", saved.dir / str(saved.newest()))
    state, data_state = saved.restore(saved.newest(), abstract)
  elif eval_only:
    raise errors.UserError(f"{workdir} has no checkpoint; train it first")
  elif resume:
    log.info("starting from resume=%s", resume)
    state, data_state = checkpoint.read(resume, abstract)
  else:
    log.info("starting from %s", f"init={init}" if init else "scratch")
    given = errors.call(
        checkpoint.read_init, init or {}, "config.init", shapes)
    state = step_lib.init_state(model, tx, seed, example, abstract, given)
  if data_state is not None:
    batches.set_state(data_state)

  # ---- Training ----
  first_step = int(state.step)
  if eval_only or first_step >= total_steps:
    log.info("at step %d of %d: only evaluating", first_step, total_steps)
    total_steps = first_step
  clock = metrics_lib.Clock(batch_size, flops)
  progress = metrics_lib.Progress(first_step, total_steps)
  last_good = saved.newest()

  def report(step, metrics):
    """Waits for a step's metrics, while the next step is running."""
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not metrics_lib.finite(metrics):
      saved.wait()
      raise errors.UserError(
          f"stopped at step {step}: loss {metrics['loss']}, gradient norm "
          f"{metrics['grad_norm']}; the last good checkpoint is "
          + ("none" if last_good is None else str(saved.dir / str(last_good))))
    clock.tick()
    rates = {}
    if step % log_every_steps == 0 or step == total_steps:
      rates = clock.read()
      writer.write(step, {**metrics, **rates})
    progress.update(step, metrics, **rates)

  def evaluate(step, names):
    rows = [(name, *row) for name in names for row in evals[name].run(
        functools.partial(embed, state.params), mesh)]
    if rows:
      writer.write(step, {f"{name}/{metric}": value
                          for name, metric, value, _, _ in rows})
    clock.start()  # this was no training time
    return rows

  # However it ends: what is being saved is saved, what was written is flushed.
  with (metrics_lib.Writer(workdir) as writer, contextlib.closing(saved),
        contextlib.closing(batches)):
    with StopRequest() as stop, progress:
      running = None  # (step, metrics) of the step not yet read
      for step in range(first_step + 1, total_steps + 1):
        state, metrics = train_step(state, next(batches))
        if running:
          report(*running)
        running = step, metrics

        stopping = stop.signal  # asked once: it may come at any moment
        save = step % save_every == 0 or step == total_steps or stopping
        due = [name for name, every in eval_every.items()
               if every and step % every == 0 and step < total_steps]
        if save or due:
          report(*running)  # nothing is kept of a step that was not finite
          running = None
        if save:
          saved.save(step, state, batches.get_state())
          last_good = step
        if stopping:
          sys.exit(f"{stopping}: saved step {step} and stopped; the same "
                   "command goes on from there")
        for row in evaluate(step, due) if due else []:
          progress.write("step {}: {} {} {:.1%} (chance {:.1%}, n {})".format(
              step, *row))
    rows = evaluate(total_steps, evals)

  # ---- Results ----
  for line in metrics_lib.table(
      [(f"{name} {metric}", f"{value:.1%}", f"{by_chance:.2%}", n)
       for name, metric, value, by_chance, n in rows],
      (f"step {total_steps}", "value", "chance", "n")):
    print(line)
  return rows


class StopRequest:
  """Within it, Ctrl-C and SIGTERM are noted in `signal`; a second one kills."""

  def __init__(self):
    self.signal = None
    self._old = {}

  def __enter__(self):
    # Python allows handlers in the main thread alone.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._old[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.signal = signal.Signals(number).name
    signal.signal(number, self._old[number])

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


# ---- The command line ----

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "Config file, with its argument: FILE.py[:key=value,...].",
    lock_config=True)
flags.DEFINE_string(
    "workdir", None, "Where the run is kept; workdirs/NAME_OF_CONFIG if unset.")
flags.DEFINE_bool(
    "eval_only", False, "Only evaluate the workdir's newest checkpoint.")


def run(argv):
  """What app.run calls."""
  del argv
  workdir = pathlib.Path(FLAGS.workdir or config_lib.default_workdir(
      FLAGS["config"].config_filename))
  absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells a lot
  metrics_lib.log_above_progress(log)
  workdir.mkdir(parents=True, exist_ok=True)
  if not FLAGS.eval_only:
    config_lib.keep_config(FLAGS.config, workdir / "config.json")
  try:
    errors.call(main, FLAGS.config.to_dict(), "config", workdir,
                eval_only=FLAGS.eval_only)
  except errors.UserError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(run, flags_parser=lambda argv: config_lib.parse_flags(
      argv, config_lib.check_config))
