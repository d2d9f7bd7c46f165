"""ANIL against its paper: the head adapts, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import C, backends, perceptron
from tests.building import F as FEATURES
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks, descended


def model():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


@backends
@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_the_papers(steps, backend):
    """Features once, then steps of the head alone on them."""
    learner, batch = mf.ANIL(model(), 0.3, steps, learn_inner_lr=True, backend=backend), class_tasks(FEATURES)
    body, head = learner.model[:-1], learner.model[-1]

    def unbatched(x, y, query_x, query_y):
        start, rates = dict(head.named_parameters()), dict.fromkeys(("weight", "bias"), learner.inner_lr)
        adapted = descended(head, start, rates, body(x), y, steps)
        return F.cross_entropy(functional_call(head, adapted, (body(query_x),)), query_y)

    assert_exact(learner, batch, unbatched)


@backends
def test_the_body_does_not_adapt(backend):
    learner, batch = mf.ANIL(model(), 0.3, 3, backend=backend), class_tasks(FEATURES)
    weights = learner.adapt(*batch.tensors[:2]).as_dict()
    for name, value in learner.model.named_parameters():
        assert all(torch.equal(each, value) for each in weights[name]) == (not name.startswith("3."))


@backends
def test_it_is_maml_that_adapts_the_head(backend):
    net, batch = model(), class_tasks(FEATURES)
    ours, mamls = mf.ANIL(net, 0.2, 3, backend=backend), mf.MAML(net, 0.2, 3, adapt="3.*", backend=backend)
    assert torch.equal(ours(batch).task_losses, mamls(batch).task_losses)


@backends
def test_a_named_head(backend):
    """Of several layers."""
    head = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, C))
    learner = mf.ANIL(
        nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), head).double(), head="2", inner_steps=2, backend=backend
    )
    assert list(learner.problem().rates) == ["2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"]
    assert relative_error(learner(class_tasks(FEATURES)).loss, torch.tensor(0.0).double() + 1) < 10


def test_options_are_mamls():
    learner = mf.ANIL(model(), 0.1, 2, first_order=True, batch_norm="per_step", momentum=0.5, label_smoothing=0.1)
    assert learner(class_tasks(FEATURES)).loss.isfinite()
    assert learner.problem().momentum == 0.5
    shown = repr(learner)
    assert "head='3'" in shown
    assert "momentum=0.5" in shown


def test_it_keeps_the_contract():
    mf.check_learner(mf.ANIL(perceptron()), class_tasks(FEATURES))
    assert mf.check_gradients(mf.ANIL(perceptron()), class_tasks(FEATURES)).order == "second order"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "classifier"}, r"head must name a layer with parameters \(got 'classifier'; there are 0, 1, 3\)"),
        ({"head": "2"}, r"head must name a layer with parameters \(got '2'; there are 0, 1, 3\)"),
        ({"model": nn.Conv2d(1, 2, 3)}, r"head must be named, .* \(got None; there is no linear layer\)"),
        ({"inner_lr": -1.0}, r"inner_lr must be >= 0 and finite \(got -1\)"),
        ({"inner_steps": -1}, r"inner_steps must be >= 0 \(got -1\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        mf.ANIL(**{"model": model(), **options})


def test_what_adapts_is_no_option():
    with pytest.raises(TypeError, match="adapt"):
        mf.ANIL(model(), adapt="0.*")
    with pytest.raises(TypeError, match=r"head must be the name of a layer \(got 3\)"):
        mf.ANIL(model(), head=3)
