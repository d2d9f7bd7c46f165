"""Conformal prediction sets: the threshold by hand, and the coverage over new tasks."""

import itertools
import math

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from tests.learners.comparing import class_tasks

COVERAGE = 0.8


def learner():
    return mf.ProtoNet(nn.Linear(5, 6)).double()


def noisy(tasks, queries=4):
    """Tasks of three classes that overlap, some tasks more than others."""
    batch = class_tasks(5, tasks=tasks, queries=queries)
    centres = 2 * torch.randn(tasks, 3, 5).double()
    spread = torch.rand(tasks, 1, 1).double() * 3

    def sampled(y):
        means = centres.gather(1, y.unsqueeze(2).expand(-1, -1, 5))
        return means + spread * torch.randn(means.shape).double()

    return mf.TaskBatch(sampled(batch.support_y), batch.support_y, sampled(batch.query_y), batch.query_y)


def test_the_threshold_is_the_quantile_in_which_each_task_counts_as_one():
    own, few, many = learner(), noisy(7, queries=2), noisy(6, queries=5)
    found = mf.conformal(own, [few, many], COVERAGE)
    pairs = []
    for batch in (few, many):
        p = own.adapt(*batch.tensors[:2])(batch.query_x).softmax(-1).detach()
        for row, labels in zip(p, batch.query_y, strict=True):
            pairs += [(1 - float(one[label]), 1 / len(labels) / 14) for one, label in zip(row, labels, strict=True)]
    pairs.sort()
    reached = itertools.accumulate(weight for _, weight in pairs)
    wanted = next(score for (score, _), total in zip(pairs, reached, strict=True) if total >= COVERAGE - 1e-12)
    assert found.threshold == pytest.approx(wanted, rel=1e-12)
    assert found.episodes == 13


def test_sets_hold_the_right_class_of_new_tasks_as_often_as_was_asked():
    """The mean over new tasks is within four standard errors of what is promised, and no set is larger than need be."""
    own = learner()
    found = mf.conformal(own, [noisy(400)], COVERAGE)
    tasks = noisy(2000)
    sets = found.adapt(*tasks.tensors[:2]).sets(tasks.query_x)
    assert sets.shape == (2000, 12, 3)
    covered = sets.gather(2, tasks.query_y.unsqueeze(2)).squeeze(2).double().mean(1)
    error = float(covered.std()) * math.sqrt(1 / 2000 + 1 / 400)
    assert abs(float(covered.mean()) - COVERAGE) < 4 * error + 1 / 401
    assert float(sets.double().sum(2).mean()) < 3
    single = found.adapt(tasks.support_x[0], tasks.support_y[0]).sets(tasks.query_x[0])
    assert torch.equal(single, sets[0])


def test_intervals_hold_the_right_number():
    own = mf.MAML(nn.Linear(2, 1), inner_lr=0.05, loss="mse").double()

    def lines(count):
        x, slope = torch.randn(count, 9, 2).double(), torch.randn(count, 2, 1).double()
        y = x @ slope + torch.rand(count, 1, 1) * torch.randn(count, 9, 1).double()
        return mf.TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])

    found, tasks = mf.conformal(own, [lines(400)], COVERAGE), lines(2000)
    low, high = found.adapt(*tasks.tensors[:2]).intervals(tasks.query_x)
    covered = ((low <= tasks.query_y) & (tasks.query_y <= high)).double().mean((1, 2))
    assert abs(float(covered.mean()) - COVERAGE) < 4 * float(covered.std()) * math.sqrt(1 / 2000 + 1 / 400) + 1 / 401


def test_the_learner_stays_as_it_was():
    own = learner().train()
    before = [value.clone() for value in own.state_dict().values()]
    found = mf.conformal(own, [noisy(30)], COVERAGE)
    assert own.training
    assert not found.adapt(*noisy(2).tensors[:2])._predict(noisy(2).query_x).requires_grad
    assert all(torch.equal(one, other) for one, other in zip(before, own.state_dict().values(), strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match=r"coverage must be above 0 and below 1 \(got 1.0\)"):
        mf.conformal(learner(), [noisy(30)], 1.0)
    with pytest.raises(ValueError, match=r"coverage must be >= 0 \(got -0.1\)"):
        mf.conformal(learner(), [noisy(30)], -0.1)
    with pytest.raises(ValueError, match=r"count must be at least 19 episodes for a coverage of 0.95 \(got 18\)"):
        mf.conformal(learner(), [noisy(18)], 0.95)
    with pytest.raises(TypeError, match=r"learner must be a Learner \(got Linear\)"):
        mf.conformal(nn.Linear(5, 3), [noisy(30)])
