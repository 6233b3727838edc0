"""Reads checkpoints: to resume a run, for inference, or to start from.

All hosts call these functions together, in the same order.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import logging
import os
import pathlib
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from sigjax import errors, trees
from sigjax.checkpoints import layout, manifest
from sigjax.runtime import files, hosts, identity

log = logging.getLogger("sigjax")

AnyPath = str | os.PathLike[str]


def newest(
  folder: files.Path,
  state: Any,
  run: Any,
) -> tuple[tuple[Any, dict[str, Any]] | None, list[files.Path]]:
  """Reads the newest undamaged checkpoint.

  Args:
    folder: WORKDIR/checkpoints.
    state: TrainState of ShapeDtypeStructs with shardings, or fn(step) -> that:
      in a run with phases it depends on the step.
    run: the identity of the run that resumes, or fn(step) -> that; None is not
      compared.

  Returns:
    (TrainState, data state), or None if there are no checkpoints at all; and
    the damaged checkpoints that are newer.

  Raises:
    UserError: all checkpoints are damaged, or the newest undamaged one is of
      another identity, model or optimizer.
  """
  found = " ".join(map(str, reversed(layout.steps(folder))))
  damaged = []
  for step in hosts.broadcast(found).split():
    path = folder / step
    fault = _fault(path)
    if not fault:
      found = _read(path, _at(state, path), _at(run, path))
      log.info("resuming from %s", path)
      return found, damaged
    log.warning(
      "%s is damaged (%s); looking for the one before it", path, fault
    )
    damaged.append(path)
  there = hosts.broadcast(
    ", ".join(
      sorted({*(p.name for p in damaged + list(folder.glob("*.damaged")))})
    )
  )
  if there:
    raise errors.UserError(
      f"{folder} has no undamaged checkpoint (there are: {there}); delete this "
      "folder to start anew"
    )
  return None, []


def read(
  path: AnyPath, state: Any, run: Any = None
) -> tuple[Any, dict[str, Any]]:
  """Returns (TrainState, data state) of the checkpoint that a path names.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    state, run: see newest.

  Raises:
    UserError: there is no checkpoint, it is damaged, or it is of another
      identity, model or optimizer.
  """
  found = checkpoint_of(path)
  _refuse_damage(found)
  return _read(found, _at(state, found), _at(run, found))


def _at(value: Any, path: files.Path) -> Any:
  """Returns a value, or what a function makes of a checkpoint's step."""
  return value(int(path.name)) if callable(value) else value


def read_about(path: AnyPath) -> dict[str, Any]:
  """Returns what is known of the run that saved a checkpoint.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.

  Returns:
    {"config": the config it was trained with, "identity": see
    identity.of_run}. A checkpoint of an older version has the config from
    WORKDIR/config.json, and no identity: {}.

  Raises:
    UserError: there is no checkpoint, it is damaged, or nothing is known.
  """
  found = checkpoint_of(path)
  about = _about(found)
  if "config" not in about:
    config = found.parent.parent / "config.json"
    try:
      about["config"] = json.loads(config.read_text())
    except FileNotFoundError:
      raise errors.UserError(
        f"{found.parent.parent} is no workdir of sigjax.train: it has no "
        "config.json"
      ) from None
    except (OSError, ValueError) as e:
      raise errors.UserError(
        f"{config} cannot be read ({layout.reason(e)}); write the config that "
        "the run was trained with there, as JSON"
      ) from e
  text = about["config"].get("model", {}).get("text", {})
  if "embed_rank" in text:  # what older versions call it
    text["bottleneck"] = text.pop("embed_rank") or 0
  return {"identity": {}, **about}


def read_params(path: AnyPath, sharding: jax.sharding.Sharding) -> dict:
  """Returns the parameters of the checkpoint that a path names.

  Low-rank adapters are merged.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.
    sharding: of every array.

  Raises:
    UserError: there is no checkpoint, or it is damaged.
  """
  found = checkpoint_of(path)
  _refuse_damage(found)
  with _one_line(found):
    stored = _metadata(found)["params"]
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stored
  )
  params = _read_items(found, params=like)["params"]
  if "lora" in params:
    from sigjax import lora  # few runs have adapters

    params = jax.jit(lora.merge)(params)
  return params


def checkpoint_of(path: AnyPath) -> files.Path:
  """Returns the folder of the checkpoint that a path names.

  Args:
    path: a workdir, for its newest checkpoint, or WORKDIR/checkpoints/STEP.

  Raises:
    UserError: there is none.
  """
  workdir, step = layout.find(path)
  folder = layout.folder_of(workdir)
  if not folder.exists():
    raise errors.UserError(f"{workdir} has no checkpoints; train there first")
  newest = layout.newest(folder)
  if newest is None:
    raise errors.UserError(f"{workdir} has no complete checkpoint")
  found = folder / str(newest if step is None else step)
  if not layout.is_complete(folder, found.name):
    there = ", ".join(map(str, layout.steps(folder)))
    raise errors.UserError(
      f"there is no checkpoint {found}; there are: {there}"
    )
  return found


def read_init(
  shapes: dict,
  path: AnyPath | None = None,
  *,
  into: str | None = None,
  dont_load: Sequence[str] = (),
  tokenizer_sha: str | None = None,
  may_lack: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads the weights that a run starts from, released ones or another run's.

  Args:
    shapes: the model's parameters, a tree of ShapeDtypeStructs.
    path: a workdir, WORKDIR/checkpoints/STEP, or what npz.load_params takes: a
      .npz file, its URL, or the name of a released checkpoint. None reads
      nothing.
    into: "img" or "txt" if the weights are of this tower alone.
    dont_load: regexes of names (within `into`) that start from scratch, or
      that the weights may have though the model has not.
    tokenizer_sha: the SHA-256 of this run's tokenizer; None is not compared.
    may_lack: parts of the parameters, such as "dec", that start from scratch if
      the weights have nothing of them.

  Returns:
    {name: array} of what was read.

  Raises:
    UserError: there are no such weights, they do not fit, or another run's
      token embeddings would be used with another tokenizer.
  """
  if path is None:
    return {}
  from sigjax.weights import npz  # most runs start from scratch

  like = shapes if into is None else shapes[into]
  if tokenizer_sha is not None and _reads_tokens(shapes, into, dont_load):
    _check_tokenizer(path, into, tokenizer_sha)
  if is_run(path):
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded = npz.fit(
      trees.flatten(read_params(path, one_device)),
      like,
      dont_load,
      path,
      may_lack,
    )
  else:
    loaded = npz.load_params(path, like, dont_load, may_lack)
  prefix = f"{into}/" if into else ""
  return {
    prefix + name: leaf
    for name, leaf in trees.flatten(loaded).items()
    if not isinstance(leaf, jax.ShapeDtypeStruct)
  }


def is_run(path: AnyPath) -> bool:
  """Returns whether a path names a run's checkpoint, not a file of weights."""
  # A URL of a file is not looked up: that may need libraries or credentials.
  if re.match(r"https?://|.*\.npz(:|$)", str(path)):
    return False
  return (layout.find(path)[0] / "checkpoints").exists()


def _reads_tokens(
  shapes: dict, into: str | None, dont_load: Sequence[str]
) -> bool:
  """Returns whether read_init would read embeddings of tokens."""
  prefix = f"{into}/" if into else ""
  return any(
    name.startswith(prefix)
    and not any(re.fullmatch(p, name.removeprefix(prefix)) for p in dont_load)
    for name in trees.flatten(shapes)
    if name.startswith("txt/Embed_0/")
  )


def _check_tokenizer(path: AnyPath, into: str | None, sha256: str) -> None:
  """Refuses embeddings of another tokenizer; warns if that cannot be told."""
  from sigjax.weights import known, vocabulary

  ours: bool | None = True
  weights = known.split(path)[0]
  if is_run(path):
    file = layout.find(path)[0] / "tokenizer.model"
    theirs = _about(checkpoint_of(path)).get("identity", {}).get("tokenizer")
    if theirs is None and file.exists():
      theirs = identity.sha256(file)
    ours = theirs in (None, sha256)
  elif name := known.name_of(weights):
    if file := known.KNOWN[name].tokenizer:
      ours = vocabulary.is_released(file, sha256)
  else:  # as tools.convert_from_hf writes it
    file = pathlib.Path(weights).parent / "tokenizer.model"
    ours = not file.exists() or identity.sha256(file) == sha256
  if ours is None:
    log.warning(
      "%s was trained with the tokenizer %s; whether this run has it cannot be "
      'told: config.tokenizer=dict(path="%s") fetches it',
      path,
      file,
      file,
    )
  elif not ours:
    names = "Embed_0/.*" if into == "txt" else "txt/Embed_0/.*"
    raise errors.UserError(
      f"config.init.path={path} was trained with another tokenizer, so its "
      "token embeddings mean other tokens; take that one with "
      f'config.tokenizer=dict(path="{file}"), or train new embeddings with '
      f'config.init.dont_load=("{names}",)'
    )


def _about(path: files.Path) -> dict[str, Any]:
  """Returns the item "about" of a checkpoint; {} of an older version."""
  with _one_line(path):
    if not (path / "about").exists():
      return {}
    listed = (path / manifest.NAME).exists()
    if listed and (fault := manifest.fault(path, within="about/")):
      raise ValueError(fault)
    return _restore(path, about=ocp.args.JsonRestore())["about"]


def _fault(path: files.Path) -> str:
  """Returns what is wrong with a checkpoint, or ""; each host reads a part."""
  if not (path / manifest.NAME).exists():
    log.warning(
      "%s was written without a %s: damage to it may not be noticed",
      path,
      manifest.NAME,
    )
    return ""
  fault = manifest.fault(path, jax.process_index(), jax.process_count())
  anywhere = hosts.max_over_processes(bool(fault))
  return fault or ("another host names the file" if anywhere else "")


def _refuse_damage(path: files.Path) -> None:
  with _one_line(path):
    if fault := _fault(path):
      raise ValueError(fault)


def _metadata(path: files.Path) -> dict[str, Any]:
  """Returns {item: tree of what has a shape and a dtype}."""
  with contextlib.closing(ocp.Checkpointer(layout.handler())) as checkpointer:
    items = checkpointer.metadata(path).item_metadata or {}
  return {name: getattr(item, "tree", item) for name, item in items.items()}


def _restore(path: files.Path, **items: Any) -> Any:
  """Returns {item: what orbax reads}, for orbax's arguments of each item."""
  with contextlib.closing(ocp.Checkpointer(layout.handler())) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _read(
  path: files.Path, state: Any, run: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
  if run is not None:
    identity.check_resumed(path, _about(path).get("identity", {}), run)
  found = _read_items(path, params=state.stored, rest=layout.rest(state))
  with _one_line(path):
    data = _restore(path, data=ocp.args.JsonRestore())["data"]
  return state.restored(params=found["params"], **found["rest"]), data


def _read_items(path: files.Path, **items: Any) -> Any:
  """Returns {item: tree}, for trees of ShapeDtypeStructs with shardings."""
  with _one_line(path):
    stored = _metadata(path)
    for item, want in items.items():
      different = trees.difference(want, stored[item])
      if different:
        raise errors.UserError(
          f"{path} is of another "
          f"{dict(params='model', rest='optimizer')[item]}, "
          f"{len(different)} arrays differ: {'; '.join(different[:3])}. "
          "Take the config it was trained with, or another --workdir"
        )
    return _restore(
      path, **{k: ocp.args.StandardRestore(v) for k, v in items.items()}
    )


@contextlib.contextmanager
def _one_line(path: files.Path) -> Iterator[None]:
  """Turns any error of the body into a UserError that names the checkpoint."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # orbax and tensorstore raise anything
    what = "cannot be read" if files.in_bucket(path) else "is damaged"
    raise errors.UserError(
      f"{path} {what} ({layout.reason(e)}); delete this folder to resume "
      "from the checkpoint before it"
    ) from e
