"""Op by op: forward, backward and the tangents of both, against autograd in float64.

Each op stands between a layer with weights, so that a tangent and an adjoint reach its input, and a head. The loss of
unadapted weights needs its forward and backward alone, that of weights adapted by one step also the two tangents. Which
parameters adapt is drawn, for each choice lets another tangent vanish; so is whose gradient is wanted.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaaug_fast.engine import reference
from metaaug_fast.engine.choice import choose_executor
from metaaug_fast.engine.problem import InnerProblem, Query, Support, inner_problem
from tests.exactness import assert_close, gradients, leaves, predictions, rand, randn

DRAWS = 12  # random shapes for each op


pytestmark = pytest.mark.usefixtures("fresh_numbers")


def integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def pair(low: int, high: int) -> tuple[int, int]:
    return integer(low, high), integer(low, high)


def one_of(*choices):
    return choices[integer(0, len(choices) - 1)]


def coin() -> bool:
    return bool(integer(0, 1))


def width() -> int:
    """Channels: one, or on either side of 4, 8, 16, 32 and 64, the widths of vectors and tiles."""
    return one_of(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65)


def picture() -> tuple[int, int, int]:
    return width(), *one_of((1, 1), (1, integer(2, 7)), (integer(2, 7), 1), pair(2, 7))


class Sandwich(nn.Module):
    """A layer from the sample to the op's input, the op, and a linear layer to three outputs."""

    def __init__(self, sample: tuple[int, ...], shape: tuple[int, ...], op: nn.Module) -> None:
        super().__init__()
        layer = (lambda *sizes: nn.Conv2d(*sizes, 1)) if len(shape) == 3 else nn.Linear
        self.before: nn.Module = layer(sample[0], shape[0])
        with torch.no_grad():
            outputs = op.eval()(torch.zeros(2, *shape)).shape[1:]
        self.op, self.flatten, self.after = op.train(), nn.Flatten(), nn.Linear(outputs.numel(), 3)
        self.double()
        for module in self.op.modules():
            for name, value in module.named_parameters(recurse=False):
                nn.init.normal_(value, mean=float(name == "weight" and value.ndim == 1), std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.flatten(self.op(self.before(x))))


def check(model: nn.Module, sample: tuple[int, ...], samples: int | None = None, **options) -> None:
    """Predictions, first and second-order gradients of two tasks are those of autograd."""
    tasks, supports, queries = 2, samples or integer(2, 6), samples or integer(2, 6)
    support = Support(randn(tasks, supports, *sample).requires_grad_(coin()), randn(tasks, supports, 3))
    query = Query(randn(tasks, queries, *sample).requires_grad_(coin()), randn(tasks, queries, 3))
    names = [name for name, _ in model.named_parameters()]
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith("after") or coin())
    adapt = [name for name in names if coin()] or names
    for steps in (0, 1):
        problem = inner_problem(model, 0.3, steps, loss="mse", adapt=adapt, seed=integer(0, 99), **options)
        executor = choose_executor(problem, sample, "fused")
        torch.testing.assert_close(*unadapted(problem, executor, query.x.detach()), rtol=1e-11, atol=1e-12)
        assert_exact(problem, support, query)


def assert_exact(problem: InnerProblem, support: Support, query: Query) -> None:
    """The loss and every gradient are those of the specification."""
    executor = choose_executor(problem, tuple(query.x.shape[2:]), "fused")
    got, expected = (each.meta_loss(problem, support, query).loss for each in (executor, reference))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    inputs = leaves(problem, support, query)
    assert_close(gradients(got, inputs), gradients(expected, inputs), 1e-10)


def unadapted(problem: InnerProblem, executor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions of the model's own weights: the executor's and the specification's."""
    flat = reference.pack(problem.parameters).detach().expand(len(x), -1)
    return executor.predict(problem, flat, x), predictions(problem, flat, x)


def drawn(make_shape, make_op, *, until_it_fits: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """A sandwich of a random shape, and its input's shape; an op that does not fit the shape is drawn again."""
    while True:
        shape = make_shape()
        sample = (integer(1, 4), *shape[1:])
        try:
            op = make_op(shape)
            return Sandwich(sample, shape, op), sample
        except (RuntimeError, ValueError):
            if not until_it_fits:
                raise


@pytest.mark.parametrize("draw", range(DRAWS))
def test_linear(draw):
    check(*drawn(lambda: (width(),), lambda shape: nn.Linear(*shape, width(), bias=coin())))


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("first", [False, True], ids=["inside", "first"])
def test_conv2d(draw, first):
    """Also on the network's input itself, which may have no gradient and then no padded channels."""

    def conv(shape) -> nn.Module:
        kernel, stride, padding, dilation = pair(1, 4), pair(1, 4), pair(0, 3), pair(1, 3)
        return nn.Conv2d(shape[0], width(), kernel, stride, padding, dilation, bias=coin())

    model, sample = drawn(picture, conv, until_it_fits=True)
    if first:
        sample = (model.op.in_channels, *sample[1:])
        model.before = nn.Identity()
    check(model, sample)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((5, 5), {"kernel_size": 5}),  # the whole picture
        ((2, 2), {"kernel_size": 3, "padding": 1}),  # no pixel sees a whole kernel
        ((3, 9), {"kernel_size": 2, "stride": 3}),  # some pixels are never read
        ((5, 5), {"kernel_size": 1, "stride": 4}),
        ((4, 4), {"kernel_size": 1, "padding": 2}),  # a border of nothing but bias
        ((1, 1), {"kernel_size": 1, "padding": (2, 0), "stride": (3, 2)}),
        ((1, 1), {"kernel_size": 3, "padding": 1}),
        ((1, 1), {"kernel_size": 1}),
        ((7, 7), {"kernel_size": 3, "dilation": 3}),
        ((4, 6), {"kernel_size": (1, 3), "padding": "same"}),
        ((9, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [1, 3, 4, 9])  # few: neighbouring pixels make a tile; more: equal pixels
def test_special_convolutions(size, settings, samples):
    check(*drawn(lambda: (width(), *size), lambda shape: nn.Conv2d(shape[0], width(), **settings)), samples)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (0, 2), (1, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (4, 7), (7, 7), (14, 13), (2, 21)], ids=str)
def test_convolutions_by_minimal_filtering(size, padding):
    """3x3 of stride 1 with many channels, on pictures of whole tiles of 2x2 and of others; one goes the direct way."""
    if size[0] + 2 * padding[0] < 3:
        padding = (1, padding[1])
    channels, outputs = integer(4, 40), integer(4, 40)
    check(*drawn(lambda: (channels, *size), lambda _: nn.Conv2d(channels, outputs, 3, 1, padding, bias=coin())))


def test_a_bias_that_moves_alone():
    """Under a convolution whose input and weights stay, the tangent is the bias's."""
    for conv in (nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2), nn.Conv2d(16, 1, 1)):
        model = Sandwich((2, 9, 9), (16, 9, 9), conv)
        problem = inner_problem(model, 0.3, 2, loss="mse", adapt=["op.bias"])
        support, query = (each(randn(2, 4, 2, 9, 9), randn(2, 4, 3)) for each in (Support, Query))
        assert_exact(problem, support, query)


@pytest.mark.parametrize("draw", range(DRAWS))
def test_a_first_convolution_of_few_channels(draw):
    """Without a gradient of the input it reads patches."""
    channels, kernel = integer(1, 3), one_of((3, 3), (2, 4), (1, 3), (4, 1))
    stride, padding, dilation = pair(1, 3), pair(0, 3), pair(1, 2)
    conv = nn.Conv2d(channels, channels * kernel[0] * kernel[1] + integer(0, 9), kernel, stride, padding, dilation)
    model, sample = drawn(lambda: (channels, *pair(7, 10)), lambda _: conv)
    model.before = nn.Identity()
    check(model, (channels, *sample[1:]))


NORMS = {
    "batch": lambda shape: (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(shape[0], 0.01, affine=coin()),
    "layer": lambda shape: nn.LayerNorm(shape, 0.01, elementwise_affine=coin(), bias=coin()),
    "group": lambda shape: nn.GroupNorm(groups(shape[0]), shape[0], 0.01, affine=coin()),
    "instance": lambda shape: nn.InstanceNorm2d(shape[0], 0.01, affine=coin()),
}


def groups(channels: int) -> int:
    return one_of(*(each for each in range(1, channels + 1) if channels % each == 0))


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, draw):
    def shape() -> tuple[int, ...]:
        return (width(), *pair(2, 5)) if norm == "instance" else one_of(picture(), (width(),))

    model, sample = drawn(shape, NORMS[norm])
    check(model, sample)
    if norm == "batch":
        nn.init.normal_(model.op.running_mean)
        nn.init.uniform_(model.op.running_var, 0.5, 2)
        check(model, sample, batch_norm="frozen")
        check(model, sample, samples=1, batch_norm="frozen")


@pytest.mark.parametrize("draw", range(DRAWS // 2))
def test_a_batch_norm_over_more_rows_than_are_summed_at_a_time(draw):
    check(*drawn(lambda: (width(), *pair(9, 12)), NORMS["batch"]), samples=3)


ACTIVATIONS = {
    "relu": lambda: nn.ReLU(coin()),
    "leaky relu": lambda: nn.LeakyReLU(one_of(0.01, 0.5, 1.5, 0.0), coin()),
    "leaky relu, rising on both sides": lambda: nn.LeakyReLU(-0.2),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(one_of(1.0, 0.3, 4.0), one_of(20.0, 1.0, 0.0)),
}


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, draw):
    check(*drawn(lambda: one_of(picture(), (width(),)), lambda shape: ACTIVATIONS[activation]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation, dtype):
    """Nothing overflows, and values are torch's, as are the derivatives of them (on the input, which weights scale)."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), ACTIVATIONS[activation](), nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[2].weight)
    x = torch.tensor([0.0, 1e-30, 1, 6, 30, 90, 800, 1e4], dtype=dtype)
    x = torch.cat([x, -x])[None, :, None].requires_grad_()
    problem = inner_problem(model, 0.0, 0, loss="mse")
    executor, flat = choose_executor(problem, (1,), "fused"), reference.pack(problem.parameters).detach()[None]
    got, expected = executor.predict(problem, flat, x), model(x)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in (got, expected)), **tolerance)


POOLS = {
    "max": lambda kernel, stride, padding: nn.MaxPool2d(kernel, stride, padding),
    "average": lambda kernel, stride, padding: nn.AvgPool2d(kernel, stride, padding),
    "average, counting pixels": lambda *window: nn.AvgPool2d(*window, count_include_pad=False),
}


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("pool", POOLS)
def test_pools(pool, draw):
    def make(shape) -> nn.Module:
        kernel = pair(1, 4)
        return POOLS[pool](kernel, pair(1, 4), tuple(integer(0, size // 2) for size in kernel))

    check(*drawn(picture, make, until_it_fits=True))


def test_the_first_of_equal_maxima_wins():
    """As in torch, whose gradient goes there alone."""
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(20, 3)).double()
    problem = inner_problem(model, 0.3, 1, loss="mse")
    x = torch.randint(2, (2, 4, 1, 3, 3)).double().requires_grad_()
    support, query = Support(x, randn(2, 4, 3)), Query(x.detach().flip(1).requires_grad_(), randn(2, 4, 3))
    assert_exact(problem, support, query)


BLOCKS = {
    "relu": lambda: [nn.ReLU()],
    "relu, pool": lambda: [nn.ReLU(), nn.MaxPool2d(2)],
    "relu, dropout, pool": lambda: [nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2)],
    "relu twice, pool": lambda: [nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)],
    "relu, pool of stride 1": lambda: [nn.ReLU(), nn.MaxPool2d(2, 1)],
    "relu, padded pool": lambda: [nn.ReLU(), nn.MaxPool2d(2, 2, 1)],
    "pool, relu": lambda: [nn.MaxPool2d(2), nn.ReLU()],
    "leaky relu, pool": lambda: [nn.LeakyReLU(0.1), nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("block", BLOCKS)
def test_what_follows_a_batch_norm(block, draw):
    model, sample = drawn(
        lambda: (width(), *pair(2, 9)), lambda shape: nn.Sequential(NORMS["batch"](shape), *BLOCKS[block]())
    )
    check(model, sample)
    nn.init.normal_(model.op[0].running_mean)
    nn.init.uniform_(model.op[0].running_var, 0.5, 2)
    check(model, sample, batch_norm="frozen")


class NormReadTwice(nn.Module):
    def __init__(self, shape: tuple[int, ...], twice: str) -> None:
        super().__init__()
        self.norm, self.twice = nn.BatchNorm2d(shape[0]), twice

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = F.relu(z)
        pooled = F.max_pool2d(y, 2)
        return pooled + F.avg_pool2d(z if self.twice == "norm" else y, 2)


@pytest.mark.parametrize("twice", ["norm", "relu"])
def test_a_value_between_norm_and_pool_that_somebody_else_reads(twice):
    check(*drawn(lambda: (width(), *pair(2, 9)), lambda shape: NormReadTwice(shape, twice)))


def test_a_norm_a_relu_and_a_pool_take_nan_for_the_largest_and_the_first_of_equals():
    block = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).eval()
    nn.init.constant_(block[0].running_var, 4.0)
    model = nn.Sequential(*block, nn.Linear(8, 3)).double().eval()
    x = torch.randint(-1, 3, (2, 3, 2, 5, 4)).double().requires_grad_()
    problem = inner_problem(model, 0.3, 1, loss="mse", batch_norm="frozen")
    assert_exact(problem, Support(x.detach().flip(0), randn(2, 3, 3)), Query(x, randn(2, 3, 3)))
    with torch.no_grad():
        x[0, 1, 1, 2, 3] = torch.nan
    problem = inner_problem(model, 0.3, 0, loss="mse", batch_norm="frozen")
    executor = choose_executor(problem, (2, 5, 4), "fused")
    got, expected = unadapted(problem, executor, x.detach())
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert expected.isnan().any()


class Mean(nn.Module):
    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), self.keepdim)


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("mean", [lambda: Mean(False), lambda: Mean(True), lambda: nn.AdaptiveAvgPool2d(1)])
def test_means_over_space(mean, draw):
    check(*drawn(picture, lambda shape: mean()))


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("first", [False, True])
def test_flatten(draw, first):
    """Also of the input itself."""
    model, sample = drawn(picture, lambda shape: nn.Flatten())
    if first:
        sample = (model.before.out_channels, *sample[1:])
        model.before = nn.Identity()
    check(model, sample)


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_dropout(p, draw):
    check(*drawn(lambda: one_of(picture(), (width(),)), lambda shape: nn.Dropout(p)))


class Add(nn.Module):
    """Sums in which a value is read once, twice, or beside what was made of it."""

    def __init__(self, form: str, channels: int) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "branches":
            return self.first(x) + self.second(x)
        if self.form == "doubled":
            return x + x
        if self.form == "residual":
            return x + self.first(x).tanh()
        if self.form == "in place":
            y = self.first(x)
            y += x
            return F.relu(y, inplace=True)
        if self.form == "chain":  # four readers of one value; relu may not take its place
            return x + F.relu(x) + (self.first(F.leaky_relu(x, 0.3)) + F.max_pool2d(x, 3, 1, 1))
        return self.first(x).relu() + self.first(F.relu(self.first(x)))  # shared


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("form", ["branches", "doubled", "residual", "in place", "chain", "shared"])
def test_adds_and_shared_modules(form, draw):
    check(*drawn(picture, lambda shape: Add(form, shape[0])))


class Multiply(nn.Module):
    """Products, as gates have them: of two branches, of a value with itself, of channels with a number for each."""

    def __init__(self, form: str, channels: int) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "branches":
            return self.first(x) * self.second(x)
        if self.form == "square":
            return x * x
        if self.form == "rectified":  # relus that are done by the products in front of them
            return F.relu(self.first(x)) * F.relu(self.second(x))
        if self.form == "in place":
            y = self.first(x)
            y *= x
            return F.relu(y, inplace=True)
        if self.form == "swish":
            return x * x.sigmoid()
        if self.form == "pooled":
            return self.first(x).mul(x.mean((2, 3), keepdim=True)).add(F.adaptive_avg_pool2d(x, 1))
        gate = self.gate(x.mean((2, 3)))
        if self.form == "excitation":
            return x * gate.sigmoid()[:, :, None, None]
        if self.form == "gate first":
            return torch.mul(gate.unsqueeze(-1).unsqueeze(-1), self.first(x))
        if self.form == "film":
            return self.first(x) * gate.view(-1, x.shape[1], 1, 1) + self.gate(gate).view(len(x), -1, 1, 1)
        return self.second(x) * self.gate(gate * gate)[:, :, None, None] * gate[:, :, None, None]  # twice


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize(
    "form",
    ["branches", "square", "rectified", "in place", "swish", "excitation", "gate first", "film", "twice", "pooled"],
)
def test_products(form, draw):
    check(*drawn(picture, lambda shape: Multiply(form, shape[0])))


class TwoReaders(nn.Module):
    """Every op that writes an adjoint also has to add to one: each stands beside another reader of its input."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.op, self.shape = op, shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(torch.tanh(x), 1) + torch.flatten(self.op(x), 1) + torch.flatten(x, 1)


@pytest.mark.parametrize(
    "op",
    [
        *(pytest.param(make, id=name) for name, make in NORMS.items()),
        *(pytest.param(lambda shape, make=make: make(), id=name) for name, make in ACTIVATIONS.items()),
        pytest.param(lambda shape: nn.Conv2d(shape[0], shape[0], 3, padding=1), id="conv2d"),
        pytest.param(lambda shape: nn.MaxPool2d(3, 1, 1), id="max pool"),
        pytest.param(lambda shape: nn.AvgPool2d(3, 1, 1, count_include_pad=False), id="average pool"),
        pytest.param(lambda shape: nn.Dropout(0.3), id="dropout"),
    ],
)
def test_adjoints_that_are_added_to_others(op):
    for _ in range(3):
        check(*drawn(lambda: (width(), *pair(2, 4)), lambda shape: TwoReaders(op(shape).train(), shape)))


def test_means_and_linear_layers_add_to_adjoints_too():
    class Net(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.before, self.linear, self.after = nn.Conv2d(2, channels, 1), nn.Linear(channels, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            mean, mean_again = x.mean((2, 3)), F.adaptive_avg_pool2d(x, 1).flatten(1)
            return self.after(self.linear(mean).tanh() + self.linear(mean + mean_again))

    for _ in range(6):
        check(Net(width()).double(), (2, *pair(1, 5)))


def soft(*shape: int) -> Tensor:
    return randn(*shape).softmax(-1).requires_grad_()


LOSSES = {
    "class ids": ("cross_entropy", 0.0, lambda *shape: torch.randint(shape[-1], shape[:-1])),
    "class ids, smoothed": ("cross_entropy", 0.3, lambda *shape: torch.randint(shape[-1], shape[:-1])),
    "probabilities": ("cross_entropy", 0.0, soft),
    "probabilities, smoothed": ("cross_entropy", 0.3, soft),
    "weights that sum to anything": ("cross_entropy", 0.0, lambda *shape: rand(*shape).requires_grad_()),
    "mse": ("mse", 0.0, lambda *shape: randn(*shape).requires_grad_()),
    "bce": ("bce", 0.0, lambda *shape: rand(*shape).requires_grad_()),
}


@pytest.mark.parametrize("draw", range(DRAWS // 2))
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, draw):
    name, smoothing, make = LOSSES[loss]
    outputs, supports, queries = width(), integer(1, 6), integer(1, 6)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    support = Support(randn(2, supports, 3).requires_grad_(), make(2, supports, outputs))
    if coin():
        support = Support(support.x, support.y, randn(2, supports).requires_grad_())
    query = Query(3 * randn(2, queries, 3).requires_grad_(), make(2, queries, outputs))
    for steps in (0, 1):
        problem = inner_problem(model, 0.3, steps, loss=name, label_smoothing=smoothing)
        got, expected = (
            each.meta_loss(problem, support, query) for each in (choose_executor(problem, (3,), "fused"), reference)
        )
        torch.testing.assert_close(got.task_losses, expected.task_losses, rtol=1e-11, atol=1e-12)
        assert got.accuracy is None or torch.equal(got.accuracy, expected.accuracy)
        inputs = leaves(problem, support, query)
        assert_close(gradients(got.loss, inputs), gradients(expected.loss, inputs), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_losses_of_large_logits(loss, dtype):
    """Nothing overflows where the loss is finite."""
    model = nn.Linear(3, 3, bias=False).to(dtype)
    nn.init.eye_(model.weight)
    x = 300 * torch.tensor([[[1, -1, 0], [-1, -1, 1], [0, 0, 0]]], dtype=dtype).requires_grad_()
    y = torch.tensor([[0, 1, 2]]) if loss == "cross_entropy" else torch.eye(3, dtype=dtype)[None]
    problem = inner_problem(model, 1e-3, 1, loss=loss)
    executors = choose_executor(problem, (3,), "fused"), reference
    got, expected = (each.meta_loss(problem, Support(x, y), Query(x, y)).loss for each in executors)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, model.weight)[0] for each in (got, expected)))
