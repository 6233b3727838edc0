"""Where the checkpoints of a run are, and what one of them holds.

    WORKDIR/checkpoints/STEP/params         the parameters
    WORKDIR/checkpoints/STEP/rest           step and optimizer state
    WORKDIR/checkpoints/STEP/data           position in the data (JSON)
    WORKDIR/checkpoints/STEP/about          config and identity (JSON)
    WORKDIR/checkpoints/STEP/manifest.json  sizes and SHA-256 of the files
    WORKDIR/checkpoints/STEP.damaged        a checkpoint with damaged files

A checkpoint is written under a temporary name, its manifest last, and then
renamed: a folder named STEP was complete once.
"""

import os
import pathlib
import re
from typing import Any

from etils import epath
import orbax.checkpoint as ocp


def folder_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of a workdir's checkpoints, an absolute path."""
  return pathlib.Path(workdir).absolute() / "checkpoints"


def steps(folder: pathlib.Path) -> list[int]:
  """Returns all steps that were complete once, in ascending order.

  There are none in a folder that does not exist.
  """
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def newest(folder: pathlib.Path) -> int | None:
  """Returns the newest step that was complete once, or None."""
  return max(steps(folder), default=None)


def find(path: str | os.PathLike[str]) -> tuple[epath.Path, int | None]:
  """Returns (workdir, step or None) of a path to a workdir or a checkpoint.

  Args:
    path: WORKDIR, WORKDIR/checkpoints or WORKDIR/checkpoints/STEP.
  """
  found = epath.Path(path)
  if found.name.isdigit() and found.parent.name == "checkpoints":
    return found.parent.parent, int(found.name)
  return (found.parent if found.name == "checkpoints" else found), None


def handler() -> ocp.CompositeCheckpointHandler:
  """Returns how orbax reads and writes each item of a checkpoint."""
  return ocp.CompositeCheckpointHandler(
    params=ocp.StandardCheckpointHandler(),
    rest=ocp.StandardCheckpointHandler(),
    data=ocp.JsonCheckpointHandler(),
    about=ocp.JsonCheckpointHandler(),
  )


def rest(state: Any) -> dict[str, Any]:
  """Returns the part of a TrainState that is not parameters."""
  found = dict(step=state.step, opt_state=state.opt_state)
  return {**found, "held": state.held} if state.held else found


def reason(error: BaseException) -> str:
  """Returns a few words of an error: the operating system's, if there are."""
  text = " ".join(str(error).split())
  number = getattr(error, "errno", None) or next(
    iter(re.findall(r"os_error_code='(\d+)'", text)), None
  )
  if number:
    return os.strerror(int(number))
  return text.split(": ")[0][:80] or type(error).__name__
