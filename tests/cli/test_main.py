"""The console program, as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metaaug_fast.bench.workloads import WORKLOADS
from metaaug_fast.cli.main import main
from metaaug_fast.runs import checkpoint

PROGRAM = Path(sys.executable).with_name("metaaug-fast")
SINUSOID = ["--data", "sinusoid", "--steps", "12", "--tasks", "4", "--episodes", "20", "--validation-episodes", "4"]


def run(*arguments, cwd=None, program=(str(PROGRAM),)):
    return subprocess.run(
        [*program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def same_learner(one, other):
    ours, theirs = (checkpoint.load(path)["learner"] for path in (one, other))
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_train_resume_and_evaluate(tmp_path):
    whole = run("train", "maml", *SINUSOID, "--threads", 1, "--out", tmp_path / "whole.safetensors")
    assert whole.returncode == 0, whole.stderr
    assert "mse" in whole.stdout
    assert "12/12" in whole.stderr

    part, again = tmp_path / "part.safetensors", tmp_path / "again.safetensors"
    arguments = [*SINUSOID, "--out", part]
    arguments[arguments.index("12")] = "5"
    assert main(["train", "maml", *map(str, arguments), "--quiet"]) == 0
    assert main(["train", "maml", "--resume", str(part), "--steps", "12", "--out", str(again), "--quiet"]) == 0
    assert same_learner(tmp_path / "whole.safetensors", again)

    report = json.loads((tmp_path / "whole.json").read_text())
    assert report["evaluation"]["episodes"] == 20
    assert report["evaluation"]["metric"] == "mse"
    assert len(report["evaluation"]["by_step"]) == 2
    assert report["settings"]["tasks"] == 4
    assert report["history"]["training"][-1]["step"] == 12
    assert report["history"]["validation"]

    judged = run(
        "evaluate", tmp_path / "whole.safetensors", "--episodes", 20, program=(sys.executable, "-m", "metaaug_fast")
    )
    assert judged.returncode == 0, judged.stderr
    found = json.loads((tmp_path / "whole.evaluation.json").read_text())["evaluation"]
    assert found == report["evaluation"]


def test_reptile_and_other_options(tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    assert (
        main(["train", "reptile", *SINUSOID, "--inner-steps", "3", "--inner-batch", "4", "--out", str(out), "--quiet"])
        == 0
    )
    assert (
        main(
            [
                "evaluate",
                str(out),
                "--episodes",
                "8",
                "--test-steps",
                "4",
                "--shots",
                "5",
                "--plot",
                str(tmp_path / "r.png"),
            ]
        )
        == 0
    )
    assert (tmp_path / "r.png").exists()
    report = json.loads((tmp_path / "r.evaluation.json").read_text())
    assert report["evaluation"]["steps"] == 4
    assert report["settings"]["shots"] == 5
    assert "after 0, 1, ... steps" in capsys.readouterr().out


def test_accuracies_say_whether_they_are_transductive(tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.py").write_text(
        "from metaaug_fast.models import strided_conv4\n\ndef net():\n    return strided_conv4(ways=3, hidden=4)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ["--model", "tiny:net"]
    arguments = ["--data", "glyphs", *own, "--ways", "3", "--queries", "2", "--tasks", "2"]
    arguments += ["--steps", "2", "--episodes", "4", "--validation-episodes", "2", "--quiet"]
    assert main(["train", "maml", *arguments, "--first-order"]) == 0
    shown = capsys.readouterr().out
    assert "new classes: accuracy" in shown
    assert "transductive" in shown
    assert "first order" in shown
    assert (
        main(
            ["evaluate", "runs/maml-glyphs.safetensors", *own, "--episodes", "4", "--split-styles", "--plot", "one.svg"]
        )
        == 0
    )
    assert Path("one.svg").exists()
    report = json.loads(Path("runs/maml-glyphs.evaluation.json").read_text())
    assert report["evaluation"]["transductive"] is True
    assert report["settings"]["split_styles"] is True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "s.safetensors"
    arguments = [
        "--data",
        "sinusoid",
        "--tasks",
        "4",
        "--steps",
        "1000000",
        "--checkpoint-every",
        "20",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [PROGRAM, "train", "maml", *arguments, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not out.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in shown
    assert "Traceback" not in errors
    state = checkpoint.load(out)
    assert state["history"]["stopped_by"] == number.name
    resumed = ["train", "maml", "--resume", str(out), "--steps", str(state["step"] + 2), "--episodes", "4", "--quiet"]
    assert main(resumed) == 0
    assert checkpoint.load(out)["step"] == state["step"] + 2


def test_explain_a_named_model_and_one_of_the_users(tmp_path, capsys, monkeypatch):
    assert main(["explain", "--model", "conv4"]) == 0
    assert "conv2d" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text(
        "import torch\nnet = torch.nn.Sequential(torch.nn.Linear(7, 3), torch.nn.Tanh())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "--model", "mine:net", "--shape", "7"]) == 0
    assert "tanh" in capsys.readouterr().out


BAD = [
    ([], "COMMAND"),
    (["train"], "learner"),
    (["train", "anil", "--data", "glyphs"], "invalid choice: 'anil'"),
    (["train", "maml"], "--data must be one of glyphs, omniglot, sinusoid (got none)"),
    (["train", "maml", "--data", "mnist"], "invalid choice: 'mnist'"),
    (["train", "maml", "--data", "omniglot"], "root must be the folder of Omniglot's archives (got none)"),
    (["train", "maml", "--data", "omniglot", "--root", "/nonexistent"], "images_background.zip is missing"),
    (["train", "maml", "--data", "glyphs", "--root", "x"], "root is for omniglot only"),
    (["train", "maml", "--data", "sinusoid", "--inner-batch", "3"], "inner_batch is for reptile only"),
    (["train", "reptile", "--data", "sinusoid", "--first-order"], "first_order is for maml only"),
    (["train", "maml", "--data", "sinusoid", "--steps", "0"], "--steps: must be an integer >= 1 (got 0)"),
    (["train", "maml", "--data", "sinusoid", "--tasks", "2.5"], "--tasks: must be an integer >= 1 (got 2.5)"),
    (["train", "maml", "--data", "sinusoid", "--inner-lr", "-0.1"], "--inner-lr: must be a number >= 0 (got -0.1)"),
    (["train", "maml", "--data", "sinusoid", "--meta-lr", "nan"], "--meta-lr: must be a number >= 0 (got nan)"),
    (["train", "maml", "--data", "sinusoid", "--seed", "-1"], "seed must be >= 0 (got -1)"),
    (["train", "maml", "--data", "glyphs", "--ways", "5000"], "ways must be at most"),
    (["train", "maml", "--data", "sinusoid", "--model", "vgg"], "model must be one of mlp, omniglot_mlp, conv4"),
    (["train", "maml", "--data", "sinusoid", "--model", "no.such:net"], "model 'no.such:net' cannot be imported"),
    (["train", "maml", "--resume", "absent.safetensors"], "no checkpoint at absent.safetensors"),
    (["evaluate", "absent.safetensors"], "no checkpoint at absent.safetensors"),
    (
        ["train", "maml", "--data", "sinusoid", "--device", "cuda:99"],
        "--device: must be cpu or one of the GPUs",
    ),
    (["evaluate", "x", "--device", "tpu"], "GPUs that torch sees"),
    (["explain", "--model", "os:getcwd"], "must be an nn.Module or make one (got str)"),
    (["explain", "--model", "conv4", "--shape", "1,x"], "--shape: must be an integer >= 1 (got x)"),
    (["bench", "--workloads", "nope"], "workloads must be names or patterns of those that --list shows (got 'nope')"),
    (["bench", "--rivals", "nope"], "rivals must be among metaaug_fast, loop, "),
    (["bench", "--scaling", "--rivals", "nope"], "(got 'nope')"),
    (["bench", "--rounds", "0"], "--rounds: must be an integer >= 1 (got 0)"),
    (["bench", "--threads", "4096"], "threads must be at most the "),
    (["bench", "--threads", "x"], "--threads: must be an integer >= 1 (got x)"),
    (["bench", "--scaling", "--threads", "1"], "threads must not be given with --scaling, which takes 1 and 2 (got 1)"),
    (["bench", "--first-call-limit", "0"], "--first-call-limit: must be above 0 (got 0)"),
    (["bench", "--all", "--workloads", "conv4*"], "--workloads: not allowed with argument --all"),
    (
        ["bench", "--out", "/dev/null/x"],
        "out must be a folder that can be written to (got /dev/null/x: Not a directory)",
    ),
    (["bench", "--scaling", "--out", "/dev/null/x"], "out must be a folder that can be written to (got /dev/null/x: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(each) or "nothing" for each, _ in BAD])
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert shown.startswith("metaaug-fast")
    assert not list(tmp_path.iterdir())


def test_bench_lists_its_workloads(capsys):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(WORKLOADS) + 1
    assert any(line.startswith("* conv4-t8-k1 ") and "T=8 K=1 S=5 Q=5, second order" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_bench_and_its_processes(tmp_path, number):
    """What is finished stays, and no process is left in the background."""
    out, mark = tmp_path / "out", f"METAAUG_TEST_RUN={tmp_path}"
    process = subprocess.Popen(
        [
            PROGRAM,
            "bench",
            "--workloads",
            "sinusoid-t25-k1*",
            "--rivals",
            "metaaug_fast",
            "--rounds",
            "1",
            "--out",
            out,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, mark.partition("=")[0]: str(tmp_path)},
    )
    assert process.stderr is not None
    shown = ""
    while "sinusoid-t25-k1-first-order: metaaug_fast" not in shown:
        line = process.stderr.readline()
        assert line, shown
        shown += line
    process.send_signal(number)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, rest
    assert rest.endswith(f"stopped; finished workloads are in {out / 'bench.json'}\n")
    assert "Traceback" not in shown + rest
    assert [each["name"] for each in json.loads((out / "bench.json").read_text())["workloads"]] == ["sinusoid-t25-k1"]
    deadline = time.monotonic() + 10
    while left := _processes_with(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _processes_with(mark):
    """Ids of processes in whose environment this stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().decode(errors="replace").split("\0"):
                found.append(path.parent.name)
    return found


def test_real_program_fails_without_a_traceback(tmp_path):
    truncated = tmp_path / "c.safetensors"
    checkpoint.save(truncated, {"weights": torch.randn(50)})
    truncated.write_bytes(truncated.read_bytes()[:-7])
    failed = run("evaluate", truncated)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "c.safetensors is damaged or no checkpoint" in failed.stderr


def test_checkpoints_that_do_not_fit(tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    assert main(["train", "maml", *SINUSOID, "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "maml", "--resume", str(out), "--inner-lr", "0.5"]) == 2
    assert "--inner-lr must be that of the checkpoint, 0.01 (got 0.5)" in capsys.readouterr().err
    assert main(["train", "reptile", "--resume", str(out)]) == 2
    assert "learner must be that of the checkpoint, maml (got reptile)" in capsys.readouterr().err
    checkpoint.save(out, {"learner": {}})
    assert main(["evaluate", str(out)]) == 2
    assert "was not written by metaaug-fast train" in capsys.readouterr().err


def test_threads_are_torchs(tmp_path):
    before = torch.get_num_threads()
    try:
        assert main(["train", "maml", *SINUSOID, "--threads", "3", "--out", str(tmp_path / "t"), "--quiet"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_version():
    shown = run("--version")
    assert shown.returncode == 0
    assert shown.stdout.startswith("metaaug-fast 0.")


@pytest.mark.slow
def test_omniglot_as_the_papers_do(tmp_path, capsys, real_omniglot):
    data = ["--data", "omniglot", "--root", str(real_omniglot)]
    arguments = [*data, "--model", "omniglot_mlp", "--tasks", "2", "--steps", "2"]
    out = ["--out", str(tmp_path / "o.safetensors"), "--episodes", "4", "--validation-episodes", "2", "--quiet"]
    assert main(["train", "maml", *arguments, *out]) == 0
    assert "5-way 1-shot: omniglot_mlp, 2 tasks, inner lr 0.4 x 1" in capsys.readouterr().out
