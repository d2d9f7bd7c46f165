"""BOIL against its paper: all but the head adapts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import F as FEATURES
from tests.building import backends, perceptron
from tests.learners.comparing import assert_exact, class_tasks, descended


def model():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


@backends
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_papers(steps, backend):
    """Steps of the extractor, of rate 0 in the classifier."""
    learner, batch = mf.BOIL(model(), 0.3, steps, learn_inner_lr=True, backend=backend), class_tasks(FEATURES)
    head = learner.model[-1]

    def unbatched(x, y, query_x, query_y):
        body, theta = learner.model[:-1], dict(learner.model[:-1].named_parameters())
        rates = dict.fromkeys(theta, learner.inner_lr)
        adapted = descended(body, theta, rates, x, y, steps, lambda features, y: F.cross_entropy(head(features), y))
        return F.cross_entropy(head(functional_call(body, adapted, (query_x,))), query_y)

    assert_exact(learner, batch, unbatched)


@backends
def test_the_head_does_not_adapt(backend):
    learner, batch = mf.BOIL(model(), 0.3, 3, backend=backend), class_tasks(FEATURES)
    weights = learner.adapt(*batch.tensors[:2]).as_dict()
    for name in ("3.weight", "3.bias"):
        assert all(torch.equal(each, learner.model.get_parameter(name)) for each in weights[name])
    assert not torch.equal(weights["0.weight"][0], learner.model[0].weight)


def test_frozen_and_per_step_parameters_stay_out():
    net = model()
    net[0].bias.requires_grad_(False)
    assert list(mf.BOIL(net).problem().rates) == ["0.weight", "1.weight", "1.bias"]
    assert list(mf.BOIL(net, batch_norm="per_step").problem().rates) == ["0.weight"]


def test_it_keeps_the_contract():
    mf.check_learner(mf.BOIL(perceptron()), class_tasks(FEATURES))
    assert mf.check_gradients(mf.BOIL(perceptron(), inner_steps=2), class_tasks(FEATURES)).order == "second order"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "classifier"}, r"head must name a layer with parameters \(got 'classifier'; there are 0, 1, 3\)"),
        ({"model": nn.Linear(2, 2)}, r"head must leave other parameters that require a gradient \(got None\)"),
        ({"model": nn.Conv2d(1, 2, 3)}, r"head must be named, .* \(got None; there is no linear layer\)"),
        ({"inner_lr": -1.0}, r"inner_lr must be >= 0 and finite \(got -1\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        mf.BOIL(**{"model": model(), **options})
