"""Expected calibration error, one bin and one sample at a time, and what `evaluate` says of it."""

import math

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.runs.calibration import calibration_error
from tests.learners.comparing import class_tasks


def by_hand(probabilities, classes, bins):
    total = 0.0
    for number in range(bins):
        inside = [
            (max(row), row.index(max(row)) == right)
            for row, right in zip(probabilities, classes, strict=True)
            if number / bins < max(row) <= (number + 1) / bins
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(sure for sure, _ in inside) / len(inside)
            total += len(inside) / len(classes) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_it_is_the_papers(bins):
    probabilities, classes = (2 * torch.randn(200, 4).double()).softmax(1), torch.randint(4, (200,))
    expected = by_hand(probabilities.tolist(), classes.tolist(), bins)
    assert calibration_error(probabilities, classes, bins) == pytest.approx(expected, rel=1e-9)


def test_what_is_as_sure_as_it_is_right_has_none():
    sure = torch.tensor([[0.75, 0.25]]).expand(400, 2)
    assert calibration_error(sure, (torch.arange(400) % 4 == 0).long()) == pytest.approx(0, abs=1e-7)
    certain = torch.eye(3)
    assert calibration_error(certain, torch.arange(3)) == 0
    assert calibration_error(certain, torch.tensor([1, 2, 0])) == 1


@pytest.mark.parametrize("make", [mf.ProtoNet, mf.MatchingNet, mf.RelationNet, mf.R2D2])
def test_evaluate_says_how_sure_a_learner_is(make):
    learner, batches = make(nn.Linear(5, 6)).double(), [class_tasks(5) for _ in range(4)]
    found = mf.evaluate(learner, batches)
    probabilities, classes = [], []
    for batch in batches:
        probabilities.append(learner.adapt(*batch.tensors[:2])(batch.query_x).softmax(-1).detach().flatten(0, 1))
        classes.append(batch.query_y.flatten())
    every, right = torch.cat(probabilities), torch.cat(classes)
    assert found.nll == pytest.approx(-float(every.gather(1, right[:, None]).log().mean()), rel=1e-9)
    assert found.calibration_error == pytest.approx(by_hand(every.tolist(), right.tolist(), 15), rel=1e-9)
    assert f"calibration error {100 * found.calibration_error:.2f} %" in str(found)
    assert f"negative log-likelihood {found.nll:.4f}" in str(found)


def test_learners_with_an_inner_loop_too():
    maml = mf.MAML(nn.Linear(5, 3), inner_lr=0.1, inner_steps=2).double()
    found = mf.evaluate(maml, [class_tasks(5)], steps=1)
    assert found.nll == pytest.approx(found.loss, rel=1e-9)
    assert 0 <= found.calibration_error <= 1
    numbers = mf.TaskBatch(*(torch.randn(3, 4, 2) for _ in range(4)))
    regression = mf.evaluate(mf.MAML(nn.Linear(2, 2), loss="mse"), [numbers])
    assert regression.nll is None
    assert "calibration" not in str(regression)


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be \[N, C\] and \[N\] \(got \[4, 2\], \[3\]\)"):
        calibration_error(torch.rand(4, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"bins must be >= 1 \(got 0\)"):
        calibration_error(torch.rand(4, 2), torch.zeros(4).long(), 0)
    assert math.isfinite(calibration_error(torch.tensor([[0.0, 0.0]]), torch.tensor([1])))
