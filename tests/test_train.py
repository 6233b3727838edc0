"""The program: learns, stops, goes on, and names mistakes in one line."""

import re
import resource
import signal
import threading
import time

import jax
import numpy as np
import pytest
from train_program import lines, params, start

from sigjax import errors, train, trees
from sigjax.data import kinds
from sigjax.runtime import identity, lock
from sigjax.weights import npz as npz_lib


def run(workdir, config, **kwargs):
  return errors.call(train.main, {**config, **kwargs}, "config", workdir)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_learns_what_shuffled_captions_do_not_teach(tmp_path, tiny_config):
  config = dict(tiny_config, total_steps=250, batch_size=24, log_every_steps=50)
  config["evals"]["picture"] = dict(
    config["evals"]["retrieval"], type="picture", captions="captions"
  )
  rows = {
    (name, row.metric): row[1:4] for name, row in run(tmp_path / "a", config)
  }
  value, by_chance, n = rows["zeroshot", "24-way top-1"]
  assert (by_chance, n) == (pytest.approx(1 / 24), 48)
  assert value > 0.5
  assert rows["retrieval", "image->text recall@1"][0] > 0.4
  for name in ("parameters.txt", "picture.png", "tokenizer.model"):
    assert (tmp_path / "a" / name).exists()
  (events,) = (tmp_path / "a").glob("events.*")
  assert (tmp_path / "a/picture.png").read_bytes() in events.read_bytes()
  logged = lines(tmp_path / "a")
  first, last = logged[0], [x for x in logged if "loss" in x][-1]
  assert first["step"] == 50 and last["step"] == 250
  assert last["loss"] < first["loss"] and last["t"] > 10
  assert last["pos_logit"] > last["neg_logit"]
  assert {
    "b",
    "grad_norm",
    "update_norm",
    "param_norm",
    "lr",
    "examples_per_second",
    "examples_per_second_per_device",
    "data_wait_percent",
    "bad_examples",
  } <= set(last)
  # Evaluated in the middle, too, and only what asks for it.
  middle = [x for x in logged if x["step"] == 125]
  assert "retrieval/image->text recall@1" in middle[0]
  assert "zeroshot/24-way top-1" not in middle[0]

  config["data"] = dict(config["data"], shuffle="captions")
  rows = {
    (name, row.metric): row[1:4] for name, row in run(tmp_path / "b", config)
  }
  assert rows["zeroshot", "24-way top-1"][0] < 0.2


def test_the_step_is_compiled_once_while_the_state_is_made(
  tmp_path, tiny_config
):
  compiled = []

  def listen(event, seconds, fun_name="", **_):
    del seconds
    if "backend_compile" in event:
      compiled.append((fun_name, threading.current_thread()))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run(tmp_path, dict(tiny_config, total_steps=2))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  by = dict(compiled)
  steps = [name for name, _ in compiled if "whole_batch" in name]
  assert len(steps) == 1
  assert by[steps[0]] is not threading.main_thread()
  made = next(name for name in by if "first_state" in name)
  assert by[made] is threading.main_thread()
  # Nothing is cut for the checkpoint.
  assert not [name for name in by if "slice" in name]


def test_images_of_any_aspect_ratio(tmp_path, tiny_config):
  """Patches with padding, in microbatches: it learns what it is shown."""
  config = dict(tiny_config, batch_size=16, microbatches=2)
  patches = "resize_to_patches(9,8)"
  config["pp"] = config["pp"].replace(
    "value_range(-1,1)", f"random_crop(16,14)|{patches}"
  )
  config["pp_image"] = f"decode|{patches}|keep('image')"
  config["model"]["image"]["kind"] = "naflex"
  config.update(total_steps=60, log_every_steps=50, eval_first=True)
  del config["evals"]["retrieval"]
  run(tmp_path, config)
  logged = lines(tmp_path)
  accuracy = [x[k] for x in logged for k in x if k.endswith("top-5")]
  before, after = accuracy  # by chance 21 %
  assert before < 0.4 and after > 0.6, accuracy


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, tiny_config):
  """SIGTERM, then the same command again: bit for bit the same parameters.

  Those of a decoder, too. On one device: tools/test_chaos.py.
  """
  config = dict(
    tiny_config,
    total_steps=30,
    evals={},
    checkpoints=dict(every_steps=10),
    sharding=((".*", "fsdp"),),
    mesh=dict(data=-1, fsdp=2),
    microbatches=3,
    losses=dict(caption=dict(type="caption")),
  )
  whole = start(tmp_path / "whole", config, 8)
  parts = start(tmp_path / "parts", config, 8)
  progress = tmp_path / "parts" / "metrics.jsonl"
  while not progress.exists() or progress.read_text().count("\n") < 4:
    assert parts.poll() is None, parts.communicate()
    time.sleep(0.02)
  parts.send_signal(signal.SIGTERM)
  _, err = parts.communicate(timeout=60)
  assert parts.returncode == 1
  last = err.strip().splitlines()[-1]
  assert last.startswith("SIGTERM: saved step "), err
  step = int(last.split()[3])
  assert 4 <= step < 30

  parts = start(tmp_path / "parts", config, 8)
  out, err = parts.communicate(timeout=120)
  assert parts.returncode == 0, err
  assert f"resuming from {tmp_path}/parts/checkpoints/{step}" in out
  _, err = whole.communicate(timeout=120)
  assert whole.returncode == 0, err
  assert_same(
    params(tmp_path / "parts/checkpoints/30"),
    params(tmp_path / "whole/checkpoints/30"),
  )
  # And the metrics of each step are there once, the same in both.
  same = [
    [
      {k: x.get(k) for k in ("step", "loss", "grad_norm", "caption")}
      for x in lines(tmp_path / name)
    ]
    for name in ("parts", "whole")
  ]
  assert same[0] == same[1]
  first, last = same[0][0]["caption"], same[0][-1]["caption"]
  assert last < first == pytest.approx(np.log(32), rel=1e-6)  # as by chance


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
  """A folder of workdirs for the tests that change nothing in it."""
  return tmp_path_factory.mktemp("parent")


def test_where_to_start(tmp_path, tiny_config, caplog):
  """The workdir's own checkpoint, then resume, then init, then scratch."""
  caplog.set_level("INFO", logger="sigjax")
  config = dict(tiny_config, total_steps=4)
  del config["evals"]["retrieval"]
  a, b, c = (tmp_path / x for x in "abc")
  first = run(a, config)
  assert "starting from scratch" in caplog.text
  start = lines(a)[0]["loss"]

  # Evaluation from the saved checkpoint alone gives the same rows.
  assert run(a, config, eval_only=True) == first
  # A finished run is not trained on, so its config stays what it was.
  caplog.clear()
  written = (a / "config.json").read_bytes()
  assert run(a, config, log_every_steps=7) == first
  assert (a / "config.json").read_bytes() == written
  assert f"all of this run is in {a}" in caplog.text
  assert f"resuming from {a}/checkpoints/4" in caplog.text

  # resume takes the step and the place in the data along, ...
  run(b, dict(config, total_steps=6), resume=str(a))
  assert f"starting from resume={a}" in caplog.text
  assert [x["step"] for x in lines(b) if "loss" in x] == [5, 6]
  short = {
    key: config[key].replace("tokenize(8)", "tokenize(3)")
    for key in ("pp", "pp_text")
  }
  run(c, dict(config, **short), profile_steps=(2, 3))
  cut = re.findall(r"([\d.]+) % of the captions are longer", caplog.text)
  assert 0 < float(cut[0]) < float(cut[-1])
  # The trace names these steps and no others, and has what they computed.
  (file,) = (c / "profile").rglob("*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
  ]
  steps = [dict(x.stats)["step_num"] for x in events if x.name == "train"]
  assert sorted(steps) == [2, 3]
  assert any("whole_batch" in x.name for x in events)

  # init takes the parameters alone, and counts from 0.
  npz = tmp_path / "a.npz"
  npz_lib.save_params(npz, trees.unflatten(params(a)))
  for i, path in enumerate((npz, a)):
    caplog.clear()
    config["losses"] = dict(caption=dict(type="caption")) if i == 0 else {}
    run(
      tmp_path / f"d{i}", dict(config, total_steps=1), init=dict(path=str(path))
    )
    assert "starting from init" in caplog.text
    assert ("from scratch: dec" in caplog.text) == (i == 0)
    (step,) = [x for x in lines(tmp_path / f"d{i}") if "loss" in x]
    assert step["step"] == 1 and step["loss"] < start
  with pytest.raises(errors.UserError, match="has no checkpoints; train"):
    run(tmp_path / "e", config, eval_only=True)
  assert not (tmp_path / "e").exists()


def test_init_of_one_tower(tmp_path, tiny_config):
  """A file of the image tower alone, beside which the rest is from scratch."""
  config = dict(tiny_config, total_steps=1, evals={})
  run(tmp_path / "a", config)
  image = trees.unflatten(params(tmp_path / "a"))["img"]
  image["head"] = {"kernel": np.zeros((32, 1000))}
  npz = tmp_path / "image.npz"
  npz_lib.save_params(npz, image)
  run(
    tmp_path / "b",
    config,
    seed=1,
    lock=("img",),
    init=dict(path=str(npz), into="img", dont_load=("head/.*",)),
  )
  a, b = params(tmp_path / "a"), params(tmp_path / "b")
  assert_same(
    {k: v for k, v in a.items() if k.startswith("img/")},
    {k: v for k, v in b.items() if k.startswith("img/")},
  )
  assert np.abs(a["txt/head/kernel"] - b["txt/head/kernel"]).max() > 0.01


def test_bad_examples_are_counted_up_to_a_fraction(tmp_path, tiny_config):
  source = kinds.open_source(**dict(tiny_config["data"], group_by=None))
  folder = tmp_path / "pictures"
  folder.mkdir()
  rows = ["file,caption"]
  for i in range(72):
    data = source[i]["image"]
    (folder / f"{i}.png").write_bytes(data[:90] if i == 7 else data)
    rows.append(f"{i}.png,{source[i]['concept'].decode()}")
  (folder / "captions.csv").write_text("\n".join(rows))
  config = dict(
    tiny_config,
    data=dict(kind="folder", path=str(folder)),
    total_steps=3,
    evals={},
  )  # 3 steps of 24: one epoch
  run(tmp_path / "a", config)
  assert lines(tmp_path / "a")[-1]["bad_examples"] >= 1
  with pytest.raises(errors.UserError, match="1 x truncated image .*7.png"):
    run(tmp_path / "b", config, bad_fraction=0.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tiny_config):
  config = dict(
    tiny_config, total_steps=6, evals={}, checkpoints=dict(every_steps=2)
  )
  run(tmp_path, dict(config, total_steps=2))
  config["optim"] = dict(
    config["optim"],
    lr=1e20,
    grad_clip_norm=None,
    schedule=dict(name="constant"),
  )
  with pytest.raises(errors.UserError) as e:
    run(tmp_path, config)
  assert "stopped at step 4" in str(e.value)
  assert f"last good checkpoint is {tmp_path}/checkpoints/2" in str(e.value)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2"}


def test_a_damaged_checkpoint_is_set_aside(tmp_path, tiny_config, caplog):
  """The run goes on from the one before, and ends where it would have."""
  caplog.set_level("INFO", logger="sigjax")
  config = dict(
    tiny_config, total_steps=6, evals={}, checkpoints=dict(every_steps=2)
  )
  want = run(tmp_path, config), params(tmp_path)
  (path,) = (tmp_path / "checkpoints/6/params/d").iterdir()
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  caplog.clear()
  assert run(tmp_path, config, eval_only=True) == want[0]
  assert path.exists()  # evaluation alone has no right to it
  assert run(tmp_path, config) == want[0]
  assert (
    caplog.text.count(
      f"checkpoints/6 is damaged (params/d/{path.name} was"
      " altered); looking for the one before it"
    )
    == 2
  )
  assert f"resuming from {tmp_path}/checkpoints/4" in caplog.text
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
    "4",
    "6",
    "6.damaged",
  }
  assert_same(params(tmp_path), want[1])
  assert [x["step"] for x in lines(tmp_path)] == list(range(1, 7))


def test_a_full_disk_is_said_and_ends_in_an_error(tmp_path, tiny_config):
  """As a limit of files' sizes: room is gone after the third step."""
  config = dict(
    tiny_config, total_steps=60, evals={}, checkpoints=dict(every_steps=20)
  )
  program = start(tmp_path / "a", config, 1)
  progress = tmp_path / "a/metrics.jsonl"
  while not progress.exists() or progress.read_text().count("\n") < 3:
    assert program.poll() is None, program.communicate()
    time.sleep(0.02)
  resource.prlimit(
    program.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)
  )
  out, err = program.communicate(timeout=120)
  assert program.returncode == 1
  assert "step 20 could not be saved: File too large" in out
  assert err.strip().splitlines()[-1] == (
    "error: step 60 could not be saved (File too large); there is no "
    "checkpoint to resume from"
  )
  assert "Traceback" not in err
  assert not list((tmp_path / "a/checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(batch_sizes=8),
      'config has no key "batch_sizes" (did you mean "batch_size"?)',
    ),
    (dict(batch_size=12), "config.batch_size is 12, which 8 devices do not"),
    (dict(batch_size=25 * 8), "too few for a batch of 200"),
    (dict(optim=dict(lrr=1)), 'config.optim has no key "lrr"'),
    (dict(loss=dict(name="sigmod")), 'config.loss.name "sigmod" is not'),
    (
      dict(loss=dict(name="sigmoid", tiles=3)),
      'config.loss has no key "tiles"',
    ),
    (dict(mesh=dict(fdsp=2)), 'config.mesh has no key "fdsp"'),
    (
      dict(data=dict(kind="tfds", name="coco", split="train")),
      'dataset "coco" is not prepared in',
    ),
    (dict(data=dict(kind="tdfs")), 'source "tdfs" is not known'),
    (
      dict(pp="decode|tokenise(8)"),
      'op "tokenise" is not known (did you mean "tokenize"?)',
    ),
    (dict(tokenizer=dict(path="none.model")), "no SentencePiece model none.mo"),
    (dict(evals=dict(x=dict(type="zeroshots"))), "config.evals.x.type"),
    (dict(data=dict(split="train")), "a source needs a kind"),
    (
      dict(tokenizer=dict(vocab_size=33)),
      "text.vocab_size is 32, but the token",
    ),
    (dict(total_steps=None), "config needs one of total_steps"),
    (dict(init=dict(path="none.npz")), "there is no file none.npz"),
    (dict(resume="nowhere"), "nowhere has no checkpoints"),
    (dict(checkpoints=dict(keeps=2)), 'config.checkpoints has no key "keeps"'),
    (dict(microbatches=2), "8 devices times 2 microbatches do not divide; try"),
  ],
)
def test_mistakes_are_one_line_and_change_nothing(
  parent, tiny_config, change, message
):
  """In a new workdir, and in one of a finished run."""
  finished = parent / "finished"
  if not finished.exists():
    finish(finished, tiny_config)
  before = tree(parent)
  # A finished run does not read the weights to start from.
  ignored = {"init", "resume"} & set(change)
  for workdir in (parent / "new/run", *([] if ignored else [finished])):
    with lock.hold(workdir), pytest.raises(errors.UserError) as e:
      run(workdir, {**tiny_config, **change})
    assert message in str(e.value) or workdir == finished
    assert "\n" not in str(e.value)
    assert tree(parent) == before


def test_other_data_of_the_same_size_is_not_resumed(parent, tiny_config):
  if not (parent / "finished").exists():
    finish(parent / "finished", tiny_config)
  before = tree(parent)
  data = dict(tiny_config["data"], shuffle="captions")
  with pytest.raises(errors.UserError, match="another identity: data.data"):
    run(parent / "finished", dict(tiny_config, data=data, evals={}))
  assert tree(parent) == before


def test_hosts_compare_what_they_train_on(tmp_path, tiny_config, monkeypatch):
  compared = {}
  monkeypatch.setattr(identity, "check_hosts", compared.__setitem__)
  monkeypatch.setattr(train, "_resumed", lambda *_: 1 / 0)  # far enough
  with pytest.raises(ZeroDivisionError):
    run(tmp_path / "a", dict(tiny_config, evals={}))
  assert compared["config"]["pp"] == tiny_config["pp"]
  source = kinds.open_source(**tiny_config["data"])
  assert compared["the run"]["data"] == source.identity()
  assert len(compared["the run"]["tokenizer"]) == 64


def test_nothing_is_done_twice_at_the_end():
  """What is due every 100 steps of 250 is due at 100, and then at the end."""
  due = [step for step in range(1, 251) if train._due(step, 100, 250)]
  assert due == [100, 200]
  assert [s for s in range(1, 1251) if train._due(s, 104, 1250)][-1] == 1144


def finish(workdir, tiny_config):
  run(workdir, dict(tiny_config, total_steps=2, evals={}))


def tree(folder):
  """Returns {path: bytes, None of a folder} of all that is in a folder."""
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
  }


def test_the_command_line(tmp_path, tiny_config):
  """Each mistake ends in one line on stderr, without a traceback."""
  cases = {
    "a": (["--config.optim.lrr=3"], "lrr"),
    "b": (["--cofig=x"], "cofig"),
    "c": (["more"], '"more" is not a flag'),
    "d": (["--config.batch_size=many"], "batch_size"),
    "e": (["--config.batch_size=0"], "config.batch_size is 0"),
    "f": (["--config=configs/none.py"], "configs/none.py"),
    "g": (["--profile_steps=5,2"], "first and the last step"),
  }
  running = {
    name: start(tmp_path / name, tiny_config, 1, more)
    for name, (more, _) in cases.items()
  }
  for name, process in running.items():
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and cases[name][1] in line
    assert not (tmp_path / name).exists()
