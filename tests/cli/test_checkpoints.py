"""What the console program takes from checkpoints, and where it writes them."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from metaaug_fast import CheckpointError, load
from metaaug_fast.cli.main import main
from metaaug_fast.files import claimed, previous_of
from metaaug_fast.learners import LEARNERS
from metaaug_fast.runs import checkpoint, configure, experiment, recipe, run
from metaaug_fast.runs.history import History

QUICK = ["--tasks", "2", "--episodes", "4", "--validation-episodes", "2", "--quiet"]
SINUSOID = ["--data", "sinusoid", "--steps", "4", *QUICK]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of 4 meta-steps with the one before it, of 2."""
    path = tmp_path_factory.mktemp("trained") / "s.safetensors"
    assert main(["train", "maml", *SINUSOID, "--checkpoint-every", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture
def copied(trained, tmp_path):
    for each in (trained, previous_of(trained)):
        shutil.copy(each, tmp_path)
    return tmp_path / trained.name


def failed(capsys, *arguments):
    """The one line that the program fails with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown


def changed(path, **sections):
    """Put other fields into a checkpoint's configuration, or something else in place of a section."""
    state = checkpoint.load(path)
    for section, fields in sections.items():
        before = state["config"].get(section, {})
        state["config"][section] = before | fields if isinstance(fields, dict) else fields
    checkpoint.save(path, state)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


COMMANDS = [["evaluate"], ["train", "--resume"]]
PAYLOAD = """
from os import abort, path
from functools import partial
from pathlib import Path
from metaaug_fast import MAML
from metaaug_fast.data import Sinusoids
from metaaug_fast.models import perceptron as net
Path("executed").touch()
bound = partial(partial(abort))
def loss(prediction, y): return (prediction - y).square().mean()
number = 3
class Learner(MAML): pass
class Data(Sinusoids): pass
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("part", ["learner", "model", "data"])
def test_no_code_that_only_a_file_names_is_run(copied, own_code, capsys, command, part):
    name = {"learner": "payload:Learner", "model": "payload:net", "data": "payload:Data"}[part]
    own_code("payload", PAYLOAD)
    changed(copied, **{part: {"name": name}})
    wanted = (
        f"{copied} cannot be used: {part} {name} is code outside this package, which only you can name: allow its "
        "module (--allow payload, in Python allow=['payload'])"
    )
    for options in ([], ["--allow", "other"]):
        assert wanted in failed(capsys, *command, copied, *options)
    calls = [lambda: load(copied), lambda: run(config, copied, resume=copied, allow=())]
    config = configure(recipe("maml-sinusoid"), ["--steps", "5"])
    for call in calls:
        with pytest.raises(CheckpointError) as raised:
            call()
        assert wanted in str(raised.value)
    assert not Path("executed").exists()
    more = ["--episodes", "4", *(["--steps", "5", "--quiet"] if command != ["evaluate"] else [])]
    assert main([*command, str(copied), "--allow", "payload", *more]) == 0
    assert Path("executed").exists()


@pytest.mark.parametrize("part", ["learner", "model", "data"])
def test_who_names_the_code_again_may_go_on(copied, own_code, capsys, part):
    own_code("payload", PAYLOAD)
    name = {"learner": "payload:Learner", "model": "payload:net", "data": "payload:Data"}[part]
    changed(copied, **{part: {"name": name}})
    shown = failed(
        capsys, "train", *(["other:one"] if part == "learner" else [f"--{part}", "other:one"]), "--resume", copied
    )
    assert "is code outside this package" in shown
    option = "learner" if part == "learner" else f"--{part}"
    other = name.replace("payload:", "payload:no")
    shown = failed(capsys, "train", *([other] if part == "learner" else [option, other]), "--resume", copied)
    assert f"{option} must be that of the checkpoint, {name} (got {other})" in shown
    again = [name] if part == "learner" else [option, name]
    assert main(["train", *again, "--resume", str(copied), "--steps", "5", "--episodes", "4", "--quiet"]) == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_function_that_only_a_file_names_is_called(copied, own_code, capsys, command):
    own_code("payload", PAYLOAD)
    changed(copied, learner={"loss": "payload:loss"})
    wanted = f"{copied} cannot be used: learner.loss payload:loss is code outside this package, which only you can name"
    assert wanted in failed(capsys, *command, copied)
    assert wanted in failed(capsys, *command, copied, "--allow", "other")
    config = configure(recipe("maml-sinusoid"), ["--steps", "5"])
    for call in (lambda: load(copied), lambda: run(config, copied, resume=copied, allow=())):
        with pytest.raises(CheckpointError) as raised:
            call()
        assert wanted in str(raised.value)
    assert not Path("executed").exists()
    more = ["--episodes", "4", *(["--steps", "5", "--quiet"] if command != ["evaluate"] else [])]
    for allowed in ("payload", "payload:loss"):
        assert main([*command, str(copied), "--allow", allowed, *more]) == 0
    assert load(copied, allow=["payload"]).loss is sys.modules["payload"].loss
    for attribute, error in (("abort", "is code outside"), ("number", "must name what can be called (got")):
        changed(copied, learner={"loss": f"payload:{attribute}"})
        assert error in failed(capsys, *command, copied, "--allow", "payload")


@pytest.mark.parametrize("attribute", ["abort", "bound", "path.os.abort", "Path.cwd"])
def test_an_allowed_module_lends_no_name_to_the_code_of_others(copied, own_code, capsys, attribute):
    own_code("payload", PAYLOAD)
    state = checkpoint.load(copied)
    state["config"]["model"] = {"name": f"payload:{attribute}"}
    checkpoint.save(copied, state)
    shown = failed(capsys, "evaluate", copied, "--allow", "payload")
    assert f"model payload:{attribute} is code outside this package, which only you can name: allow its module" in shown


@pytest.mark.slow
def test_a_file_cannot_end_the_process(copied):
    changed(copied, model={"name": "os:abort"})
    done = subprocess.run([sys.executable, "-m", "metaaug_fast", "evaluate", copied], capture_output=True, check=False)
    assert done.returncode == 2, done.returncode


def test_the_hint_to_go_on_names_what_is_the_users_own(own_code, monkeypatch, capsys):
    own_code("named", "from metaaug_fast.models import mlp\nfrom metaaug_fast import MAML\nnet = mlp([1, 8, 1])\n")
    kind = "from metaaug_fast import MAML\nclass Mine(MAML): pass\ndef loss(x, y): return (x - y).square().mean()\n"
    own_code("kind", kind)
    monkeypatch.setattr("metaaug_fast.runs.experiment.train", lambda *_, **__: History(stopped_by="SIGTERM"))
    arguments = ["train", "kind:Mine", *SINUSOID, "--model", "named:net", "--loss", "kind:loss", "--out", "my c"]
    assert main(arguments) == 143
    hint = "to go on: metaaug-fast train kind:Mine --model named:net --allow kind:loss --resume 'my c'\n"
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"inner_steps": "x"}}, "cannot be used: learner.inner_steps must be an integer (got 'x')"),
        ({"model": {"name": 3}}, "cannot be used: model.name must be a name (got 3)"),
        ({"model": 3}, "cannot be used: model must be a mapping from fields to values (got 3)"),
        ({"sampling": {"shots": 2.5}}, "cannot be used: sampling.shots must be an integer (got 2.5)"),
        ({"sampling": {"shots": 0}}, "cannot be used: shots must be >= 1 (got 0)"),
        ({"learner": {"first_order": 1}}, "cannot be used: learner.first_order must be true or false (got 1)"),
        ({"training": {"seed": True}}, "cannot be used: training.seed must be an integer (got True)"),
        ({"training": {"steps": None}}, "cannot be used: training.steps must be an integer (got none)"),
        ({"learner": {"name": "lost"}}, f"cannot be used: learner must be one of {', '.join(LEARNERS)}, or"),
        ({"learner": {"unknown": 1}}, "cannot be used: learner has no field 'unknown'"),
        ({"unknown": {}}, "cannot be used: a section must be one of learner, model,"),
        ({"learner": "maml"}, "is of an older metaaug_fast"),
        ({"model": {"hidden": [3]}}, "does not fit"),
    ],
    ids=str,
)
def test_settings_that_are_none_are_one_line(copied, capsys, sections, message):
    changed(copied, **sections)
    shown = failed(capsys, "evaluate", copied)
    assert str(copied) in shown
    if sections != {"learner": "maml"}:
        assert message in shown
    if message != "does not fit":
        assert message in failed(capsys, "train", "maml", "--resume", copied)


@pytest.mark.parametrize(
    "config", [3, "x", [1], {"learner": 3}, {"learner": "x"}, {"learner": {}}, {"a": {}}, {}, None]
)
def test_a_configuration_that_is_none_is_one_line(copied, capsys, config):
    checkpoint.save(copied, checkpoint.load(copied) | {"config": config})
    for command in COMMANDS:
        assert str(copied) in failed(capsys, *command, copied)
    with pytest.raises(CheckpointError, match=str(copied)):
        load(copied)


@pytest.mark.parametrize("part", ["learner", "model", "data"])
def test_a_name_that_is_not_registered(copied, capsys, part):
    state = checkpoint.load(copied)
    state["config"][part] = {"name": "mine"}
    checkpoint.save(copied, state)
    for command in COMMANDS:
        assert f"{copied} cannot be used: {part} must be one of " in failed(capsys, *command, copied)
    with pytest.raises(CheckpointError, match=rf"{part} must be one of .*\(got 'mine'"):
        load(copied)


def test_a_checkpoint_without_the_name_of_its_model(copied, capsys):
    state = checkpoint.load(copied)
    del state["config"]["model"]
    checkpoint.save(copied, state)
    assert "cannot be used: model.name must be given (got none)" in failed(capsys, "evaluate", copied)


@pytest.mark.parametrize(
    "state",
    [{"learner": None}, {"learner": {}}, {"learner": 3}, {"step": -1}, {"step": "x"}, {"step": None}],
    ids=str,
)
def test_states_that_are_none_are_one_line(copied, capsys, state):
    checkpoint.save(copied, checkpoint.load(copied) | state)
    assert str(copied) in failed(capsys, "train", "maml", "--resume", copied, "--steps", "6", *QUICK)
    if "step" not in state:
        assert str(copied) in failed(capsys, "evaluate", copied)


def test_a_damaged_checkpoint_goes_on_from_the_one_before(trained, copied, capsys):
    damage(copied)
    shown = failed(capsys, "evaluate", copied)
    assert shown.endswith(f"; the checkpoint before it is {previous_of(copied)}\n")
    assert main(["train", "maml", "--resume", str(copied), *QUICK]) == 0
    shown = capsys.readouterr().err
    assert shown.count("going on from the checkpoint before it") == 1
    ours, theirs = checkpoint.load(copied), checkpoint.load(trained)
    assert ours["step"] == theirs["step"] == 4
    assert all(torch.equal(value, theirs["learner"][name]) for name, value in ours["learner"].items())


def test_fewer_steps_than_done_is_said_and_reported_truly(copied, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    assert main(["train", "maml", "--resume", str(copied), "--out", str(out), "--steps", "3", *QUICK]) == 0
    shown = capsys.readouterr()
    assert "has 4 meta-steps already, so none is added (steps is 3)" in shown.err
    assert "4 steps" in shown.out
    assert checkpoint.load(out)["config"]["training"]["steps"] == checkpoint.load(out)["step"] == 4
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["config"]["training"]["steps"] == report["history"]["training"][-1]["step"] == 4


@pytest.mark.parametrize("unusable", ["d/run.safetensors", "d/run.json", "pipe"])
def test_an_unusable_out_is_found_before_any_work(tmp_path, monkeypatch, capsys, unusable):
    def work(*_, **__):
        pytest.fail("work was done")

    monkeypatch.setattr(experiment, "make_sources", work)
    monkeypatch.setattr(experiment, "make_learner", work)
    monkeypatch.chdir(tmp_path)
    if unusable == "pipe":
        os.mkfifo(unusable)
    else:
        Path(unusable).mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    out = unusable.replace(".json", ".safetensors")
    assert f"{unusable} cannot be written (it is " in failed(capsys, "train", "maml", *SINUSOID, "--out", out)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_where_evaluate_writes_is_tried_first(copied, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("metaaug_fast.cli.evaluate.load", lambda *_, **__: pytest.fail("work was done"))
    assert f"{tmp_path} cannot be written (it is a folder)" in failed(capsys, "evaluate", copied, option, tmp_path)
    shown = failed(capsys, "evaluate", copied, option, copied)
    assert f"--report and --plot must be other files than the checkpoint (got {copied})" in shown


def test_a_second_run_meets_the_lock_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "make_sources", lambda *_, **__: pytest.fail("work was done"))
    out, ready, done = tmp_path / "c", threading.Event(), threading.Event()

    def first():
        with claimed(out):
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    ready.wait(60)
    try:
        shown = failed(capsys, "train", "maml", *SINUSOID, "--out", out)
    finally:
        done.set()
        thread.join()
    assert f"{out} is being written by another run; wait for it, or write to another file" in shown


def test_a_run_holds_its_out_until_its_report_is_written(tmp_path, monkeypatch):
    caught = []

    def other():
        with pytest.raises(OSError, match="another run"), claimed(tmp_path / "c"):
            pass
        caught.append(True)

    def meanwhile(*_):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    monkeypatch.setattr(experiment, "write_report", meanwhile)
    assert main(["train", "maml", *SINUSOID, "--out", str(tmp_path / "c")]) == 0
    assert caught == [True]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "run.safetensors"
    link.symlink_to(tmp_path / "store" / "real.safetensors")
    assert main(["train", "maml", *SINUSOID, "--out", str(link)]) == 0
    assert link.is_symlink()
    assert checkpoint.load(tmp_path / "store" / "real.safetensors")["step"] == 4


def test_a_report_never_takes_the_place_of_another_file(tmp_path):
    for name in ("x.json", "lr0.1", "lr0.2"):
        assert main(["train", "maml", *SINUSOID, "--out", str(tmp_path / name)]) == 0
        assert checkpoint.load(tmp_path / name)["step"] == 4
        assert json.loads((tmp_path / f"{name}.json").read_text())["config"]["training"]["steps"] == 4
