"""A checkpoint is put back as a whole, or refused and nothing has changed."""

import copy
import errno
import math
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from metaaug_fast.errors import CheckpointError, FileWriteError
from metaaug_fast.files import previous_of
from metaaug_fast.learners.maml import MAML
from metaaug_fast.models import mlp
from metaaug_fast.runs import checkpoint
from metaaug_fast.runs.training import train
from tests.building import assert_same, parts, same


def run(steps, made, **more):
    learner, episodes, rest = made
    return train(learner, episodes, steps, progress=False, **rest, **more)


def snapshot(made):
    """Everything that a resumption changes."""
    learner, episodes, more = made
    states = [part.state_dict() for part in (learner, episodes, *more.values())]
    return copy.deepcopy([*states, torch.get_rng_state()])


class Signed(torch.optim.Optimizer):
    """One of the user's own, with settings outside its groups."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.decay = 0.5

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                trace = self.state[parameter].setdefault("trace", torch.zeros_like(parameter))
                trace.mul_(self.decay).add_(parameter.grad.sign())
                parameter.sub_(group["lr"] * trace)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2),
    "SGD momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "Adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "Adam groups": lambda p: torch.optim.Adam([{"params": [each], "lr": 1e-2} for each in p]),
    "own": lambda p: Signed(p, 1e-2),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p)
        for name in (
            "AdamW",
            "Adagrad",
            "Adadelta",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "Adafactor",
        )
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, name):
    whole, first, second = (parts(seed, optimizer=OPTIMIZERS[name]) for seed in (1, 1, 2))
    run(5, whole)
    run(2, first, checkpoint=tmp_path / "c")
    run(5, second, resume=tmp_path / "c")
    assert_same(whole[0], second[0])
    assert same(snapshot(whole)[2], snapshot(second)[2])


def change(*path, to):
    """A change of the stored state at this path."""

    def apply(state):
        for key in path[:-1]:
            state = state[key]
        if to is None:
            del state[path[-1]]
        else:
            state[path[-1]] = to(state.get(path[-1])) if callable(to) else to

    return apply


MOMENT = ("optimizers", 0, "state", 0, "exp_avg")
CHANGES = {
    "moment of another shape": (change(*MOMENT, to=torch.ones(1)), r"optimizer.0.exp_avg must be \[8, 1\] torch.fl"),
    "moment of another dtype": (change(*MOMENT, to=lambda x: x.double()), r"exp_avg must be .* torch.float64\)"),
    "moment is a number": (change(*MOMENT, to=3.0), r"exp_avg must be \[8, 1\] torch.float32 \(got float\)"),
    "no moment": (change(*MOMENT, to=None), "optimizer.0 lacks exp_avg"),
    "a moment too many": (change("optimizers", 0, "state", 0, "trace", to=torch.ones(1)), "must not have trace"),
    "unknown parameter": (change("optimizers", 0, "state", 7, to={}), "optimizer has no parameter 7"),
    "no groups": (change("optimizers", 0, "param_groups", to=[]), "parameter groups"),
    "no betas": (change("optimizers", 0, "param_groups", 0, "betas", to=None), "lacks 'betas'"),
    "rate is a word": (change("optimizers", 0, "param_groups", 0, "lr", to="x"), ""),
    "negative step of Adam": (change(*MOMENT[:4], "step", to=torch.tensor(-2.0)), "0.step must be an integer >= 0"),
    "fractional step of Adam": (change(*MOMENT[:4], "step", to=torch.tensor(1.5)), r"0 \(got 1.5\)"),
    "NaN as step of Adam": (change(*MOMENT[:4], "step", to=torch.tensor(math.nan)), r"0 \(got nan\)"),
    "state is a list": (change("optimizers", 0, to=[]), "list"),
    "weight of another shape": (
        change("learner", "model.0.weight", to=torch.ones(9, 1)),
        r"learner.model.0.weight must",
    ),
    "weight of another dtype": (
        change("learner", "model.0.bias", to=torch.ones(8).double()),
        r"got \[8\] torch.float64",
    ),
    "no weight": (change("learner", "model.0.bias", to=None), "learner lacks model.0.bias"),
    "a weight too many": (change("learner", "head", to=torch.ones(1)), "learner must not have head"),
    "no learner": (change("learner", to=None), "lacks 'learner'"),
    "negative position": (change("episodes", "position", to=-1), "position must be >= 0"),
    "fractional position": (change("episodes", "position", to=0.5), "position must be an integer"),
    "no position": (change("episodes", "position", to=None), "lacks 'position'"),
    "short generator": (change("generator", to=torch.zeros(3, dtype=torch.uint8)), "RNG state"),
    "no generator": (change("generator", to=4), ""),
    "negative step": (change("step", to=-1), r"step must be an integer >= 0 \(got -1\)"),
    "fractional step": (change("step", to=2.0), r"step must be an integer >= 0 \(got 2.0\)"),
    "NaN as step": (change("step", to=math.nan), r"step must be an integer >= 0 \(got nan\)"),
    "step is a truth": (change("step", to=True), "step must be an integer >= 0"),
    "step is a word": (change("step", to="3"), "step must be an integer >= 0"),
    "history is a number": (change("history", to=3), ""),
    "words in history": (change("history", "seconds", to="x"), "history must hold numbers"),
    "no rates": (change("schedulers", 0, "base_lrs", to=[]), "scheduler.base_lrs must have 1 entries"),
    "fractional epoch": (change("schedulers", 0, "last_epoch", to=0.5), "last_epoch must be an integer >= 0"),
    "no gamma": (change("schedulers", 0, "gamma", to=None), "scheduler lacks gamma"),
    "another scheduler": (
        change("kinds", "schedulers", to=["StepLR"]),
        r"schedulers must be StepLR \(got ExponentialLR\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_changes_nothing(tmp_path, name):
    apply, message = CHANGES[name]
    run(2, parts(1), checkpoint=tmp_path / "c")
    state = checkpoint.load(tmp_path / "c")
    apply(state)
    checkpoint.save(tmp_path / "c", state)
    made = parts(2)
    run(1, made)
    before = snapshot(made)
    with pytest.raises(CheckpointError, match=rf"c does not fit what is to be resumed \(.*{message}"):
        run(4, made, resume=tmp_path / "c")
    assert same(before, snapshot(made))


def test_what_a_module_refuses_itself_changes_nothing(tmp_path):
    run(2, parts(1, kind="reptile"), checkpoint=tmp_path / "c")
    state = checkpoint.load(tmp_path / "c")
    state["learner"]["_extra_state"] = torch.zeros(4, dtype=torch.uint8)
    checkpoint.save(tmp_path / "c", state)
    made = parts(2, kind="reptile")
    before = snapshot(made)
    with pytest.raises(CheckpointError, match="c does not fit what is to be resumed"):
        run(4, made, resume=tmp_path / "c")
    assert same(before, snapshot(made))


FUSED = """
import sys, torch
import metaaug_fast as mf
from metaaug_fast.runs import checkpoint

def run(steps, **more):
    learner = mf.MAML(mf.models.mlp([1, 600, 600, 1]), inner_lr=0.01, loss="mse")
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2, fused=True)
    episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=2, queries=2, tasks=1)
    mf.train(learner, episodes, steps, optimizer=optimizer, progress=False, **more)

path = sys.argv[1]
run(1, checkpoint=path)
state = checkpoint.load(path)
for each in state["optimizers"][0]["state"].values():
    each["exp_avg"], each["exp_avg_sq"] = torch.ones(3), torch.ones(3)
checkpoint.save(path, state)
try:
    run(2, resume=path)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_wrong_shapes_do_not_crash_the_process(tmp_path):
    """torch's fused Adam reads beyond moments that are too short."""
    command = [sys.executable, "-c", FUSED, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "optimizer.0.exp_avg must be [600, 1] torch.float32 (got [3] torch.float32)" in done.stdout


@pytest.mark.parametrize(("stored", "resumed"), [("Adam fused", "SGD"), ("SGD", "Adam fused"), ("SGD", "RMSprop")])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_another_optimizers_state_is_refused(tmp_path, stored, resumed, version):
    run(2, parts(1, optimizer=OPTIMIZERS[stored]), checkpoint=tmp_path / "c")
    checkpoint.save(tmp_path / "c", as_of_version(version, checkpoint.load(tmp_path / "c")))
    made = parts(2, optimizer=OPTIMIZERS[resumed])
    before = snapshot(made)
    message = f"optimizers must be {stored.split()[0]} .got {resumed.split()[0]}" if version > 1 else "does not fit"
    with pytest.raises(CheckpointError, match=message):
        run(4, made, resume=tmp_path / "c")
    assert same(before, snapshot(made))


def as_of_version(version, state):
    """The state as that version told it."""
    if version > 2:
        return state
    kinds = {name: (each or [None])[0] for name, each in state.pop("kinds").items()}
    for name in ("optimizer", "scheduler"):
        state[name] = (state.pop(f"{name}s") or [None])[0]
    if version > 1:
        state["kinds"] = {name: kinds[f"{name}s"] for name in ("optimizer", "scheduler")}
    return state


@pytest.mark.parametrize("version", [1, 2])
def test_states_of_older_versions_are_gone_on_from(tmp_path, version):
    whole = parts(1, 0.3)
    run(6, whole)
    run(2, parts(1, 0.3), checkpoint=tmp_path / "c")
    checkpoint.save(tmp_path / "c", as_of_version(version, checkpoint.load(tmp_path / "c")))
    second = parts(2, 0.3)
    run(6, second, resume=tmp_path / "c")
    assert_same(whole[0], second[0])


def test_an_older_state_without_an_optimizer_is_refused(tmp_path):
    run(2, parts(1, kind="reptile"), checkpoint=tmp_path / "c")
    state = checkpoint.load(tmp_path / "c")
    state["optimizers"] = state["schedulers"] = []
    checkpoint.save(tmp_path / "c", as_of_version(2, state))
    with pytest.raises(CheckpointError, match="whose learner had no optimizer: it can be loaded, but not gone on from"):
        run(4, parts(1, kind="reptile"), resume=tmp_path / "c")


def test_schedulers_that_cannot_be_stepped_are_refused_first(tmp_path):
    learner, episodes, more = parts()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(more["optimizer"])
    with pytest.raises(ValueError, match=r"scheduler must be one that steps without a metric \(got ReduceLROnPlateau"):
        train(learner, episodes, 3, optimizer=more["optimizer"], scheduler=plateau, progress=False)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    for optimizer in (other, None):
        with pytest.raises(ValueError, match="scheduler must be one of the optimizer that is given"):
            train(learner, episodes, 3, optimizer=optimizer, scheduler=more["scheduler"], progress=False)
    assert episodes.position == 0


def test_a_damaged_file_goes_on_from_the_one_before(tmp_path):
    """To the same bits as without a stop, and saying so."""
    path = tmp_path / "c.safetensors"
    whole = parts(1, 0.3)
    run(7, whole)
    run(5, parts(1, 0.3), checkpoint=path, checkpoint_every=2)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    second = parts(2, 0.3)
    with pytest.warns(UserWarning, match=r"c.safetensors is damaged .*its digest does not match\); going on from the"):
        history = run(7, second, resume=path, checkpoint=path)
    assert_same(whole[0], second[0])
    assert [point.step for point in history.training] == [1, 2, 3, 4, 5, 6, 7]
    assert checkpoint.load(path)["step"] == 7
    # The damaged file did not become the one before.
    assert checkpoint.load(previous_of(path))["step"] == 4


def test_fewer_steps_than_done_says_so_and_writes_the_truth(tmp_path):
    run(5, parts(1), checkpoint=tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    for steps in (3, 5):
        made = parts(2)
        message = rf"a has 5 meta-steps already, so none is added \(steps is {steps}\)"
        with pytest.warns(UserWarning, match=message):
            history = run(steps, made, resume=tmp_path / "a", checkpoint=tmp_path / f"b{steps}")
        assert history.training[-1].step == 5
        state = checkpoint.load(tmp_path / f"b{steps}")
        assert state["step"] == 5
        assert all(torch.equal(value, state["learner"][name]) for name, value in made[0].state_dict().items())
    with pytest.warns(UserWarning, match="none is added"):
        run(3, parts(2), resume=tmp_path / "a", checkpoint=tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert not previous_of(tmp_path / "a").exists()


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("trouble", ["folder", "below a file", "no space"])
def test_an_unusable_checkpoint_is_found_before_any_work(tmp_path, monkeypatch, trouble):
    path = tmp_path / "c"
    if trouble == "folder":
        path.mkdir()
    elif trouble == "below a file":
        path.touch()
        path = path / "c"
    else:
        monkeypatch.setattr("os.posix_fallocate", full_disk, raising=False)
    made = parts()
    with pytest.raises(FileWriteError, match=rf"{path} cannot be written \("):
        run(3, made, checkpoint=path)
    assert made[1].position == 0


def test_room_is_asked_for_three_files_with_moments(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("os.posix_fallocate", lambda descriptor, offset, size: sizes.append(size), raising=False)
    learner = MAML(mlp([1, 150, 150, 1]), inner_lr=0.01, loss="mse")
    more = {"optimizer": torch.optim.Adam(learner.parameters()), "checkpoint": tmp_path / "c", "progress": False}
    train(learner, parts()[1], 2, checkpoint_every=1, **more)
    size = (tmp_path / "c").stat().st_size
    assert size > 3 * 4 * 150 * 150
    train(learner, parts()[1], 4, resume=tmp_path / "c", **more)
    assert [round(each / size, 1) for each in sizes] == [0, 3, 0, 1]


def test_a_state_that_cannot_be_kept_is_found_before_any_work(tmp_path):
    made = parts()
    with pytest.raises(TypeError, match=r"got object at 'config.x'"):
        run(3, made, checkpoint=tmp_path / "c", config={"x": object()})
    assert made[1].position == 0
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_to_one_file_is_refused(tmp_path):
    caught = []

    def second():
        made = parts(2)
        try:
            run(3, made, checkpoint=tmp_path / "c")
        except FileWriteError as error:
            caught.append((str(error), made[1].position))

    def meanwhile(done):
        if done == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    run(3, parts(), checkpoint=tmp_path / "c", before_step=meanwhile)
    message = f"{tmp_path / 'c'} is being written by another run; wait for it, or write to another file"
    assert caught == [(message, 0)]
    assert [each.name for each in tmp_path.iterdir()] == ["c"]
