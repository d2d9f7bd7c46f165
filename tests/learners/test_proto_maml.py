"""Proto-MAML against its paper, and against prototypical networks where it takes no step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import backends, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks, descended


def model():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


def papers(learner, steps):
    """A task's loss: features, class means one by one, the head of them, steps."""
    body = learner.model[:-1]

    def unbatched(x, y, query_x, query_y):
        features = body(x)
        centres = torch.stack([features[y == way].mean(0) for way in range(3)])
        start = dict(learner.model.named_parameters())
        start |= {"3.weight": 2 * centres, "3.bias": -(centres**2).sum(1)}
        rates = {name: rate.value for name, rate in learner.problem().rates.items()}
        adapted = descended(learner.model, start, rates, x, y, steps)
        return F.cross_entropy(functional_call(learner.model, adapted, (query_x,)), query_y)

    return unbatched


@backends
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_it_is_the_papers(steps, backend):
    learner = mf.ProtoMAML(model(), 0.3, steps, learn_inner_lr=steps > 0, backend=backend)
    assert_exact(learner, class_tasks(4), papers(learner, steps))


@backends
def test_gradients_reach_the_support_samples(backend):
    learner, batch = mf.ProtoMAML(model(), 0.3, 2, backend=backend), class_tasks(4)
    batch.support_x.requires_grad_()
    assert_exact(learner, batch, papers(learner, 2), {"support_x": batch.support_x})


@backends
def test_a_head_that_does_not_adapt_stays_at_the_prototypes(backend):
    learner, batch = mf.ProtoMAML(model(), 0.3, 2, adapt=["0.*", "1.*"], backend=backend), class_tasks(4)
    assert_exact(learner, batch, papers(learner, 2))
    weights, start = (learner.adapt(*batch.tensors[:2], steps=steps).as_dict() for steps in (2, 0))
    assert torch.equal(weights["3.weight"], start["3.weight"])


@backends
def test_without_steps_it_is_protonet(backend):
    """Up to the squared length of a query's features, which is the same for all classes."""
    net, batch = perceptron(), class_tasks(4, shots=3)
    learner, protonet = mf.ProtoMAML(net, inner_steps=0, backend=backend), mf.ProtoNet(net[:-1])
    out, expected = learner(batch), protonet(batch)
    assert relative_error(out.task_losses, expected.task_losses) < 1e-10
    assert torch.equal(out.accuracy, expected.accuracy)
    found, closeness = (each.adapt(*batch.tensors[:2])(batch.query_x) for each in (learner, protonet))
    squares = net[:-1](batch.query_x.flatten(0, 1)).square().sum(-1).view(3, -1, 1)
    assert relative_error(found - squares, closeness) < 1e-10


@backends
@pytest.mark.parametrize(
    "options", [{"batch_norm": "per_step", "inner_steps": 2}, {"batch_norm": "frozen"}, {"first_order": True}]
)
def test_mamls_options(options, backend):
    """As the reference has it from that start."""
    learner = mf.ProtoMAML(model(), 0.2, **{"inner_steps": 1, **options}, backend=backend)
    report = mf.check_gradients(learner, class_tasks(4))
    assert report.order == ("first order" if learner.first_order else "second order"), report
    assert report.relative_error < 1e-8


def test_by_step_is_forward_for_each():
    learner, batch = mf.ProtoMAML(model(), 0.2, 3), class_tasks(4)
    for found, wanted in zip(learner.by_step(batch), mf.Learner.by_step(learner, batch), strict=True):
        assert relative_error(found.task_losses, wanted.task_losses) < 1e-12


def test_dropout_drops_in_training_alone():
    learner, batch = mf.ProtoMAML(perceptron(nn.Dropout(0.5), nn.Tanh())), class_tasks(4)
    assert not torch.equal(learner(batch).loss, learner(batch).loss)
    learner.eval()
    assert torch.equal(learner(batch).loss, learner(batch).loss)


@backends
def test_prototypes_follow_the_mode(backend):
    """Under "running" those of evaluation are normalised by running statistics, though training came before."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)), nn.Sequential(nn.Linear(7, 3))).double()
    learner, batch = mf.ProtoMAML(net, inner_steps=0, batch_norm="running", backend=backend), class_tasks(4)
    learner(batch)
    net.eval()
    weights = learner.adapt(*batch.tensors[:2]).as_dict()["1.0.weight"]
    for task, (x, y) in enumerate(zip(*batch.tensors[:2], strict=True)):
        centres = torch.stack([net[0](x[y == way]).mean(0) for way in range(3)])
        assert relative_error(weights[task], 2 * centres) < 1e-12
    assert not learner.transductive


@backends
def test_a_replaced_layer_counts_at_once(backend):
    learner, batch = mf.ProtoMAML(model(), 0.3, 1, backend=backend), class_tasks(4)
    learner(batch)
    learner.model[0] = nn.Linear(4, 7).double()
    assert_exact(learner, batch, papers(learner, 1))


def test_it_keeps_the_contract():
    mf.check_learner(mf.ProtoMAML(perceptron()), class_tasks(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "classifier"}, r"head must name a layer with parameters \(got 'classifier'; there are 0, 1, 3\)"),
        ({"head": "1"}, r"head must be a linear layer with a bias \(got BatchNorm1d\(7.* at '1'\)"),
        (
            {"model": nn.Linear(4, 3, bias=False)},
            r"head must be a linear layer with a bias \(got Linear\(.*bias=False\)",
        ),
        ({"model": nn.Conv2d(1, 2, 3)}, r"head must be named, .* \(got None; there is no linear layer\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        mf.ProtoMAML(**{"model": model(), **options})


@pytest.mark.parametrize("ways", [2, 4])
def test_ways_are_the_heads_outputs(ways):
    learner, batch = mf.ProtoMAML(model()), class_tasks(4, ways=ways)
    message = rf"support_y must have the 3 classes of the head's outputs \(got {ways}\)"
    for call in (lambda: learner(batch), lambda: learner.adapt(*batch.tensors[:2]), lambda: learner.by_step(batch)):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_support_sets():
    learner, batch = mf.ProtoMAML(model()), class_tasks(4)
    with pytest.raises(ValueError, match=r"support_y must be class ids, int64 \[T, S\] \(got torch.float64"):
        learner.adapt(batch.support_x, torch.rand(3, 6, 3).double())
    inner = mf.ProtoMAML(nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)).double(), head="0")
    with pytest.raises(
        ValueError, match=r"head must be the model's last layer, on features \[N, 4\] \(got \[N, 3\] before"
    ):
        inner(batch)
