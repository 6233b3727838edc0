"""Weights & Biases and Trackio: they get what metrics.jsonl gets, and pictures.

config.log names them, separated by commas. A project may follow a colon:
"wandb", "wandb:PROJECT", "wandb:ENTITY/PROJECT,trackio:PROJECT". All else is
set by their own environment variables, such as WANDB_MODE=offline.
"""

from collections.abc import Callable, Mapping
import importlib.util
import io
import json
import logging
import secrets
from typing import Any, NamedTuple

from PIL import Image

from sigjax import errors
from sigjax.runtime import files, hosts

log = logging.getLogger("sigjax")

PROJECT = "sigjax"  # where none is named


class _Run(NamedTuple):
  """A run of a tracker.

  Attributes:
    send: fn(step, {name: number or picture}).
    picture: fn(image) -> what `send` takes.
    finish: fn(whether the program ends as it should).
  """

  send: Callable[[int, Mapping[str, Any]], object]
  picture: Callable[[Image.Image], Any]
  finish: Callable[[bool], object]


def _wandb(workdir: files.Path, project: str, id_: str, config: Any) -> _Run:
  import wandb  # pyright: ignore[reportMissingImports]

  here = workdir
  if files.in_bucket(workdir):
    here = files.cache_dir() / "wandb"
    here.mkdir(parents=True, exist_ok=True)

  entity, _, project = project.rpartition("/")
  try:
    run = wandb.init(
      dir=here,
      # None leaves the choice to WANDB_ENTITY and WANDB_PROJECT.
      entity=entity or None,
      project=project or None,
      name=workdir.name,
      id=id_,
      resume="allow",
      config=config,
    )
  except wandb.Error as e:
    raise errors.UserError(
      f"config.log: wandb does not start ({' '.join(str(e).split())}); log in "
      "with `wandb login`, or set WANDB_MODE=offline"
    ) from None
  # wandb's own count of steps refuses what belongs to an earlier one, such as
  # an evaluation that a killed run had not finished.
  run.define_metric("step")
  run.define_metric("*", step_metric="step")
  return _Run(
    lambda step, values: run.log({"step": step, **values}),
    wandb.Image,
    lambda ok: run.finish(exit_code=0 if ok else 1),
  )


def _trackio(workdir: files.Path, project: str, id_: str, config: Any) -> _Run:
  import trackio  # pyright: ignore[reportMissingImports]

  run = trackio.init(
    project or PROJECT,
    name=f"{workdir.name}-{id_}",  # its name is what it is resumed by
    resume="allow",
    config=config,
    embed=False,
  )
  return _Run(
    lambda step, values: run.log(dict(values), step=step),
    trackio.Image,
    lambda ok: run.finish(),
  )


TRACKERS = {"wandb": _wandb, "trackio": _trackio}


def parse(spec: str) -> dict[str, str]:
  """Returns {name: project} of config.log; a project may be "".

  Raises:
    UserError: a name is not known, given twice, or not installed.
  """
  found = {}
  for part in spec.split(","):
    name, _, project = part.strip().partition(":")
    errors.pick(TRACKERS, name, "config.log")
    if name in found:
      raise errors.UserError(f"config.log names {name} twice")
    if hosts.is_primary() and importlib.util.find_spec(name) is None:
      raise errors.UserError(
        f"config.log names {name}, which is not installed; "
        f"pip install 'sigjax[{name}]'"
      )
    found[name] = project
  return found


class Tracker:
  """A run of one of TRACKERS, on the primary process.

  A resumed run goes on in the same run there, see WORKDIR/NAME.json. Steps that
  it does again have been sent: of each metric only later ones are. A run that
  begins anew is a new run there.

  Args:
    name: one of TRACKERS.
    project: "", PROJECT, or for wandb ENTITY/PROJECT.
    workdir: the run's directory.
    first_step: the run resumes from this step.
    config: of the run.

  Raises:
    UserError: it does not start.
  """

  def __init__(
    self,
    name: str,
    project: str,
    workdir: files.Path,
    first_step: int,
    config: Mapping[str, Any],
  ):
    self._path = workdir / f"{name}.json"
    self._about: dict[str, Any] = dict(
      project=project, id=secrets.token_hex(4), newest={}
    )
    if first_step > 0:
      self._about |= _before(self._path, project)
    plain = json.loads(json.dumps(config, default=str))
    self._run = TRACKERS[name](workdir, project, self._about["id"], plain)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends the scalars that were not sent before."""
    self._send(step, dict(scalars))

  def write_image(self, step: int, name: str, png: bytes) -> None:
    """Sends a PNG, unless it was sent before."""
    picture = Image.open(io.BytesIO(png))
    self._send(step, {name: self._run.picture(picture)})

  def _send(self, step: int, values: dict[str, Any]) -> None:
    newest = self._about["newest"]
    new = {k: v for k, v in values.items() if newest.get(k, -1) < step}
    if not new:
      return
    self._run.send(step, new)
    newest.update(dict.fromkeys(new, step))
    try:
      files.write(self._path, json.dumps(self._about) + "\n")
    except OSError as e:  # a full disk does not end a run
      log.warning("%s cannot be written: %s", self._path, e.strerror)

  def close(self, ok: bool) -> None:
    """Ends the run there; `ok` is whether it ended as it should."""
    self._run.finish(ok)


def _before(path: files.Path, project: str) -> dict[str, Any]:
  """Returns what an earlier process wrote to WORKDIR/NAME.json; {} if none."""
  try:
    about = json.loads(path.read_text())
    if about["project"] == project:
      return dict(id=str(about["id"]), newest=dict(about["newest"]))
  except FileNotFoundError:
    pass
  except (OSError, ValueError, TypeError, KeyError):
    log.warning("%s is damaged: this becomes a new run there", path)
  return {}
