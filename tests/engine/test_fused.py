"""The fused engine against the specification: whole inner loops, and what may happen around them."""

import copy
import math
import os
import random
import re
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast import _C
from metaaug_fast.engine import fused, reference
from metaaug_fast.engine.choice import choose_executor
from metaaug_fast.engine.fused import FusedExecutor
from metaaug_fast.engine.norms import update_running
from metaaug_fast.engine.problem import InnerProblem, Query, Support, inner_problem, with_steps
from metaaug_fast.errors import NonFiniteError, NotFusedError
from tests.building import python, sets
from tests.exactness import RATE_FORMS, assert_close, gradients, learned_rates, leaves, predictions, rand, randn

pytestmark = pytest.mark.usefixtures("fresh_numbers")
on_its_own = pytest.mark.cpu_only("a process of its own does not run in the emulation")


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
    channels, affine, eps = shape[0], draw.chance(0.7), draw.choice((1e-3, 0.1))
    groups = draw.choice([each for each in range(1, channels + 1) if channels % each == 0])
    if math.prod(shape) // groups < 3:
        groups = 1
    if kind == "instance" and (len(shape) == 1 or math.prod(shape[1:]) < 3):
        kind = "group"
    if kind in ("layer", "group") and math.prod(shape) < 3:  # a norm of one or two values leaves nothing of them
        kind = "none"
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
    return nn.Conv2d(inputs, draw.randint(2, 11), kernel, stride, padding, dilation, bias=bias)


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
    rates = learned_rates(form, values, steps, 0.02 if loss == "mse" else 0.2)
    problem = inner_problem(model, rates, steps, **options)
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
    if got.accuracy is not None:
        differing = (got.accuracy - expected.accuracy).abs()
        assert not differing.any() or (differing <= share_of_ties(problem, support, query)).all()
    inputs, share = leaves(problem, support, query), randn(len(support.x))
    if not inputs:
        assert not got.loss.requires_grad
        return
    for value in (lambda out: out.loss, lambda out: out.task_losses @ share + 2 * out.loss):
        assert_close(*(gradients(value(out), inputs, retain_graph=True) for out in (got, expected)))
    for (name, value), moved in zip(state.state_dict().items(), problem.model.state_dict().values(), strict=True):
        torch.testing.assert_close(moved, value, rtol=1e-10, atol=1e-12, msg=name)


def share_of_ties(problem: InnerProblem, support: Support, query: Query) -> Tensor:
    """Of each task's queries, those whose two best outputs differ by rounding alone."""
    output = predictions(problem, reference.adapt(problem, support), query.x).detach()
    best, second = output.topk(2, dim=2).values.unbind(2)
    return (best - second < 1e-10).double().mean(1) + 1e-12


@pytest.mark.parametrize("case", range(48))
def test_random_networks(case):
    assert_exact(*random_problem(case))


@pytest.mark.parametrize("case", range(24))
def test_a_loss_of_ones_own_on_predictions_of_adapted_weights(case):
    problem, support, query = random_problem(case)
    support, query = replace(support, y=support.y.detach()), replace(query, step_weights=None)
    executor = executor_of(problem, support.x)
    got_flat, flat = executor.adapt(problem, support), reference.adapt(problem, support)
    torch.testing.assert_close(got_flat, flat, rtol=1e-10, atol=1e-12)
    got = executor.predict(problem, got_flat, query.x)
    expected = predictions(problem, flat, query.x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    inputs, share, direction = leaves(problem, support, query), torch.randn_like(got), torch.randn_like(flat)
    if inputs:
        found, wanted = (
            gradients((output * share).sin().sum() + 0.1 * (direction * weights).sum(), inputs)
            for output, weights in ((got, got_flat), (expected, flat))
        )
        assert_close(found, wanted)


def assert_exact_by_step(problem: InnerProblem, support: Support, query: Query) -> None:
    """Losses and accuracies before and after every step, without gradient and without a trace in the model."""
    state = copy.deepcopy(problem.model.state_dict())
    got, expected = (each.judge_steps(problem, support, query) for each in (executor_of(problem, support.x), reference))
    assert len(got) == problem.steps + 1
    for steps, (found, wanted) in enumerate(zip(got, expected, strict=True)):
        assert not found.task_losses.requires_grad
        torch.testing.assert_close(found.task_losses, wanted.task_losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.loss, found.task_losses.mean())
        assert (found.accuracy is None) == (wanted.accuracy is None)
        if found.accuracy is not None and not torch.equal(found.accuracy, wanted.accuracy):
            seen = support if support.rows is None else replace(support, rows=support.rows[:, :steps])
            ties = share_of_ties(with_steps(problem, steps), seen, query)
            assert ((found.accuracy - wanted.accuracy).abs() <= ties).all()
    assert all(torch.equal(value, state[name]) for name, value in problem.model.state_dict().items())


@pytest.mark.parametrize("case", range(48))
def test_random_networks_by_step(case):
    problem, support, query = random_problem(case)
    assert_exact_by_step(problem, support, replace(query, step_weights=None))


@pytest.mark.parametrize("first_order", [False, True])
def test_the_public_inner_loop(first_order):
    model, x, y, z = mlp(), randn(3, 6, 4).requires_grad_(), randn(3, 6, 2).requires_grad_(), randn(3, 5, 4)
    weight, lr = rand(3, 6).requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, "y": y, "weight": weight, "lr": lr, "z": z.requires_grad_()} | dict(model.named_parameters())
    found = []
    for backend in ("fused", "fallback"):
        fast = mf.inner_loop(model, x, y, lr, 3, weight, "mse", 0.5, 0.1, first_order=first_order, backend=backend)
        assert fast.flat.shape == (3, sum(value.numel() for value in model.parameters()))
        judged = fast.evaluate(z, z[..., :2].detach()).loss
        value = (fast(z) - 1).abs().sum() + judged + fast.as_dict()["0.bias"].sin().sum()
        found.append(gradients(value, inputs))
    assert_close(*found)


# --- single properties ----------------------------------------------------------------------------------------------


def mlp(batch_norm: bool = False) -> nn.Module:
    middle = nn.BatchNorm1d(10) if batch_norm else nn.LayerNorm(10)
    return nn.Sequential(nn.Linear(4, 10), middle, nn.Tanh(), nn.Linear(10, 7), nn.GELU(), nn.Linear(7, 2)).double()


def convolutional(ways: int = 3, width: int = 6) -> nn.Module:
    """On [2, 8, 8] pictures; smooth, so that rounding and differences of any size stay small."""
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 5, 3, stride=2, padding=1),
        nn.GroupNorm(1, 5),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(20, ways),
    ).double()


def filtered(width: int = 24) -> nn.Module:
    """Of many channels, so that 3x3 convolutions go by minimal filtering in every precision."""
    conv = [nn.Conv2d(2, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)]
    return nn.Sequential(*conv, nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 3)).double()


def conv_sets(**sizes: int) -> tuple[Support, Query]:
    """Sets for `convolutional`."""
    return sets((2, 8, 8), **sizes)


def cast(
    dtype: torch.dtype, problem: InnerProblem, support: Support, query: Query, device: str = "cpu"
) -> tuple[InnerProblem, Support, Query]:
    """Copies in another precision or on another device, of the same numbers."""

    def to(value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return None if value is None else value.to(device)
        return value.detach().to(device, dtype).requires_grad_(value.requires_grad)

    model = copy.deepcopy(problem.model).to(device, dtype)
    given = {name: to(value) for name, value in problem.parameters.items() if name in problem.per_step}
    once = {id(rate): replace(rate, value=to(rate.value)) for rate in problem.rates.values()}
    problem = replace(
        problem,
        model=model,
        parameters=dict(model.named_parameters()) | given,
        rates={name: once[id(rate)] for name, rate in problem.rates.items()},
    )
    support = Support(*map(to, (support.x, support.y, support.sample_weight, support.rows, support.initial)))
    return problem, support, Query(to(query.x), to(query.y), to(query.step_weights))


def run_all(problem: InnerProblem, support: Support, query: Query) -> dict[str, Tensor]:
    """Everything that a meta-step and an adaptation give."""
    executor, inputs = executor_of(problem, support.x), leaves(problem, support, query)
    out, flat = executor.meta_loss(problem, support, query), executor.adapt(problem, support)
    result = {f"loss {name}": value for name, value in gradients(out.loss, inputs).items()}
    result |= {f"flat {name}": value for name, value in gradients(flat.sin().sum(), inputs).items()}
    return result | {"flat": flat.detach(), "task_losses": out.task_losses.detach()}


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("kind", ["perceptron", "convolutional", "filtered"])
def test_single_precision(kind, steps):
    """Updates and gradients differ from those in double precision by rounding, which each step adds to."""
    if kind != "perceptron":
        model, (support, query) = convolutional() if kind == "convolutional" else filtered(), conv_sets()
    else:
        model, support = mlp(), Support(randn(3, 6, 4).requires_grad_(), randn(3, 6, 2).requires_grad_())
        query = Query(randn(3, 6, 4).requires_grad_(), randn(3, 6, 2))
    lr = (0.05 + 0.1 * rand(steps)).requires_grad_()  # not so small that the sum rounds an update away
    problem = inner_problem(model, lr, steps, loss="mse" if kind == "perceptron" else "cross_entropy", momentum=0.5)
    single = cast(torch.float32, problem, support, query)
    double = cast(torch.float64, *single)
    got, expected = run_all(*single), run_all(*double)
    for found, start in ((got, single[0]), (expected, double[0])):
        found["update"] = found.pop("flat") - reference.pack(start.parameters).detach()
    tolerance = 200 * (steps + 1) * torch.finfo(torch.float32).eps
    assert_close({name: value.double() for name, value in got.items()}, expected, tolerance)
    for name in ("update", "loss support_x", "flat parameter: 0.weight"):
        cosine = torch.cosine_similarity(got[name].double().flatten(), expected[name].flatten(), dim=0)
        assert 1 - float(cosine) < tolerance**2 + 1e-12


def test_finite_differences_of_the_meta_loss():
    """Along a random direction of each input in turn, and independent of the reference."""
    support, query = conv_sets(tasks=2)
    query = replace(query, y=randn(2, 4, 3).softmax(-1).requires_grad_(), step_weights=rand(3).requires_grad_())
    model = convolutional()
    lr = learned_rates("element, step", dict(model.named_parameters()), 3)
    problem = inner_problem(model, lr, 3, momentum=0.5, weight_decay=0.1, label_smoothing=0.1)
    support = replace(support, rows=torch.randint(5, (2, 3, 4)))
    executor = executor_of(problem, support.x)
    for start in (None, start_of_each(problem, 2)):
        support = replace(support, initial=start)
        inputs = leaves(problem, support, query)
        found = gradients(executor.meta_loss(problem, support, query).loss, inputs)
        for name, tensor in inputs.items():
            direction, values = torch.randn_like(tensor), []
            for size in (2e-4, -2e-4, 4e-4, -4e-4):
                with torch.no_grad():
                    tensor += size * direction
                    values.append(float(executor.meta_loss(problem, support, query).loss))
                    tensor -= size * direction
            slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 24e-4
            assert abs(slope - float((found[name] * direction).sum())) < 1e-7 * (1 + abs(slope)), name


def test_a_bias_before_a_batch_norm_has_no_gradient():
    """It is 0 to rounding, and nothing larger is made of it on the way through five steps."""
    support, query = conv_sets()
    for precision, bound in ((torch.float64, 1e-13), (torch.float32, 1e-4)):
        problem, *sets = cast(precision, inner_problem(convolutional(), 0.3, 5, momentum=0.5), support, query)
        found = gradients(executor_of(problem, support.x).meta_loss(problem, *sets).loss, leaves(problem, *sets))
        assert float(found["parameter: 0.bias"].norm()) < bound * float(found["parameter: 0.weight"].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [5, 70])
def test_the_same_bits_whatever_the_threads_and_whatever_ran_before(dtype, tasks):
    support, query = conv_sets(tasks=tasks)
    model = convolutional().train()
    model.insert(3, nn.Dropout(0.3))
    lr = (0.1 * rand(3)).requires_grad_()
    call = cast(dtype, inner_problem(model, lr, 3, momentum=0.5, seed=5), support, query)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run_all(*call))
        with pytest.raises(NonFiniteError):  # leaves NaN in all that is kept between calls
            run_all(call[0], replace(call[1], x=torch.full_like(support.x, torch.nan, dtype=dtype)), call[2])
    results.append(run_all(replace(call[0], model=copy.deepcopy(call[0].model)), *call[1:]))  # an executor of its own
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_calls_from_two_threads_take_turns():
    calls = [(inner_problem(mlp(), 0.1, 3), *perceptron_sets()) for _ in range(2)]
    calls.append((calls[0][0], *perceptron_sets(samples=3)))  # the first one's executor, with other shapes
    alone = [run_all(*call) for call in calls]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda call: [run_all(*call) for _ in range(20)], calls))
    for expected, found in zip(alone, together, strict=True):
        for each in found:
            assert all(torch.equal(value, each[name]) for name, value in expected.items())


def test_first_calls_from_many_threads_share_an_engine():
    """It is made by the first call that needs it, while others come."""
    sets, model = perceptron_sets(), mlp()
    call = (inner_problem(model, 0.1, 1), *sets)
    expected = run_all(*call)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            problem = replace(call[0], model=copy.deepcopy(model))
            executor, gate = executor_of(problem, sets[0].x), Barrier(4)
            executor.engine(problem)  # what Python keeps is there; the engine in it is not

            def adapt(_: int, executor=executor, problem=problem, gate=gate) -> Tensor:
                gate.wait()
                return executor.adapt(problem, sets[0])

            for found in pool.map(adapt, range(4)):
                assert torch.equal(found, expected["flat"])


def perceptron_sets(tasks: int = 3, samples: int = 6) -> tuple[Support, Query]:
    """Sets for `mlp` with class ids."""
    x, y = randn(2, tasks, samples, 4), torch.randint(2, (2, tasks, samples))
    return Support(x[0].requires_grad_(), y[0]), Query(x[1].requires_grad_(), y[1])


@pytest.mark.parametrize("sizes", [(1, 40, 40, 1), (4, 8, 12, 16, 3), (8, 7, 4, 4)])
def test_perceptrons_of_round_and_other_sizes(sizes):
    """Where rows are whole vectors, and where some are not."""
    problem = inner_problem(mf.models.mlp(list(sizes)).double(), 0.05, 3, loss="mse", momentum=0.3)
    support = Support(randn(3, 6, sizes[0]).requires_grad_(), randn(3, 6, sizes[-1]))
    assert_exact(problem, support, Query(randn(3, 5, sizes[0]).requires_grad_(), randn(3, 5, sizes[-1])))


@pytest.mark.parametrize(
    ("tasks", "samples", "queries", "steps", "batch_norm"),
    [(1, 1, 1, 2, False), (1, 5, 1, 1, False), (130, 2, 3, 1, True), (3, 5, 4, 0, True), (2, 4, 3, 20, True)],
)
def test_sizes_at_the_edge(tasks, samples, queries, steps, batch_norm):
    support, query = perceptron_sets(tasks, samples)[0], perceptron_sets(tasks, queries)[1]
    problem = inner_problem(mlp(batch_norm), torch.tensor(0.1).double().requires_grad_(), steps, momentum=0.3)
    assert_exact(problem, support, query)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("width", [3, 40, 100])
def test_activations_kept_for_some_of_the_steps_or_computed_again(width, rows, monkeypatch):
    """The engine keeps as many steps as fit: here all of them, two or three, and one."""
    support, query = conv_sets(tasks=2, supports=7)
    if rows:
        support = replace(support, rows=torch.randint(7, (2, 5, 6)))
    lr, model = (0.3 * rand(5)).requires_grad_(), convolutional(width=width)
    for mib in (0, 1, 256):
        monkeypatch.setenv("METAAUG_KEEP_MIB", str(mib))
        problem = inner_problem(copy.deepcopy(model), lr, 5, momentum=0.5)
        assert_exact(problem, support, query)


@pytest.mark.cpu_only("on a GPU the budget says how many tasks run at once, and so which blocks share a sum")
@pytest.mark.parametrize("width", [3, 40, 100])
def test_the_same_bits_whatever_is_kept(width, monkeypatch):
    calls, found = (inner_problem(convolutional(width=width), 0.1, 5), *conv_sets(tasks=2, supports=7)), []
    for mib in (0, 1, 256):
        monkeypatch.setenv("METAAUG_KEEP_MIB", str(mib))
        found.append(run_all(*calls))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("form", ["plain", "rows", "input gradient", "dropout", "skip", "relu, pool", "start of each"])
@pytest.mark.parametrize("adapt", [["8.*"], ["5.*", "8.*"], ["8.bias"], ["4.bias", "8.weight"]], ids=str)
def test_what_lies_in_front_of_all_that_adapts(adapt, form, frozen):
    """Layers that give the same at every step, learnt through all steps (ANIL), and those that only seem to."""
    support, query = conv_sets(supports=6)
    support.x.requires_grad_(form == "input gradient")
    model = convolutional()
    if form == "rows":
        support = replace(support, rows=torch.randint(6, (3, 4, 5)))
    if form == "dropout":
        model[2] = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
    if form == "skip":
        model[2] = Skip()
    if form == "relu, pool":
        model[2], model[3] = nn.ReLU(), nn.MaxPool2d(2)
    model = model.double().train()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    for value in (model[0].bias, model[4].weight):
        value.requires_grad_(bool(torch.rand(()) < 0.7))
    lr = (0.2 * rand(4)).requires_grad_()
    statistics = "frozen" if frozen else "batch"
    problem = inner_problem(model, lr, 4, adapt=adapt, momentum=0.4, weight_decay=0.1, batch_norm=statistics, seed=3)
    if form == "start of each":
        support = replace(support, initial=start_of_each(problem, 3))
    assert_exact(problem, support, query)
    assert_exact(problem, support, replace(query, step_weights=rand(4).requires_grad_()))
    first_order = replace(problem, first_order=True)
    assert_exact(first_order, support, query)


class Skip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + x


def test_tensors_that_are_not_contiguous():
    problem = inner_problem(convolutional(), 0.1, 3)
    problem.model[8].weight = nn.Parameter(randn(20, 3).t())
    alpha = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    problem = inner_problem(problem.model, alpha.expand(3), 3)
    size = len(reference.pack(problem.parameters))
    support = Support(
        randn(6, 5, 8, 8, 4)[::2, :, :, :, 1::2].permute(0, 1, 4, 2, 3).requires_grad_(),
        randn(3, 3, 5).softmax(1).transpose(1, 2).requires_grad_(),
        rand(5).expand(3, 5).requires_grad_(),
        torch.randint(5, (3, 3, 3, 2))[..., 0],
        (0.1 * randn(size, 3)).t().requires_grad_(),
    )
    query = Query(
        randn(3, 9, 2, 8, 8)[:, ::2].requires_grad_(), torch.randint(3, (5, 3)).t(), rand(6)[::2].requires_grad_()
    )
    assert not any(each.is_contiguous() for each in (support.x, support.y, support.sample_weight, support.rows))
    assert_exact(problem, support, query)
    executor, inputs = executor_of(problem, support.x), leaves(problem, support) | {"alpha": alpha}
    found = gradients(executor.adapt(problem, support).sum(), inputs)  # the adjoint of a sum is one number, expanded
    assert_close(found, gradients(reference.adapt(problem, support).sum(), inputs))
    x = query.x.detach().transpose(3, 4).requires_grad_()
    flat = support.initial.detach().requires_grad_()
    outputs = executor.predict(problem, flat, x), executor.predict(problem, flat.contiguous(), x.contiguous())
    assert torch.equal(*outputs)
    assert_close(*(gradients(each.sum(), {"flat": flat, "x": x}) for each in outputs))


def test_only_what_requires_a_gradient_gets_one():
    support, query = conv_sets()
    model = convolutional()
    model[0].requires_grad_(False)
    support.x.requires_grad_(False)
    problem = inner_problem(model, 0.3, 2, adapt="*")
    executor_of(problem, support.x).meta_loss(problem, support, query).loss.backward()
    assert model[0].weight.grad is None
    assert support.x.grad is None
    assert model[4].weight.grad is not None
    assert_exact(problem, support, query)


def test_gradients_are_differentiable_once():
    support, query = conv_sets()
    problem = inner_problem(convolutional(), 0.3, 1)
    executor = executor_of(problem, support.x)
    flat = executor.adapt(problem, support)
    values = executor.meta_loss(problem, support, query).loss, flat, executor.predict(problem, flat, query.x)
    for value in (*values, *(each.square() for each in values)):
        (once,) = torch.autograd.grad(value.sum(), [support.x], create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            once.sum().backward()


@pytest.fixture
def asked_for(monkeypatch) -> list[list[str]]:
    """The outputs that the engine was asked for, call by call."""
    calls: list[list[str]] = []
    engine = FusedExecutor.engine

    class Spy:
        def __init__(self, engine) -> None:
            self.engine = engine

        def run(self, settings, inputs, outputs):
            calls.append(list(outputs))
            return self.engine.run(settings, inputs, outputs)

    monkeypatch.setattr(FusedExecutor, "engine", lambda *args: Spy(engine(*args)))
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("step_weights", [False, True])
def test_evaluation_computes_no_gradient(asked_for, mode, step_weights):
    support, query = conv_sets()
    query = replace(query, step_weights=rand(3).requires_grad_() if step_weights else None)
    problem = inner_problem(convolutional(), torch.tensor(0.3).double().requires_grad_(), 3)
    executor = executor_of(problem, support.x)
    expected = executor.meta_loss(problem, support, query)
    assert any(name.startswith("grad_") for name in asked_for.pop())
    with mode():
        got = executor.meta_loss(problem, support, query)
        executor.predict(problem, executor.adapt(problem, support), query.x)
    assert len(asked_for) == 3
    assert not any(name.startswith("grad_") for call in asked_for for name in call)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.task_losses, expected.task_losses.detach(), rtol=1e-14, atol=0)
    assert torch.equal(got.accuracy, expected.accuracy)


def test_the_gradient_is_computed_with_the_loss_and_never_twice(asked_for):
    support, query = conv_sets()
    problem = inner_problem(convolutional(), 0.3, 2)
    out = executor_of(problem, support.x).meta_loss(problem, support, query)
    (2 * out.loss).backward()
    assert len(asked_for) == 1
    assert "grad_parameters" in asked_for[0]


@pytest.mark.parametrize("optimizer", [{"optimizer": "adam"}, {"optimizer": "adam", "betas": (0.9, 0.99)}, {}])
def test_mean_displacement_and_adam(optimizer):
    support, query = conv_sets(tasks=5)
    problem = inner_problem(convolutional(), 0.05, 4, weight_decay=0.1, **optimizer)
    executor = executor_of(problem, support.x)
    expected = reference.adapt(problem, support).detach()
    mean, nothing = executor.adapt_mean(problem, support)
    again, asked = executor.adapt_mean(problem, support, query)
    assert nothing is None
    assert not mean.requires_grad
    start = reference.pack(problem.parameters).detach()
    for each in (mean, again):
        torch.testing.assert_close(each, (expected - start).mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(executor.adapt(problem, support).detach(), expected, rtol=1e-9, atol=1e-12)
    judged, wanted = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    for each in (judged, asked):
        torch.testing.assert_close(each.task_losses, wanted.task_losses)
        torch.testing.assert_close(each.loss, wanted.loss)
        assert torch.equal(each.accuracy, wanted.accuracy)
    differentiable = problem.optimizer == "sgd"
    assert executor.adapt(problem, support).requires_grad == judged.loss.requires_grad == differentiable


@pytest.mark.cpu_only("on a GPU a query needs memory, of which there may then be too little for the same order of sums")
def test_the_same_bits_with_a_query_and_without():
    support, query = conv_sets(tasks=5)
    problem = inner_problem(convolutional(), 0.05, 4)
    executor = executor_of(problem, support.x)
    assert torch.equal(executor.adapt_mean(problem, support)[0], executor.adapt_mean(problem, support, query)[0])


@pytest.mark.parametrize("optimizer", [{"optimizer": "adam"}, {"optimizer": "adam", "betas": (0.9, 0.99)}, {}])
def test_by_step_with_adam_and_without(optimizer):
    lr = 0.1 * rand(4)  # of each step
    problem = inner_problem(convolutional(), lr, 4, weight_decay=0.1, **optimizer)
    assert_exact_by_step(problem, *conv_sets(tasks=5))


@pytest.mark.parametrize(("tasks", "queries", "steps"), [(1, 1, 0), (130, 3, 1), (2, 4, 20)])
def test_by_step_at_the_edge(tasks, queries, steps):
    support, query = perceptron_sets(tasks)[0], perceptron_sets(tasks, queries)[1]
    assert_exact_by_step(inner_problem(mlp(), torch.full((steps,), 0.1), steps, momentum=0.3), support, query)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_per_step_affines_by_step(rows):
    affine = {f"1.{name}": randn(rows, 10) for name in ("weight", "bias")}
    problem = inner_problem(mlp(batch_norm=True), 0.1, 3, batch_norm="per_step", parameters=affine)
    assert_exact_by_step(problem, *perceptron_sets())


def test_dropout_and_running_statistics_by_step():
    """A query pass drops by its own count of steps; statistics of the batch are used and not learnt."""
    model = mlp(batch_norm=True).train()
    model.insert(3, nn.Dropout(0.4))
    problem = inner_problem(model, 0.1, 3, batch_norm="running", seed=7)
    support, query = perceptron_sets()
    assert_exact_by_step(problem, support, query)
    assert_exact_by_step(problem, replace(support, rows=torch.randint(6, (3, 3, 4))), query)


@pytest.mark.parametrize("kind", ["perceptron", "convolutional", "filtered"])
def test_single_precision_by_step(kind):
    model = {"perceptron": mlp, "convolutional": convolutional, "filtered": filtered}[kind]()
    sets = perceptron_sets() if kind == "perceptron" else conv_sets()
    single = cast(torch.float32, inner_problem(model, 0.1, 3, momentum=0.5), *sets)
    got, expected = (
        {f"after {k}": out.task_losses.double() for k, out in enumerate(executor.judge_steps(*call))}
        for call in (single, cast(torch.float64, *single))
        for executor in [executor_of(call[0], call[1].x)]
    )
    assert_close(got, expected, 800 * torch.finfo(torch.float32).eps)


def test_one_call_without_gradients_judges_by_step(asked_for):
    support, query = conv_sets()
    executor = executor_of(problem := inner_problem(convolutional(), 0.3, 3), support.x)
    executor.judge_steps(problem, support, query)
    executor.judge_steps(problem, support, replace(query, y=randn(3, 4, 3).softmax(-1)))
    assert asked_for == [["losses_by_step", "accuracy_by_step"], ["losses_by_step"]]


def test_what_is_judged_by_step_ends_with_what_is_judged_at_the_end():
    support, query = conv_sets(tasks=5)
    call = fused._Call(executor_of(problem := inner_problem(convolutional(), 0.3, 3), support.x), problem)
    at_the_end = ["loss", "task_losses", "accuracy", "predictions", "mean_displacement"]
    alone = call.run(call.tensors(support, query), at_the_end)
    for names in (["losses_by_step"], ["accuracy_by_step"], ["losses_by_step", "accuracy_by_step"]):
        beside = call.run(call.tensors(support, query), at_the_end + names)
        assert all(torch.equal(value, beside[name]) for name, value in alone.items())
        for name, last in (("losses_by_step", "task_losses"), ("accuracy_by_step", "accuracy")):
            assert name not in beside or torch.equal(beside[name][:, -1], alone[last])


@pytest.mark.parametrize("wanted", ["losses_by_step", "accuracy_by_step"])
@pytest.mark.parametrize("beside", ["gradients", "step_weights", "prediction_adjoint"])
def test_nothing_goes_back_beside_what_is_judged_by_step(wanted, beside):
    support, query = conv_sets()
    call = fused._Call(executor_of(problem := inner_problem(convolutional(), 0.3, 3), support.x), problem)
    weighted = replace(query, step_weights=rand(3)) if beside == "step_weights" else query
    outputs = [wanted, "grad_support_x"] if beside == "gradients" else [wanted]
    adjoint = randn(3, 4, 3) if beside == "prediction_adjoint" else None
    message = (
        "losses_by_step and accuracy_by_step must be asked for without gradients, step_weights and "
        f"prediction_adjoint (got {beside})"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call.run(call.tensors(support, weighted), outputs, prediction_adjoint=adjoint)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_per_step_affines(rows):
    """A row for each support pass; queries read the row of the step before; beyond the last row, that one."""
    support, query = perceptron_sets()
    model = mlp(batch_norm=True)
    affine = {f"1.{name}": randn(rows, 10).requires_grad_() for name in ("weight", "bias")}
    problem = inner_problem(model, 0.1, 3, batch_norm="per_step", parameters=affine, momentum=0.5)
    assert_exact(problem, support, replace(query, step_weights=randn(3).requires_grad_()))
    executor, inputs = executor_of(problem, support.x), leaves(problem, support)
    got, expected = (each.adapt(problem, support).sin().sum() for each in (executor, reference))
    assert_close(gradients(got, inputs), gradients(expected, inputs))
    flat = reference.adapt(problem, support).detach()
    x = query.x.detach()
    got, expected = executor.predict(problem, flat, x), predictions(problem, flat, x).detach()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_per_step_tensors_of_one_model_may_differ_between_calls():
    support, query = perceptron_sets()
    model = mlp(batch_norm=True)
    for name in ("1.weight", "1.bias"):
        rows = {name: randn(2, 10).requires_grad_()}
        assert_exact(inner_problem(model, 0.1, 3, batch_norm="per_step", parameters=rows), support, query)


@pytest.mark.cpu_only("only there are parameters packed")
def test_a_parameter_that_two_ops_lay_out_differently_is_not_fused():
    support, _ = perceptron_sets()
    model = mlp()
    model.insert(2, nn.BatchNorm1d(10))
    model[2].double().weight = model[1].weight
    problem = inner_problem(model, 0.1, 1)
    with pytest.raises(NotFusedError, match="layout"):
        executor_of(problem, support.x)
    with pytest.warns(mf.FallbackWarning, match="layout"):
        assert choose_executor(problem, (4,)).name == "fallback"


def test_batch_norm_of_one_value_is_refused():
    """As torch does: there is no variance in one value."""
    support, query = perceptron_sets(samples=1)
    problem = inner_problem(mlp(batch_norm=True), 0.1, 1)
    with pytest.raises(ValueError, match="at least 2 values"):
        executor_of(problem, support.x).meta_loss(problem, support, query)


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_named_by_task_and_step(dtype):
    problem, support, query = cast(dtype, inner_problem(convolutional(), 0.3, 3), *conv_sets(tasks=5))
    executor = executor_of(problem, support.x)
    before = executor.meta_loss(problem, support, query).task_losses
    bad = support.x.detach().clone()
    bad[3, 0, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^task 3, step 0: .*nan"):
        executor.adapt(problem, replace(support, x=bad))
    with pytest.raises(NonFiniteError, match=r"^task 3, step 0: .*nan"), torch.no_grad():
        executor.meta_loss(problem, replace(support, x=bad), query)
    rows = torch.arange(1, 4).expand(5, 3, 3).clone()
    rows[3, 1, 2] = 0
    with pytest.raises(NonFiniteError, match=r"^task 3, step 1: .*nan"):
        executor.meta_loss(problem, replace(support, x=bad, rows=rows), query)
    bad[1, 0, 0, 5, 5] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^task 1, step 0: "):
        executor.adapt(problem, replace(support, x=bad))
    bad = query.x.detach().clone()
    bad[4, 3, 0, 2, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^task 4, query.*: .*nan"):
        executor.meta_loss(problem, support, replace(query, x=bad))
    rates = torch.tensor([0.1, 0.1, torch.finfo(dtype).max], dtype=dtype)
    far = inner_problem(problem.model, rates, 3, weight_decay=1e9)
    with pytest.raises(NonFiniteError, match=r"^task 0, step 2: .*weight"):
        executor.adapt_mean(far, support)
    assert torch.equal(executor.meta_loss(problem, support, query).task_losses, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_by_step_is_named_by_task_and_step(dtype):
    """Weights that leap in the second step are too much for a query of the last task, which all others bear."""
    large = torch.finfo(dtype).max ** 0.6
    problem = inner_problem(nn.Sequential(nn.Linear(4, 2)).double(), [0.1, large, 0.0], 3)
    problem, support, query = cast(dtype, problem, *perceptron_sets())
    executor = executor_of(problem, support.x)
    before = executor.judge_steps(problem, support, query)
    bad = query.x.detach().clone()
    bad[2] *= large
    with pytest.raises(NonFiniteError, match=r"^task 2, query after step 2: loss is (nan|inf)$"):
        executor.judge_steps(problem, support, replace(query, x=bad))
    bad[1, 3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^task 1, query after step 0: loss is nan$"):
        executor.judge_steps(problem, support, replace(query, x=bad))
    worse = support.x.detach().clone()
    worse[1, 0, 0] = torch.nan
    rows = torch.arange(1, 4).repeat(3, 3, 1)
    rows[1, 2, 1] = 0
    with pytest.raises(NonFiniteError, match=r"^task 1, step 2: loss is nan$"):
        executor.judge_steps(problem, replace(support, x=worse, rows=rows), query)
    for one, other in zip(executor.judge_steps(problem, support, query), before, strict=True):
        assert torch.equal(one.task_losses, other.task_losses)


# --- the instruction sets -------------------------------------------------------------------------------------------


def blocks() -> nn.Module:
    """Patches, minimal filtering, batch norms that relu and pool, and a head of one output."""
    conv = [
        layer for inputs in (2, 40) for layer in (nn.Conv2d(inputs, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU())
    ]
    return nn.Sequential(*conv, nn.MaxPool2d(2), nn.Flatten(), nn.Tanh(), nn.Linear(640, 1)).double()


def block_sets(differentiable: bool = False) -> tuple[Support, Query]:
    support, query = (each(randn(3, 5, 2, 8, 8), randn(3, 5, 1)) for each in (Support, Query))
    support.x.requires_grad_(differentiable)
    return support, query


@pytest.mark.cpu_only("a GPU has one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(dtype, monkeypatch):
    calls = [
        cast(dtype, inner_problem(convolutional(width=21), 0.1, 3, momentum=0.5), *conv_sets(supports=3)),
        cast(dtype, inner_problem(mlp(), 0.1, 3), *perceptron_sets()),
        cast(dtype, inner_problem(filtered(), 0.1, 2), *conv_sets()),
    ]
    if dtype is torch.float64:  # in float32 a ReLU or a pooling may take the other side of a kink
        lr = 1e-3  # a step over 640 features diverges at 0.1 and multiplies every rounding
        calls.append((inner_problem(blocks(), lr, 2, loss="mse"), *block_sets(differentiable=True)))
        calls.append((inner_problem(blocks(), lr, 2, loss="mse", adapt="9.*"), *block_sets()))
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("METAAUG_ISA", isa)
        fresh = [(replace(call[0], model=copy.deepcopy(call[0].model)), *call[1:]) for call in calls]
        try:
            assert _C.instruction_set() == isa
            found[isa] = [run_all(*call) for call in fresh]
        except ValueError as error:
            assert str(error) == f"METAAUG_ISA asks for {isa}, which this processor lacks"  # noqa: PT017
    assert "baseline" in found
    for results in found.values():
        for got, expected in zip(results, found["baseline"], strict=True):
            assert_close(got, expected, 1000 * torch.finfo(dtype).eps)


@pytest.mark.cpu_only("a GPU has one")
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    support, query = perceptron_sets()
    problem = inner_problem(mlp(), 0.1, 1)
    monkeypatch.setenv("METAAUG_ISA", "mmx")
    with pytest.raises(ValueError, match=r"^METAAUG_ISA must be avx512, avx2 or baseline \(got mmx\)$"):
        executor_of(problem, support.x).meta_loss(problem, support, query)


@pytest.mark.parametrize("value", ["", "-1", "1.5", "many", "99999999999999999999"])
def test_a_budget_that_is_no_number_is_refused(value, monkeypatch):
    support, query = perceptron_sets()
    problem = inner_problem(mlp(), 0.1, 1)
    monkeypatch.setenv("METAAUG_KEEP_MIB", value)
    with pytest.raises(ValueError, match=rf"^METAAUG_KEEP_MIB must be a number of MiB, .* \(got {value}\)$"):
        executor_of(problem, support.x).meta_loss(problem, support, query)


# --- processes of their own -----------------------------------------------------------------------------------------


@on_its_own
@pytest.mark.parametrize(("tasks", "steps"), [(64_000, 2000), (1, 2**31 - 1)])
def test_another_thread_runs_meanwhile_and_ctrl_c_stops_the_call(tasks, steps):
    """The call would take many minutes; a thread that counts beside it interrupts it, and it must stop on its own.

    Of one task, whose gradient would need the weights of all steps, it is between steps that it must hear.
    """
    program = f"""
        import os, signal, threading, time
        import torch, metaaug_fast as mf

        def interrupt():
            for count in range(20):
                time.sleep(0.02)  # each waking needs the interpreter, which the call must have let go
            print("counted", count, flush=True)
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
        model = mf.models.mlp([1, 40, 40, 1])
        x, y = torch.randn({tasks}, 10, 1), torch.randn({tasks}, 10, 1)
        mf.inner_loop(model, x[:1], y[:1], steps=1, loss="mse", backend="fused")
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with torch.set_grad_enabled({tasks > 1}):
                mf.inner_loop(model, x, y, 1e-3, {steps}, loss="mse")
            print("finished")
        except KeyboardInterrupt:
            print("interrupted")
        flat = mf.inner_loop(model, x[:3], y[:3], steps=1, loss="mse", backend="fused").flat
        print("usable", bool(flat.isfinite().all()))
    """
    out = python(program, timeout=60)
    assert out.split("\n")[:3] == ["counted 19", "interrupted", "usable True"]


@on_its_own
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_forked_child_computes_the_same():
    """As a data loader's workers do; the threads that a call has left behind are not in the child."""
    out = python("""
        import os
        import torch, metaaug_fast as mf

        torch.set_num_threads(3)
        model = mf.models.mlp([1, 9, 1])
        x, y = torch.randn(2, 50, 10, 1)
        flat = mf.inner_loop(model, x, y, steps=3, loss="mse", backend="fused").flat
        if (child := os.fork()) == 0:
            again = mf.inner_loop(model, x, y, steps=3, loss="mse", backend="fused").flat
            os._exit(0 if torch.equal(again, flat) else 1)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert out == "child 0\n"


@pytest.mark.slow
@on_its_own
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_without_kept_activations_grows_by_the_weights_of_each_step_and_nothing_else(monkeypatch):
    """From one step to twenty: nineteen more theta_k for each thread's task at work, and a tenth on top."""
    monkeypatch.setenv("METAAUG_KEEP_MIB", "0")
    out = python("""
        import gc, os
        import torch, metaaug_fast as mf
        from metaaug_fast.engine.loop import meta_loss
        from metaaug_fast.engine.problem import Query, Support, inner_problem

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

        model = mf.models.conv4(ways=5)
        x, y = torch.randn(4, 5, 1, 28, 28), torch.arange(5).expand(4, 5)
        threads = 2
        grown = []
        for steps in (1, 20):
            if (child := os.fork()) == 0:
                torch.set_num_threads(threads)
                before = peak()
                meta_loss(inner_problem(model, 0.01, steps), Support(x, y), Query(x, y)).loss.backward()
                with open(f"/proc/self/fd/1", "w") as out:
                    print(peak() - before, file=out, flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        print(threads * sum(value.numel() for value in model.parameters()) * 4)
    """)
    once, often, weights = map(int, out.split())
    print(f"peak growth {(often - once) / weights:.2f} sets of weights for 19 steps")
    assert often - once < 1.1 * 19 * weights + 2**20
    assert often - once > 0.9 * 19 * weights, "the measure must see them"


@pytest.mark.parametrize("weights", ["mean", "sum", "loss and sum", "step weights", "unequal"])
def test_only_unequal_weights_of_tasks_need_a_second_sweep(weights, monkeypatch):
    problem = inner_problem(mlp(), 0.1, 2)
    support, query = perceptron_sets()
    if weights == "step weights":
        query = replace(query, step_weights=rand(2).requires_grad_())
    combine = {
        "mean": lambda out: out.task_losses.mean(),
        "sum": lambda out: out.task_losses.sum(),
        "loss and sum": lambda out: 2 * out.loss + out.task_losses.sum(),
        "step weights": lambda out: out.task_losses.mean(),
        "unequal": lambda out: out.task_losses @ torch.arange(1.0, len(out.task_losses) + 1).double(),
    }[weights]
    calls = []
    run = fused._Call.run
    monkeypatch.setattr(fused._Call, "run", lambda self, *args, **given: calls.append(1) or run(self, *args, **given))
    inputs = leaves(problem, support, query)
    got = gradients(combine(executor_of(problem, support.x).meta_loss(problem, support, query)), inputs)
    assert len(calls) == (2 if weights == "unequal" else 1)
    assert_close(got, gradients(combine(reference.meta_loss(problem, support, query)), inputs))
