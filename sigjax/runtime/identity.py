"""What a run depends on: compared across hosts, and with its checkpoints.

Hosts with different data would train together without a sign of it, and a run
resumed with other data, another tokenizer or another preprocessing would go on
as if nothing had changed.
"""

from collections.abc import Iterator
import hashlib
import json
import os
from typing import Any

from sigjax import errors
from sigjax.runtime import files, hosts


def of_run(
  *, data: Any, tokenizer: str, pp: str, model: Any, order: Any = None
) -> dict[str, Any]:
  """Returns the identity of a run, as JSON would give it back.

  Args:
    data: the identity of the training data: its files' names and sizes.
    tokenizer: the SHA-256 of its file, see vocabulary.of_run.
    pp: the preprocessing of training examples, config.pp.
    model: config.model.
    order: the version of the order of examples; None if it is kept elsewhere.
  """
  parts = dict(data=data, tokenizer=tokenizer, pp=pp, model=model, order=order)
  return json.loads(json.dumps(parts))


def sha256(content: bytes | str | os.PathLike[str]) -> str:
  """Returns the SHA-256 in hexadecimal, of bytes or of the file at a path."""
  if isinstance(content, bytes):
    return hashlib.sha256(content).hexdigest()
  file: Any = files.path(content)
  with file.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def check_tokenizer(
  file: str | os.PathLike[str], about: dict[str, Any]
) -> None:
  """Raises UserError if a tokenizer is not that of a checkpoint.

  Args:
    file: WORKDIR/tokenizer.model.
    about: what the checkpoint keeps, see restore.read_about.
  """
  trained_with = about.get("identity", {}).get("tokenizer")
  if trained_with not in (None, sha256(file)):
    raise errors.UserError(
      f"{file} is not the tokenizer that the checkpoint was trained with; put "
      "a copy of that one there"
    )


def check_hosts(what: str, value: Any) -> None:
  """Raises UserError unless all processes have the same value.

  All processes call it together. Where it raises, hosts.end_all ends the
  others.

  Args:
    what: the value's name in the error, such as "config" or "the run".
    value: anything that JSON can hold.
  """
  text = json.dumps(value)
  first = json.loads(hosts.broadcast(text))
  found = list(_differences(json.loads(text), first, what))
  if found:
    name, here, there = found[0]
    here, there = _shown(here, there)
    raise errors.UserError(
      f"{name} is {here} on {hosts.process_name()}, but {there} on process 0; "
      "start all processes with the same config and the same data"
    )


def check_resumed(
  path: str | os.PathLike[str], was: dict[str, Any], now: dict[str, Any]
) -> None:
  """Raises UserError if a checkpoint was saved by a run of another identity.

  Args:
    path: the checkpoint, for the error.
    was: the identity that it was saved with; {} of an older version. Parts, and
      keys of config.model, that only one of the two has are not compared:
      another version of this package has more of them.
    now: the identity of the run that wants to resume.
  """
  found = [
    "{} was {}, now it is {}".format(name, *_shown(before, after))
    for part in was
    if part in now
    for name, before, after in _differences(
      was[part],
      now[part],
      f"config.{part}" if part in ("pp", "model") else part,
    )
    if part != "model" or None not in (before, after)
  ]
  if found:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise errors.UserError(
      f"{path} is of a run with another identity: {'; '.join(found[:3])}{more}."
      " Undo this to resume, or give another --workdir, where "
      f'config.init=dict(path="{path}") starts from these weights'
    )


def _differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
  """Yields (name, value in a, value in b) of what differs in JSON values."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted({*a, *b}):
      yield from _differences(a.get(key), b.get(key), f"{name}.{key}")
  elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    for i, (x, y) in enumerate(zip(a, b)):
      yield from _differences(x, y, f"{name}[{i}]")
  elif a != b:
    yield name, a, b


def _shown(a: Any, b: Any, length: int = 80) -> tuple[str, str]:
  """Returns two different values in words, long ones from where they differ."""
  texts = json.dumps(a), json.dumps(b)
  if max(map(len, texts)) <= length:
    return texts
  start = max(len(os.path.commonprefix(texts)) - 20, 0)
  cut = [
    f"{'..' * (start > 0)}{text[start : start + length]}"
    f"{'..' * (len(text) > start + length)}"
    for text in texts
  ]
  return cut[0], cut[1]
