"""Hallucination against the paper's pipeline, written a task and a class at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment.hallucinate import Hallucination, PictureGenerator, VectorGenerator
from tests.building import perceptron
from tests.exactness import assert_close, relative_error
from tests.learners.comparing import class_tasks

pytestmark = pytest.mark.usefixtures("fresh_numbers")

FEATURES, NOISE = 4, 3


def generator():
    made = VectorGenerator(FEATURES, NOISE).double()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return made


def enlarged(learner, x, y):
    """A support set and what is made of it, class by class and one by one, with the z of evaluation."""
    samples, labels = list(x), y.tolist()
    for label in range(max(labels) + 1):
        own = [sample for sample, other in zip(x, y.tolist(), strict=True) if other == label]
        for number in range(learner.per_class):
            turn, member = divmod(number, len(own))
            samples.append(learner.generator(own[member][None], learner.turns.double()[turn][None])[0])
            labels.append(label)
    return torch.stack(samples), torch.tensor(labels)


def nearest_mean(learner, x, y, query_x, query_y):
    means = torch.stack([x[y == label].mean(0) for label in range(int(y.max()) + 1)])
    return F.cross_entropy(-torch.cdist(query_x, means).square(), query_y)


def descended(learner, x, y, query_x, query_y):
    model, theta = learner.learner.model, dict(learner.learner.model.named_parameters())
    for _ in range(2):
        loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
        slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {name: value - 0.4 * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
    return F.cross_entropy(functional_call(model, theta, (query_x,)), query_y)


def protonet():
    return mf.ProtoNet(nn.Identity()), nearest_mean


def maml():
    return mf.MAML(perceptron(), inner_lr=0.4, inner_steps=2, backend="fused"), descended


@pytest.mark.parametrize(("make", "per_class"), [(protonet, 1), (protonet, 5), (maml, 0), (maml, 1), (maml, 5)])
def test_losses_and_gradients(make, per_class):
    """Of the generator, too, for which they go through the steps of the inner loop."""
    inner, paper = make()
    learner = Hallucination(inner, generator(), per_class, NOISE).eval()
    batch = class_tasks(FEATURES)
    out = learner(batch)
    losses = [
        paper(learner, *enlarged(learner, *task[:2]), *task[2:]) for task in zip(*batch.tensors, strict=True)
    ]  # fmt: skip
    expected = torch.stack(losses)
    assert relative_error(out.task_losses, expected) < 1e-10
    assert_close(slopes(learner, out.loss), slopes(learner, expected.mean()))


def slopes(learner, loss):
    names, values = zip(*learner.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True), strict=True))


@pytest.mark.parametrize("make", [protonet, maml])
def test_features_behind_a_body(make):
    """The generator makes features; the body learns from these, from support and from query."""
    inner, paper = make()
    body = nn.Sequential(nn.Linear(6, FEATURES), nn.Tanh()).double()
    learner = Hallucination(inner, generator(), 2, NOISE, body).eval()
    batch = class_tasks(6)
    losses = [
        paper(learner, *enlarged(learner, body(x), y), body(query_x), query_y)
        for x, y, query_x, query_y in zip(*batch.tensors, strict=True)
    ]
    out = learner(batch)
    assert relative_error(out.task_losses, torch.stack(losses)) < 1e-10
    assert_close(slopes(learner, out.loss), slopes(learner, torch.stack(losses).mean()))
    adapted = learner.adapt(*batch.tensors[:2])
    assert len(adapted) == batch.tasks
    assert relative_error(adapted.evaluate(*batch.tensors[2:]).task_losses, out.task_losses) < 1e-12


def test_classes_of_different_sizes():
    labels = torch.tensor([[0, 1, 1, 2, 2, 2], [2, 0, 1, 0, 0, 2]])
    x = torch.randn(2, 6, FEATURES).double()
    learner = Hallucination(protonet()[0], generator(), 4, NOISE).eval()
    made, ids = learner.make(x, labels)
    for task in range(2):
        more_x, more_y = enlarged(learner, x[task], labels[task])
        assert torch.equal(ids[task], more_y[6:])
        assert relative_error(made[task], more_x[6:]) < 1e-12


def test_training_draws_evaluation_does_not():
    learner, batch = Hallucination(protonet()[0], generator(), 4, NOISE), class_tasks(FEATURES)
    torch.manual_seed(3)
    first = learner(batch).task_losses
    second = learner(batch).task_losses
    torch.manual_seed(3)
    assert torch.equal(first, learner(batch).task_losses)
    assert not torch.equal(first, second)
    made, _ = learner.make(*batch.tensors[:2])
    assert not torch.allclose(made[:, 0], made[:, 2])  # of one sample, by other z
    learner.eval()
    state = torch.get_rng_state()
    assert torch.equal(learner(batch).task_losses, learner(batch).task_losses)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("body", [None, lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU())])
@pytest.mark.parametrize("make", [protonet, maml])
def test_it_keeps_the_contract(make, body):
    learner = Hallucination(make()[0], generator(), 4, NOISE, body and body().double())
    report = mf.check_learner(learner, class_tasks(FEATURES))
    assert {clause for clause in report.clauses.values() if clause != "kept"} == set()
    assert mf.check_gradients(Hallucination(maml()[0], generator(), 2, NOISE).eval(), class_tasks(FEATURES)).ok


def test_it_learns_what_a_class_varies_in():
    """Samples are a class's centre and a large shift along one direction, which one sample does not tell."""
    torch.manual_seed(0)
    direction = torch.tensor([4.0, 0.0, 0.0, 0.0])
    labels = torch.arange(60).repeat_interleave(10)
    x = torch.randn(60, 4)[labels] + direction * torch.randn(600, 1) + 0.1 * torch.randn(600, 4)
    data = mf.data.ClassSamples.from_arrays(x, labels)
    train, test = (
        mf.data.Episodes(part, ways=4, shots=1, queries=5, tasks=16)
        for part in (data.subset(range(40)), data.subset(range(40, 60)))
    )
    plain = mf.evaluate(mf.ProtoNet(nn.Identity()), test, 100)
    learner = Hallucination(mf.ProtoNet(nn.Identity()), VectorGenerator(4, 4), 8, 4)
    mf.train(learner, train, 300, meta_lr=0.01, progress=False)
    assert mf.evaluate(learner, test, 100).mean > plain.mean + 0.05


def test_pictures_stay_pictures():
    made = PictureGenerator(3, NOISE, hidden=4)
    learner = Hallucination(mf.MAML(mf.models.conv4(5, (3, 16, 16), hidden=4)), made, 2, NOISE)
    y = torch.arange(5).repeat(2, 1)
    x = torch.rand(2, 5, 3, 16, 16)
    pictures, _ = learner.make(x, y)
    assert pictures.shape == (2, 10, 3, 16, 16)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    learner(mf.TaskBatch(x, y, x, y)).loss.backward()
    assert all(float(value.grad.norm()) > 0 for value in made.parameters())
    copied = copy.deepcopy(learner)
    copied.load_state_dict(learner.state_dict())
    assert copied.eval()(mf.TaskBatch(x, y, x, y)).loss == learner.eval()(mf.TaskBatch(x, y, x, y)).loss


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learner": nn.Linear(4, 3)}, TypeError, r"learner must be a Learner \(got Linear\)"),
        ({"generator": None}, TypeError, r"generator must be an nn.Module \(got NoneType\)"),
        ({"body": abs}, TypeError, r"body must be an nn.Module \(got builtin_function_or_method\)"),
        ({"per_class": -1}, ValueError, r"per_class must be >= 0 \(got -1\)"),
        ({"noise": 0}, ValueError, r"noise must be >= 1 \(got 0\)"),
        ({"seed": 0.5}, TypeError, r"seed must be an integer \(got 0.5\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        Hallucination(**{"learner": protonet()[0], "generator": generator(), **options})


def test_bad_tasks_and_generators():
    batch = class_tasks(FEATURES)
    learner = Hallucination(protonet()[0], generator(), 2, NOISE)
    with pytest.raises(ValueError, match="support_y must be class ids"):
        learner(mf.TaskBatch(batch.support_x, batch.support_x, *batch.tensors[2:]))
    with pytest.raises(ValueError, match=r"support_y must have a sample of each class 0..3 in every task"):
        learner.make(batch.support_x, batch.support_y + 1)
    learner.generator = VectorGenerator(FEATURES, NOISE).double()
    learner.generator.layers[-1] = nn.Linear(FEATURES, 7).double()
    with pytest.raises(ValueError, match=r"generator must give samples \[N, 4\] \(got \(18, 7\)\)"):
        learner(batch)


def test_a_generator_learns_in_second_order_alone():
    learner = Hallucination(protonet()[0], generator(), 2, NOISE)
    learner.learner = mf.MAML(perceptron(), first_order=True)
    with pytest.raises(ValueError, match=r"learner must be of second order.*\(got MAML of first order\)"):
        learner(class_tasks(FEATURES))
    with torch.no_grad():
        assert learner(class_tasks(FEATURES)).loss.isfinite()
