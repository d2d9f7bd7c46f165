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

from metaaug_fast.cli.main import main
from metaaug_fast.files import claimed, previous_of
from metaaug_fast.runs import checkpoint, recipes
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


def changed(path, **settings):
    state = checkpoint.load(path)
    state["config"] |= settings
    checkpoint.save(path, state)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


COMMANDS = [["evaluate"], ["train", "maml", "--resume"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_code_that_only_a_file_names_is_run(copied, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "payload.py").write_text(
        "from pathlib import Path; from metaaug_fast.models import mlp\n"
        "Path('executed').touch()\ndef net():\n  return mlp([1, 40, 40, 1])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    changed(copied, model="payload:net")
    shown = failed(capsys, *command, copied)
    assert f"{copied} cannot be used: its model is code outside this package, which only you can name: give " in shown
    assert "--model payload:net" in shown
    shown = failed(capsys, *command, copied, "--model", "other:net")
    assert "--model must be that of the checkpoint, payload:net (got other:net)" in shown
    assert not Path("executed").exists()
    more = ["--episodes", "4"] + (["--steps", "5", "--quiet"] if command != ["evaluate"] else [])
    assert main([*command, str(copied), "--model", "payload:net", *more]) == 0
    assert Path("executed").exists()


@pytest.mark.slow
def test_a_file_cannot_end_the_process(copied):
    changed(copied, model="os:abort")
    done = subprocess.run([sys.executable, "-m", "metaaug_fast", "evaluate", copied], capture_output=True, check=False)
    assert done.returncode == 2, done.returncode


def test_the_hint_to_go_on_names_the_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "named.py").write_text("from metaaug_fast.models import mlp\nnet = mlp([1, 8, 1])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metaaug_fast.cli.main.train", lambda *_, **__: History(stopped_by="SIGTERM"))
    assert main(["train", "maml", *SINUSOID, "--model", "named:net", "--out", "c"]) == 143
    assert "to go on: metaaug-fast train maml --resume c --model named:net\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": "x"}, "cannot be used: inner_steps must be int (got 'x')"),
        ({"model": 3}, "cannot be used: model must be str (got 3)"),
        ({"shots": 2.5}, "cannot be used: shots must be int (got 2.5)"),
        ({"first_order": 1}, "cannot be used: first_order must be bool (got 1)"),
        ({"seed": True}, "cannot be used: seed must be int (got True)"),
        ({"learner": "anil"}, "cannot be used: learner must be one of"),
        ({"unknown": 1}, "was not written by metaaug-fast train"),
        ({"model": "conv4"}, "does not fit"),
    ],
)
def test_settings_that_are_none_are_one_line(copied, capsys, settings, message):
    changed(copied, **settings)
    assert message in failed(capsys, "evaluate", copied)
    if message != "does not fit":
        assert message in failed(capsys, "train", "maml", "--resume", copied)


@pytest.mark.parametrize(
    "state",
    [{"learner": None}, {"learner": {}}, {"learner": 3}, {"config": None}, {"step": -1}, {"step": "x"}],
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
    assert checkpoint.load(out)["config"]["steps"] == checkpoint.load(out)["step"] == 4
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["settings"]["steps"] == report["history"]["training"][-1]["step"] == 4


@pytest.mark.parametrize("unusable", ["d/run.safetensors", "d/run.json", "pipe"])
def test_an_unusable_out_is_found_before_any_work(tmp_path, monkeypatch, capsys, unusable):
    def work(*_, **__):
        pytest.fail("work was done")

    monkeypatch.setattr(recipes, "make_episodes", work)
    monkeypatch.setattr(recipes, "make_learner", work)
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
    monkeypatch.setattr(recipes, "make_learner", lambda *_: pytest.fail("work was done"))
    assert f"{tmp_path} cannot be written (it is a folder)" in failed(capsys, "evaluate", copied, option, tmp_path)
    shown = failed(capsys, "evaluate", copied, option, copied)
    assert f"--report and --plot must be other files than the checkpoint (got {copied})" in shown


def test_a_second_run_meets_the_lock_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "make_learner", lambda *_: pytest.fail("work was done"))
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

    monkeypatch.setattr("metaaug_fast.cli.main._report", meanwhile)
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
        assert json.loads((tmp_path / f"{name}.json").read_text())["settings"]["steps"] == 4
