"""Every value of a config can be overridden, those at their defaults too."""

import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict
import pytest

from sigjax import defaults, errors, losses, optim, sharding, train
from sigjax.runtime import program

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
ROOT = pathlib.Path(__file__).parent.parent


def parse(monkeypatch, *overrides, config="siglip_emoji"):
  """Returns the config of a command line, as sigjax.train has it."""
  path = (ROOT / "configs" / config).with_suffix(".py")
  argv = ["train", f"--config={path}", *overrides]
  values = flags.FlagValues()
  monkeypatch.setattr(sys, "argv", argv)
  defaults.define_config_flag(train.main, values)
  values(argv)
  return values.config


def test_a_default_is_overridden(monkeypatch):
  config = parse(
    monkeypatch,
    "--config.seed=3",
    "--config.loss.name=softmax",
    "--config.init.path=siglip/b16_256",
    "--config.data.part=(0, 0.5)",
    "--config.data.element=caption",
    "--config.data.languages=('en', 'th')",
    "--config.data.mismatch=0.1",
    "--config.tokenizer.byte_fallback=true",
    "--config.optim.options.b1=0.8",
    "--config.model.text.bottleneck=96",
    "--config.evals.held_style_zeroshot.templates=photo",
    "--config.checkpoints.keep=7",
    "--config.resume=elsewhere",
  )
  assert config.seed == 3 and config.loss.name == "softmax"
  assert config.init.path == "siglip/b16_256"
  assert config.data.part == (0, 0.5) and config.data.element == "caption"
  assert config.data.languages == ("en", "th") and config.data.mismatch == 0.1
  assert config.tokenizer.byte_fallback is True
  assert config.optim.options.b1 == 0.8
  assert config.model.text.bottleneck == 96
  assert config.evals.held_style_zeroshot.templates == "photo"
  assert config.checkpoints.keep == 7 and config.resume == "elsewhere"
  # What the file gives stays, and no duration is given twice.
  assert config.optim.options.b2 == 0.95
  assert config.optim.schedule.to_dict() == dict(
    name="cosine", warmup_percent=10
  )


@pytest.mark.parametrize("config", ["siglip_b16", "siglit_l16", "siglip_own"])
def test_main_takes_a_filled_config(monkeypatch, config):
  """Each section is exactly what its function takes."""
  filled = parse(monkeypatch, config=config).to_dict()
  errors.check(train.main, filled, "config", "workdir", eval_only=False)
  assert filled["seed"] == 0 and filled["log_every_steps"] in (20, 50)


def test_losses_of_a_phase_have_defaults_too(monkeypatch):
  config = parse(
    monkeypatch,
    "--config.phases.views.losses.views.momentum=0.5",
    "--config.phases.views.from_percent=70",
    "--config.losses.caption.weight=0.25",
    config="siglip2_emoji",
  )
  late = config.phases.views.losses.views
  assert late.momentum == 0.5 and late.temperature == 0.1
  assert config.losses.caption.weight == 0.25
  assert config.losses.caption.parallel == 0.5
  assert config.phases.naflex.losses.views is None  # ends
  errors.check(
    train.main, config.to_dict(), "config", "workdir", eval_only=False
  )


def test_another_choice_has_other_defaults(monkeypatch):
  config = parse(
    monkeypatch,
    "--config.loss.name=softmax",
    "--config.optim.name=lion",
    "--config.optim.schedule.name",
    "rsqrt",
    "--config.optim.schedule.timescale=7",
  )
  losses.make(sharding.make_mesh(), sharding.AXES, **config.loss)
  errors.check(optim.lion, config.optim.options, "config.optim.options")
  assert config.optim.options.to_dict() == dict(b1=0.9, b2=0.99, mu_dtype=None)
  assert "comm" not in config.loss and config.loss.tile == 1024
  schedule = config.optim.schedule
  assert (schedule.timescale, schedule.cooldown_steps) == (7, 0)


def test_a_number_or_a_name(monkeypatch):
  """Where both are possible, each may override the other."""
  config = parse(
    monkeypatch,
    "--config.model.bias_init=auto",
    "--config.model.bias=-2.5",
    "--config.loss.positives=mask",
  )
  assert config.model.bias_init == "auto" and config.model.bias == -2.5
  assert config.loss.positives == "mask" and config.loss.negatives is None
  assert "key" not in config.loss and "groups" not in config.loss
  config = parse(monkeypatch, "--config.model.bias_init=-7")
  assert config.model.bias_init == -7 and config.model.bias == "learned"


def test_a_value_within_negatives(monkeypatch, tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
    "from ml_collections import ConfigDict\n"
    "get_config = lambda: ConfigDict(\n"
    "  dict(loss=dict(negatives=dict(share=0.5, which='hardest'))))\n"
  )
  more = "--config.loss.negatives.share=0.25"
  config = parse(monkeypatch, more, config=path.with_suffix(""))
  assert config.loss.negatives.to_dict() == dict(share=0.25, which="hardest")


def test_a_mistyped_key_is_one_line(monkeypatch, capsys):
  def check(_):
    parse(monkeypatch, "--config.optim.lrr=1")

  with pytest.raises(SystemExit) as e:
    program.parse_flags(["train"], check)
  line = str(e.value)
  assert line.startswith("error: the config has no key")
  assert "lrr" in line and '"lr"' in line and "\n" not in line


def test_what_is_none_may_become_a_section():
  config = ConfigDict(dict(loss=None))
  defaults.fill(config, train.main)
  assert config.loss.name == "sigmoid" and config.loss.tile == 1024
  assert config.init.path is None and config.total_steps is None
