"""What the console program says to input that cannot work: one line and exit code 2, never a traceback."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from metaaug_fast import MAML, models
from metaaug_fast.bench.worker import cores
from metaaug_fast.cli.main import main
from metaaug_fast.errors import out_of_memory
from metaaug_fast.runs.build import make_model
from metaaug_fast.runs.config import Part

TRAIN = ["train", "maml", "--data", "sinusoid", "--steps", "2", "--episodes", "4", "--validation-episodes", "2"]
TRAIN += ["--quiet"]
HUGE = "1000000000000"
LIMIT = f"must be an integer below 2**31 (got {HUGE})"


def one_line(arguments, capsys):
    """The error that the program ends with, whatever was warned of before."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "warning:" not in line] == lines[-1:]
    assert lines[-1].startswith("metaaug-fast")
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[([*TRAIN, f"--{name.replace('_', '-')}", HUGE], f"{name} must be below 2**31 (got {HUGE})") for name in (
            "tasks", "shots", "queries", "ways", "test_steps", "inner_steps", "episodes", "steps",
        )],
        (["explain", "--model", "conv4", "--samples", HUGE], LIMIT),
        (["explain", "--model", "conv4", "--shape", f"1,{HUGE}"], LIMIT),
        (["bench", "--rounds", HUGE], LIMIT),
        ([*TRAIN, "--tasks", "²"], "sampling.tasks must be an integer (got ²)"),
        ([*TRAIN, "--tasks", ""], "sampling.tasks must be an integer (got )"),
        ([*TRAIN, "--episodes", "1"], "episodes must be >= 2 (got 1)"),
        ([*TRAIN, "--validation-episodes", "1"], "validation_episodes must be >= 2 (got 1)"),
        ([*TRAIN, "--seed", str(2**64)], f"seed must be below 2**63 (got {2**64})"),
        (["train", "reptile", *TRAIN[2:], "--meta-lr", "1e308"], "meta_lr must be > 0 and finite in float32 (got 1e+"),
        ([*TRAIN, "--meta-lr", "0"], "meta_lr must be > 0 and finite in float32 (got 0.0)"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [TRAIN, ["evaluate", "x"], ["explain", "--model", "mlp"], ["demo"]])
def test_threads_that_no_machine_starts(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    for number in ("10000000000", "99999999999999999999999", str(8 * cores() + 1)):
        message = one_line([*command, "--threads", number], capsys)
        assert f"--threads: must be at most 8 for each of {cores()} cores, {8 * cores()} (got {number})" in message
    assert "--threads: must be an integer below 2**31" in one_line(["bench", "--threads", "10000000000"], capsys)
    assert torch.get_num_threads() == before
    assert not list(tmp_path.iterdir())


def test_memory_that_cannot_be_had(tmp_path):
    """In a process that may have 8 GiB: a machine with more would begin to fill them."""
    sizes = {
        "--shots 3, --tasks 2000000000": TRAIN,
        "--inner-steps 2000000000": TRAIN,
        "--shots 2147483647, --tasks 2147483647": TRAIN,
        "--shape 1,99999,99999, --samples 25": ["explain", "--model", "conv4"],
        "--shape 99999,99999999,99999999, --samples 25": ["explain", "--model", "conv4"],
    }
    calls = [[*command, *size.replace(", ", " ").split()] for size, command in sizes.items()]
    failed = subprocess.run(
        [sys.executable, "-c", f"from metaaug_fast.cli.main import main; print([main(call) for call in {calls}])"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY)),
    )
    assert failed.stdout.endswith("[2, 2, 2, 2, 2]\n"), failed.stderr
    for line, call, size in zip(failed.stderr.splitlines(), calls, sizes, strict=True):
        assert line.startswith(f"metaaug-fast {call[0]}: error: not enough memory for {size} (")
        assert len(line) < 400


def test_what_counts_as_memory_that_cannot_be_had():
    for size in (2**62, (2**40, 2**40)):
        with pytest.raises(RuntimeError) as raised:
            torch.empty(size)
        assert out_of_memory(raised.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_bug_of_ours_is_a_traceback(monkeypatch):
    """Only what a user can mend is one line."""
    for error in (RuntimeError("a bug"), KeyError("a bug"), AttributeError("a bug"), OverflowError("a bug")):

        def broken(*_, error=error, **__):
            raise error

        monkeypatch.setattr("metaaug_fast.cli.explain.explain", broken)
        with pytest.raises(type(error), match="a bug"):
            main(["explain", "--model", "mlp"])


OWN = """
import torch

number = 3
class Fails(torch.nn.Linear):
    def forward(self, x):
        return {}["missing"]
def fails(): return Fails(1, 1)
def raises(): raise RuntimeError("first\\nsecond")
def raises_key(): raise KeyError("k")
def exits(): raise SystemExit(3)
def needs(x): return x
def nothing(): return None
"""
MODULES = {
    "own": OWN,
    "m_runtime": "raise RuntimeError('boom')",
    "m_syntax": "def (",
    "m_key": "raise KeyError('k')",
    "m_exit": "raise SystemExit(3)",
    "m_import": "import nosuchthing",
    "m_empty": "raise ValueError",
}


@pytest.fixture
def own_modules(own_code):
    for name, content in MODULES.items():
        own_code(name, content)


@pytest.mark.parametrize("command", [TRAIN, ["explain"]], ids=["train", "explain"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("m_runtime:net", "model 'm_runtime:net' cannot be imported (RuntimeError: boom)"),
        ("m_syntax:net", "model 'm_syntax:net' cannot be imported (SyntaxError: invalid syntax (m_syntax.py, line 1))"),
        ("m_key:net", "model 'm_key:net' cannot be imported (KeyError: 'k')"),
        ("m_exit:net", "model 'm_exit:net' cannot be imported (SystemExit: 3)"),
        ("m_import:net", "model 'm_import:net' cannot be imported (ModuleNotFoundError: No module named"),
        ("m_empty:net", "model 'm_empty:net' cannot be imported (ValueError)"),
        (":net", "model ':net' cannot be imported (ValueError: Empty module name)"),
        ("..:net", "model '..:net' cannot be imported (TypeError: "),
        ("own:", "model 'own:' cannot be imported (AttributeError: "),
        ("own:number", "model 'own:number' must be an nn.Module or make one (got int)"),
        ("own:nothing", "model 'own:nothing' must be an nn.Module or make one (got NoneType)"),
        ("own:raises", "model 'own:raises' cannot be made (RuntimeError: first second)"),
        ("own:raises_key", "model 'own:raises_key' cannot be made (KeyError: 'k')"),
        ("own:exits", "model 'own:exits' cannot be made (SystemExit: 3)"),
    ],
)  # fmt: skip
def test_models_whose_code_fails(command, model, message, capsys, own_modules):
    assert message in one_line([*command, "--model", model], capsys)
    with pytest.raises(ValueError, match="model") as raised:
        make_model(Part(model, {}))
    assert raised.value.__cause__ is not None or "must be" in message


def test_arguments_of_a_model_that_nobody_gives(capsys, own_modules):
    assert "model.x must be given: own:needs has no default for it" in one_line(
        [*TRAIN, "--model", "own:needs"], capsys
    )
    message = "model 'own:needs' cannot be made (TypeError: needs() missing 1 required"
    assert message in one_line(["explain", "--model", "own:needs"], capsys)


def test_models_whose_forward_fails(capsys, own_modules):
    message = "model must accept samples of shape (1,) (got KeyError: 'missing')"
    assert message in one_line([*TRAIN, "--model", "own:fails"], capsys)


def test_steps_beyond_the_engines_integers():
    for steps in (2**31, 10**30):
        with pytest.raises(ValueError, match=rf"steps must be below 2\*\*31 \(got {steps}\)"):
            MAML(models.mlp([1, 4, 1]), inner_steps=steps, loss="mse").problem()
        with pytest.raises(ValueError, match=rf"steps must be below 2\*\*31 \(got {steps}\)"):
            MAML(models.mlp([1, 4, 1]), loss="mse").problem(steps)
