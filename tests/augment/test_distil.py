"""Distilled samples: their gradient against a plain unroll, and what they teach."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import random_starts
from metaaug_fast.augment.distil import DistilledSet, distil
from metaaug_fast.engine.reference import pack
from tests.exactness import relative_error

pytestmark = pytest.mark.usefixtures("fresh_numbers")


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()


def unrolled(few, model, x, y, starts):
    """The paper's algorithm 1, a start at a time."""
    losses = []
    for flat in starts:
        pieces = flat.split([value.numel() for value in model.parameters()])
        theta = {
            name: piece.view_as(value).requires_grad_()
            for (name, value), piece in zip(model.named_parameters(), pieces, strict=True)
        }
        for rate in few.log_lr.exp():
            loss = F.cross_entropy(functional_call(model, theta, (few.x,)), few.y)
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: value - rate * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, theta, (x,)), y))
    return torch.stack(losses)


@pytest.mark.parametrize("own_start", [False, True])
def test_gradients_of_samples_and_rates(own_start):
    model = network()
    few = DistilledSet(torch.randn(6, 1, 5, 5).double(), torch.arange(3).repeat(2), 0.3, 3)
    x, y = torch.randn(7, 1, 5, 5).double(), torch.randint(3, (7,))
    starts = pack(dict(model.named_parameters())).detach()[None] if own_start else random_starts(model, 4, 7)
    out = few(model, x, y, None if own_start else starts)
    expected = unrolled(few, model, x, y, starts)
    assert relative_error(out.task_losses, expected) < 1e-10
    inputs = [few.x, few.log_lr]
    got, wanted = (torch.autograd.grad(loss, inputs) for loss in (out.loss, expected.mean()))
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) < 1e-9


def test_starts_are_what_layers_draw():
    model = nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(7)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    starts = random_starts(model, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert torch.equal(starts, random_starts(model, 3, seed=5))
    assert not torch.equal(starts, random_starts(model, 3, seed=6))
    weight, _, scale, shift, *_ = starts.split([value.numel() for value in model.parameters()], 1)
    assert 0.3 < float(weight.abs().max()) <= 0.5  # uniform below 4 ** -0.5
    assert not torch.equal(weight[0], weight[1])
    assert (scale == 1).all()
    assert not shift.any()


@pytest.mark.parametrize("own_start", [False, True])
def test_samples_teach_more_than_those_that_they_were(own_start):
    """Clusters whose samples are noisy: a network trained on one each does better on those that were learned."""
    labels = torch.arange(4).repeat_interleave(50)
    x = torch.randn(4, 6)[labels] + torch.randn(200, 6)
    data = mf.data.ClassSamples.from_arrays(x, labels)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    options = {"inner_steps": 5, "inner_lr": 0.1, "own_start": own_start, "seed": 2}
    before = distil(model, data, steps=1, lr=0.0, **options)
    after = distil(model, data, steps=100, **options)
    assert same(after, distil(model, data, steps=100, **options))
    starts = None if own_start else random_starts(model, 20, seed=9999)
    with torch.no_grad():
        one, other = (few(model, x, labels, starts) for few in (before, after))
    assert other.loss < one.loss
    assert other.accuracy.mean() > one.accuracy.mean()
    assert after.data().samples.shape == (4, 6)


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_pictures_stay_pictures():
    pictures = mf.data.Glyphs().subset(range(3))
    few = distil(mf.models.conv4(ways=3, hidden=4), pictures, per_class=2, steps=3, lr=1.0, batch=8)
    assert few.x.shape == (6, 1, 28, 28)
    assert few.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert 0 <= float(few.x.min()) <= float(few.x.max()) <= 1
    assert few.data().samples.shape == (6, 1, 28, 28)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        return x @ self.weight


DATA = mf.data.ClassSamples.from_arrays(torch.randn(6, 4), torch.arange(6) % 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DistilledSet(torch.zeros(3, 4), torch.arange(2)), ValueError, r"x and y must be floating samples"),
        (
            lambda: DistilledSet(torch.zeros(2, 4).long(), torch.arange(2)),
            ValueError,
            r"floating samples .* torch.int64",
        ),
        (lambda: DistilledSet([1.0], torch.arange(1)), TypeError, r"x must be a tensor \(got list\)"),
        (
            lambda: DistilledSet(torch.zeros(2, 4), torch.arange(2), 0.0),
            ValueError,
            r"inner_lr must be > 0 \(got 0.0\)",
        ),
        (
            lambda: DistilledSet(torch.zeros(2, 4), torch.arange(2), 1, 0),
            ValueError,
            r"inner_steps must be >= 1 \(got 0\)",
        ),
        (lambda: distil(nn.Linear(4, 2), DATA, 0), ValueError, r"per_class must be >= 1 \(got 0\)"),
        (lambda: distil(nn.Linear(4, 2), DATA, 4), ValueError, r"per_class must be at most .* \(got 4; one has 3\)"),
        (lambda: distil(nn.Linear(4, 2), DATA, steps=0), ValueError, r"steps must be >= 1 \(got 0\)"),
        (lambda: distil(nn.Linear(4, 2), DATA, lr=-1), ValueError, r"lr must be >= 0 \(got -1\)"),
        (lambda: distil(nn.Linear(4, 2), DATA, own_start=1), TypeError, r"own_start must be True or False \(got 1\)"),
        (lambda: distil(nn.Linear(4, 2), [1]), TypeError, r"data must be ClassSamples \(got list\)"),
        (lambda: distil(nn.Linear(5, 2), DATA), ValueError, r"model must accept samples of shape \(4,\)"),
        (lambda: distil(Bare(), DATA), ValueError, r"reset_parameters\(\) \(got Bare at ''\)"),
        (lambda: random_starts(nn.Linear(4, 2), 0), ValueError, r"count must be >= 1 \(got 0\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_diverging_distillation_says_so():
    huge = mf.data.ClassSamples.from_arrays(torch.full((4, 4), 1e38), torch.arange(4) % 2)
    with pytest.raises(mf.NonFiniteError):
        distil(nn.Linear(4, 2), huge, steps=2)
