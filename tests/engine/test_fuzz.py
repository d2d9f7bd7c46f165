"""Calls put together at random: right against the reference, or refused by one of the documented exceptions.

A call is drawn so that it is valid, and half of the time one argument is then spoilt. `METAAUG_FUZZ` is how many calls
each test makes; hypothesis prints the smallest one that fails.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.engine import reference
from metaaug_fast.engine.problem import InnerProblem, Query, Support, inner_problem
from metaaug_fast.errors import NonFiniteError, NotFusedError
from metaaug_fast.tasks import class_ids
from tests.building import VIEWS
from tests.exactness import errors, gradients, leaves

pytestmark = pytest.mark.usefixtures("fresh_numbers")

fuzz = settings(
    max_examples=int(os.environ.get("METAAUG_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
DOCUMENTED = (TypeError, ValueError, NonFiniteError, NotFusedError)
UNEXPLAINED = (
    "Internal",
    "no attribute",
    "not supported between",
    "unsupported operand",
    "object is not",
    "argument of",
)
CLASSES = 3
DTYPES = torch.float64, torch.float32

# --- models ---


class Doubled(nn.Module):
    """An op that the engine does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, 0.1), nn.Softplus(), nn.Linear(6, CLASSES))


def convolutional() -> nn.Module:
    body = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3, 0.1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(12, CLASSES))


def unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), Doubled(), nn.Sigmoid(), nn.Linear(6, CLASSES))


SAMPLE_SHAPES = {perceptron: (4,), normalised: (4,), convolutional: (2, 4, 4), unknown: (4,)}
LAYOUTS = (lambda value: value, *VIEWS.values())

# --- what may be wrong with an argument ---


def of_inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.detach().clone()


SPOILT_TENSORS = {
    "nothing": lambda value: None,
    "a number": lambda value: 1.5,
    "a list": lambda value: [1, 2],
    "no tasks": lambda value: value[:0],
    "no samples": lambda value: value[:, :0],
    "a dimension less": lambda value: value[0],
    "a dimension more": lambda value: value[None],
    "a sample more": lambda value: torch.cat([value, value[:, :1]], 1),
    "a last value less": lambda value: value[..., :-1],
    "half precision": lambda value: value.half(),
    "brain floats": lambda value: value.bfloat16(),
    "single precision": lambda value: value.float(),
    "double precision": lambda value: value.double(),
    "whole numbers": lambda value: value.long(),
    "small whole numbers": lambda value: value.int(),
    "booleans": lambda value: value > 0,
    "complex": lambda value: value.to(torch.complex64),
    "NaN": lambda value: value * math.nan if value.is_floating_point() else value,
    "infinite": lambda value: value * math.inf if value.is_floating_point() else value,
    "large": lambda value: value * 1000,
    "negative": lambda value: -value - 1,
    "sparse": lambda value: value.detach().to_sparse(),
    "on no device": lambda value: value.to("meta"),
    "expanded": lambda value: value[:1].expand(value.shape),
    "of inference": of_inference,
    "a parameter": lambda value: nn.Parameter(value.detach()) if value.is_floating_point() else value,
}
SPOILT_VALUES = (
    *(
        None,
        True,
        "a",
        -1,
        -0.5,
        0,
        2.5,
        math.nan,
        math.inf,
        2**31,
        10**400,
        [],
        [0.1],
        {},
        {"0.weight": 0.1},
        nn.ReLU(),
    ),
    *(torch.ones(2), torch.tensor(0.1), torch.tensor(True), torch.zeros(()).to("meta"), object()),
)

# --- calls ---


@dataclass
class Case:
    """Arguments of a call by their names, apart from the sets of tasks."""

    model: nn.Module
    sets: dict[str, Any]
    options: dict[str, Any]
    spoilt: str = ""

    def split(self) -> tuple[dict[str, Any], Support, Query]:
        """What makes the inner problem, and the two sets."""
        names = ("sample_weight", "rows", "initial")
        support = Support(self.sets["support_x"], self.sets["support_y"], *map(self.options.get, names))
        rest = {name: value for name, value in self.options.items() if name not in (*names, "backend")}
        return rest, support, Query(self.sets["query_x"], self.sets["query_y"])


def draw_case(draw: st.DrawFn, prefix: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES, **more: list[Any]) -> Case:
    """Arguments of `inner_loop`, or of a learner, which calls them `inner_...`; `more` are values of others."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    build = draw(st.sampled_from(list(SAMPLE_SHAPES)), label="model")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    model = build().to(dtype).train(draw(st.booleans(), label="training"))
    tasks, supports, queries, steps = (
        draw(st.integers(low, 3), label=name) for name, low in {"T": 1, "S": 2, "Q": 2, "K": 0}.items()
    )
    loss = draw(st.sampled_from(["ids", "probabilities", "mse", "bce"]), label="loss")

    def tensor(name: str, value: Tensor) -> Tensor:
        value = draw(st.sampled_from(LAYOUTS), label=f"{name} lies as")(value)
        return value.requires_grad_(value.is_floating_point() and draw(st.booleans(), label=f"{name} has a gradient"))

    sets = {}
    for name, count in (("support", supports), ("query", queries)):
        sets[f"{name}_x"] = tensor(f"{name}_x", torch.randn(tasks, count, *SAMPLE_SHAPES[build], dtype=dtype))
        values = torch.randn(tasks, count, CLASSES, dtype=dtype)
        target = {"ids": torch.randint(CLASSES, (tasks, count)), "mse": values}.get(loss, values.softmax(-1))
        sets[f"{name}_y"] = tensor(f"{name}_y", target)
    options: dict[str, Any] = {
        "loss": "cross_entropy" if loss in ("ids", "probabilities") else loss,
        f"{prefix}steps": steps,
        f"{prefix}lr": draw(st.sampled_from([0.1, 0, [0.1] * steps, torch.rand((), dtype=dtype) / 4]), label="lr"),
    }
    common = {"batch_norm": ["batch", "frozen"], "backend": ["auto", "fallback"], "adapt": ["*.weight", ["0.weight"]]}
    for name, values in {**common, "task_chunk": [1, 2, 4], **more}.items():
        if draw(st.booleans(), label=f"gives {name}"):
            options[name] = draw(st.sampled_from(values), label=name)
    size = sum(value.numel() for value in model.parameters())
    tensors = {
        "sample_weight": lambda: torch.rand(tasks, supports, dtype=dtype),
        "rows": lambda: torch.randint(supports, (tasks, steps, 2)),
        "initial": lambda: torch.randn(tasks, size, dtype=dtype) / 2,
    }
    for name, value in tensors.items():
        if not prefix and draw(st.booleans(), label=f"gives {name}"):
            options[name] = tensor(name, value())
    return Case(model, sets, options)


def spoil(draw: st.DrawFn, case: Case) -> Case:
    """The call with one argument replaced."""
    name = draw(st.sampled_from([*case.sets, *case.options]), label="spoils")
    value = case.sets.get(name, case.options.get(name))
    if isinstance(value, Tensor) and value.ndim > 1:
        value = SPOILT_TENSORS[draw(st.sampled_from(list(SPOILT_TENSORS)), label="with")](value)
    else:
        value = draw(st.sampled_from(SPOILT_VALUES), label="with")
    sets, options = ({**each, **({name: value} if name in each else {})} for each in (case.sets, case.options))
    return replace(case, sets=sets, options=options, spoilt=name)


def drawn(draw: st.DrawFn, **more: Any) -> Case:
    case = draw_case(draw, **more)
    return spoil(draw, case) if draw(st.booleans(), label="spoilt") else case


# --- what has to come of them ---


def collect(problem: InnerProblem, out: mf.MetaOutput, flat: Tensor, *sets: Any) -> dict[str, Tensor]:
    """What a call gave, and the gradient of all of it together for whatever has one."""
    inputs, weight = leaves(problem, *sets), torch.arange(1, len(flat) + 1, dtype=flat.dtype)
    total = (out.task_losses * weight).sum() + out.loss + flat.sin().sum()
    found = gradients(total, inputs) if total.requires_grad else {name: x.detach() * 0 for name, x in inputs.items()}
    return {"flat": flat.detach(), "task_losses": out.task_losses.detach(), **found}


def usable(value: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of one from inference mode, which plain autograd refuses."""
    return value.clone() if value is not None and value.is_inference() else value


def specified(case: Case, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The same by the reference."""
    rest, support, query = case.split()
    support, query = (replace(each, **{name: usable(x) for name, x in vars(each).items()}) for each in (support, query))
    support, query = (replace(each, y=class_ids(each.y)) for each in (support, query))
    problem = inner_problem(case.model, **{rename(name): value for name, value in rest.items()})
    out = reference.meta_loss(problem, support, query)
    return collect(problem, out, reference.adapt(problem, support), support, query)


def judge(
    case: Case,
    call: Callable[[], dict[str, Tensor]],
    wanted: Callable[[], dict[str, Tensor]],
    exact: float = 1e-9,
) -> None:
    """Right, or refused with a reason and for one, and then nothing has changed."""
    before = copy.deepcopy(case.model.state_dict())
    got = outcome(call)
    if isinstance(got, NonFiniteError):
        assert not finite(wanted()), got
    elif isinstance(got, Exception):
        assert case.spoilt, got
        assert str(got), type(got)
        assert not any(text in str(got) for text in UNEXPLAINED), got
        assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    elif tame(expected := wanted()):
        tolerance = 5e-3 if case.model[0].weight.dtype == torch.float32 else exact
        rounding = {name: 8 * torch.finfo(value.dtype).eps for name, value in expected.items()}  # of low precision
        found = errors(got, expected)
        wrong = {name: error for name, error in found.items() if not error < max(tolerance, rounding[name])}
        assert not wrong, wrong


def outcome(call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | Exception:
    try:
        return call()
    except DOCUMENTED as error:
        return error


def tame(values: dict[str, Tensor]) -> bool:
    """Whether nothing is so large, as with a rate that is, that rounding grows beyond all tolerances."""
    return all(bool((value.abs() < 1e4).all()) for value in values.values())


def finite(values: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


SGD = {"momentum": [0.5, 0], "weight_decay": [0.1, 0], "label_smoothing": [0.2, 0], "first_order": [False, True]}


@fuzz
@given(st.data())
@pytest.mark.filterwarnings("ignore::metaaug_fast.errors.FallbackWarning")
def test_inner_loop(data):
    case = drawn(data.draw, **SGD)

    def call() -> dict[str, Tensor]:
        _, support, query = case.split()
        fast = mf.inner_loop(case.model, support.x, support.y, **case.options)
        return collect(fast.problem, fast.evaluate(query.x, query.y), fast.flat, support, query)

    judge(case, call, lambda: specified(case))


@fuzz
@given(st.data())
@pytest.mark.filterwarnings("ignore::metaaug_fast.errors.FallbackWarning")
def test_maml(data):
    case = drawn(data.draw, prefix="inner_", **SGD)

    def call() -> dict[str, Tensor]:
        _, support, query = case.split()
        maml = mf.MAML(case.model, **case.options)
        out = maml(mf.TaskBatch(support.x, support.y, query.x, query.y))
        flat = maml.adapt(support.x, support.y).flat
        return collect(maml.problem(), out, flat, support, query)

    judge(case, call, lambda: specified(case, lambda name: name.removeprefix("inner_")))


@fuzz
@given(st.data())
@pytest.mark.filterwarnings("ignore::metaaug_fast.errors.FallbackWarning")
def test_reptile(data):
    # Adam divides a gradient that is 0 but for rounding, as that of a bias in front of a norm, by its 1e-8.
    more = {"inner_optimizer": ["adam", "sgd"], "meta_lr": [1.0, 0.5, 0]}
    case = drawn(data.draw, prefix="inner_", dtypes=(torch.float64,), **more)
    start = reference.pack(copy.deepcopy(dict(case.model.named_parameters()))).detach()
    twin = replace(case, model=copy.deepcopy(case.model))

    def call() -> dict[str, Tensor]:
        _, support, query = case.split()
        out = mf.Reptile(case.model, **case.options).step(mf.TaskBatch(support.x, support.y, query.x, query.y))
        return {
            "moved": reference.pack(dict(case.model.named_parameters())).detach() - start,
            "losses": out.task_losses,
        }

    def wanted() -> dict[str, Tensor]:
        options = {name: value for name, value in twin.options.items() if name != "meta_lr"}
        options = {"inner_lr": 1e-3, "inner_optimizer": "adam", "first_order": True, **options}
        found = specified(replace(twin, options=options), lambda name: name.removeprefix("inner_"))
        rate = twin.options.get("meta_lr", 1.0)
        return {"moved": rate * (found["flat"] - start).mean(0), "losses": found["task_losses"]}

    judge(case, call, wanted, exact=1e-6)
