"""A pass without an inner loop: what the model's own call gives, by the engine where it can be."""

import copy

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine.encoding import encode
from metaaug_fast.engine.fused import FusedExecutor
from tests.exactness import assert_close, randn, relative_error

pytestmark = pytest.mark.usefixtures("fresh_numbers")


@pytest.fixture
def passes(monkeypatch):
    """How often the engine was taken."""
    found, own = [], FusedExecutor.encode

    def counted(self, problem, x):
        found.append(len(x))
        return own(self, problem, x)

    monkeypatch.setattr(FusedExecutor, "encode", counted)
    return found


def convolutions(*more, norm=None):
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), norm or nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), *more, nn.Linear(45, 3)
    ).double()


def assert_same(model, samples, x_too=True):
    """Output, gradients and buffers are those of a call of the model."""
    x, mix = randn(samples, 2, 8, 9), randn(samples, 3)
    results = []
    for each, run in ((model, encode), (copy.deepcopy(model), lambda network, x: network(x))):
        leaf = x.clone().requires_grad_(x_too)
        output = run(each, leaf)
        inputs = [value for value in each.parameters() if value.requires_grad] + [leaf] * x_too
        found = [output, *torch.autograd.grad((output.flatten(1)[:, :3] * mix).sum(), inputs), *each.buffers()]
        results.append({str(place): value.detach().double() for place, value in enumerate(found)})
    assert_close(*results)


@pytest.mark.parametrize("x_too", [False, True])
@pytest.mark.parametrize("samples", [2, 33, 150])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_is_the_models_call(mode, samples, x_too, passes):
    model = getattr(convolutions(), mode)()
    for value in model.buffers():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    for _ in range(2):  # running statistics move, and are used
        assert_same(model, samples, x_too=x_too)
    assert passes == [samples] * 2


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5, momentum=None),
        nn.BatchNorm2d(5, affine=False, momentum=0.3),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.GroupNorm(5, 5),
        nn.Identity(),
    ],
    ids=["average of all", "no affine", "no statistics", "group", "none"],
)
def test_norms_of_every_kind(norm, passes):
    model = convolutions(norm=norm)
    assert_same(model, 7)
    assert_same(model, 7)
    assert len(passes) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.insert(5, nn.Dropout(0.5)),
        lambda model: model[1].eval(),
        lambda model: model.insert(5, nn.SiLU()),
        lambda model: model.register_forward_hook(lambda module, args, output: 2 * output),
        lambda model: model[3].register_forward_hook(lambda module, args, output: output + 1),
        lambda model: model.__setitem__(1, nn.InstanceNorm2d(5, track_running_stats=True).double()),
        lambda model: model.half(),
    ],
    ids=["dropout", "a frozen norm", "another op", "hook", "hook inside", "instance statistics", "half"],
)
def test_what_the_engine_would_do_otherwise_is_called(change, passes):
    model = convolutions()
    encode(model, randn(4, 2, 8, 9))
    assert len(passes) == 1
    change(model)
    twin, x = copy.deepcopy(model), randn(4, 2, 8, 9).to(next(model.parameters()).dtype)
    torch.manual_seed(0)
    one = encode(model, x)
    torch.manual_seed(0)
    assert torch.equal(one, twin(x))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    assert len(passes) == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_feature_maps_are_left_as_they_are(mode, passes):
    model = convolutions()[:4]
    assert_same(getattr(model, mode)(), 37)
    assert len(passes) == 1
    assert encode(model, randn(6, 2, 8, 9)).shape == (6, 5, 3, 3)


def test_autocast_is_heeded(passes):
    model = convolutions().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert encode(model, torch.rand(4, 2, 8, 9)).dtype == torch.bfloat16
    assert not passes
    assert encode(model, torch.rand(4, 2, 8, 9)).dtype == torch.float32
    assert passes


def test_what_no_engine_takes_meets_the_models_own_errors(passes):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        encode(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.rand(1, 4))
    with pytest.raises(RuntimeError, match="dtype"):
        encode(nn.Linear(4, 3), torch.rand(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        encode(nn.Linear(4, 3), torch.rand(2, 5))
    assert encode(nn.Linear(4, 3), torch.rand(0, 4)).shape == (0, 3)
    assert encode(nn.Flatten(), torch.rand(2, 4, 1, 1)).shape == (2, 4)
    assert not passes


def test_parts_that_are_replaced(passes):
    model, x = convolutions().eval(), randn(4, 2, 8, 9)
    encode(model, x)
    model[-1] = nn.Linear(45, 7).double().eval()
    assert encode(model, x).shape == (4, 7)
    model[1].load_state_dict(nn.BatchNorm2d(5).double().state_dict())
    model[1].running_mean = torch.ones(5).double()
    model[0].weight = nn.Parameter(randn(5, 2, 3, 3))
    assert relative_error(encode(model, x), model(x)) < 1e-12
    assert len(passes) == 3


def test_frozen_weights_and_no_grad(passes):
    model = convolutions()
    for value in model[:-1].parameters():
        value.requires_grad_(False)
    assert_same(model, 6, x_too=False)
    with torch.no_grad():
        assert not encode(model, randn(4, 2, 8, 9)).requires_grad
    assert len(passes) == 2


def test_transforms_of_functions(passes):
    """Weights that torch.func puts in place of the model's get their gradient."""
    model, x = convolutions().eval(), randn(4, 2, 8, 9)
    encoder = mf.ProtoNet(model)
    weights = {name: value.detach() for name, value in encoder.named_parameters()}

    def loss(weights, run):
        return torch.func.functional_call(encoder if run else model, weights, x).square().sum()

    encoder.forward = lambda x: encode(model, x)
    got = torch.func.grad(loss)(weights, True)
    expected = torch.func.grad(loss)({name.removeprefix("model."): value for name, value in weights.items()}, False)
    for name, value in expected.items():
        assert relative_error(got[f"model.{name}"], value) < 1e-9
    losses = torch.vmap(lambda weights: loss(weights, True))({name: value[None] for name, value in weights.items()})
    assert relative_error(losses, model(x).square().sum()[None]) < 1e-9
    assert not passes


def test_a_second_derivative_is_refused(passes):
    model, x = convolutions(), randn(4, 2, 8, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(encode(model, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_a_gradient_of_what_is_not_finite_is_not_finite(passes):
    model, x = convolutions(), randn(4, 2, 8, 9).requires_grad_()
    (encode(model, x).sum() / 0).backward()
    assert passes
    assert x.grad.isnan().all()
    assert all(value.grad.isnan().all() for value in model.parameters())
