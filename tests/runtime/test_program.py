"""Mistakes on the command line end in one line."""

import sys

from absl import flags
from ml_collections import config_flags
import pytest

from sigjax.runtime import program

# ml_collections loads the file of --config so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")


@pytest.fixture
def parse(monkeypatch, tmp_path):
  """parse(argument): of a program with a --config; returns (rest, config)."""
  values = flags.FlagValues()
  monkeypatch.setattr(program.flags, "FLAGS", values)
  monkeypatch.setattr(program.app, "define_help_flags", lambda: None)
  config_flags.DEFINE_config_file(
    "config", None, flag_values=values, lock_config=True
  )
  (tmp_path / "c.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=None):\n"
    "  return ConfigDict(dict(seed=1, loss=dict(name='ring')))\n"
  )

  def parse_one(argument):
    argv = ["program", f"--config={tmp_path}/c.py", argument]
    monkeypatch.setattr(sys, "argv", argv)  # where it looks for overrides
    return program.parse_flags(argv, program.config_given), values.config

  return parse_one


@pytest.mark.parametrize(
  "argument, line",
  [
    ("--config.sed=2", 'the config has no key "sed" (did you mean "seed"?)'),
    ("--config.loss.nme=x", 'the config has no key "nme" (did you mean "name"'),
    ("--config.evals.x=1", 'the config has no key "evals"'),
    ("--config.seed=many", "invalid literal for int"),
    ("--sede=1", "Unknown command line flag 'sede'"),
    ("train", '"train" is not a flag: flags begin with --'),
  ],
)
def test_a_mistake_in_a_flag_is_one_line(parse, argument, line):
  with pytest.raises(SystemExit) as e:
    parse(argument)
  assert str(e.value).startswith("error: ") and line in str(e.value)
  assert "\n" not in str(e.value) and "ConfigDict" not in str(e.value)


def test_a_mistake_that_a_config_finds_is_one_line(parse, tmp_path):
  (tmp_path / "c.py").write_text(
    "from sigjax import errors\n"
    "def get_config(arg=None):\n"
    "  raise errors.UserError('lora=4 adapts whole towers')\n"
  )
  with pytest.raises(SystemExit, match="^error: lora=4 adapts whole towers$"):
    parse("--config.seed=1")


def test_overrides_are_taken(parse):
  rest, config = parse("--config.loss.name=all")
  assert rest == ["program"] and config.loss.name == "all"
