"""Meta-SGD against its paper, and against MAML where all rates are one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import backends, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks, descended

BAD = [
    (-0.1, r"inner_lr must be >= 0 \(got -0.1\)"),
    ((0.1, -0.1), r"inner_lr must be >= 0 \(got -0.1\)"),
    ((0.2, 0.1), r"inner_lr must be a range \(low, high\) with low <= high \(got \(0.2, 0.1\)\)"),
    ([0.1, 0.2, 0.3], r"inner_lr must be a number or a range \(low, high\) \(got \[0.1, 0.2, 0.3\]\)"),
]


def model():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


@backends
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_papers(steps, backend):
    """Algorithm 1, with rates of both signs."""
    learner, batch = mf.MetaSGD(model(), (0.0, 0.6), steps, backend=backend), class_tasks(4)
    with torch.no_grad():
        for value in learner.inner_lr.values():
            value -= 0.2

    def unbatched(x, y, query_x, query_y):
        theta = dict(learner.model.named_parameters())
        alpha = {name: learner.inner_lr[name.replace(".", "/")] for name in theta}
        return F.cross_entropy(
            functional_call(learner.model, descended(learner.model, theta, alpha, x, y, steps), (query_x,)), query_y
        )

    assert_exact(learner, batch, unbatched)


@backends
def test_with_one_rate_it_is_maml(backend):
    net, batch = model(), class_tasks(4)
    learner, maml = mf.MetaSGD(net, 0.3, 2, backend=backend), mf.MAML(net, 0.3, 2, learn_inner_lr=True, backend=backend)
    out, expected = learner(batch), maml(batch)
    assert relative_error(out.task_losses, expected.task_losses) < 1e-12
    alpha = torch.autograd.grad(out.loss, list(learner.inner_lr.values()))
    (shared,) = torch.autograd.grad(expected.loss, maml.inner_lr)
    assert relative_error(sum(value.sum() for value in alpha), shared) < 1e-9


def test_rates_start_within_a_range_or_alike():
    for inner_lr, low, high in ((0.3, 0.3, 0.3), ((0.005, 0.1), 0.005, 0.1)):
        learner = mf.MetaSGD(model(), inner_lr)
        assert {tuple(value.shape) for value in learner.inner_lr.values()} == {(7, 4), (7,), (3, 7), (3,)}
        rates = torch.cat([value.detach().flatten() for value in learner.inner_lr.values()])
        assert low <= float(rates.min()) <= float(rates.max()) <= high
        assert (float(rates.std()) > 0) == (low != high)


def test_only_what_adapts_has_rates():
    assert set(mf.MetaSGD(model(), adapt="3.*").inner_lr) == {"3/weight", "3/bias"}


def test_it_keeps_the_contract():
    mf.check_learner(mf.MetaSGD(perceptron(), 0.1), class_tasks(4))
    assert mf.check_gradients(mf.MetaSGD(perceptron(), 0.1, 2), class_tasks(4)).order == "second order"


@pytest.mark.parametrize(("inner_lr", "message"), BAD)
def test_bad_rates(inner_lr, message):
    with pytest.raises(ValueError, match=message):
        mf.MetaSGD(model(), inner_lr)
