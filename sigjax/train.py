"""The program: trains, resumes and evaluates what a config describes.

python -m sigjax.train --config configs/siglip_emoji.py --workdir DIR
"""

from collections.abc import Mapping, Sequence
import contextlib
import errno
import functools
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any

from absl import app, flags
from clu import parameter_overview
import jax

from sigjax import config as config_lib
from sigjax import errors, trees
from sigjax import sharding as sharding_lib
from sigjax.checkpoints import restore
from sigjax.checkpoints.save import Checkpoints
from sigjax.data import kinds
from sigjax.data.example import preprocess
from sigjax.data.faults import BAD_FRACTION
from sigjax.runtime import files, hosts, identity
from sigjax.runtime import metrics as metrics_lib
from sigjax.runtime.progress import Progress
from sigjax.stage import Stage
from sigjax.weights import vocabulary

if TYPE_CHECKING:
  from sigjax import evaluators

logger = logging.getLogger("sigjax")


def main(
  workdir: str | files.Path,
  *,
  batch_size: int,
  data: Mapping[str, Any],
  pp: str,
  pp_image: str,
  pp_text: str,
  tokenizer: Mapping[str, Any],
  model: Mapping[str, Any],
  optim: Mapping[str, Any],
  total_steps: int | None = None,
  total_epochs: float | None = None,
  total_examples: float | None = None,
  seed: int = 0,
  loss: Mapping[str, Any] | None = None,
  losses: Mapping[str, Mapping[str, Any]] | None = None,
  phases: Mapping[str, Mapping[str, Any]] | None = None,
  lengths: Sequence[Sequence[int]] = (),
  curate: Mapping[str, Any] | None = None,
  mesh: Mapping[str, Any] | None = None,
  sharding: Sequence = sharding_lib.REPLICATED,
  lock: Sequence[str] = (),
  lora: Mapping[str, Any] | None = None,
  microbatches: int = 1,
  feed: str = "device",
  bad_fraction: float = BAD_FRACTION,
  init: Mapping[str, Any] | None = None,
  resume: str | None = None,
  checkpoints: Mapping[str, Any] | None = None,
  log_every_steps: int = 50,
  log: str = "",
  evals: Mapping[str, Mapping[str, Any]] | None = None,
  eval_first: bool = False,
  eval_only: bool = False,
  profile_steps: tuple[int, int] | None = None,
) -> list[tuple[str, "evaluators.Row"]]:
  """Runs a config; its top-level keys are these arguments.

  Args:
    workdir: output directory, perhaps in a bucket; an existing run there is
      resumed.
    batch_size: B, over all devices.
    data: the training data, arguments of kinds.open_source.
    pp: preprocessing of a training example, to "image" and "text", and to
      "group" for a loss with positives.
    pp_image, pp_text: preprocessing of an image alone, and of a text alone, in
      evaluation and prediction.
    tokenizer: arguments of vocabulary.of_run.
    model: arguments of two_towers.TwoTowers, see two_towers.of_config.
    optim: arguments of optim.make_optimizer.
    total_steps, total_epochs, total_examples: the length; one of them.
    seed: of initialisation, data order, augmentation, dropout, random
      negatives and what the terms of losses draw.
    loss: of pairs, arguments of losses.make: "name" and the loss's own options.
    losses: the losses beside it, {name: {"type": one of terms.TERMS, "weight",
      its arguments}}.
    phases: what changes on the way, {name: {"from_steps", key: value}}, see
      config.phases_of.
    lengths: rows (L, n). Of each batch, one of these numbers of patches takes
      the place of "{length}" in pp, drawn at random; then there are n times as
      many microbatches. For image towers of kind "naflex".
    curate: lets a teacher choose the examples of each batch out of more:
      curate.Settings.
    mesh: arguments of sharding.make_mesh.
    sharding: rows (regex, split) over the parameters, see sharding.SPLITS.
    lock: parts of the parameters that are not trained, such as ("img",); see
      state.py.
    lora: adapts attention and MLPs by matrices of low rank, while the rest of
      the towers is locked: arguments of lora.shapes, such as dict(rank=8).
    microbatches: the number of pieces in which the towers see the batch.
    feed: "device" or "host": where the batch waits; see step.make_train_step.
    bad_fraction: the largest fraction of examples that may be unusable; other
      examples take their place, see pipeline.train_batches.
    init: weights to start from, arguments of restore.read_init.
    resume: a workdir or checkpoint to continue from, step and data position
      included.
    checkpoints: "every_steps", and arguments of Checkpoints.
    log_every_steps: how often metrics are written.
    log: what they are sent to beside metrics.jsonl and TensorBoard: "wandb",
      "trackio", or both; see runtime/trackers.py.
    evals: {name: {"type": one of EVALUATORS, "every_steps", its arguments}}.
      All run at the end, those with every_steps also during training.
    eval_first: evaluate before the first step, too: what weights to start from
      are worth.
    eval_only: only evaluate the newest checkpoint.
    profile_steps: the first and the last step of a trace in WORKDIR/profile.

  Returns:
    (name, Row) of each result of the last evaluation.

  Durations in optim, phases, checkpoints and evals may also be given as
  *_epochs, *_examples or *_percent.
  """
  config = dict(locals())
  for key in ("workdir", "eval_only", "profile_steps"):
    del config[key]
  workdir = files.path(workdir)
  identity.check_hosts("config", config)
  if log:
    from sigjax.runtime import trackers  # few runs have any

    trackers.parse(log)

  # ---- Devices ----
  mesh_ = errors.call(sharding_lib.make_mesh, mesh or {}, "config.mesh")
  sharding_lib.check_batch_size(batch_size, mesh_, microbatches)
  logger.info(
    "%d device(s): %s, mesh %s; workdir %s",
    mesh_.size,
    jax.devices()[0].device_kind,
    dict(mesh_.shape),
    workdir,
  )

  # ---- Data ----
  source = errors.call(kinds.open_source, data, "config.data")
  goes_on = any((workdir / "checkpoints").glob("[0-9]*"))
  tokens, made_from = errors.call(
    vocabulary.of_run,
    tokenizer,
    "config.tokenizer",
    workdir / "tokenizer.model",
    functools.partial(kinds.all_captions, source),
    source.name,
    goes_on,
  )
  times = config_lib.Durations(
    batch_size,
    len(source),
    total_steps=total_steps,
    total_epochs=total_epochs,
    total_examples=total_examples,
  )
  total = times.total_steps

  # ---- Model, losses, optimizer, of each phase ----
  plan = config_lib.phases_of(
    times.resolve(phases or {}, "config.phases"),
    {
      "pp": pp,
      "pp_image": pp_image,
      "model": model,
      "losses": losses or {},
      "microbatches": microbatches,
      "lengths": lengths,
    },
    total,
  )
  sections = dict(
    batch_size=batch_size,
    optim=times.resolve(optim, "config.optim"),
    loss=loss,
    sharding=sharding,
    lock=lock,
    lora=lora,
    feed=feed,
    seed=seed,
  )
  # All of them now: a mistake in the last phase is found before the first step.
  stages = [
    Stage(phase, source, tokens, mesh_, total, sections, bad_fraction)
    for phase in plan
  ]
  for stage in stages:
    _check_vocabulary(stage.run.model.text, tokens.rows, init)
    _log_model(stage)
  _log_data(source, stages[0].pp, tokens, total, batch_size)
  stage_at = lambda step: stages[config_lib.phase_at(plan, step)]
  if curate:
    chosen_by = _teacher(
      curate, stages[0].example, mesh_, batch_size, feed, made_from["sha256"]
    )
    for stage in stages:
      stage.curate(*chosen_by)
  batches = stages[0].batches()
  if not (goes_on or eval_only):
    stages[0].compile_ahead()  # takes longer than all until the first step

  # ---- Evaluations ----
  evaluations = _Evaluations(
    times.resolve(evals or {}, "config.evals"),
    workdir,
    tokens,
    dict(pp_text=pp_text, bad_fraction=bad_fraction),
    mesh_,
    stages,
  )
  for name, evaluator in evaluations.by_name.items():
    source.check_tower(evaluator.source.tower, f"config.evals.{name}")

  # ---- Where to start ----
  section = times.resolve(checkpoints or {}, "config.checkpoints")
  save_every = section.pop("every_steps", None) or total
  saver = errors.call(
    Checkpoints, section, "config.checkpoints", workdir, read_only=eval_only
  )
  me = functools.partial(
    _identity, source.identity(), made_from["sha256"], stage_at
  )
  identity.check_hosts("the run", me(0))
  abstract = lambda step: stage_at(step).run.state
  found = _resumed(saver, abstract, me, resume, eval_only, workdir)
  if found is None:
    state = _initial(stages[0], seed, init, made_from["sha256"])
  else:
    state, position = found
    source.check_tower(position.pop("tower", None), "the run until now")
    batches.set_state(position)
  first_step = int(state.step)
  stage = stage_at(first_step)
  if stage is not stages[0]:
    batches.change(stage.batches())
  hosts.max_over_processes(0)  # now no host can refuse any more

  # ---- Training ----
  if hosts.is_primary() and not eval_only:
    workdir.mkdir(parents=True, exist_ok=True)
    vocabulary.keep(workdir / "tokenizer.model", tokens, made_from)
  if eval_only or first_step >= total:
    logger.info("at step %d of %d: only evaluating", first_step, total)
    total = first_step
  elif hosts.is_primary():
    _write_settings(workdir, config, stage)
  agree = hosts.Agreement(mesh_)
  due = functools.partial(_due, total=total)

  # However it ends: what is being saved is saved, and what is open is closed.
  writer = metrics_lib.Writer(
    workdir, None if eval_only else first_step, log, config
  )
  with writer, saver, contextlib.closing(batches):
    with hosts.StopRequest() as stop, Progress(first_step, total) as progress:
      clock = metrics_lib.Clock(batch_size, stage.flops)
      report = _Reports(
        log_every_steps, total, clock, writer, progress, batches, saver
      )
      if eval_first and first_step == 0:
        rows = evaluations.run(
          list(evaluations.by_name), stage, state.params, 0, writer
        )
        for name, row in rows:
          progress.write(f"before training: {name} {row}")
        clock.start(batches.waited)  # evaluation is no training time
      running = None  # (step, metrics) of a step that is not yet reported
      trace = None
      if profile_steps:
        from sigjax.runtime import profile  # few runs are traced

        trace = profile.Trace(workdir / "profile", profile_steps)
      for step in range(first_step + 1, total + 1):
        if stage_at(step) is not stage:
          if running:
            report(*running)
            running = None
          stage = stage_at(step)
          progress.write(f"step {step}: {stage.phase.name} begins")
          state = _begin(stage, state, seed)
          batches.change(stage.batches())
          clock.change(stage.flops, batches.waited)
          if hosts.is_primary():
            _write_settings(workdir, config, stage)
        if trace:
          trace.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
          state, metrics = stage.train_step(state, next(batches))
        if trace and (folder := trace.after(step, metrics)):
          progress.write(f"the trace of steps up to {step} is in {folder}")
        if running:
          report(*running)  # waits for it while the next step runs
        running = step, metrics

        # All hosts act at the same step, though only one may have noticed.
        stopping, save_failed = agree(stop.signal, saver.failed())
        if save_failed:
          saver.wait()  # logs why, and makes room; the next save may succeed
        names = [
          k for k, every in evaluations.every.items() if due(step, every)
        ]
        save = due(step, save_every) or step == total or stopping
        if save or names:
          report(*running)  # a step that is not finite is never saved
          running = None
        if save:
          position = {**batches.get_state(), "tower": source.tower}
          now = {**config, **stage.phase.sections}
          about = {"config": now, "identity": me(step)}
          writer.flush()  # or a resumed run lacks what led to its checkpoint
          saver.save(step, state, position, about)
        if stopping:
          saver.check(step)
          sys.exit(
            f"{signal.Signals(stopping).name}: saved step {step} and stopped; "
            "the same command resumes from there"
          )
        if names:
          rows = evaluations.run(names, stage, state.params, step, writer)
          for name, row in rows:
            progress.write(f"step {step}: {name} {row}")
          clock.start(batches.waited)  # evaluation is no training time
    names = list(evaluations.by_name)
    rows = evaluations.run(names, stage, state.params, total, writer)
    if total > first_step:
      saver.check(total)

  # ---- Results ----
  if hosts.is_primary():
    print("\n".join(_table(rows, total)))
    logger.info("all of this run is in %s", workdir)
  return rows


# ---- Parts of main ----


def _log_data(source, pp, tokens, total: int, batch_size: int) -> None:
  """Says how much data there is, and what is lost of it."""
  logger.info(
    "%s: %d examples; %d steps of %d are %.1f epochs",
    source.name,
    len(source),
    total,
    batch_size,
    total * batch_size / len(source),
  )
  cut = preprocess.cut_share(source.brief, source.numbers(), pp, tokens)
  if cut > 0:
    logger.info(
      "%.1f %% of the captions are longer than tokenize keeps", 100 * cut
    )


def _teacher(section, example, mesh, batch_size, feed, tokenizer_sha):
  """Reads a teacher; returns the arguments of Stage.curate."""
  from sigjax import curate  # few runs have any

  settings = errors.call(curate.Settings, section, "config.curate")
  settings.check(batch_size, mesh, feed)
  teacher, shapes = curate.teacher(settings, example, mesh)
  given = restore.read_init(
    shapes,
    settings.path,
    dont_load=("dec/.*", "distill/.*"),
    tokenizer_sha=tokenizer_sha,
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params = jax.device_put(trees.unflatten(given), whole)
  return settings, teacher, params


def _log_model(stage) -> None:
  phase = stage.phase
  logger.info(
    "%s%.1f M parameters (parameters.txt), %.2f GFLOP per example",
    f"{phase.name}, from step {phase.first}: " if phase.first else "",
    parameter_overview.count_parameters(stage.run.state.stored) / 1e6,
    stage.flops / 1e9,
  )


def _resumed(saver, abstract, me, resume, eval_only, workdir):
  """Returns (state, position in the data) to go on from; None if there is none.

  Raises:
    UserError: it is damaged or of another run; or eval_only has none.
  """
  if found := saver.restore_newest(abstract, me):
    return found
  if eval_only:
    raise errors.UserError(f"{workdir} has no checkpoint; train it first")
  if not resume:
    return None
  logger.info("starting from resume=%s", resume)
  return restore.read(resume, abstract, me)


def _identity(data, tokenizer, stage_at, step: int) -> dict[str, Any]:
  """Returns the identity of the run in the phase of a step."""
  sections = stage_at(step).phase.sections
  model = _without_how(sections["model"])
  return identity.of_run(
    data=data, tokenizer=tokenizer, pp=sections["pp"], model=model
  )


def _begin(stage, state, seed):
  """Returns the state with which a phase begins."""
  from sigjax import init as init_lib

  run = stage.run
  stage.compile_ahead()
  return init_lib.carry(
    run.model,
    run.tx,
    seed,
    stage.example,
    run.state,
    state,
    run.lock,
    run.terms,
  )


def _initial(stage, seed, init, tokenizer_sha):
  """Returns the state of a run that begins, from scratch or with init."""
  from sigjax import init as init_lib  # a resumed run needs none

  logger.info("starting from %s", _shown(init) or "scratch")
  init, run = init or {}, stage.run
  if "lora" in run.state.trained:  # no weights hold adapters
    init = dict(init, dont_load=(*init.get("dont_load", ()), "lora/.*"))
  parts = [term.kind.part for term in run.terms]
  given = errors.call(
    restore.read_init,
    init,
    "config.init",
    run.state.stored,
    tokenizer_sha=tokenizer_sha,
    may_lack=parts,
  )
  there = {name.split("/")[0] for name in given}
  if given and (new := [part for part in parts if part not in there]):
    logger.info("not in these weights, from scratch: %s", ", ".join(new))
  return init_lib.init_state(
    run.model,
    run.tx,
    seed,
    stage.example,
    run.state,
    given,
    run.lock,
    run.terms,
  )


def _write_settings(workdir: files.Path, config, stage) -> None:
  """Writes config.json and parameters.txt."""
  config_lib.write_config(config, workdir / "config.json")
  shapes = stage.run.state.stored
  table = parameter_overview.get_parameter_overview(shapes, include_stats=False)
  (workdir / "parameters.txt").write_text(table + "\n")


def _shown(init: Mapping[str, Any] | None) -> str:
  given = {k: v for k, v in (init or {}).items() if v}
  return f"init={given}" if given.get("path") else ""


def _without_how(model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns config.model without what changes memory and time alone."""
  how = ("remat", "attention")
  towers = {
    tower: {k: v for k, v in model[tower].items() if k not in how}
    for tower in ("image", "text")
  }
  return {**model, **towers}


def _check_vocabulary(text: Mapping[str, Any], pieces: int, init) -> None:
  size = text.get("vocab_size", pieces)
  if pieces > size:
    raise errors.UserError(
      f"config.model.text.vocab_size is {size}, but the tokenizer has "
      f"{pieces} pieces; "
      + (
        f"take the tokenizer of {init['path']} (config.tokenizer.path)"
        if init and init.get("path")
        else "set it to that"
      )
    )


def _due(step: int, every: int | None, total: int) -> bool:
  """Whether to save or evaluate now; False shortly before the end does both."""
  return bool(every) and step % every == 0 and 2 * (total - step) >= every


class _Evaluations:
  """The evaluations of a run; each phase has its model and its pp_image.

  Attributes:
    by_name: {name: evaluator}.
    every: {name: steps between evaluations in training, or None}.
  """

  def __init__(self, sections, workdir, tokens, shared, mesh, stages):
    from sigjax import embed, evaluators  # not every run has any

    self._mesh, self._tokens = mesh, tokens
    self.every = {k: v.pop("every_steps", None) for k, v in sections.items()}
    self._by_pp, opened = {}, {}
    for stage in stages:
      pp_image = stage.phase.sections["pp_image"]
      if pp_image not in self._by_pp:
        options = dict(shared, pp_image=pp_image)
        self._by_pp[pp_image] = {
          name: evaluators.make(
            f"config.evals.{name}",
            workdir / f"{name}.png",
            section,
            options,
            opened,
          )
          for name, section in sections.items()
        }
    self.by_name = next(iter(self._by_pp.values()))
    make = lambda stage: embed.make_embed(stage.run.model, mesh)
    self._embed = functools.cache(make)
    self._others = functools.cache(
      lambda stage: embed.others(stage.run.model, mesh, stage.run.terms)
    )

  def run(self, names, stage, params, step, writer):
    """Returns (name, Row) of each result, and writes their values."""
    from sigjax.evaluators.embedder import Embedder

    run = functools.partial(self._embed(stage), params)
    others = {
      name: functools.partial(fn, params)
      for name, fn in self._others(stage).items()
    }
    embedder = Embedder(run, self._tokens, others)
    by_name = self._by_pp[stage.phase.sections["pp_image"]]
    rows = [
      (name, row)
      for name in names
      for row in by_name[name].run(embedder, self._mesh)
    ]
    if rows:
      writer.write(step, {f"{name}/{r.metric}": r.value for name, r in rows})
    for name in names:
      picture = getattr(self.by_name[name], "path", None)
      if picture is not None and picture.exists():
        writer.write_image(step, name, picture.read_bytes())
    return rows


class _Reports:
  """Reads the metrics of finished steps, and writes and shows them."""

  def __init__(self, every, total, clock, writer, progress, batches, saver):
    self._every, self._total = every, total
    self._clock, self._writer, self._progress = clock, writer, progress
    self._batches, self._saver = batches, saver

  def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Waits for a step. Raises UserError if its loss is not finite."""
    values = {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}
    if not metrics_lib.finite(values):
      self._saver.wait()
      newest = self._saver.newest()
      good = "none" if newest is None else self._saver.dir / str(newest)
      raise errors.UserError(
        f"stopped at step {step}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}; the last good checkpoint is {good}"
      )
    self._clock.tick()
    rates = {}
    if step % self._every == 0 or step == self._total:
      rates = self._clock.read(self._batches.waited)
      bad = sum(self._batches.faults().values())
      self._writer.write(step, {**values, **rates, "bad_examples": bad})
    self._progress.update(step, values, **rates)


def _table(rows, step):
  return metrics_lib.table(
    [
      (f"{name} {r.metric}", f"{r.value:.1%}", f"{r.chance:.2%}", r.count())
      for name, r in rows
    ],
    (f"step {step}", "value", "chance", "n"),
  )


# ---- The command line ----

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this program; tools have a --config of their own."""
  from sigjax import defaults

  defaults.define_config_flag(main)
  flags.DEFINE_string(
    "workdir",
    None,
    "Output directory, here or in a bucket (gs://, s3://); "
    "workdirs/NAME_OF_CONFIG if unset.",
  )
  flags.DEFINE_bool(
    "eval_only", False, "Only evaluate the workdir's newest checkpoint."
  )
  flags.DEFINE_list(
    "profile_steps",
    None,
    "First and last step of a trace for TensorBoard and XProf, such as 10,15.",
  )
  flags.DEFINE_string(
    "coordinator",
    None,
    "Of several hosts: HOST:PORT on which process 0 listens. Slurm and TPU "
    "pods need none of these three.",
  )
  flags.DEFINE_integer("num_processes", None, "The number of processes.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def command_line(argv: list[str]) -> None:
  """What app.run calls."""
  # main needs none of them.
  from sigjax.runtime import lock, profile, program, start

  del argv
  flag: Any = FLAGS["config"]
  workdir = FLAGS.workdir or config_lib.default_workdir(flag.config_filename)
  workdir = files.path(workdir)
  program.quiet_libraries()
  start.keep_memory()
  start.tell_libtpu()
  try:
    hosts.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    program.show_log_in_training()
    start.keep_compiled(workdir)
    start.log_libtpu()
    # Evaluation alone writes nothing that a run beside it writes.
    alone = contextlib.nullcontext() if FLAGS.eval_only else None
    with alone or lock.hold(workdir):
      config = FLAGS.config.to_dict()
      errors.call(
        main,
        config,
        "config",
        workdir,
        eval_only=FLAGS.eval_only,
        profile_steps=profile.check(FLAGS.profile_steps),
      )
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      where = e.filename or workdir
      hosts.end_all(
        errors.UserError(
          f"{where}: {e.strerror}; make room, then the same command resumes"
        )
      )
    hosts.end_all(e)
  except (Exception, KeyboardInterrupt) as e:  # the others must not wait
    hosts.end_all(e)


if __name__ == "__main__":
  from sigjax.runtime import program

  define_flags()
  app.run(
    command_line,
    flags_parser=lambda argv: program.parse_flags(argv, program.config_given),
  )
