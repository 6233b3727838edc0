"""Where the checkpoints of a run are, and what one of them holds.

    WORKDIR/checkpoints/STEP/params         the parameters
    WORKDIR/checkpoints/STEP/rest           step and optimizer state
    WORKDIR/checkpoints/STEP/data           position in the data (JSON)
    WORKDIR/checkpoints/STEP/about          config and identity (JSON)
    WORKDIR/checkpoints/STEP/manifest.json  sizes and SHA-256 of the files
    WORKDIR/checkpoints/STEP.damaged        a checkpoint with damaged files

A checkpoint is written under a temporary name, its manifest last, and then
renamed: a folder named STEP was complete once. In a bucket, where nothing can
be renamed, STEP/commit_success.txt is written last: a folder named STEP without
it is not complete.
"""

import os
import re
from typing import Any

import orbax.checkpoint as ocp

from sigjax import errors
from sigjax.runtime import files

_COMMITTED = "commit_success.txt"  # orbax writes it


def folder_of(workdir: str | os.PathLike[str]) -> files.Path:
  """Returns the folder of a workdir's checkpoints, an absolute path."""
  folder = files.path(workdir).absolute() / "checkpoints"
  if files.in_bucket(folder):
    from sigjax.runtime import bucket

    bucket.teach_orbax()
  return folder


def steps(folder: files.Path) -> list[int]:
  """Returns all steps that were complete once, in ascending order.

  There are none in a folder that does not exist.
  """
  if files.in_bucket(folder):
    names = [name.split("/") for name in folder.below()]
    found = [name[0] for name in names if name[1:] == [_COMMITTED]]
  else:
    found = [path.name for path in folder.glob("*")]
  return sorted(int(name) for name in found if name.isdigit())


def is_complete(folder: files.Path, step: int | str) -> bool:
  """Returns whether a step was complete once; a listing may lag behind."""
  path = folder / str(step)
  return (path / _COMMITTED if files.in_bucket(path) else path).exists()


def leftovers(folder: files.Path) -> list[files.Path]:
  """Returns what failed saves and interrupted deletions left."""
  if not files.in_bucket(folder):
    return [*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob("*.old")]
  steps = [path for path in folder.iterdir() if path.name.isdigit()]
  return [path for path in steps if not is_complete(folder, path.name)]


def unfinished(folder: files.Path, step: int) -> files.Path:
  """Returns where a step is that is being saved, until it is complete."""
  if files.in_bucket(folder):
    return folder / str(step)
  (found,) = folder.glob(f"{step}.orbax-checkpoint-tmp*")
  return found


def discard(folder: files.Path, step: int) -> None:
  """Deletes a complete checkpoint; interrupted, it leaves a leftover."""
  path = folder / str(step)
  if not files.in_bucket(path):  # there, deleting begins with _COMMITTED
    path = path.rename(folder / f"{step}.old")
  files.remove(path)


def newest(folder: files.Path) -> int | None:
  """Returns the newest step that was complete once, or None."""
  return max(steps(folder), default=None)


def find(path: str | os.PathLike[str]) -> tuple[files.Path, int | None]:
  """Returns (workdir, step or None) of a path to a workdir or a checkpoint.

  Args:
    path: WORKDIR, WORKDIR/checkpoints or WORKDIR/checkpoints/STEP.
  """
  found = files.path(path)
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
  if isinstance(error, errors.UserError):
    return str(error)
  text = " ".join(str(error).split())
  if "http_response_code" in text or "CURL" in text:
    from sigjax.runtime import bucket

    return bucket.reason(error)
  number = getattr(error, "errno", None) or next(
    iter(re.findall(r"os_error_code='(\d+)'", text)), None
  )
  if number:
    return os.strerror(int(number))
  return text.split(": ")[0][:80] or type(error).__name__
