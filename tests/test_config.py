"""The config argument and durations."""

import json

import pytest

from sigjax import config, errors


def test_parse_arg():
  parse = lambda arg: config.parse_arg(arg, n=3, x=1e9, name="a", on=False)
  assert parse(None) == dict(n=3, x=1e9, name="a", on=False)
  assert parse("n=5,on,name=b/c.npz") == dict(
    n=5, x=1e9, name="b/c.npz", on=True
  )
  assert parse("on=0,x=2.5e3") == dict(n=3, x=2500.0, name="a", on=False)


@pytest.mark.parametrize(
  "arg, message",
  [
    ("m=3", 'argument "m" is not known'),
    ("n=many", 'n takes a int, such as n=3, not "n=many"'),
    ("n", 'not "n"'),
    ("on=perhaps", '"perhaps" is not known'),
  ],
)
def test_parse_arg_refuses(arg, message):
  with pytest.raises(errors.UserError) as e:
    config.parse_arg(arg, n=3, on=False)
  assert message in str(e.value)


def test_durations():
  times = config.Durations(
    10, 100, total_steps=None, total_epochs=2.5, total_examples=None
  )
  assert times.total_steps == 25
  section = dict(
    warmup_percent=8,
    a=dict(every_epochs=1, keep_examples=1, lr=3),
    cooldown_steps=0,
    x_steps=None,
  )
  assert times.resolve(section, "s") == dict(
    warmup_steps=2,
    a=dict(every_steps=10, keep_steps=1, lr=3),
    cooldown_steps=0,
    x_steps=None,
  )


@pytest.mark.parametrize(
  "total",
  [
    {},
    dict(total_steps=1, total_epochs=1),
    dict(total_steps=-1),
    dict(total_examples=float("nan")),
  ],
)
def test_total_is_needed_once(total):
  with pytest.raises(errors.UserError):
    config.Durations(10, 100, **total)


def test_a_duration_is_given_once():
  times = config.Durations(10, 100, total_steps=5)
  with pytest.raises(errors.UserError, match="s gives warmup_"):
    times.resolve(dict(warmup_steps=1, warmup_epochs=1), "s")


def test_another_argument_is_another_workdir():
  assert config.default_workdir("configs/x.py") == "workdirs/x"
  assert config.default_workdir("a/x.py:b=c/d.npz,e") == (
    "workdirs/x_b=c_d.npz,e"
  )


def test_another_config_in_a_workdir_is_said(tmp_path, caplog):
  caplog.set_level("INFO", logger="sigjax")
  path = tmp_path / "config.json"
  config.write_config(dict(a=1, b=(2, 3)), path)
  config.write_config(dict(a=1, b=(2, 3)), path)
  assert not caplog.text
  config.write_config(dict(a=1, b=(2, 4)), path)
  assert "config.b: it was [2, 3], now it is [2, 4]" in caplog.text
  assert json.loads(path.read_text()) == {"a": 1, "b": [2, 4]}


@pytest.mark.parametrize("text", ["", "{", "3", "[1]"])
def test_a_damaged_config_does_not_block(tmp_path, text):
  path = tmp_path / "config.json"
  path.write_text(text)
  config.write_config(dict(a=1), path)
  assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
  "arg, path",
  [
    ("path=d/{a,b}.tar,n=2", "d/{a,b}.tar"),
    ("n=2,path=d/{{a,b},{1..3}}.tar", "d/{{a,b},{1..3}}.tar"),
    ("path=one\\, two,n=2", "one, two"),
    ("path=a\\{b,n=2", "a{b"),
    ("path=a=b,n=2", "a=b"),
  ],
)
def test_commas_within_values(arg, path):
  assert config.parse_arg(arg, path="", n=1) == dict(path=path, n=2)
