"""Counts which of 90 deliberate mistakes in the code the tests notice.

  python tests/mutations.py               # all: about ten minutes
  python tests/mutations.py ring.py tar   # those whose file or test has a word

Each mutation replaces a text of one file, in a copy of the repository, and runs
the tests that should fail. pytest does not collect this file.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
# A mutation counts as noticed if its tests take so much longer than without it.
HANGS = 5


class Mutation(NamedTuple):
  """A mistake.

  Attributes:
    file: the file in sigjax/.
    old: a text that occurs once in it.
    new: the text that replaces it.
    tests: the file, or FILE::TEST, in tests/ that should notice it.
  """

  file: str
  old: str
  new: str
  tests: str


LOSSES = "test_losses.py"
OPTIONS = "test_loss_options.py"
STEP = "test_step.py"
OPTIM = "test_optim.py"
ORDER = "data/batches/test_order.py"
MIXTURE = "data/test_mixture.py"
TAR = "data/formats/test_tar.py"
CHECKPOINTS = "checkpoints/test_checkpoints.py"
IN_BUCKETS = "checkpoints/test_checkpoints_in_buckets.py"
BUCKET = "runtime/test_bucket.py"
LOCK = "runtime/test_lock.py"
NPZ = "weights/test_npz.py"
EVALUATORS = "evaluators/test_evaluators.py"

MUTATIONS = [
  # ---- Losses ----
  Mutation(
    "losses.py",
    "return -jnp.sum(weight * jax.nn.log_sigmoid(labels * logits)) / len(zimg)",
    "return -jnp.mean(weight * jax.nn.log_sigmoid(labels * logits))",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "softplus = jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))",
    "softplus = jnp.log1p(jnp.exp(x))",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "dt = ring.mean(jnp.sum(zimg.astype(F32) * dzimg, axis=1))",
    "dt = ring.mean(jnp.sum(zimg.astype(F32) * dzimg, axis=1)) * ring.devices",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "dzimg * (t / ring.batch), dztxt * (t / ring.batch)",
    "dzimg * (t / ring.batch), dztxt / ring.batch",
    LOSSES,
  ),
  Mutation(
    "softmax.py",
    "slope = (over_texts + over_images) / 2 - target",
    "slope = over_texts - target",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "precision = lax.Precision.HIGHEST if x.dtype == F32 else None",
    "precision = None",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "neg / B / (B - 1) * t + b",
    "neg / B / B * t + b",
    LOSSES,
  ),
  Mutation(
    "losses.py",
    "same = jnp.any(image[:, None] == text[None, :], axis=2)",
    "same = jnp.all(image[:, None] == text[None, :], axis=2)",
    OPTIONS,
  ),
  Mutation(
    "negatives.py",
    "kept = jnp.where(key == nth, tie, (key > nth).astype(jnp.float32))",
    "kept = (key >= nth).astype(jnp.float32)",
    f"{OPTIONS}::test_ring",
  ),
  Mutation(
    "negatives.py",
    "add = lambda x: lax.psum(jnp.sum(x, axis=0, dtype=jnp.uint32), ring.axes)",
    "add = lambda x: lax.pmax(jnp.sum(x, axis=0, dtype=jnp.uint32), ring.axes)",
    f"{OPTIONS}::test_ring",
  ),
  Mutation(
    "negatives.py",
    "jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))",
    "bits",
    f"{OPTIONS}::test_plain",
  ),
  # ---- Ring ----
  Mutation(
    "ring.py",
    "return lax.psum(jnp.sum(x), self.axes) / self.batch",
    "return lax.pmean(jnp.sum(x), self.axes) / self.batch",
    LOSSES,
  ),
  Mutation(
    "ring.py",
    "ahead, elsewhere = send(texts, way), send(before, way)",
    "ahead, elsewhere = send(texts, way), send(before, -way)",
    LOSSES,
  ),
  Mutation(
    "ring.py",
    "lanes = [(0, half, -1), (half, b, 1)]",
    "lanes = [(0, half, 1), (half, b, 1)]",
    LOSSES,
  ),
  Mutation(
    "ring.py",
    "first = -lax.axis_index(ring.axes) * (ring.batch // ring.devices)",
    "first = -lax.axis_index(ring.axes)",
    LOSSES,
  ),
  Mutation(
    "ring.py",
    "return visit(whole * tile, rest, state) if rest else state",
    "return state",
    LOSSES,
  ),
  # ---- Step ----
  Mutation(
    "step.py",
    'key = self.key(state, i, jax.lax.axis_index("data"))',
    'key = self.key(state, jax.lax.axis_index("data"))',
    STEP,
  ),
  Mutation(
    "step.py",
    "for number in (state.step, *more):",
    "for number in more:",
    STEP,
  ),
  Mutation(
    "step.py",
    "lr=self.lr_fn(state.step)",
    "lr=self.lr_fn(state.step + 1)",
    STEP,
  ),
  Mutation(
    "step.py",
    "add = lambda x, rows: x + jnp.sum(rows, 0)",
    "add = lambda x, rows: jnp.sum(rows, 0)",
    STEP,
  ),
  Mutation(
    "step.py",
    "cut = x.reshape(mesh.size, k, -1, *x.shape[1:]).swapaxes(0, 1)",
    "cut = x.reshape(k, mesh.size, -1, *x.shape[1:])",
    STEP,
  ),
  Mutation(
    "step.py",
    "trained=trained, opt_state=opt_state)",
    "trained=trained, opt_state=state.opt_state)",
    STEP,
  ),
  # ---- Optimizer ----
  Mutation(
    "optim.py",
    "warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)",
    "warmup = jnp.minimum(step / max(warmup_steps, 1), 1.0)",
    OPTIM,
  ),
  Mutation(
    "optim.py",
    "return -(lr * lr_mult * u.astype(p.dtype) + wd * wd_mult * p)",
    "return -lr * (lr_mult * u.astype(p.dtype) + wd * wd_mult * p)",
    OPTIM,
  ),
  Mutation(
    "optim.py",
    'wd_mults: Sequence = ((".*/kernel", 1.0), (".*", 0.0)),',
    'wd_mults: Sequence = ((".*", 1.0),),',
    OPTIM,
  ),
  Mutation(
    "optim.py",
    "b2: float = 0.95,\n  eps",
    "b2: float = 0.999,\n  eps",
    OPTIM,
  ),
  # ---- Order and mixtures ----
  Mutation(
    "data/batches/order.py",
    "ROUNDS = {1: 4, 2: 16}",
    "ROUNDS = {1: 4, 2: 4}",
    ORDER,
  ),
  Mutation(
    "data/batches/order.py",
    "seed = np.random.SeedSequence([*self._seed, epoch])",
    "seed = np.random.SeedSequence([*self._seed])",
    ORDER,
  ),
  Mutation(
    "data/batches/order.py",
    "      if element in before:",
    "      if False:",
    ORDER,
  ),
  Mutation(
    "data/batches/order.py",
    "x = (place - low + attempt * size + attempt // turn) % left",
    "x = (place - low + attempt) % left",
    ORDER,
  ),
  Mutation(
    "data/source.py",
    "j = bisect.bisect_right(self._starts, i) - 1",
    "j = max(bisect.bisect_left(self._starts, i) - 1, 0)",
    MIXTURE,
  ),
  # ---- Tar ----
  Mutation(
    "data/formats/tar.py",
    "if end > window.size:",
    "if end >= window.size:",
    TAR,
  ),
  Mutation(
    "data/formats/tar.py",
    "if end > window.size:",
    "if False:",
    TAR,
  ),
  Mutation(
    "data/formats/tar.py",
    " or part in samples[-1][1]:",
    ":",
    TAR,
  ),
  # ---- Checkpoints ----
  Mutation(
    "checkpoints/manifest.py",
    "      _to_disk(folder, f)\n    return found",
    "      pass\n    return found",
    CHECKPOINTS,
  ),
  Mutation(
    "checkpoints/manifest.py",
    "if _digest(f) != digest else",
    "if False else",
    CHECKPOINTS,
  ),
  Mutation(
    "checkpoints/save.py",
    "layout.steps(self.dir)[: -self._keep]",
    "layout.steps(self.dir)[:-1]",
    CHECKPOINTS,
  ),
  # ---- Buckets ----
  Mutation(
    "checkpoints/layout.py",
    "if name[1:] == [_COMMITTED]]",
    "if name[1:]]",
    IN_BUCKETS,
  ),
  Mutation(
    "runtime/bucket.py",
    '      self._ask(lambda store: store.read(start or "/").result())',
    "      pass",
    BUCKET,
  ),
  Mutation(
    "runtime/lock.py",
    "self.path.write(data, self._generation)",
    "self.path.write(data)",
    LOCK,
  ),
  # ---- Released weights ----
  Mutation(
    "models/vit.py",
    '(*grid, table.shape[2]), "linear")',
    '(*grid, table.shape[2]), "linear", antialias=False)',
    NPZ,
  ),
  Mutation(
    "weights/npz.py",
    'flat[tower + "cls"] = cls + table[:, :1]',
    'flat[tower + "cls"] = cls',
    NPZ,
  ),
  Mutation(
    "weights/npz.py",
    "flat[name] = table[:, :length]",
    "flat[name] = table[:, -length:]",
    NPZ,
  ),
  # ---- Evaluations ----
  Mutation(
    "evaluators/ranking.py",
    "return jnp.sum(~right & ~(scores < best), axis=1)",
    "return jnp.sum(~right & (scores > best), axis=1)",
    EVALUATORS,
  ),
  Mutation(
    "evaluators/retrieval.py",
    "strings.setdefault(group, []).append(with_string[string])",
    "strings.setdefault(group, []).append(with_string[string][:1])",
    EVALUATORS,
  ),
  Mutation(
    "evaluators/zeroshot.py",
    "np.add.at(heads, self._text_classes, ztxt)",
    "heads[self._text_classes] = ztxt",
    EVALUATORS,
  ),
  Mutation(
    "evaluators/zeroshot.py",
    "heads /= np.linalg.norm(heads, axis=1, keepdims=True) + 1e-8",
    "heads /= np.bincount(self._text_classes)[:, None]",
    EVALUATORS,
  ),
  # ---- What a user or a hostile file can bring ----
  Mutation(
    "data/formats/tfds.py",
    "except Exception as e:  # array_record's and TFDS's have no common base",
    "except OSError as e:",
    "data/formats/test_tfrecord.py",
  ),
  Mutation(
    "data/formats/parquet.py",
    "return _texts(value.get(fields[0]), fields[1:]) if fields else []",
    "return list(value)",
    "data/formats/test_parquet.py",
  ),
  Mutation(
    "data/formats/parquet.py",
    "      if field not in inner:",
    "      if False:",
    "data/formats/test_parquet.py",
  ),
  Mutation(
    "losses.py",
    'errors.check(fn, options, "config.loss", *[None] * 4, **given)',
    "pass",
    "test_train.py::test_mistakes_are_one_line_and_change_nothing",
  ),
  Mutation(
    "data/kinds.py",
    "if not isinstance(kind, str):",
    "if False:",
    "data/test_filter.py",
  ),
  Mutation(
    "defaults.py",
    "    _add(section, losses.make)",
    "    pass",
    "test_defaults.py",
  ),
  Mutation(
    "defaults.py",
    '_add(config, main, skip=("eval_only", "profile_steps"))',
    "pass",
    "test_defaults.py",
  ),
  Mutation(
    "weights/fetch.py",
    'if {".", "..", ""} & set(names) or re.search',
    "if re.search",
    "weights/test_fetch.py",
  ),
  Mutation(
    "weights/fetch.py",
    "if e.code == 416 and headers:",
    "if e.code == 416:",
    "weights/test_fetch.py",
  ),
  Mutation(
    "train.py",
    "  if cut > 0:",
    "  if cut > 1:",
    "test_train.py::test_where_to_start",
  ),
  Mutation(
    "data/example/images.py",
    "    8: np.rot90,",
    "    8: lambda x: np.rot90(x, -1),",
    "data/example/test_images.py",
  ),
  Mutation(
    "data/example/preprocess.py",
    "top, left = (side - h) // 2, (side - w) // 2",
    "top, left = 0, 0",
    "data/example/test_preprocess.py",
  ),
  Mutation(
    "data/formats/folder.py",
    "return tree.read(pair[1]) if pair[1] in texts else None",
    "return pair[1]",
    "data/formats/test_folder.py",
  ),
  # ---- SigLIP 2 ----
  Mutation(
    "prototypes.py",
    "(cosines - centre[None]) / teacher_temperature",
    "(cosines + centre[None]) / teacher_temperature",
    "test_distill.py::test_the_loss_is_the_formula",
  ),
  Mutation(
    "prototypes.py",
    "  there = cut(jnp.ones(rows, F32))",
    "  there = jnp.ones_like(cut(jnp.ones(rows, F32)))",
    "test_distill.py::test_the_loss_is_the_formula",
  ),
  Mutation(
    "terms/distill.py",
    '    theirs = self._see(teacher["img"], views)',
    '    theirs = self._see(params["img"], views)',
    "test_distill.py::test_a_teacher_that_is_the_student_and_sees_the_same",
  ),
  Mutation(
    "terms/distill.py",
    "    rest = (1 - self._momentum) * (1 + jnp.cos(jnp.pi * done)) / 2",
    "    rest = 1 - self._momentum",
    "test_distill.py::test_the_teacher_follows",
  ),
  Mutation(
    "models/vit.py",
    "      x = jnp.where(mask[..., None], token, x)",
    "      x = jnp.where(mask[..., None], token, x) + 1e-2 * x",
    "test_distill.py::test_hidden_patches",
  ),
  Mutation(
    "step.py",
    '    new["held"] = self.held_after(state, trained, means)',
    '    new["held"] = state.held',
    "test_distill.py::test_what_learns",
  ),
  Mutation(
    "init.py",
    "if k in have and _same(have[k], x)}",
    "if k in have and not k.startswith('opt')}",
    "test_phases.py::test_what_is_carried_over",
  ),
  Mutation(
    "models/vit.py",
    "  solve = jnp.asarray(np.linalg.pinv(resize), jnp.float32)  # (q q, p p)",
    "  solve = jnp.asarray(resize.T / resize.sum(), jnp.float32)",
    "test_phases.py::test_what_is_carried_over",
  ),
  Mutation(
    "config.py",
    "if phase.first < max(step, 1)",
    "if phase.first <= max(step, 1)",
    "test_phases.py::test_what_a_phase_takes_over",
  ),
  Mutation(
    "data/batches/pipeline.py",
    "    other.set_state(self.get_state())\n",
    "",
    "data/batches/test_pipeline.py::test_goes_on_with_another_preprocessing",
  ),
  Mutation(
    "step.py",
    "  return jax.tree.map(lambda x: x.sharding, state), None",
    "  return None",
    "test_step.py::test_any_mesh_gives_the_same_numbers",
  ),
  Mutation(
    "curate.py",
    "      return (odds + found[0] - found[1], taken), new",
    "      return (odds + found[0] + found[1], taken), new",
    "test_curate.py::test_what_is_drawn_is_the_formula",
  ),
  Mutation(
    "data/example/views.py",
    "    share = rng.uniform(*area) * height * width",
    "    share = area[1] * height * width",
    "data/example/test_views.py",
  ),
  # ---- Small datasets in memory, and rows loaded several at a time ----
  Mutation(
    "data/memory.py",
    "      self._kept[i] = example\n",
    "",
    "data/test_memory.py",
  ),
  Mutation(
    "data/batches/loader.py",
    "min((part + 1) * several, b)",
    "min((part + 1) * several, b - 1)",
    "data/batches/test_pipeline.py",
  ),
  # ---- Patches ----
  Mutation(
    "models/vit.py",
    "return image.swapaxes(2, 3).reshape(b, h, w, -1)",
    "return image.reshape(b, h, w, -1)",
    "models/test_vit.py",
  ),
  # ---- What fits ----
  Mutation(
    "remat.py",
    "if needed <= limit and needed < math.inf:",
    "if needed <= limit:",
    "test_remat.py",
  ),
  Mutation(
    "remat.py",
    "  if kept and kept.exists():\n",
    "  if False:\n",
    "test_remat.py",
  ),
  # ---- Attention ----
  Mutation(
    "models/attention_tpu.py",
    "  @pl.when(pl.program_id(2) > 0)\n  def _():\n    to[:, lanes] += x",
    "  @pl.when(pl.program_id(2) > 0)\n  def _():\n    to[:, lanes] = x",
    "models/test_attention_tpu.py::test_queries_in_parts",
  ),
  Mutation(
    "models/attention_tpu.py",
    "  if i > 0:\n    to[:, lanes] += x",
    "  if i > 0:\n    to[:, lanes] = x",
    "models/test_attention_tpu.py::test_against_numpy",
  ),
  Mutation(
    "models/attention_tpu.py",
    "      found += _dot(rows, lost, 1, 0)",
    "      found += 0 * _dot(rows, lost, 1, 0)",
    "models/test_attention_tpu.py::test_against_numpy",
  ),
  Mutation(
    "models/transformer.py",
    "1.5 * _SLOPE * _CUBIC",
    "_SLOPE * _CUBIC",
    "models/test_transformer.py",
  ),
  Mutation(
    "models/attention.py",
    "logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)",
    "logits = jnp.where(mask, logits, 0.0)",
    "models/test_attention.py",
  ),
  Mutation(
    "step.py",
    "apart = min(self.mesh.shape.values()) > 1",
    "apart = False",
    STEP,
  ),
  Mutation(
    "runtime/start.py",
    "home = workdir if files.in_bucket(workdir) else files.cache_dir()",
    "home = files.cache_dir()",
    "runtime/test_start.py",
  ),
  Mutation(
    "checkpoints/save.py",
    "return x.addressable_data(0)",
    "return x",
    "test_train.py::test_the_step_is_compiled_once_while_the_state_is_made",
  ),
  Mutation(
    "stage.py",
    "self._ahead.start()",
    "self._ahead.run()",
    "test_train.py::test_the_step_is_compiled_once_while_the_state_is_made",
  ),
  Mutation(
    "evaluators/__init__.py",
    "if arguments not in opened:",
    "if True:",
    EVALUATORS,
  ),
  Mutation(
    "data/source.py",
    "return dict(self._briefs[i])",
    "return self._briefs[i]",
    "data/test_kinds.py",
  ),
  # ---- Rates ----
  Mutation(
    "runtime/metrics.py",
    "time.monotonic(), 0, waited",
    "time.monotonic(), 0, 0.0",
    "runtime/test_metrics.py",
  ),
]


def copy_repository(folder: pathlib.Path) -> None:
  """Copies all files that git does not ignore."""
  command = ["git", "ls-files", "-z", "--cached", "--others"]
  done = subprocess.run(
    [*command, "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
  )
  for name in filter(None, done.stdout.decode().split("\0")):
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(ROOT / name, folder / name)


def run_tests(
  folder: pathlib.Path, tests: str, seconds: float | None = None
) -> tuple[int, str]:
  """Runs tests in a copy of the repository.

  Returns:
    pytest's exit code, -1 after too many seconds; and a line of its output.
  """
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0"]
  command += ["-p", "no:cacheprovider", f"tests/{tests}"]
  # A cache of compiled programs for all runs; others may set their own.
  env = {
    "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    **os.environ,
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  try:
    done = subprocess.run(
      command,
      cwd=folder,
      env=env,
      capture_output=True,
      text=True,
      timeout=seconds,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return -1, f"no end after {seconds:.0f} s"
  lines = [line for line in done.stdout.splitlines() if line.strip()]
  failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
  said = (failed or lines or [done.stderr[-100:]])[-1]
  return done.returncode, f"{said} (exit code {done.returncode})"


def check(mutations: Sequence[Mutation]) -> None:
  """Ends the program unless each old text occurs exactly once."""
  wrong = [
    f'{m.file} has "{m.old}" {count} times, not once'
    for m in mutations
    if (count := (ROOT / "sigjax" / m.file).read_text().count(m.old)) != 1
  ]
  if wrong:
    sys.exit("error: " + "\n  ".join(wrong))


def times(
  mutations: Sequence[Mutation], folder: pathlib.Path
) -> dict[str, float]:
  """Returns {tests: seconds} without mutations; these tests have to pass."""
  found = {}
  for tests in sorted({mutation.tests for mutation in mutations}):
    begin = time.monotonic()
    code, said = run_tests(folder, tests)
    if code:
      sys.exit(f"error: {tests} fails without a mutation: {said}")
    found[tests] = time.monotonic() - begin
    print(f"   passed   {found[tests]:4.0f} s  {tests}", flush=True)
  return found


def results(
  mutations: Sequence[Mutation], folder: pathlib.Path
) -> Iterator[bool]:
  """Yields whether the tests notice each mutation; prints lines about it."""
  whole = times(mutations, folder)
  for i, mutation in enumerate(mutations, start=1):
    path = folder / "sigjax" / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    begin = time.monotonic()
    limit = HANGS * whole[mutation.tests] + 60
    code, said = run_tests(folder, mutation.tests, limit)
    path.write_text(before)
    if code not in (-1, 0, 1):  # no test ran
      sys.exit(f"error: {mutation.file}: {mutation.new}: {said}")
    print(
      f"{i:2d} {'killed' if code else 'SURVIVED':8} "
      f"{time.monotonic() - begin:4.0f} s  {mutation.file}: "
      f"{mutation.new.strip()}\n   {said[:100]}",
      flush=True,
    )
    yield bool(code)


def main(words: Sequence[str]) -> None:
  """Runs the mutations whose file or tests contain one of the words."""
  chosen = [
    m
    for m in MUTATIONS
    if not words or any(w in f"{m.file} {m.tests}" for w in words)
  ]
  check(chosen)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / "copy"
    copy_repository(folder)
    noticed = list(results(chosen, folder))
  print(f"{sum(noticed)} of {len(noticed)} mutations are noticed")
  sys.exit(0 if all(noticed) else 1)


if __name__ == "__main__":
  main(sys.argv[1:])
