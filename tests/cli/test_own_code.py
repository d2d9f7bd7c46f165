"""Learners, data sets and models of a user's own, through the console program and from Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import metaaug_fast as mf
from metaaug_fast.cli.main import main
from metaaug_fast.runs import checkpoint, configure, run
from metaaug_fast.runs.build import make_episodes, make_sources

OWN = '''
import torch
from torch import nn
import metaaug_fast as mf
from metaaug_fast.data import ClassSamples, Sinusoids
from metaaug_fast.models import perceptron


class Mine(mf.Learner):
    """Nearest means, at a temperature that is learned; dropout draws from torch's generator."""

    encoder = True

    def __init__(self, model, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor(temperature))

    @mf.learners.one_task_too
    def adapt(self, support_x, support_y):
        def embed(x):
            return nn.functional.dropout(self.model(x.flatten(0, 1)), 0.1, self.training).unflatten(0, x.shape[:2])

        means = mf.learners.class_means(embed(support_x), support_y)
        return mf.learners.Predictor(lambda x: -self.scale * torch.cdist(embed(x), means), len(support_x))


class Bare(mf.Learner):
    """Without a model."""

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(power))

    @mf.learners.one_task_too
    def adapt(self, support_x, support_y):
        means = mf.learners.class_means(support_x.flatten(2), support_y)
        return mf.learners.Predictor(lambda x: -self.scale * torch.cdist(x.flatten(2), means), len(support_x))


def squares(prediction, y):
    return (prediction.softmax(-1) - nn.functional.one_hot(y, prediction.shape[-1])).square().mean()


class Tuned(mf.MAML):
    def __init__(self, model, tau: float = 1.0, **options):
        super().__init__(model, **options)
        self.tau = tau


def arrays(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(8)
    return labels[:, None, None, None] % 7 + torch.rand(8 * classes, 1, 4, 4, generator=generator), labels


class Data(ClassSamples):
    def __init__(self, classes: int = 50):
        data = ClassSamples.from_arrays(*arrays(classes, 1))
        super().__init__(data.samples, data.first, data.counts, data.names)


class Split(ClassSamples):
    default_model = "own:shaped"

    def __init__(self, split: str):
        data = ClassSamples.from_arrays(*arrays(12, ["train", "validation", "test"].index(split)))
        super().__init__(data.samples, data.first, data.counts, data.names)


class Dataset(torch.utils.data.Dataset):
    def __init__(self, classes: int = 50):
        self.images, self.targets = arrays(classes, 2)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def made():
    return ClassSamples.from_arrays(*arrays(50, 3))


ready, dataset, curves = made(), Dataset(), Sinusoids(amplitude=(1.0, 2.0))


class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 5))


def bare():
    return Flat()


def with_ways(ways=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), *([] if ways is None else [nn.Linear(4, ways)]))


def shaped(ways, sample_shape, hidden: int = 4):
    return perceptron(ways, sample_shape, [hidden])


net = Flat()
'''
QUICK = ["--tasks", "2", "--episodes", "20", "--validation-episodes", "10", "--quiet"]


@pytest.fixture
def own(own_code):
    own_code("own", OWN)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def bits(path):
    """All of a checkpoint that the meta-steps made."""
    state = checkpoint.load(path)
    return {name: value for name, value in state.items() if name != "history"}


CASES = {
    "a learner on data with splits": ["own:Mine", "--data", "own:Split", "--temperature", "2"],
    "a learner without a model": ["own:Bare", "--data", "own:Split"],
    "a learner that extends ours": ["own:Tuned", "--data", "own:Split", "--tau", "2", "--inner-lr", "0.1"],
    "a class of data, a class of model": ["maml", "--data", "own:Data", "--model", "own:Flat"],
    "a function, a function": ["maml", "--data", "own:made", "--model", "own:bare"],
    "ready data, a ready model": ["maml", "--data", "own:ready", "--model", "own:net"],
    "a torch data set, a model with ways": ["protonet", "--data", "own:Dataset", "--model", "own:with_ways"],
    "ready, a model of a shape": ["protonet", "--data", "own:dataset", "--model", "own:shaped", "--train-ways", "7"],
    "classes": ["reptile", "--data", "own:Data", "--classes", "60", "--model", "own:with_ways", "--batched=false"],
    "curves": ["maml", "--data", "own:curves", "--model", "own:shaped", "--loss", "mse", "--inner-lr", "0.01"],
    "a function for a field": ["own:Tuned", "--data", "own:Split", "--loss", "own:squares", "--inner-lr", "0.1"],
    "our model": ["protonet", "--data", "own:made", "--model", "mlp", "--hidden", "[4]"],
    "our data": ["own:Mine", "--data", "glyphs", "--model", "strided_conv4", "--hidden", "4"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_trains_stops_goes_on_and_is_judged(own, capsys, case):
    arguments = CASES[case]
    steps = ["--checkpoint-every", "2", "--validate-every", "2", "--steps", "4"]
    assert main(["train", *arguments, *steps, *QUICK, "--out", "whole.safetensors"]) == 0
    config = checkpoint.load("whole.safetensors")["config"]
    again = ["train", "--allow", "own", "--resume", "whole.previous.safetensors", "--quiet"]
    assert checkpoint.load("whole.previous.safetensors")["step"] == 2
    assert main([*again, "--out", "again.safetensors"]) == 0
    assert same(bits("whole.safetensors"), bits("again.safetensors"))
    capsys.readouterr()
    assert main(["evaluate", "whole.safetensors", "--allow", "own"]) == 0
    (judged,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("new "))

    outcome = run(configure(config), "python.safetensors", progress=False, say=lambda text: None)
    assert same(bits("whole.safetensors"), bits("python.safetensors"))
    assert str(outcome.evaluation) in judged
    loaded = mf.load("whole.safetensors", allow=["own"])
    tasks = make_episodes(outcome.config, "test", make_sources(outcome.config.data)["test"]).batch(0)
    with torch.no_grad():
        ours, theirs = (
            each.eval().adapt(tasks.support_x, tasks.support_y)(tasks.query_x) for each in (loaded, outcome.learner)
        )
    assert torch.equal(ours, theirs)
    with pytest.raises(mf.CheckpointError, match="is code outside this package"):
        mf.load("whole.safetensors")


def killed(arguments, path):
    """Train in a process of its own, which is killed once it has written a second checkpoint."""
    command = [sys.executable, "-m", "metaaug_fast", "train", *arguments, "--out", path, "--quiet", "--threads", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while not Path(path).with_suffix(".previous.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["own:Mine", "--data", "own:Split"],
        ["own:Tuned", "--data", "own:ready", "--model", "own:net"],
        ["maml", "--data", "sinusoid", "--model", "mlp", "--hidden", "[4]"],
        ["protonet", "--data", "glyphs", "--model", "strided_conv4", "--hidden", "4", "--train-ways", "7"],
        ["reptile", "--data", "own:Dataset", "--model", "own:net", "--inner-batch", "2"],
    ],
    ids=" ".join,
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(own, arguments):
    arguments = [*arguments, *QUICK[:-1], "--checkpoint-every", "20", "--validate-every", "1000000"]
    killed([*arguments, "--steps", "1000000"], "part.safetensors")
    step = checkpoint.load("part.safetensors")["step"]
    steps = ["--steps", str(step + 7)]
    assert main(["train", arguments[0], "--resume", "part.safetensors", "--allow", "own", *steps, "--quiet"]) == 0
    assert main(["train", *arguments, *steps, "--out", "whole.safetensors", "--quiet"]) == 0
    assert checkpoint.load("whole.safetensors")["step"] == step + 7
    assert same(bits("part.safetensors"), bits("whole.safetensors"))
    assert not list(Path().glob(".*.part"))
