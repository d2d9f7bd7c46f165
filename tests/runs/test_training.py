import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from metaaug_fast.data import ClassSamples, Episodes, Sinusoids
from metaaug_fast.errors import CheckpointError, NonFiniteError
from metaaug_fast.learners import MAML, ProtoNet
from metaaug_fast.models import mlp
from metaaug_fast.runs import checkpoint, training
from metaaug_fast.runs.evaluation import evaluate
from metaaug_fast.runs.history import History, Point, ValidationPoint
from metaaug_fast.runs.load import load
from metaaug_fast.runs.training import train
from tests.building import assert_same, parts
from tests.runs import distributed as together


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
    assert 0 < history.validation[0].seconds < history.validation[1].seconds < history.seconds
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
    history = History(
        [Point(1, 0.5, 0.25, 10.0), Point(2, 0.4)], [ValidationPoint(2, 0.9, 0.01, 0.9, 3.0)], 3.5, "SIGTERM"
    )
    content = history.as_dict()
    assert History.from_dict(content) == history
    assert History.from_dict(content).validation[0].seconds == 3.0
    del content["validation"][0]["seconds"]  # as it was written before
    assert History.from_dict(content).validation[0].seconds is None


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
from metaaug_fast.data import ClassSamples, Episodes, Sinusoids
from metaaug_fast.learners import MAML, ProtoNet
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
    with pytest.raises(
        CheckpointError, match=r"c does not fit what is to be resumed \(schedulers must be ExponentialLR \(got none\)"
    ):
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


def rates(schedule, steps=8, **more):
    """The rate in each meta-step."""
    learner, episodes, _ = parts()
    optimizer = torch.optim.SGD(learner.parameters(), 0.5)
    seen = []
    train(
        learner, episodes, steps, optimizer=optimizer, schedule=schedule, progress=False, **more,
        before_step=lambda done: seen.append(optimizer.param_groups[0]["lr"]),
    )  # fmt: skip
    return seen


def test_schedules():
    assert rates("constant") == [0.5] * 8
    assert rates("linear") == pytest.approx([0.5 * (1 - n / 8) for n in range(8)])
    assert rates("cosine") == pytest.approx([0.25 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])
    assert rates("halving") == [0.5] * 8
    halving = training.SCHEDULES["halving"]
    assert [halving(9000, n) for n in (1999, 2000, 3999, 4000, 8000)] == [1, 0.5, 0.5, 0.25, 0.0625]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_on_where_it_was(tmp_path, schedule):
    whole, episodes, _ = parts(1)
    train(whole, episodes, 6, schedule=schedule, meta_lr=0.1, progress=False)
    learner, episodes, _ = parts(1)

    def stop(done):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"schedule": schedule, "meta_lr": 0.1, "progress": False}
    train(learner, episodes, 6, before_step=stop, checkpoint=tmp_path / "c", **options)
    learner, episodes, _ = parts(2)
    train(learner, episodes, 6, resume=tmp_path / "c", **options)
    assert_same(whole, learner)


def test_reptile_is_scaled_by_its_schedule():
    """As its paper lets the step size fall: by hand and by the schedule, to rounding."""
    one, episodes, _ = parts(1, kind="reptile")
    for done in range(6):
        one.meta_lr = 0.5 * (1 - done / 6)
        one.step(next(episodes))
    other, episodes, _ = parts(1, kind="reptile")
    train(other, episodes, 6, meta_lr=0.5, schedule="linear", progress=False)
    for mine, wanted in zip(other.parameters(), one.parameters(), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-7)


def test_the_meta_lr_of_reptile_may_still_be_set_between_steps():
    learner, episodes, _ = parts(1, kind="reptile")
    before = [value.detach().clone() for value in learner.parameters()]
    train(learner, episodes, 3, before_step=lambda done: setattr(learner, "meta_lr", 0.0), progress=False)
    assert all(torch.equal(one, other) for one, other in zip(before, learner.parameters(), strict=True))


def test_gradients_are_clipped_for_the_run_alone():
    learner, episodes, _ = parts()
    optimizer = torch.optim.SGD(learner.parameters(), 1.0)
    start = [value.detach().clone() for value in learner.parameters()]
    train(learner, episodes, 1, optimizer=optimizer, clip_norm=1e-3, progress=False)
    moved = torch.cat([(one - other).flatten() for one, other in zip(start, learner.parameters(), strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    start = [value.detach().clone() for value in learner.parameters()]
    train(learner, episodes, 1, optimizer=optimizer, progress=False)
    moved = torch.cat([(one - other).flatten() for one, other in zip(start, learner.parameters(), strict=True)])
    assert float(moved.norm()) > 1e-2


def scored(*scores):
    """Validations with these losses, one after the other."""
    found = iter(scores)
    return lambda: training.Evaluation("mse", next(found), 0.1, 0.0, 10, 1, False)


def test_patience_stops_after_validations_without_a_better_one(tmp_path):
    learner, episodes, more = parts()
    validate = scored(3.0, 2.0, 2.5, 2.0, 9.0, 1.0)
    options = {"validate_every": 2, "patience": 3, "checkpoint": tmp_path / "c", "progress": False, **more}
    history = train(learner, episodes, 99, validate=validate, **options)
    assert history.stopped_by == "early stopping"
    assert [point.step for point in history.validation] == [2, 4, 6, 8, 10]
    assert history.best.step == 4
    assert checkpoint.load(tmp_path / "c")["step"] == 10


def test_the_best_is_kept_beside(tmp_path):
    learner, episodes, more = parts()
    states = []

    def validate():
        states.append([value.clone() for value in learner.state_dict().values()])
        return losses()

    losses = scored(3.0, 1.0, 2.0, 1.5)
    options = {"validate_every": 2, "keep_best": True, "checkpoint": tmp_path / "run.safetensors", "progress": False}
    train(learner, episodes, 8, validate=validate, **options, **more)
    best = checkpoint.load(tmp_path / "run.best.safetensors")
    assert best["step"] == 4
    assert all(torch.equal(one, other) for one, other in zip(best["learner"].values(), states[1], strict=True))
    assert checkpoint.load(tmp_path / "run.safetensors")["step"] == 8
    learner, episodes, more = parts(2)
    train(
        learner, episodes, 10, validate=scored(1.2), resume=tmp_path / "run.safetensors", **options, **more
    )  # not better than before the stop
    assert checkpoint.load(tmp_path / "run.best.safetensors")["step"] == 4


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    """Of a learner whose loss nobody else looks at."""
    learner = ProtoNet(mlp([2, 4]))
    dataset = ClassSamples.from_arrays(torch.randn(20, 2), torch.arange(20) % 4)
    episodes = Episodes(dataset, ways=3, shots=1, queries=2, tasks=2)

    def spoil(done):
        if done == 3:
            with torch.no_grad():
                next(learner.parameters()).fill_(math.nan)

    with pytest.raises(NonFiniteError, match="the meta-loss is nan in one of the meta-steps up to 4"):
        train(learner, episodes, 9, before_step=spoil, checkpoint=tmp_path / "c", checkpoint_every=2, progress=False)
    assert checkpoint.load(tmp_path / "c")["step"] == 2


def test_options_that_do_not_go_together_are_refused_first(tmp_path):
    learner, episodes, more = parts()
    trials = [
        ({"patience": 2}, ValueError, r"patience needs validate \(got None\)"),
        ({"keep_best": True}, ValueError, r"keep_best needs validate \(got None\)"),
        ({"keep_best": True, "validate": scored(1.0)}, ValueError, "keep_best needs checkpoint"),
        ({"patience": 0, "validate": scored(1.0)}, ValueError, r"patience must be >= 1 \(got 0\)"),
        ({"clip_norm": -1.0}, ValueError, r"clip_norm must be >= 0 \(got -1.0\)"),
        ({"schedule": "step"}, ValueError, r"schedule must be one of constant, .* \(got 'step'\)"),
        ({"schedule": "linear", **more}, ValueError, "schedule must be 'constant' where a scheduler is given"),
        ({"meta_lr": 0.1, **more}, ValueError, r"meta_lr must be None where an optimizer is given, .* \(got 0.1\)"),
        ({"meta_lr": -0.1}, ValueError, r"meta_lr must be >= 0 \(got -0.1\)"),
    ]
    for options, error, message in trials:
        with pytest.raises(error, match=message):
            train(learner, episodes, 3, progress=False, **options)
    with pytest.raises(TypeError, match=r"learner must be a Learner \(got Sequential\)"):
        train(mlp([1, 1]), episodes, 3, progress=False)
    assert episodes.position == 0


def test_several_optimizers():
    """One for each half of the parameters is the same as one for all."""
    runs = []
    for split in (False, True):
        learner, episodes, _ = parts(1)
        values = list(learner.parameters())
        groups = [values[:2], values[2:]] if split else [values]
        optimizers = [torch.optim.Adam(group, 1e-2) for group in groups]
        train(learner, episodes, 5, optimizer=optimizers, schedule="cosine", progress=False)
        runs.append(learner)
    assert_same(*runs)


@pytest.mark.slow
def test_two_processes_train_one_learner(tmp_path):
    """Through DDP over gloo: each has half of the tasks, and both arrive where one process with all of them does."""
    program = Path(__file__).with_name("distributed.py")
    started = [subprocess.Popen([sys.executable, program, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    alone = together.learner(seed=0)
    train(alone, together.episodes(), 4, meta_lr=0.01, progress=False)
    judged = evaluate(alone, together.episodes(), 12).mean
    for rank in range(2):
        state, mean, refused = torch.load(tmp_path / f"rank{rank}")
        for name, value in alone.state_dict().items():
            assert torch.allclose(state[name], value, rtol=1e-4, atol=1e-6), name
        assert mean == pytest.approx(judged, rel=1e-4)
        assert refused == "learner must not be wrapped: Reptile updates itself (got DistributedDataParallel)"
    loaded = load(tmp_path / "run.safetensors", together.learner(seed=5))
    assert evaluate(loaded, together.episodes(), 12).mean == pytest.approx(judged, rel=1e-4)


def test_minutes_end_a_run(tmp_path):
    learner, episodes, more = parts()
    history = train(learner, episodes, 10**6, minutes=0.002, checkpoint=tmp_path / "c", progress=False, **more)
    assert history.stopped_by == "minutes"
    assert 0.12 <= history.seconds < 5
    assert checkpoint.load(tmp_path / "c")["step"] == history.training[-1].step < 10**6
    with pytest.raises(ValueError, match=r"minutes must be >= 0 \(got -1\)"):
        train(learner, episodes, 3, minutes=-1, progress=False, **more)


def test_batches_of_other_forms_are_trained_on():
    whole, episodes, more = parts(1)
    train(whole, episodes, 4, progress=False, **more)
    learner, episodes, more = parts(1)

    class Tuples(type(episodes)):
        def __next__(self):
            return super().__next__().tensors

    episodes.__class__ = Tuples
    train(learner, episodes, 4, progress=False, **more)
    assert_same(whole, learner)
