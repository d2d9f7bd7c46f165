"""Attacks on inputs: what they promise, and against an attack written for one task in plain autograd."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaaug_fast as mf
from metaaug_fast.learners import attack_queries
from metaaug_fast.models import conv4, perceptron
from tests.building import backends
from tests.exactness import relative_error
from tests.learners.attacking import climbed
from tests.learners.comparing import class_tasks

EPS = 1e-12  # of float64 sums


def model(norm=False):
    middle = [nn.BatchNorm1d(7)] if norm else []
    return nn.Sequential(nn.Linear(5, 7), *middle, nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.mark.parametrize("attack", [mf.FGSM(0.3, -1, 1), mf.PGD(0.3, 4, low=-1, high=1), mf.PGD(0.3, 4, step=0.25)])
def test_inputs_stay_in_the_ball_and_in_the_range(attack):
    x = 2 * torch.rand(3, 4, 5).double() - 1
    weight = torch.randn(5).double()
    moved = attack(lambda inputs: (inputs * weight).sin(), x)
    assert float((moved - x).abs().max()) <= 0.3 + EPS
    assert float((moved - x).abs().max()) > 0.299  # the radius is made use of
    if attack.low is not None:
        assert float(moved.min()) >= -1
        assert float(moved.max()) <= 1
    assert not moved.requires_grad


@backends
@pytest.mark.parametrize("norm", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_it_is_the_attack_of_each_task_alone(norm, loss, backend):
    """Weights that have adapted, taken out one by one, attacked in plain autograd."""
    net = model(norm)
    learner = mf.MAML(net, 0.3, 2, loss=loss, backend=backend)
    tasks = class_tasks(5)
    if loss == "mse":
        targets = [torch.randn(3, count, 3).double() for count in (6, 9)]
        tasks = mf.TaskBatch(tasks.support_x, targets[0], tasks.query_x, targets[1])
    attacked = attack_queries(learner, tasks, mf.PGD(0.2, 5, 0.07, random_start=False))
    fast = learner.adapt(tasks.support_x, tasks.support_y)
    criterion = F.cross_entropy if loss == "cross_entropy" else F.mse_loss
    for task in range(3):
        module, y = fast.module(task), tasks.query_y[task]
        expected = climbed(lambda x, m=module, y=y: criterion(m(x), y), tasks.query_x[task], 0.2, 5, 0.07)
        assert relative_error(attacked.query_x[task], expected) < 1e-12
    assert attacked.support_x is tasks.support_x
    assert attacked.query_y is tasks.query_y


def test_it_is_the_attack_of_each_sample_alone():
    """Where none sees the others."""
    learner, tasks = mf.MAML(model(), 0.3), class_tasks(5)
    attacked = attack_queries(learner, tasks, mf.PGD(0.2, 3, low=-9, high=9, random_start=False))
    module = learner.adapt(tasks.support_x, tasks.support_y).module(1)
    for sample in range(3):
        x, y = tasks.query_x[1, sample], tasks.query_y[1, sample]
        expected = climbed(lambda one, y=y: F.cross_entropy(module(one[None]), y[None]), x, 0.2, 3, 2.5 * 0.2 / 3)
        assert relative_error(attacked.query_x[1, sample], expected) < 1e-12


@pytest.mark.parametrize(
    "learner",
    [
        lambda: mf.MAML(model(), 0.3, 2),
        lambda: mf.ProtoNet(perceptron(None, (5,), (7, 6), "tanh").double()),
        lambda: mf.R2D2(perceptron(None, (5,), (7, 6), "tanh").double()).double(),
        lambda: mf.Reptile(model(), inner_lr=0.3, inner_steps=2),
    ],
    ids=["maml", "protonet", "r2d2", "reptile"],
)
def test_losses_grow(learner):
    learner, tasks = learner(), class_tasks(5, tasks=20)
    attacked = [attack_queries(learner, tasks, attack) for attack in (mf.PGD(0), mf.FGSM(0.1), mf.PGD(0.1))]
    clean, one, many = (learner(each).task_losses.detach() for each in attacked)
    assert bool((one > clean).all())
    assert bool((many > clean).all())
    assert float(many.mean()) >= float(one.mean()) - 1e-3  # what more steps are for
    assert all(value.grad is None for value in learner.parameters())


def test_fgsm_is_one_step_of_pgd():
    x, weight = torch.randn(2, 3, 5).double(), torch.randn(5).double()

    def losses(inputs):
        return (inputs @ weight).square()

    found = mf.FGSM(0.2, -5, 5)(losses, x)
    assert torch.equal(found, mf.PGD(0.2, 1, 0.2, False, -5, 5)(losses, x))
    slope = 2 * (x @ weight).unsqueeze(-1) * weight
    assert relative_error(found, x + 0.2 * slope.sign()) < 1e-12


def test_a_random_start_follows_torchs_generator():
    x, attack = torch.zeros(2, 500), mf.PGD(0.5, 1, 0.0, low=-0.25)
    torch.manual_seed(3)
    first = attack(lambda inputs: inputs, x)
    assert not torch.equal(first, attack(lambda inputs: inputs, x))
    torch.manual_seed(3)
    assert torch.equal(first, attack(lambda inputs: inputs, x))
    assert float(first.min()) == -0.25
    assert 0.45 < float(first.max()) <= 0.5
    assert abs(float((first == -0.25).float().mean()) - 0.25) < 0.1  # uniform in -0.5 .. 0.5, and cut


def test_a_radius_of_none_gives_the_inputs_back():
    x, state = torch.randn(2, 3), torch.get_rng_state()
    assert mf.PGD(0)(lambda inputs: inputs, x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_added_is_a_constant_to_autograd():
    x = torch.randn(2, 3, requires_grad=True)
    moved = mf.FGSM(0.1)(lambda inputs: inputs.square(), x)
    moved.square().sum().backward()
    assert torch.equal(x.grad, 2 * moved.detach())


def test_the_learner_stays_as_it_is():
    """Running statistics, too, and its mode, in training."""
    learner = mf.ProtoNet(conv4(None, (1, 16, 16), hidden=3))
    before = copy.deepcopy(learner.state_dict())
    attack_queries(learner, class_tasks(1, 16, 16).to(torch.float32), mf.PGD(0.1, 2))
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert learner.training
    assert all(value.grad is None for value in learner.parameters())


def test_they_say_what_they_are():
    assert str(mf.PGD(0.1)) == "pgd of radius 0.1, 20 steps of 0.0125 from a random start"
    assert str(mf.PGD(0.1, 1, random_start=False, low=0)) == "pgd of radius 0.1, 1 step of 0.1, in 0.."
    assert str(mf.FGSM(0.5, 0, 1)) == "fgsm of radius 0.5, 1 step of 0.5, in 0..1"
    for attack in (mf.PGD(0.1), mf.FGSM(0.1)):
        assert pickle.loads(pickle.dumps(attack)) == copy.deepcopy(attack) == attack
    assert mf.FGSM(0.1) != mf.PGD(0.1, 1, 0.1, False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": -0.1}, ValueError, r"radius must be >= 0 \(got -0.1\)"),
        ({"radius": "big"}, TypeError, r"radius must be a number \(got 'big'\)"),
        ({"radius": float("inf")}, ValueError, r"radius must be finite \(got inf\)"),
        ({"steps": 0}, ValueError, r"steps must be >= 1 \(got 0\)"),
        ({"step": -1.0}, ValueError, r"step must be >= 0 \(got -1.0\)"),
        ({"random_start": 1}, TypeError, r"random_start must be True or False \(got 1\)"),
        ({"low": float("nan")}, ValueError, r"low must be >= -inf \(got nan\)"),
        ({"low": 1.0, "high": 0.5}, ValueError, r"low must be below high, 0.5 \(got 1\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.PGD(**{"radius": 0.1, **options})


def test_bad_inputs():
    x = torch.tensor([[0.5, 1.5]])
    with pytest.raises(ValueError, match=r"inputs must lie between low and high, 0 and 1, to be attacked \(got 1.5\)"):
        mf.FGSM(0.1, 0, 1)(lambda inputs: inputs, x)
    with pytest.raises(ValueError, match=r"inputs must be floating point to be attacked \(got torch.int64\)"):
        mf.FGSM(0.1)(lambda inputs: inputs, torch.arange(3))
    with pytest.raises(ValueError, match=r"losses must depend on the inputs .* \(got a constant\)"):
        mf.FGSM(0.1)(lambda inputs: torch.ones(2), x)
    with pytest.raises(ValueError, match=r"steps must be None for ProtoNet, which has no inner loop \(got 3\)"):
        attack_queries(mf.ProtoNet(nn.Linear(5, 4).double()), class_tasks(5), mf.FGSM(0.1), steps=3)
