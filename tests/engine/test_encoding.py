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


def assert_same(model, samples, x_too=True, shape=(2, 8, 9)):
    """Output, gradients and buffers are those of a call of the model."""
    x, mix = randn(samples, *shape), randn(samples, 3)
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


class TwoPaths(nn.Module):
    """Norms behind one another, on flat features and on what two paths share; a convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.other = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (2, 6, 6, 6))
        self.flat, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norms[1](self.first(self.norms[0](x))))
        y = torch.relu(self.norms[2](self.again(x)))
        x = torch.relu(self.again(y) + self.norms[3](self.other(x)))
        return self.head(self.flat(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))


@pytest.mark.parametrize("samples", [2, 31, 90])
def test_norms_across_paths(samples, passes):
    model = TwoPaths().double()
    assert_same(model, samples)
    assert_same(model, samples, x_too=False)
    assert len(passes) == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pictures_that_fill_a_cache(mode, passes):
    model = mf.models.resnet12(widths=(8, 9, 10, 11), sample_shape=(3, 60, 60)).double()
    assert_same(getattr(model, mode)(), 9, shape=(3, 60, 60))
    assert passes == [9]


def two_losses(model, shapes):
    """Of passes of so many samples each, and what there is to learn."""
    xs = [randn(samples, 2, 8, 9) for samples in shapes]
    return [encode(model, x).square().sum() for x in xs], [model(x).square().sum() for x in xs]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kept", ["", "0"])
def test_the_way_back_of_an_older_pass(kept, mode, passes, monkeypatch):
    if kept:
        monkeypatch.setenv("METAAUG_KEEP_MIB", kept)
    model = getattr(convolutions(), mode)()
    found, expected = two_losses(model, (70, 41))
    assert len(passes) == 2
    weights = list(model.parameters())

    def gradients(loss):
        values = torch.autograd.grad(loss, weights, retain_graph=True)
        return {str(place): value for place, value in enumerate(values)}

    for place in (1, 0, 1, 1, 0):
        assert_close(gradients(found[place]), gradients(expected[place]))
    assert all(map(torch.equal, *(gradients(found[1]).values() for _ in range(2))))


def test_threads_change_no_bit(passes):
    model, x, found = convolutions().float(), randn(150, 2, 8, 9).float(), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            output = encode(model, x)
            found.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    exact = encode(copy.deepcopy(model).double(), x.double())
    assert relative_error(found[0][0].double(), exact) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_has_changed_since_is_an_error(mode, passes):
    model = getattr(convolutions(), mode)()
    loss = encode(model, randn(4, 2, 8, 9)).square().sum()
    with torch.no_grad():
        model[0].weight.add_(1) if mode == "train" else model[1].running_var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
