"""Comparing an executor with the specification: random numbers, inputs by name, gradients, and how close is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaaug_fast.engine import reference
from metaaug_fast.engine.norms import forward
from metaaug_fast.engine.problem import InnerProblem, Query, Support

RATE_FORMS = ("number", "scalar", "step", "tensor", "tensor, step", "element", "element, step", "mixed")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def learned_rates(form: str, parameters: Mapping[str, Tensor], steps: int, scale: float = 0.3):
    """Random inner learning rates of one of `RATE_FORMS` for the adapted `parameters`."""

    def value(*shape: int) -> Tensor:
        return (scale * rand(*shape)).requires_grad_()

    def each(shape_of) -> dict[str, Tensor]:
        return {name: value(*shape_of(parameter)) for name, parameter in parameters.items()}

    def mixed() -> dict[str, float | Tensor]:
        forms = (lambda shape: scale / 2, lambda shape: value(steps), lambda shape: value(*shape))
        return {name: forms[place % 3](each.shape) for place, (name, each) in enumerate(parameters.items())}

    return {
        "number": lambda: scale / 2,
        "scalar": value,
        "step": lambda: value(steps),
        "tensor": lambda: each(lambda parameter: ()),
        "tensor, step": lambda: each(lambda parameter: (steps,)),
        "element": lambda: each(lambda parameter: parameter.shape),
        "element, step": lambda: each(lambda parameter: (steps, *parameter.shape)),
        "mixed": mixed,
    }[form]()


def leaves(problem: InnerProblem, support: Support, query: Query | None = None) -> dict[str, Tensor]:
    """Everything of a call that asks for a gradient, by "kind" or "kind: parameter"."""
    named: dict[str, Tensor | None] = {f"parameter: {name}": value for name, value in problem.parameters.items()}
    named |= {f"rate: {name}": rate.value for name, rate in problem.rates.items()}
    named |= {"support_x": support.x, "support_y": support.y}
    named |= {"sample_weight": support.sample_weight, "initial": support.initial}
    if query is not None:
        named |= {"query_x": query.x, "query_y": query.y, "step_weights": query.step_weights}
    return {name: value for name, value in named.items() if value is not None and value.requires_grad}


def predictions(problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
    """The specification's, of each task's weights `[T, P]` on its queries `[T, N, ...]`."""
    outputs = [
        forward(problem, reference.unpack(problem, each), one, task=task, step=problem.steps, query=True)
        for task, (each, one) in enumerate(zip(flat, x, strict=True))
    ]
    return torch.stack(outputs)


def gradients(value: Tensor, inputs: Mapping[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """The gradient of a scalar with respect to each input; zeros where there is none."""
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True, **options)
    return dict(zip(inputs, found, strict=True))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of a tensor as a whole; what is expected must not be zero."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return float((found - expected).detach().norm() / expected.detach().norm())


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each gradient as a whole vector.

    Some gradients are 0 to rounding, as that of a bias in front of a batch norm. So no error is relative to less than
    1e-3 of the largest gradient, nor, where all are such, to less than 1e-5.
    """
    floor = max(1e-5, 1e-3 * max(float(value.norm()) for value in expected.values()))
    result = {}
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        difference = float((got[name] - value).norm())
        result[name] = difference / max(float(value.norm()), floor) if difference else 0.0
    return result


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Every relative error is below the tolerance (NaN is not)."""
    found = errors(got, expected)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error < tolerance}
    assert not wrong, wrong
