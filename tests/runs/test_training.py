import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from metaaug_fast.data import Episodes, Sinusoids
from metaaug_fast.errors import CheckpointError, NonFiniteError
from metaaug_fast.learners.maml import MAML
from metaaug_fast.models import mlp
from metaaug_fast.runs import checkpoint, training
from metaaug_fast.runs.evaluation import evaluate
from metaaug_fast.runs.history import History, Point, ValidationPoint
from metaaug_fast.runs.training import train
from tests.building import assert_same, parts


def test_history_has_the_curves_and_losses_fall():
    learner, episodes, _ = parts()
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    judged = Episodes(Sinusoids(), shots=5, queries=5, tasks=10, seed=9)
    history = train(
        learner,
        episodes,
        300,
        optimizer=optimizer,
        validate=lambda: evaluate(learner, judged, 40),
        validate_every=100,
        progress=False,
    )
    assert [point.step for point in history.validation] == [100, 200, 300]
    assert history.training[-1].step == 300
    assert history.stopped_by is None
    assert history.seconds > 0
    losses = [point.loss for point in history.training]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert all(point.accuracy is None and point.tasks_per_second > 0 for point in history.training)


def test_points_are_means_over_the_steps_since_the_last(monkeypatch):
    monkeypatch.setattr(training, "POINTS", 2)
    learner, episodes, more = parts()
    losses = []
    learner.register_forward_hook(lambda module, inputs, out: losses.append(float(out.loss.detach())))
    history = train(learner, episodes, 7, progress=False, **more)
    assert [point.step for point in history.training] == [3, 6, 7]
    means = [sum(each) / len(each) for each in (losses[:3], losses[3:6], losses[6:])]
    assert [point.loss for point in history.training] == pytest.approx(means, rel=1e-5)


def test_history_round_trip():
    history = History([Point(1, 0.5, 0.25, 10.0), Point(2, 0.4)], [ValidationPoint(2, 0.9, 0.01)], 3.5, "SIGTERM")
    assert History.from_dict(history.as_dict()) == history


@pytest.mark.parametrize("kind", ["maml", "reptile"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind, dropout):
    whole, episodes, more = parts(1, dropout, kind)
    seen = []
    whole_history = train(whole, episodes, 12, before_step=seen.append, progress=False, **more)
    generator = torch.get_rng_state()

    learner, episodes, more = parts(1, dropout, kind)
    train(learner, episodes, 5, checkpoint=tmp_path / "c", progress=False, **more)
    learner, episodes, more = parts(2, dropout, kind)
    torch.manual_seed(77)
    resumed = []
    history = train(learner, episodes, 12, resume=tmp_path / "c", before_step=resumed.append, progress=False, **more)
    assert_same(whole, learner)
    assert torch.equal(generator, torch.get_rng_state())
    assert seen == list(range(12))
    assert resumed == list(range(5, 12))
    assert [point.step for point in history.training] == [point.step for point in whole_history.training]


def test_validation_does_not_change_the_run():
    runs = []
    for validate in (True, False):
        learner, episodes, more = parts(3, dropout=0.3)
        if validate:
            more |= {"validate": lambda: evaluate(learner, Episodes(Sinusoids(), tasks=4), 8), "validate_every": 2}  # noqa: B023
        train(learner, episodes, 6, progress=False, **more)
        runs.append(learner)
    assert_same(*runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_and_saves(tmp_path, number):
    learner, episodes, more = parts()
    before = signal.getsignal(number)

    def interrupt(done):
        if done == 4:
            os.kill(os.getpid(), number)

    history = train(learner, episodes, 50, before_step=interrupt, checkpoint=tmp_path / "c", progress=False, **more)
    assert history.stopped_by == number.name
    assert signal.getsignal(number) is before
    state = checkpoint.load(tmp_path / "c")
    assert state["step"] == 5
    assert state["episodes"]["position"] == 5
    whole, episodes, more = parts()
    train(whole, episodes, 5, progress=False, **more)
    assert_same(whole, learner)
    learner, episodes, more = parts(4)
    assert train(learner, episodes, 6, resume=tmp_path / "c", progress=False, **more).stopped_by is None


def test_signal_during_validation_is_not_lost(tmp_path):
    learner, episodes, more = parts()

    def validate():
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(learner, episodes, 3)

    history = train(
        learner, episodes, 9, validate=validate, validate_every=4, checkpoint=tmp_path / "c", progress=False, **more
    )
    assert history.stopped_by == "SIGTERM"
    assert checkpoint.load(tmp_path / "c")["step"] == 4
    assert history.training[-1].step == 4


def test_second_signal_does_not_wait():
    learner, episodes, more = parts()

    def interrupt(done):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(learner, episodes, 50, before_step=interrupt, progress=False, **more)
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_outside_the_main_thread():
    learner, episodes, more = parts()
    histories = []
    thread = threading.Thread(
        target=lambda: histories.append(train(learner, episodes, 3, progress=False, **more)), daemon=True
    )
    thread.start()
    thread.join()
    assert histories[0].training[-1].step == 3


SCRIPT = """
import sys, torch
from metaaug_fast.data import Episodes, Sinusoids
from metaaug_fast.learners.maml import MAML
from metaaug_fast.models import mlp
from metaaug_fast.runs.training import train

path, resume, steps = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(5)
learner = MAML(mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
episodes = Episodes(Sinusoids(), shots=5, queries=5, tasks=3)
train(learner, episodes, steps, optimizer=optimizer, checkpoint=path, checkpoint_every=1,
      resume=path if resume else None, progress=False)
"""


@pytest.mark.slow
def test_killed_run_loses_nothing_before_its_last_checkpoint(tmp_path):
    """A real process, which writes at every step, is killed at some moment, several times."""
    path, resume, reached = tmp_path / "c", "start", 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), resume, "1000000"])
        deadline = time.monotonic() + 60
        while not path.exists() or checkpoint.load(path)["step"] < reached + 3:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run writes no checkpoints"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = checkpoint.load(path)
        assert state["step"] >= reached + 3
        reached, resume = state["step"], "resume"
    subprocess.run([sys.executable, "-c", SCRIPT, str(path), "resume", str(reached + 2)], check=True)
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "whole"), "start", str(reached + 2)], check=True)
    resumed, whole = checkpoint.load(path), checkpoint.load(tmp_path / "whole")
    assert resumed["step"] == whole["step"] == reached + 2
    for name, value in whole["learner"].items():
        assert torch.equal(value, resumed["learner"][name])


def test_nan_leaves_the_last_checkpoint(tmp_path):
    learner, episodes, more = parts()

    def spoil(done):
        if done == 3:
            with torch.no_grad():
                next(learner.parameters()).fill_(math.nan)

    with pytest.raises(NonFiniteError):
        train(
            learner,
            episodes,
            9,
            before_step=spoil,
            checkpoint=tmp_path / "c",
            checkpoint_every=2,
            progress=False,
            **more,
        )
    state = checkpoint.load(tmp_path / "c")
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["learner"].values())


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    learner, episodes, more = parts()
    train(learner, episodes, 2, checkpoint=tmp_path / "c", progress=False, **more)
    with pytest.raises(CheckpointError, match=r"c does not fit what is to be resumed \(scheduler: one has it"):
        train(learner, episodes, 4, optimizer=more["optimizer"], resume=tmp_path / "c", progress=False)
    other = MAML(mlp([1, 9, 1]), loss="mse")
    with pytest.raises(CheckpointError, match="does not fit"):
        train(other, episodes, 4, optimizer=torch.optim.Adam(other.parameters()), resume=tmp_path / "c", progress=False)
    checkpoint.save(tmp_path / "c", {"weights": torch.ones(2)})
    with pytest.raises(CheckpointError, match="does not fit"):
        train(learner, episodes, 4, resume=tmp_path / "c", progress=False, **more)


@pytest.mark.parametrize("name", ["steps", "validate_every", "checkpoint_every"])
def test_counts_are_checked_first(name):
    learner, episodes, more = parts()
    with pytest.raises(ValueError, match=rf"{name} must be >= 1 \(got 0\)"):
        train(learner, episodes, **{"steps": 3, **more, name: 0})
    assert episodes.position == 0


def test_progress_bar_shows_loss_and_speed(capsys):
    learner, episodes, more = parts()
    train(learner, episodes, 3, **more)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss" in shown
    assert "tasks/s" in shown
    assert "accuracy" not in shown
