"""What a phase of a run is made of: its examples, its step, its batches."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
import numpy as np

from sigjax import build, errors, sharding
from sigjax.config import Phase
from sigjax.data.batches import pipeline
from sigjax.data.example import preprocess
from sigjax.data.example.tokenizer import Tokenizer
from sigjax.data.source import Source
from sigjax.models.two_towers import TwoTowers
from sigjax.step import Batch, Result

if TYPE_CHECKING:
  from sigjax import curate


LENGTH = "{length}"  # in pp, where one of `lengths` is put


class Stage:
  """A phase's parts. Nothing of it is on the devices before it begins.

  Args:
    phase: from config.phases_of.
    source: the training data.
    tokens: the tokenizer.
    mesh: the devices.
    total_steps: the length of the training.
    sections: what no phase changes: batch_size, seed, and other keywords of
      build.build.
    bad_fraction: see pipeline.train_batches.

  Attributes:
    phase: see above.
    pp: the preprocessing of training examples, with the first of `lengths`.
    example: one training example, for its shapes.
    run: the parts of build.build.
    flops: of training on an example, the mean over lengths.

  Raises:
    UserError: a mistake in the phase's sections.
  """

  def __init__(
    self,
    phase: Phase,
    source: Source,
    tokens: Tokenizer,
    mesh: Mesh,
    total_steps: int,
    sections: Mapping[str, Any],
    bad_fraction: float,
  ):
    self._of, self._mesh = 1, mesh
    self._curator: curate.Curator | None = None
    self._ahead: threading.Thread | None = None
    self.phase, self._source, self._bad = phase, source, bad_fraction
    self._sections = sections
    from sigjax.models import flops

    pp, lengths, k, model, losses = (
      phase.sections[key]
      for key in ("pp", "lengths", "microbatches", "model", "losses")
    )
    self._rows = _checked(lengths, pp, model)
    self.pp = with_length(pp, self._rows[0][0])
    parse = functools.partial(preprocess.parse, tokenizer=tokens)
    self._preprocess = {
      length: parse(with_length(pp, length)) for length, _ in self._rows
    }
    preprocess.check_weights(source.brief, source.numbers(), self.pp)

    def made(times: int, example: Mapping) -> build.Built:
      return build.build(
        mesh,
        example,
        total_steps,
        model=model,
        losses=losses,
        since=phase.since,
        microbatches=k * times,
        **sections,
      )

    self._steps: dict[int | None, build.Built] = {}
    counts, by_times = [], {}
    for length, times in self._rows:
      first = pipeline.first_example(source, self._preprocess[length])
      if times not in by_times:
        by_times[times] = made(times, first)
      run = self._steps[length] = by_times[times]
      trained = run.state.trained
      counts.append(flops.training(run.model, first, trained, run.terms))
      if length == self._rows[0][0]:
        self.example, self.run = first, run
    self.flops = sum(counts) / len(counts)

  def batches(self) -> pipeline.TrainBatches:
    """Returns the phase's batches; their position is to be set."""
    return pipeline.train_batches(
      self._source,
      self._preprocess[self._rows[0][0]],
      batch_size=self._sections["batch_size"] * self._of,
      seed=self._sections["seed"],
      bad_fraction=self._bad,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      vary=self._vary() if len(self._rows) > 1 else None,
    )

  def train_step(self, state: Any, batch: Batch) -> Result:
    """Runs the step of the batch's length, see step.make_train_step."""
    if self._ahead:
      self._ahead.join()
    length = None if None in self._steps else batch["image"].shape[1]
    step = self._steps[length].train_step
    if self._curator is None:
      return step(state, batch)
    batch, more = self._curator(state, batch)
    state, metrics = step.program(state, batch)
    return state, {**metrics, "to_learn": more}

  def compile_ahead(self) -> None:
    """Compiles the step in a thread; train_step waits for it.

    JAX keeps what it has compiled, so the first call of train_step finds it.
    """
    program = self.run.train_step.program
    # Only whole batches that come from the host have the shapes below.
    if self._ahead or program is None or self._curator:
      return
    B = self._sections["batch_size"]
    batch = sharding.abstract_batch(self.example, B, self._mesh)

    # What cannot be compiled fails in train_step, too.
    with contextlib.suppress(Exception):
      # Not in the thread: tracing is Python, which runs one thread at a time.
      lowered = program.lower(self.run.state, batch)

      def work() -> None:
        with contextlib.suppress(Exception):
          lowered.compile()

      self._ahead = threading.Thread(target=work)
      self._ahead.start()

  def curate(
    self, settings: "curate.Settings", teacher: TwoTowers, params: Any
  ) -> None:
    """From now on, a teacher chooses the examples of each step.

    Args:
      settings: the section config.curate.
      teacher, params: the teacher's towers, and its parameters.
    """
    from sigjax import curate  # few runs have a teacher

    most = max(times for _, times in self._rows)
    self._of = settings.of
    self._curator = curate.Curator(
      self.run.model,
      teacher,
      params,
      self._mesh,
      self._sections["batch_size"],
      self.phase.sections["microbatches"] * most * settings.of,
      settings.chunks,
      self._sections["seed"],
    )

  def _vary(self) -> Callable[[int], Any]:
    seed = self._sections["seed"]

    @functools.lru_cache(64)
    def drawn(step: int) -> Any:
      # Five numbers: an example's are seeded with three, noise's with four.
      rng = np.random.default_rng([seed, 2, step, 2, 2])
      length, _ = self._rows[rng.integers(len(self._rows))]
      return self._preprocess[length]

    return drawn


def with_length(pp: str, length: int | None) -> str:
  """Returns a pipe string with a number of patches in it."""
  return pp if length is None else pp.replace(LENGTH, str(length))


def _checked(lengths: Any, pp: str, model: Mapping) -> list[tuple[Any, int]]:
  """Returns rows (length, times), or ((None, 1),) without lengths."""
  if bool(lengths) != (LENGTH in pp):
    raise errors.UserError(
      f'config.lengths are put in the place of "{LENGTH}" in config.pp, but '
      f"{'that has none' if lengths else 'there are none'}: write both, as in "
      f'"resize_to_patches({LENGTH},16)", or neither'
    )
  if not lengths:
    return [(None, 1)]
  if model["image"].get("kind") != "naflex":
    raise errors.UserError(
      "config.lengths are for an image tower that takes any number of patches: "
      'config.model.image.kind has to be "naflex"'
    )
  rows = []
  for row in lengths:
    if len(row) != 2 or not all(isinstance(x, int) and x > 0 for x in row):
      raise errors.UserError(
        f"config.lengths has the row {tuple(row)}, but takes rows (number of "
        "patches, times as many microbatches), such as (1024, 2)"
      )
    rows.append(tuple(row))
  if len(dict(rows)) < len(rows):
    raise errors.UserError("config.lengths has a number of patches twice")
  return rows
