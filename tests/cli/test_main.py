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
from metaaug_fast.data import SOURCES
from metaaug_fast.learners import LEARNERS
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
    assert report["config"]["sampling"]["tasks"] == 4
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
    inner = ["--inner-steps", "3", "--inner-batch", "4"]
    assert main(["train", "reptile", *SINUSOID, *inner, "--out", str(out), "--quiet"]) == 0
    again = ["evaluate", str(out), "--episodes", "8", "--test-steps", "4", "--shots", "5"]
    assert main([*again, "--plot", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").exists()
    report = json.loads((tmp_path / "r.evaluation.json").read_text())
    assert report["evaluation"]["steps"] == 4
    assert report["config"]["sampling"]["shots"] == 5
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
    again = ["evaluate", "runs/maml-glyphs.safetensors", "--allow", "tiny", "--episodes", "4"]
    assert main([*again, "--split-styles", "--plot", "one.svg"]) == 0
    assert Path("one.svg").exists()
    report = json.loads(Path("runs/maml-glyphs.evaluation.json").read_text())
    assert report["evaluation"]["transductive"] is True
    assert report["config"]["sampling"]["split_styles"] is True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "s.safetensors"
    arguments = ["--data", "sinusoid", "--tasks", "4", "--steps", "1000000", "--checkpoint-every", "20", "--out", out]
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
    (
        ["tarin"],
        "COMMAND must be one of train, evaluate, transfer, augment, list, explain, demo, bench "
        "(got 'tarin'; did you mean 'train'?)",
    ),
    (["train"], f"LEARNER must be one of {', '.join(LEARNERS)}, or module:attribute (got none)"),
    (
        ["train", "nail", "--data", "glyphs"],
        f"learner must be one of {', '.join(LEARNERS)}, or module:attribute (got 'na",
    ),
    (["train", "protonett", "--data", "glyphs"], "(got 'protonett'; did you mean 'protonet'?)"),
    (["train", "maml"], f"--data must be one of {', '.join(sorted(SOURCES))}, or module:attribute (got none)"),
    (
        ["train", "maml", "--data", "mnits"],
        f"data must be one of {', '.join(sorted(SOURCES))}, or module:attribute (got 'mn",
    ),
    (["train", "maml", "--data", "glyph"], "(got 'glyph'; did you mean 'glyphs'?)"),
    (["train", "maml", "--data", "omniglot"], "data.root must be given: omniglot has no default for it (got none)"),
    (["train", "maml", "--data", "omniglot", "--root", "/nonexistent"], "images_background.zip is missing"),
    (["train", "maml", "--data", "glyphs", "--root", "x"], "--root is no option here"),
    (["train", "maml", "--data", "glyphs", "--download"], "download must not be given: data glyphs fetches nothing"),
    (["train", "maml", "--data", "sinusoid", "--inner-batch", "3"], "--inner-batch is no option here"),
    (["train", "reptile", "--data", "sinusoid", "--first-order"], "--first-order is no option here"),
    (["train", "maml", "--data", "sinusoid", "--inner-stepz", "3"], "no option here; did you mean '--inner-steps'?"),
    (
        ["train", "maml", "--data", "sinusoid", "--lerner.inner_lr=3"],
        "no option here; did you mean '--learner.inner_lr'?",
    ),
    (["train", "maml", "--data", "sinusoid", "--thread", "3"], "--thread is no option here; did you mean '--threads'?"),
    (["train", "maml", "--data", "sinusoid", "--inner", "3"], "--inner is no option here"),
    (["train", "maml", "--data", "sinusoid", "more"], "what follows must be options and their values (got 'more')"),
    (["train", "maml", "--data", "sinusoid", "--steps", "0"], "steps must be >= 1 (got 0)"),
    (["train", "maml", "--data", "sinusoid", "--steps"], "training.steps must be given a value, an integer (got none)"),
    (["train", "maml", "--data", "sinusoid", "--tasks", "2.5"], "sampling.tasks must be an integer (got 2.5)"),
    (["train", "maml", "--data", "sinusoid", "--inner-lr", "-0.1"], "inner_lr must be >= 0 and finite (got -0.1)"),
    (
        ["train", "maml", "--data", "sinusoid", "--inner-lr", "x"],
        "learner.inner_lr must be a number, a list of numbers ",
    ),
    (["train", "maml", "--data", "sinusoid", "--meta-lr", "nan"], "meta_lr must be a number or null (got nan)"),
    (["train", "maml", "--data", "sinusoid", "--first-order", "3"], "first_order must be true or false (got 3)"),
    (["train", "maml", "--data", "sinusoid", "--hidden", "3"], "model.hidden must be a list of integers (got 3)"),
    (["train", "maml", "--data", "sinusoid", "--schedule", "up"], "schedule must be one of constant, linear, cosine, "),
    (
        ["train", "maml", "--data", "sinusoid", "--backend", "gpu"],
        "backend must be one of auto, fused, fallback (got 'gpu",
    ),
    (["train", "maml", "--data", "sinusoid", "--recipe", "maml-sinus"], "did you mean 'maml-sinusoid'?"),
    (["train", "maml", "--data", "sinusoid", "--seed", "-1"], "seed must be >= 0 (got -1)"),
    (
        ["train", "maml", "--data", "sinusoid", "--allow", "os"],
        "--allow is for --resume: what you name yourself may run",
    ),
    (["train", "--data", "sinusoid", "maml"], "the learner must come first: metaaug-fast train maml ..."),
    (["train", "--steps", "3", "mine:Learner"], "the learner must come first: metaaug-fast train mine:Learner ..."),
    (
        ["train", "maml", "--data", "glyphs", "--train-ways", "7"],
        "train_ways must be ways, 5, for maml, whose model has",
    ),
    (
        ["train", "protonet", "--data", "glyphs", "--test-steps", "3"],
        "test_steps must be null for protonet, which has no ",
    ),
    (["train", "maml", "--data", "glyphs", "--ways", "5000"], "ways must be at most"),
    (
        ["train", "maml", "--data", "sinusoid", "--model", "vgg"],
        "model must be one of conv4, deep_averaging, minilm, mlp, omniglot_mlp, ",
    ),
    (["train", "maml", "--data", "sinusoid", "--model", "no.such:net"], "model 'no.such:net' cannot be imported"),
    (["train", "maml", "--resume", "absent.safetensors"], "no checkpoint at absent.safetensors"),
    (["evaluate", "absent.safetensors"], "no checkpoint at absent.safetensors"),
    (["evaluate"], "CHECKPOINT"),
    (
        ["evaluate", "--episodes", "20", "c.safetensors"],
        "the checkpoint must come first: metaaug-fast evaluate CHECKPOINT",
    ),
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
    assert "learner.inner_lr must be that of the checkpoint, 0.01 (got 0.5)" in capsys.readouterr().err
    assert main(["train", "reptile", "--resume", str(out)]) == 2
    assert "learner must be that of the checkpoint, maml (got reptile)" in capsys.readouterr().err
    checkpoint.save(out, {"learner": {}})
    assert main(["evaluate", str(out)]) == 2
    assert "has no configuration, for no run of metaaug-fast wrote it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Checkpoints of learners with and without an output for each class."""
    folder = tmp_path_factory.mktemp("judged")
    for learner in ("maml", "protonet"):
        arguments = ["--data", "glyphs", "--model", "strided_conv4", "--hidden", "4", "--tasks", "2", "--steps", "1"]
        arguments += ["--episodes", "4", "--validation-episodes", "2", "--quiet", "--out", str(folder / learner)]
        assert main(["train", learner, *arguments]) == 0
    return folder


@pytest.mark.parametrize(
    ("learner", "options", "message"),
    [
        ("maml", ["--ways", "6"], "ways must be at most model.ways, 5 (got 6)"),
        ("maml", ["--ways", "x"], "sampling.ways must be an integer (got x)"),
        ("maml", ["--inner-lr", "1"], "--inner-lr is no option here"),
        ("maml", ["--seed", "1"], "--seed is no option here"),
        ("maml", ["--episode", "4"], "--episode is no option here; did you mean '--episodes'?"),
        ("maml", ["--plott", "x.png"], "--plott is no option here; did you mean '--plot'?"),
        ("maml", ["--plot", "x.xyz"], "--plot must be a file of a format such as .png, .svg or .pdf (got x.xyz)"),
        ("maml", ["--download"], "download must not be given: data glyphs fetches nothing"),
        ("maml", ["more"], "what follows must be options and their values (got 'more')"),
        ("protonet", ["--test-steps", "2"], "test_steps must be null for protonet, which has no inner loop (got 2)"),
    ],
)
def test_evaluate_says_what_cannot_be_before_any_work(judged, capsys, tmp_path, monkeypatch, learner, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metaaug_fast.cli.evaluate.judge", lambda *_: pytest.fail("work was done"))
    capsys.readouterr()
    assert main(["evaluate", str(judged / learner), *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_evaluate_judges_and_draws_other_tasks(judged, tmp_path, capsys):
    for learner, ways in (("maml", 3), ("protonet", 7)):
        options = ["--ways", str(ways), "--split-styles", "--episodes", "4", "--plot", str(tmp_path / f"{ways}.png")]
        assert main(["evaluate", str(judged / learner), *options, "--report", str(tmp_path / "r.json")]) == 0
        assert f"{ways}-way 1-shot" in capsys.readouterr().out
        assert (tmp_path / f"{ways}.png").exists()
        assert json.loads((tmp_path / "r.json").read_text())["config"]["sampling"]["split_styles"] is True


def test_pictures_are_of_images_and_curves(tmp_path, own_code, capsys):
    own_code(
        "flat",
        "import torch\nfrom metaaug_fast.data import ClassSamples\n"
        "def data(): return ClassSamples.from_arrays(torch.rand(200, 6), torch.arange(50).repeat(4))\n",
    )
    arguments = [
        "--data",
        "flat:data",
        "--model",
        "mlp",
        "--steps",
        "1",
        "--tasks",
        "2",
        "--shots",
        "1",
        "--queries",
        "2",
    ]
    assert (
        main(["train", "maml", *arguments, "--episodes", "4", "--validation-episodes", "2", "--out", "c", "--quiet"])
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", "c", "--allow", "flat", "--plot", "x.png"]) == 2
    assert "--plot needs images, or curves over one number (got samples of shape (6,))" in capsys.readouterr().err
    assert not Path("x.png").exists()


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
    assert "5-way 1-shot: omniglot_mlp, 2 tasks, inner lr 0.4, inner steps 1" in capsys.readouterr().out


def test_evaluate_on_another_data_set(tmp_path, capsys, monkeypatch):
    path, fresh = str(tmp_path / "c.safetensors"), ["--episodes", "10", "--validation-episodes", "10", "--quiet"]
    assert main(["train", "maml", "--data", "glyphs", "--hidden", "4", "--steps", "2", "--out", path, *fresh]) == 0
    (tmp_path / "other_data.py").write_text(
        "import numpy as np\nimport metaaug_fast as mf\n\n"
        "def letters():\n"
        "    pictures = np.random.default_rng(0).random((300, 1, 28, 28), np.float32)\n"
        "    return mf.data.ClassSamples.from_arrays(pictures, np.arange(300) % 30)\n\n"
        "def small():\n"
        "    return mf.data.ClassSamples.from_arrays(np.zeros((300, 1, 8, 8), np.float32), np.arange(300) % 30)\n"
    )
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", path, "--data", "other_data:letters", "--episodes", "10"]) == 0
    shown = capsys.readouterr().out
    assert "maml on other_data:letters" in shown
    for data, message in (
        ("other_data:small", "model was made for, [1, 28, 28] (got other_data:small with [1, 8, 8])"),
        ("sinusoid", "model was made for, [1, 28, 28] (got sinusoid with [1])"),
        ("glyph", "did you mean 'glyphs'"),
    ):
        assert main(["evaluate", path, "--data", data, "--episodes", "10"]) == 2
        assert message in capsys.readouterr().err
