"""ProtoNet against the paper's algorithm, written for one episode and one class at a time."""

import copy

import pytest
import torch
from torch import nn

from metaaug_fast import ProtoNet, TaskBatch
from metaaug_fast.models import conv4, perceptron
from tests.exactness import assert_close
from tests.learners.comparing import assert_exact

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


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "cosine"},
        {"distance": "cosine", "temperature": 0.3, "learn_temperature": False},
        {"temperature": 4.0, "learn_temperature": True},
        {"clustering": 0.7},
    ],
    ids=lambda options: ", ".join(options),
)
def test_other_forms(options):
    """Of a distance, a temperature and an added variance, one sample and one class at a time."""
    learner, batch = ProtoNet(perceptron(None, (F,), (7, 6), "tanh"), **options).double(), tasks()

    def unbatched(x, y, query_x, query_y):
        embedded, queries = learner.model(x), learner.model(query_x)
        prototypes = [embedded[y == way].mean(0) for way in range(WAYS)]
        loss = 0.0
        for query, label in zip(queries, query_y, strict=True):
            if learner.closeness.distance == "cosine":
                close = [(query @ each) / query.norm() / each.norm() for each in prototypes]
            else:
                close = [-((query - each) ** 2).sum() for each in prototypes]
            loss = loss - (torch.stack(close) / learner.closeness.temperature).log_softmax(0)[label] / len(queries)
        every, labels = torch.cat([embedded, queries]), torch.cat([y, query_y])
        means = [every[labels == way].mean(0) for way in range(WAYS)]
        middle = sum(means) / WAYS
        within = sum(((one - means[label]) ** 2).sum() for one, label in zip(every, labels, strict=True)) / len(every)
        between = sum(((mean - middle) ** 2).sum() for mean in means) / WAYS
        return loss + learner.clustering * within / between

    assert_exact(learner, batch, unbatched)
    learner.eval()
    judged = learner.adapt(*batch.tensors[:2]).evaluate(*batch.tensors[2:])
    assert torch.allclose(learner(batch).task_losses, judged.task_losses, rtol=1e-12)  # nothing is added


@pytest.mark.parametrize("clustering", [0.0, 0.7])
def test_tasks_of_different_sizes(clustering):
    """What the mask leaves out counts nowhere: neither its samples, were they NaN, nor its labels."""
    learner, batch = ProtoNet(perceptron(None, (F,), (7,), "tanh"), clustering=clustering).double(), tasks()
    padded_x = torch.cat([batch.support_x, torch.full((T, 2, F), torch.nan).double()], 1)
    padded_y = torch.cat([batch.support_y, torch.full((T, 2), -100)], 1)
    mask = torch.ones(T, 10, dtype=torch.bool)
    mask[:, 8:] = False
    padded = TaskBatch(padded_x, padded_y, *batch.tensors[2:])
    assert torch.allclose(learner(padded, mask=mask).task_losses, learner(batch).task_losses, rtol=1e-12)
    mask[0, (batch.support_y[0] == 2).nonzero()[0]] = False  # one of three
    one = learner.adapt(padded_x, padded_y, mask=mask)(batch.query_x)[0]
    kept = mask[0, :8]
    alone = learner.adapt(batch.support_x[0, kept], batch.support_y[0, kept])(batch.query_x[0])
    assert torch.allclose(one, alone, rtol=1e-12)
    single = learner.adapt(padded_x[0], padded_y[0], mask=mask[0])(batch.query_x[0])
    assert torch.allclose(single, alone, rtol=1e-12)


def test_batch_norms_do_not_see_what_a_mask_leaves_out():
    """In training, where a batch's statistics are taken: losses, gradients and running statistics."""
    model = conv4(None, (1, 16, 16), hidden=3).double()
    learner, padded = ProtoNet(model), ProtoNet(copy.deepcopy(model))
    y = torch.arange(3).repeat(2, 1)
    batch = TaskBatch(torch.rand(2, 3, 1, 16, 16).double(), y, torch.rand(2, 3, 1, 16, 16).double(), y)
    more_x = torch.cat([100 * torch.rand(2, 2, 1, 16, 16).double(), batch.support_x], 1)
    more = TaskBatch(more_x, torch.cat([y[:, :2], y], 1), batch.query_x, batch.query_y)
    mask = torch.tensor([[False, False, True, True, True]]).expand(2, -1)
    one, other = learner(batch), padded(more, mask=mask)
    assert torch.allclose(one.task_losses, other.task_losses, rtol=1e-10)
    one.loss.backward()
    other.loss.backward()
    assert_close(*({name: value.grad for name, value in each.named_parameters()} for each in (padded, learner)))
    for name, value in padded.model.named_buffers():
        assert torch.allclose(value, learner.model.get_buffer(name), rtol=1e-12), name


def test_it_says_what_computes_it():
    learner = ProtoNet(conv4(ways=None, hidden=4))
    assert learner.runs_on((1, 28, 28)) == "fused encoder"
    learner.model[0].append(nn.SiLU())
    assert learner.runs_on((1, 28, 28)) == "torch"
    words = ProtoNet(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3)))
    assert words.runs_on((5,), ids=True) == "torch"


def test_a_permuted_support_set_is_the_same():
    learner, batch = ProtoNet(perceptron(None, (F,), (7,))).double(), tasks()
    order = torch.randperm(batch.support_x.shape[1])
    one = learner.adapt(*batch.tensors[:2])(batch.query_x)
    other = learner.adapt(batch.support_x[:, order], batch.support_y[:, order])(batch.query_x)
    assert torch.allclose(one, other, rtol=1e-12)


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
    for name, value in {
        "temperature": -1.0,
        "distance": "l1",
        "clustering": -0.1,
        "learn_temperature": 1,
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got '?{value}"):
            ProtoNet(perceptron(None, (F,), (7,)), **{name: value})
    with pytest.raises(
        ValueError, match=r"mask must be bool \[3, 8\], a place for each support sample \(got torch.int64"
    ):
        ProtoNet(perceptron(None, (F,), (7,)).double())(batch, mask=batch.support_y)
    learner = ProtoNet(perceptron(None, (F,), (7,)).double())
    with pytest.raises(ValueError, match=r"steps must be None for ProtoNet, which has no inner loop \(got 2\)"):
        learner(batch, steps=2)
    unknown = TaskBatch(*batch.tensors[:3], batch.query_y + 1)
    for call in (lambda: learner(unknown), lambda: learner.adapt(*batch.tensors[:2]).evaluate(*unknown.tensors[2:])):
        if int(unknown.query_y.max()) == WAYS:
            with pytest.raises(ValueError, match=r"query_y must hold class ids 0..3 \(got 4\)"):
                call()
