"""Weights and labels of a support set: their gradients against an unroll task by task, and what they learn."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import LearnedLabels, LearnedWeights
from metaaug_fast.tasks import TaskBatch
from tests.building import C, F, S, T, backends, perceptron, tasks
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.comparing import descended

RATE, STEPS = 0.3, 3


def unrolled(learner, x, y, query_x, query_y, weight=None):
    def loss(logits, target):
        each = nn.functional.cross_entropy(logits, target, reduction="none")
        return (each if weight is None else each * weight).mean()

    start = dict(learner.model.named_parameters())
    weights = descended(learner.model, start, dict.fromkeys(start, RATE), x, y, STEPS, loss)
    return nn.functional.cross_entropy(functional_call(learner.model, weights, (query_x,)), query_y)


def maml(backend="fused"):
    return mf.MAML(perceptron(), inner_lr=RATE, inner_steps=STEPS, backend=backend)


@backends
def test_gradients_of_weights(backend):
    learner, batch, weights = maml(backend), tasks(), LearnedWeights(T, S).double()
    nn.init.normal_(weights.logits)
    named = {"weights": weights.logits}
    got = gradients(learner(batch, sample_weight=weights()).loss, named)
    w = S * torch.softmax(weights.logits, 1)
    losses = [unrolled(learner, *(each[task] for each in batch.tensors), w[task]) for task in range(T)]
    assert_close(got, gradients(torch.stack(losses).mean(), named), 1e-8)


@backends
def test_gradients_of_labels(backend):
    learner, batch = maml(backend), tasks()
    labels = LearnedLabels(batch.support_y, C).double()
    nn.init.normal_(labels.logits)
    named = {"labels": labels.logits}
    got = gradients(learner(labels(batch)).loss, named)
    soft = torch.softmax(labels.logits, 2)
    losses = [
        unrolled(learner, batch.support_x[task], soft[task], batch.query_x[task], batch.query_y[task])
        for task in range(T)
    ]
    assert_close(got, gradients(torch.stack(losses).mean(), named), 1e-8)


def test_they_start_where_nothing_is_changed():
    batch = tasks()
    assert torch.equal(LearnedWeights(T, S)(), torch.ones(T, S))
    labels = LearnedLabels(batch.support_y, C, confidence=0.8)
    assert relative_error(labels.probabilities.gather(2, batch.support_y[..., None]), torch.full((T, S, 1), 0.8)) < 1e-6
    assert relative_error(labels.probabilities.sum(-1), torch.ones(T, S)) < 1e-6


def test_permuting_labels_permutes_the_probabilities():
    y, order = torch.arange(C).repeat(T, 2), torch.randperm(C)
    got = LearnedLabels(order[y]).probabilities
    assert torch.equal(got[..., order], LearnedLabels(y).probabilities)


def cluster_tasks(wrong: int) -> tuple[TaskBatch, torch.Tensor]:
    """Three clusters of six support samples each, of which the first few have the label of the next."""
    torch.manual_seed(0)
    centres, y = 3 * torch.eye(3, F), torch.arange(3).repeat(T, 6)
    x = centres[y] + 0.3 * torch.randn(T, 18, F)
    given = y.clone()
    given[:, :wrong] = (y[:, :wrong] + 1) % 3
    return TaskBatch(x, given, centres[y] + 0.3 * torch.randn(T, 18, F), y), y


def trained(module, loss, steps=60):
    optimizer = torch.optim.Adam(module.parameters(), 0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_weights_of_wrong_labels_fall():
    batch, _ = cluster_tasks(wrong=3)
    learner, weights = mf.MAML(nn.Linear(F, 3), inner_lr=0.5, inner_steps=3), LearnedWeights(T, 18)
    trained(weights, lambda: learner(batch, sample_weight=weights()).loss)
    found = weights().detach()
    assert found[:, :3].max() < 0.5 * found[:, 3:].mean()
    assert relative_error(found.mean(1), torch.ones(T)) < 1e-5


def test_wrong_labels_are_mended():
    batch, right = cluster_tasks(wrong=3)
    learner, labels = mf.MAML(nn.Linear(F, 3), inner_lr=0.5, inner_steps=3), LearnedLabels(batch.support_y)
    trained(labels, lambda: learner(labels(batch)).loss, 150)
    wrong = torch.arange(18) < 3
    found = labels.probabilities.detach()
    assert (found.argmax(-1) == right)[:, wrong].all()


def test_wrong_arguments():
    y = torch.zeros(T, S).long()
    for call, message in [
        (lambda: LearnedWeights(0, 3), r"tasks must be >= 1 \(got 0\)"),
        (lambda: LearnedWeights(2, 1.5), "samples must be an integer"),
        (lambda: LearnedLabels([0, 1]), "support_y must be a tensor"),
        (lambda: LearnedLabels(y.float()), "support_y must be class ids"),
        (lambda: LearnedLabels(y[0]), "support_y must be class ids"),
        (lambda: LearnedLabels(y - 1), r"support_y must hold class ids >= 0 \(got -1\)"),
        (lambda: LearnedLabels(y + 3, ways=3), r"support_y must hold class ids 0..2 \(got 3\)"),
        (lambda: LearnedLabels(y, ways=0), "ways must be >= 1"),
        (lambda: LearnedLabels(y, 4, 0.2), r"confidence must be above 1 / ways, 0.25, and below 1 \(got 0.2\)"),
        (lambda: LearnedLabels(y, 4, 1.0), "confidence must be above"),
        (lambda: LearnedLabels(y[:2], 3)(tasks()), "tasks must have support sets"),
        (lambda: LearnedLabels(y, 3)(3), "tasks must be a TaskBatch"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
