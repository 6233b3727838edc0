"""Fills a config with the defaults of the functions that its sections call.

So config.json says everything, and every value can be overridden on the command
line: --config.seed=1, --config.optim.options.b2=0.99.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import os
import re
import sys
import typing
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from sigjax import errors, losses, optim, sharding, terms
from sigjax.models import two_towers
from sigjax.models.text import TextTransformer

MODULE = ("parent", "name", "mesh")  # of flax modules; no settings
TOWER = (*MODULE, "out_dim", "dtype")  # the model gives them to its towers
UNITS = ("steps", "epochs", "examples", "percent")  # of durations


def define_config_flag(
  main: Callable[..., Any] | None = None,
  flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines --config: a config file, filled when it is loaded, and locked.

  Args:
    main: its keyword arguments are the config's top-level keys; None leaves
      these as the file has them.
    flag_values: where the flag is defined.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with its argument: FILE.py[:key=value,...].",
    lock_config=True,
    flag_values=flag_values,
  )
  parser: Any = flag_values["config"].parser
  load = parser.parse

  def load_and_fill(path: str) -> Any:
    file = path.partition(":")[0]
    if not os.path.exists(file):
      raise errors.UserError(
        f"there is no such file in {os.getcwd()}; configs/ is in the root of "
        "the repository"
      )
    config = load(path)
    with config.unlocked():
      fill(config, main, _chosen(sys.argv))
    return config

  parser.parse = load_and_fill


def _chosen(argv: Sequence[str]) -> dict[str, str]:
  """Returns {path: value} of the overrides that choose a function.

  Such as --config.loss.name=softmax: which defaults there are depends on it.
  """
  found = {}
  for i, arg in enumerate(argv):
    match = re.fullmatch(r"--?config\.([\w.]+\.(?:name|kind|type))(=.*)?", arg)
    if match:
      after = argv[i + 1] if i + 1 < len(argv) else ""
      found[match[1]] = match[2][1:] if match[2] else after
  return found


def fill(
  config: Any,
  main: Callable[..., Any] | None = None,
  chosen: Mapping[str, str] | None = None,
) -> None:
  """Adds to a config, in place, each key that it leaves at its default.

  Args:
    config: a ConfigDict.
    main: see define_config_flag.
    chosen: {path: value} of names that replace the config's own, such as
      {"loss.name": "softmax"}.
  """
  # Imported here: it is the tools that open no data which import this file.
  from sigjax import evaluators
  from sigjax.checkpoints import restore, save
  from sigjax.data import kinds
  from sigjax.weights import vocabulary

  if main:
    sections = ("loss", "mesh", "init", "checkpoints", "evals")
    for key in sections:
      if config.get(key) is None:
        config[key] = ConfigDict()
    _add(config, main, skip=("eval_only", "profile_steps"))
  if (section := config.get("optim")) is not None:
    for key in ("schedule", "options"):
      if section.get(key) is None:
        section[key] = ConfigDict()
  for path, value in (chosen or {}).items():
    *parents, last = path.split(".")
    section = config
    for key in parents:
      section = section.get(key) if isinstance(section, ConfigDict) else None
    if isinstance(section, ConfigDict):
      section[last] = value
  if (model := config.get("model")) is not None:
    _add(model, two_towers.TwoTowers, MODULE)
    image = model.get("image", ConfigDict())
    tower = two_towers.IMAGE_TOWERS.get(image.get("kind", "vit"))
    _add(image, tower and tower(), (*MODULE, "out_dim", "dtype"))
    text = model.get("text", ConfigDict())
    _add(text, TextTransformer, (*MODULE, "out_dim", "dtype"))
  if (section := config.get("optim")) is not None:
    _add(section, optim.make_optimizer)
    _add(section.schedule, optim.make_schedule)
    _add(section.schedule, optim.SCHEDULES.get(section.schedule.name))
    _add(section.options, optim.OPTIMIZERS.get(section.name))
  if (section := config.get("loss")) is not None:
    _add(section, losses.make)
    loss = losses.LOSSES.get(section.name)
    _add(section, loss and loss(), ("b", "groups", "key", "axes"))
  phases = [x for x in (config.get("phases") or {}).values() if x is not None]
  for phase in phases:
    _add_duration(phase, "from")
  for part in (config, *phases):
    for section in (part.get("losses") or {}).values():
      # None ends a loss; without a type, it is changed in part.
      if section and (make := terms.TERMS.get(section.get("type"))):
        _add(section, make(), ("what", "model", "span"))
        _add(section, terms.term)
  if (section := config.get("curate")) is not None:
    from sigjax import curate

    _add(section, curate.Settings)
    _add(section.get("model"), two_towers.TwoTowers, MODULE)
  if (section := config.get("mesh")) is not None:
    _add(section, sharding.make_mesh, ("devices",))
  if (section := config.get("init")) is not None:
    _add(section, restore.read_init, ("tokenizer_sha", "may_lack"))
  if (section := config.get("checkpoints")) is not None:
    _add(section, save.Checkpoints, ("read_only",))
    _add_duration(section, "every")
  if (section := config.get("tokenizer")) is not None:
    _add(section, vocabulary.of_run)
  _add_source(config.get("data"), kinds)
  for section in (config.get("evals") or {}).values():
    make = evaluators.EVALUATORS.get(section.get("type"))
    _add(section, make and make(), ("path", "bad_fraction"))
    _add_duration(section, "every")
    for key in ("data", "data_test"):
      _add_source(section.get(key), kinds)


def _add_source(section: Any, kinds: Any) -> None:
  if section is not None:
    _add(section, kinds.open_source)
    make = kinds.SOURCES.get(section.get("kind"))
    _add(section, make and make())
    for part in section.get("sources", ()):
      if isinstance(part, ConfigDict):
        _add_source(part, kinds)


def _add_duration(section: Any, name: str) -> None:
  if not any(f"{name}_{unit}" in section for unit in UNITS):
    section[f"{name}_steps"] = _value(None)


def _add(
  section: Any,
  fn: Callable[..., Any] | None,
  skip: tuple[str, ...] = (),
) -> None:
  """Adds the arguments of fn that have defaults and are not there yet."""
  if fn is None:  # an unknown name, which is an error when it is used
    return
  for key in section:  # None may be overridden by anything
    if section[key] is None:
      section[key] = _value(None)
  for key, param in inspect.signature(fn).parameters.items():
    if key in skip:
      continue
    types = typing.get_args(param.annotation)
    either = str in types and float in types
    if key in section:
      if either and section[key] is not None:
        section[key] = _either(section[key])
      continue
    stem, _, unit = key.rpartition("_")
    if param.default is inspect.Parameter.empty:
      continue
    given = unit in UNITS and any(f"{stem}_{u}" in section for u in UNITS)
    if given and param.default is not None:
      continue  # the same duration, in another unit
    section[key] = (_either if either else _value)(param.default)


def _either(value: Any) -> Any:
  """Returns a value that a number or a text may override."""
  return config_dict.FieldReference(value, field_type=object)


def _value(default: Any) -> Any:
  if default is None:
    return config_dict.placeholder(object)
  if isinstance(default, Mapping):
    return ConfigDict(default)
  return default
