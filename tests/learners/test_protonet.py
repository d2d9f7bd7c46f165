"""ProtoNet against the paper's algorithm, written for one episode and one class at a time."""

import copy

import pytest
import torch
from torch import nn

from metaaug_fast import ProtoNet, TaskBatch
from metaaug_fast.models import conv4, perceptron

T, F = 3, 5
WAYS, COUNTS = 4, (2, 1, 3, 2)  # support samples of each class


def tasks(ways=WAYS, counts=COUNTS, queries=6):
    labels = torch.cat([torch.full((count,), way) for way, count in enumerate(counts)])
    y = torch.stack([labels[torch.randperm(len(labels))] for _ in range(T)])
    x, query_x = (torch.randn(T, count, F, dtype=torch.float64) for count in (len(labels), queries))
    return TaskBatch(x, y, query_x, torch.randint(ways, (T, queries)))


def unbatched(model, batch, task):
    """Loss and accuracy of one episode, from the paper's equations (1) and (2) and algorithm 1."""
    x, y, query_x, query_y = (each[task] for each in batch.tensors)
    prototypes = [model(x[y == way]).sum(0) / (y == way).sum() for way in range(int(y.max()) + 1)]
    loss, right = 0.0, 0
    for sample, label in zip(query_x, query_y, strict=True):
        embedded = model(sample[None])[0]
        distances = torch.stack([((embedded - prototype) ** 2).sum() for prototype in prototypes])
        loss = loss + (distances[label] + torch.logsumexp(-distances, 0)) / len(query_x)
        right += int(distances.argmin() == label)
    return loss, right / len(query_x)


def test_loss_gradients_and_accuracy_are_the_papers():
    model, batch = perceptron(None, (F,), (7, 6), "tanh").double(), tasks()
    learner = ProtoNet(copy.deepcopy(model))
    out = learner(batch)
    expected, accuracies = zip(*(unbatched(model, batch, task) for task in range(T)), strict=True)
    assert torch.allclose(out.task_losses, torch.stack(expected), rtol=1e-10)
    assert out.accuracy.tolist() == pytest.approx(accuracies)
    got = torch.autograd.grad(out.loss, list(learner.parameters()))
    wanted = torch.autograd.grad(torch.stack(expected).mean(), list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-9


def test_adapted_tasks_predict_squared_distances():
    model, batch = perceptron(None, (F,), (7,), "tanh").double(), tasks()
    adapted = ProtoNet(model).adapt(batch.support_x, batch.support_y)
    prediction = adapted(batch.query_x)
    assert prediction.shape == (T, 6, WAYS)
    for way in range(WAYS):
        prototype = torch.stack([model(x[y == way]).mean(0) for x, y in zip(*batch.tensors[:2], strict=True)])
        embedded = torch.stack([model(x) for x in batch.query_x])
        wanted = -(embedded - prototype[:, None]).square().sum(-1)
        assert torch.allclose(prediction[..., way], wanted, rtol=1e-9, atol=1e-12)


def test_training_may_have_other_ways_than_testing():
    learner = ProtoNet(perceptron(None, (F,), (7,)).double())
    assert learner(tasks(7, (1,) * 7)).task_losses.shape == (T,)
    assert learner.adapt(*tasks().tensors[:2])(torch.randn(T, 2, F).double()).shape == (T, 2, WAYS)


def test_batch_norm_is_the_modules_own():
    """Its statistics are those of everything in training, and running in evaluation."""
    model = conv4(None, (1, 16, 16), hidden=3)
    learner, other = ProtoNet(model), copy.deepcopy(model)
    y = torch.arange(3).repeat(2, 1)
    batch = TaskBatch(torch.rand(2, 3, 1, 16, 16), y, torch.rand(2, 6, 1, 16, 16), y.repeat(1, 2))
    learner(batch)
    other(torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1))
    for name, value in other.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-5), name
    assert not learner.transductive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y.float()), r"support_y must be class ids, int64 \[T, S\] \(got torch.float32"),
        (lambda x, y: (x, y - 1), r"support_y must hold class ids >= 0 \(got -1\)"),
        (
            lambda x, y: (x, y.clamp(min=1)),
            r"support_y must have a sample of each class 0..3 in every task \(task 0 lacks 0",
        ),
        (lambda x, y: (x[:, 1:], y), "support_y must have the tasks and samples of support_x"),
    ],
)
def test_bad_support_sets(change, message):
    batch = tasks()
    learner = ProtoNet(perceptron(None, (F,), (7,)).double())
    with pytest.raises(ValueError, match=message):
        learner.adapt(*change(*batch.tensors[:2]))


def test_bad_arguments():
    batch = tasks()
    with pytest.raises(TypeError, match=r"model must be an nn.Module \(got str\)"):
        ProtoNet("conv4")
    with pytest.raises(ValueError, match=r"model must give features \[N, D\] \(got shape \(\d+, 2, 3\)\)"):
        ProtoNet(nn.Sequential(nn.Linear(F, 6), nn.Unflatten(1, (2, 3))).double())(batch)
    learner = ProtoNet(perceptron(None, (F,), (7,)).double())
    with pytest.raises(ValueError, match=r"steps must be None for ProtoNet, which has no inner loop \(got 2\)"):
        learner(batch, steps=2)
    unknown = TaskBatch(*batch.tensors[:3], batch.query_y + 1)
    for call in (lambda: learner(unknown), lambda: learner.adapt(*batch.tensors[:2]).evaluate(*unknown.tensors[2:])):
        if int(unknown.query_y.max()) == WAYS:
            with pytest.raises(ValueError, match=r"query_y must hold class ids 0..3 \(got 4\)"):
                call()
