import math

import pytest
import torch
from torch import nn

from metaaug_fast.data import ClassSamples, Episodes, Sinusoids
from metaaug_fast.learners import FGSM, PGD, attack_queries
from metaaug_fast.learners.maml import MAML
from metaaug_fast.learners.protonet import ProtoNet
from metaaug_fast.learners.r2d2 import R2D2
from metaaug_fast.learners.reptile import Reptile
from metaaug_fast.models import conv4, mlp, strided_conv4
from metaaug_fast.runs.evaluation import Evaluation, evaluate


def blobs(classes=12, samples=8):
    """Classes that are easy to tell apart: a direction each, with noise."""
    centres = torch.randn(classes, 1, 6)
    points = centres + 0.3 * torch.randn(classes, samples, 6)
    return ClassSamples.from_arrays(points.flatten(0, 1), torch.arange(classes).repeat_interleave(samples))


def test_accuracy_and_interval_are_those_of_the_episodes():
    learner = MAML(mlp([6, 16, 5]), inner_lr=0.5, inner_steps=3)
    episodes = Episodes(blobs(), shots=2, queries=3, tasks=7)
    accuracies, losses = [], []
    for index in range(3):
        tasks = episodes.batch(index)
        for task in range(7):
            model = learner.adapt(tasks.support_x, tasks.support_y).module(task)
            logits = model(tasks.query_x[task])
            accuracies.append(float((logits.argmax(-1) == tasks.query_y[task]).float().mean()))
            losses.append(float(nn.functional.cross_entropy(logits, tasks.query_y[task]).detach()))
    count = 17
    values = torch.tensor(accuracies[:count], dtype=torch.float64)
    result = evaluate(learner, episodes, count)
    assert result.metric == "accuracy"
    assert result.episodes == count
    assert result.steps == 3
    assert result.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert result.interval == pytest.approx(
        2.119905 * float(values.std()) / math.sqrt(count), abs=1e-6
    )  # Student's t, 16
    assert result.loss == pytest.approx(sum(losses[:count]) / count, rel=1e-4)
    assert result.by_step == ()


def test_repeated_calls_judge_alike_and_leave_no_trace():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    learner = MAML(model, inner_steps=2)
    episodes = Episodes(blobs(), tasks=5, queries=2)
    next(episodes)
    generator = torch.get_rng_state()
    assert evaluate(learner, episodes, 12) == evaluate(learner, episodes, 12)
    assert torch.equal(torch.get_rng_state(), generator)
    assert episodes.position == 1
    assert learner.training
    assert model.training
    assert all(parameter.grad is None for parameter in learner.parameters())
    learner.eval()
    evaluate(learner, episodes, 2)
    assert not learner.training


@torch.no_grad()
def test_regression_reports_the_loss_after_every_step():
    learner = MAML(mlp([1, 8, 1]), inner_lr=0.02, inner_steps=3, loss="mse")
    episodes = Episodes(Sinusoids(), shots=6, queries=5, tasks=10)
    result = evaluate(learner, episodes, 20, by_step=True)
    assert result.metric == "mse"
    assert len(result.by_step) == 4
    assert result.by_step[-1] == result.mean
    assert result.mean == pytest.approx(result.loss)
    queries = [episodes.batch(index) for index in range(2)]
    before = sum(
        float((learner.model(each.query_x.flatten(0, 1)) - each.query_y.flatten(0, 1)).square().mean())
        for each in queries
    )
    assert result.by_step[0] == pytest.approx(before / 2, rel=1e-5)
    assert evaluate(learner, episodes, 20, steps=2).mean == pytest.approx(result.by_step[2], rel=1e-6)
    assert not result.transductive


def test_reptile_and_callable_losses():
    def huber(prediction, target):
        return nn.functional.huber_loss(prediction, target)

    episodes = Episodes(Sinusoids(), shots=4, queries=5, tasks=4)
    learner = Reptile(mlp([1, 8, 1]), inner_lr=0.01, inner_batch=2, loss="mse")
    assert evaluate(learner, episodes, 8, steps=7).steps == 7
    learner = MAML(mlp([1, 8, 1]), inner_lr=0.01, loss=huber, backend="fallback")
    result = evaluate(learner, episodes, 8)
    assert result.metric == "huber"
    assert result.mean == pytest.approx(result.loss)


@pytest.mark.parametrize(
    ("policy", "transductive"), [("batch", True), ("per_step", True), ("running", False), ("frozen", False)]
)
def test_transduction_follows_the_batch_norm_policy(policy, transductive):
    learner = MAML(strided_conv4(hidden=2), batch_norm=policy)
    assert learner.transductive is transductive
    assert not MAML(strided_conv4(hidden=2, norm="group"), batch_norm="batch").transductive


def test_text_says_everything_that_a_figure_needs():
    result = Evaluation("accuracy", 0.97321, 0.00412, 0.1, 600, 1, True)
    assert str(result) == "accuracy 97.32 % +- 0.41 % (95 % interval, 600 episodes, 1 inner step, transductive)"
    result = Evaluation("accuracy", 0.5, 0.1, 0.1, 10, 3, False)
    assert str(result) == "accuracy 50.00 % +- 10.00 % (95 % interval, 10 episodes, 3 inner steps, not transductive)"
    assert str(Evaluation("mse", 0.77, 0.05, 0.77, 600, 1, False)).startswith("mse 0.7700 +- 0.0500 (95 % interval")


def test_bad_counts():
    learner = MAML(mlp([1, 8, 1]), loss="mse")
    episodes = Episodes(Sinusoids(), tasks=4)
    with pytest.raises(ValueError, match=r"count must be >= 2 episodes, .* \(got 1\)"):
        evaluate(learner, episodes, 1)
    with pytest.raises(ValueError, match=r"steps must be >= 0 \(got -1\)"):
        evaluate(learner, episodes, 4, steps=-1)


def test_any_iterable_of_batches_is_judged():
    learner = MAML(mlp([6, 16, 5]), inner_lr=0.5)
    episodes = Episodes(blobs(), shots=2, queries=3, tasks=4)
    batches = [episodes.batch(index) for index in range(3)]
    expected = evaluate(learner, episodes, 12)
    assert evaluate(learner, batches) == expected
    assert evaluate(learner, [batch.tensors for batch in batches]) == expected
    assert evaluate(learner, iter(batches), 12) == expected
    assert evaluate(learner, (episodes.batch(index) for index in range(9)), 10) == evaluate(learner, episodes, 10)
    assert evaluate(learner, [one for batch in batches for one in batch.split(1)]).mean == pytest.approx(expected.mean)
    with pytest.raises(ValueError, match=r"episodes must hold as many tasks as count, 13 \(got 12\)"):
        evaluate(learner, batches, 13)


# --- under attack ---

ATTACK = PGD(0.6, 5, random_start=False)


@pytest.mark.parametrize(
    "learner",
    [
        lambda: MAML(mlp([6, 16, 5]), 0.5, 3),
        lambda: ProtoNet(mlp([6, 16, 8])),
        lambda: R2D2(mlp([6, 16, 8]), ridge=0.1),
    ],
    ids=["maml", "protonet", "r2d2"],
)
def test_queries_are_attacked_against_the_adapted_learner(learner):
    learner, episodes = learner(), Episodes(blobs(), shots=2, queries=3, tasks=7)
    batches = [attack_queries(learner.eval(), episodes.batch(index), ATTACK) for index in range(3)]
    expected, clean = evaluate(learner, batches, 17), evaluate(learner, episodes, 17)
    learner.train()
    found = evaluate(learner, episodes, 17, attack=ATTACK)
    assert (found.mean, found.interval) == (expected.mean, expected.interval)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.loss > clean.loss
    assert found.mean < clean.mean
    assert found.attack is ATTACK
    assert evaluate(learner, episodes, 17, attack=PGD(0.0)).mean == clean.mean


def test_steps_count_under_attack():
    learner, episodes = MAML(mlp([6, 16, 5]), 0.5, 3), Episodes(blobs(), shots=2, queries=3, tasks=7)
    batches = [attack_queries(learner, episodes.batch(index), ATTACK, steps=1) for index in range(2)]
    assert evaluate(learner, episodes, 14, steps=1, attack=ATTACK).mean == evaluate(learner, batches, 14, steps=1).mean


def test_random_starts_are_the_same_in_each_call_and_leave_no_trace():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    learner, episodes, attack = MAML(model, batch_norm="running"), Episodes(blobs(), tasks=5, queries=2), PGD(0.3, 2)
    generator, before = torch.get_rng_state(), {name: each.clone() for name, each in learner.state_dict().items()}
    found = evaluate(learner, episodes, 12, attack=attack)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    assert evaluate(learner, episodes, 12, attack=attack) == found
    assert learner.training
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_encoders_of_pictures_are_attacked():
    """With batch norms, which go by their running statistics."""
    learner = ProtoNet(conv4(None, (1, 16, 16), hidden=4))
    centres = torch.rand(8, 1, 1, 16, 16)
    pictures = (centres + 0.1 * torch.randn(8, 6, 1, 16, 16)).clamp(0, 1).flatten(0, 1)
    episodes = Episodes(ClassSamples.from_arrays(pictures, torch.arange(8).repeat_interleave(6)), tasks=4, queries=2)
    learner(episodes.batch(0))
    attack = PGD(0.2, 5, low=0, high=1)
    assert evaluate(learner, episodes, 8, attack=attack).loss > evaluate(learner, episodes, 8).loss


def test_a_figure_under_attack_says_so():
    result = Evaluation("accuracy", 0.5, 0.1, 0.1, 10, 1, False, attack=FGSM(0.1, 0, 1))
    assert str(result) == (
        "accuracy 50.00 % +- 10.00 % (95 % interval, 10 episodes, 1 inner step, not transductive, "
        "under fgsm of radius 0.1, 1 step of 0.1, in 0..1)"
    )
    assert result.as_dict()["attack"] == {
        "name": "fgsm", "radius": 0.1, "steps": 1, "step": 0.1, "random_start": False, "low": 0, "high": 1,
    }  # fmt: skip
    assert Evaluation("accuracy", 0.5, 0.1, 0.1, 10, 1, False).as_dict()["attack"] is None


def test_regression_is_attacked_through_its_loss():
    learner, episodes = MAML(mlp([1, 8, 1]), 0.01, loss="mse"), Episodes(Sinusoids(), shots=5, queries=5, tasks=4)
    assert evaluate(learner, episodes, 8, attack=PGD(0.5)).mean > evaluate(learner, episodes, 8).mean


def test_attacks_that_cannot_be():
    learner, episodes = MAML(mlp([6, 16, 5])), Episodes(blobs(), tasks=4)
    with pytest.raises(TypeError, match=r"attack must be a PGD, an FGSM or None \(got 'pgd'\)"):
        evaluate(learner, episodes, 8, attack="pgd")
    with pytest.raises(ValueError, match="by_step must be False under an attack"):
        evaluate(learner, episodes, 8, by_step=True, attack=ATTACK)
    with pytest.raises(ValueError, match="inputs must lie between low and high, 0 and 1"):
        evaluate(learner, episodes, 8, attack=FGSM(0.1, 0, 1))
    assert learner.training
