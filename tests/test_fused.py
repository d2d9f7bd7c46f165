"""The fused engine against the specification: whole inner loops, and what may happen around them."""

import copy
import fnmatch
import gc
import math
import random
import subprocess
import sys
import textwrap
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from exactness import RATE_FORMS, assert_close, errors, fresh_numbers, gradients, learned_rates, leaves, rand, randn
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast import reference
from metaaug_fast.errors import NonFiniteError, NotFusedError
from metaaug_fast.fused import FusedExecutor
from metaaug_fast.inner_loop import choose_executor
from metaaug_fast.norms import forward, update_running
from metaaug_fast.problem import InnerProblem, Query, Support, inner_problem


@pytest.fixture(autouse=True)
def numbers():
    with fresh_numbers():
        yield


# --- random networks ------------------------------------------------------------------------------------------------

ACTIVATIONS = (
    nn.ReLU,
    nn.Tanh,
    lambda: nn.LeakyReLU(0.2),
    nn.GELU,
    nn.Sigmoid,
    lambda: nn.GELU("tanh"),
    nn.Softplus,
    lambda: nn.Softplus(3.0, 1.5),
)
NORMS = ("batch", "layer", "group", "instance", "none")
LOSSES = ("ids", "probabilities", "mse", "ids, smoothed", "bce", "probabilities, smoothed")


class Repeated(nn.Module):
    """Calls a module that keeps its input's shape several times, adding what went in or not."""

    def __init__(self, inner: nn.Module, times: int, residual: bool) -> None:
        super().__init__()
        self.inner, self.times, self.residual = inner, times, residual

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.inner(x) if self.residual else self.inner(x)
        return x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Draw(random.Random):
    """Python's random choices, from torch's seed."""

    def __init__(self) -> None:
        super().__init__(torch.initial_seed())

    def chance(self, share: float) -> bool:
        return self.random() < share

    def pair(self, low: int, high: int) -> tuple[int, int]:
        return self.randint(low, high), self.randint(low, high)


def norm_layer(kind: str, shape: tuple[int, ...], draw: Draw) -> nn.Module:
    channels, affine, eps = shape[0], draw.chance(0.7), draw.choice((1e-5, 1e-2))
    groups = draw.choice([each for each in range(1, channels + 1) if channels % each == 0])
    if math.prod(shape) // groups < 3:
        groups = 1
    if kind == "instance" and math.prod(shape[1:]) < 3 or len(shape) == 1 and kind == "instance":
        kind = "group"
    return {
        "batch": lambda: (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(channels, eps, affine=affine),
        "layer": lambda: nn.LayerNorm(shape, eps, elementwise_affine=affine, bias=draw.chance(0.5)),
        "group": lambda: nn.GroupNorm(groups, channels, eps, affine=affine),
        "instance": lambda: nn.InstanceNorm2d(channels, eps, affine=affine),
        "none": nn.Identity,
    }[kind]()


def conv_layer(shape: tuple[int, ...], draw: Draw, keep: bool) -> nn.Module:
    inputs, bias = shape[0], draw.chance(0.7)
    if keep:
        return nn.Conv2d(inputs, inputs, 3, padding=draw.choice((1, "same")), bias=bias)
    kernel, stride, dilation = draw.pair(1, 3), draw.pair(1, 3), draw.pair(1, 2)
    padding = tuple(draw.randint(0, size - 1) for size in kernel)
    return nn.Conv2d(inputs, draw.randint(1, 11), kernel, stride, padding, dilation, bias=bias)


def pool_layer(draw: Draw) -> nn.Module:
    kernel, stride = draw.pair(1, 3), draw.pair(1, 3)
    padding = (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2))
    if draw.chance(0.5):
        return nn.MaxPool2d(kernel, stride, padding)
    return nn.AvgPool2d(kernel, stride, padding, count_include_pad=draw.chance(0.5))


def random_net(case: int, draw: Draw, dropout: bool = True) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """A network with every activation and norm in turn; its input's and its output's shape per sample."""
    shape: tuple[int, ...] = (draw.randint(1, 9),)
    pictures = draw.chance(0.7) or NORMS[case % 5] == "instance"
    if pictures:
        shape = (draw.randint(1, 3), *draw.pair(4, 8))
    start, layers = shape, []

    def add(layer: nn.Module) -> bool:
        """Append the layer if it leaves something of the picture."""
        nonlocal shape
        try:
            with torch.no_grad():
                result = layer.eval()(torch.zeros(2, *shape))
        except RuntimeError:
            return False
        layers.append(layer.train())
        shape = tuple(result.shape[1:])
        return True

    for depth in range(draw.randint(1, 3)):
        norm, activation = NORMS[(case + depth) % 5], ACTIVATIONS[(case + 3 * depth) % 8]
        if draw.chance(0.3):
            keep = conv_layer(shape, draw, True) if pictures else nn.Linear(*shape, *shape)
            body = nn.Sequential(keep, norm_layer(norm, shape, draw), activation())
            add(Repeated(body, draw.randint(1, 2), draw.chance(0.7)))
            continue
        while not add(conv_layer(shape, draw, False) if pictures else nn.Linear(*shape, draw.randint(1, 19))):
            pass
        if draw.chance(0.8):
            add(norm_layer(norm, shape, draw))
        add(activation())
        if pictures and draw.chance(0.4):
            add(pool_layer(draw))
        if dropout and draw.chance(0.25):
            add(nn.Dropout(draw.choice((0.1, 0.5))))
    body = nn.Sequential(*layers)
    if LOSSES[case % 6] in ("mse", "bce") and pictures and draw.chance(0.4):
        head: nn.Module = nn.Conv2d(shape[0], draw.randint(1, 3), 1)
        return randomised(nn.Sequential(OrderedDict(body=body, head=head))), start, (head.out_channels, *shape[1:])
    ways = draw.randint(2, 6)
    if pictures:
        body.extend(draw.choice(([nn.Flatten()], [Mean()], [nn.AdaptiveAvgPool2d(1), nn.Flatten()])))
        with torch.no_grad():
            shape = tuple(copy.deepcopy(body).eval()(torch.zeros(2, *start)).shape[1:])
    head = nn.Linear(*shape, ways, bias=draw.chance(0.8))
    return randomised(nn.Sequential(OrderedDict(body=body, head=head))), start, (ways,)


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with norms whose affine and running statistics are not their initial ones."""
    for module in model.double().modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            for name, value in module.named_parameters(recurse=False):
                nn.init.normal_(value, mean=float(name == "weight"), std=0.3)
    return model


def targets(loss: str, shape: tuple[int, ...], output: tuple[int, ...]) -> Tensor:
    if loss.startswith("ids"):
        return torch.randint(output[0], shape)
    y = randn(*shape, *output)
    return {"mse": y, "bce": y.sigmoid()}.get(loss, y.softmax(-1)).requires_grad_()


def random_problem(case: int, dropout: bool = True) -> tuple[InnerProblem, Support, Query]:
    """Everything that an inner loop can be asked for, with every rate form and loss in turn."""
    draw = Draw()
    model, sample, output = random_net(case, draw, dropout)
    loss, steps, tasks = LOSSES[case % 6], 1 + case // 8 % 5, draw.randint(1, 4)
    for value in model.parameters():
        value.requires_grad_(draw.chance(0.85))
    options = {
        "loss": loss if loss in ("mse", "bce") else "cross_entropy",
        "label_smoothing": 0.2 if "smoothed" in loss else 0.0,
        "momentum": draw.choice((0.0, 0.7)),
        "weight_decay": draw.choice((0.0, 0.1)),
        "adapt": draw.choice(("*", "*", "head.*", [name for name, _ in model.named_parameters()][:2])),
        "first_order": draw.chance(0.15),
        "batch_norm": draw.choice(("batch", "batch", "per_step", "running", "frozen")),
        "seed": draw.randrange(2**31),
    }
    if options["batch_norm"] == "per_step":
        rows = {
            f"{path}.{name}": (value + 0.2 * randn(draw.randint(1, steps + 1), len(value))).detach().requires_grad_()
            for path, module in model.named_modules()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
            for name, value in module.named_parameters()
        }
        options["parameters"] = rows
        options["adapt"] = [name for name, _ in model.named_parameters() if name not in rows]
    if draw.chance(0.2):
        model.eval()
    adapted = inner_problem(model, 0.1, steps, **options).rates
    form = RATE_FORMS[case // 5 % 8]
    values = {name: value for name, value in model.named_parameters() if name in adapted}
    problem = inner_problem(model, learned_rates(form, values, steps), steps, **options)
    supports, queries = draw.randint(3, 7), draw.randint(2, 6)
    support = Support(
        randn(tasks, supports, *sample).requires_grad_(draw.chance(0.7)),
        targets(loss, (tasks, supports), output),
        (0.2 + rand(tasks, supports)).requires_grad_() if draw.chance(0.5) else None,
        torch.randint(supports, (tasks, steps, draw.randint(3, 6))) if draw.chance(0.3) else None,
        start_of_each(problem, tasks) if draw.chance(0.25) else None,
    )
    query = Query(
        randn(tasks, queries, *sample).requires_grad_(draw.chance(0.7)),
        targets(loss, (tasks, queries), output),
        randn(steps).requires_grad_() if draw.chance(0.3) else None,
    )
    return problem, support, query


def start_of_each(problem: InnerProblem, tasks: int) -> Tensor:
    packed = reference.pack(problem.parameters).detach()
    return (packed + 0.1 * randn(tasks, len(packed))).requires_grad_()


def executor_of(problem: InnerProblem, x: Tensor) -> FusedExecutor:
    """The executor itself, for the public face draws a dropout seed of its own."""
    return choose_executor(problem, tuple(x.shape[2:]), "fused")


def assert_exact(problem: InnerProblem, support: Support, query: Query) -> None:
    """Losses, accuracy, running statistics and every gradient, of the loss and of weighted task losses."""
    expected, state = reference.meta_loss(problem, support, query), copy.deepcopy(problem.model)
    if problem.batch_norm == "running" and problem.training:
        update_running(state, reference.running_statistics(problem, support, query))
    got = executor_of(problem, support.x).meta_loss(problem, support, query)
    torch.testing.assert_close(got.task_losses, expected.task_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.loss, got.task_losses.mean())
    assert (got.accuracy is None) == (expected.accuracy is None)
    assert got.accuracy is None or torch.equal(got.accuracy, expected.accuracy)
    inputs, share = leaves(problem, support, query), randn(len(support.x))
    if not inputs:
        assert not got.loss.requires_grad
        return
    for value in (lambda out: out.loss, lambda out: out.task_losses @ share + 2 * out.loss):
        assert_close(gradients(value(got), inputs, retain_graph=True), gradients(value(expected), inputs, retain_graph=True))
    for (name, value), moved in zip(state.state_dict().items(), problem.model.state_dict().values(), strict=True):
        torch.testing.assert_close(moved, value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", range(48))
def test_random_networks(case):
    assert_exact(*random_problem(case))
