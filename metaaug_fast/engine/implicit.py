"""A proximal inner problem and the gradient of its solution, which does not ask how the solution was found.

    phi    = argmin loss(phi; support) + pull / 2 |phi - theta|^2           for every task
    H      = d2 loss / dphi2,  so that  (I + H / pull) dphi/dtheta = I
    v      = the adjoint of phi,  x = (I + H / pull)^-1 v  the adjoint of theta

One inner step of rate `1 / pull` from phi has the Jacobian `I - H / pull`. Its reverse sweep with p gives
`p - H p / pull`, hence `(I + H / pull) p = 2 p - (p - H p / pull)` for conjugate gradients; and what its sweep with x
gives to support data, and to weights that do not adapt, is their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .autograd import once_differentiable
from .executor import Executor
from .fast_weights import FastWeights
from .loop import prepare
from .problem import InnerProblem, Rate, Support
from .reference import pack


@dataclass(frozen=True)
class Solved:
    """What conjugate gradients came to, for every task.

    solution: x, `[T, N]`. residuals: `|b - A x| / |b|`, `[T]`. indefinite: whether they met a direction p with
    `p A p <= 0`, `[T]`.
    """

    solution: Tensor
    residuals: Tensor
    indefinite: Tensor


@dataclass(frozen=True)
class Proximal:
    """How a proximal problem is solved, and its solution differentiated.

    problem: with the steps, and the one rate, of the descent. pull: > 0. damping: how much stronger the pull is in the
    equations of the gradient. cg_steps, cg_tolerance: see `conjugate_gradients`. report: is told how each backward pass
    went.
    """

    problem: InnerProblem
    pull: float
    damping: float
    cg_steps: int
    cg_tolerance: float
    report: Callable[[Solved], None]


def adapt_proximally(proximal: Proximal, support: Support, backend: str = "auto") -> FastWeights:
    """Check the support set and descend in every task; theta is `support.initial`, if given.

    Gradients are those of a minimum, taken where the descent ended. They reach what those of `inner_loop` do, except
    for the rate.
    """
    executor, problem, support = prepare(proximal.problem, support, backend)
    data = _theta(problem, support), support.x, support.y, support.sample_weight
    return FastWeights(problem, _Minimum.apply(replace(proximal, problem=problem), executor, *data), backend)


@torch.no_grad()
def proximal_steps(proximal: Proximal, support: Support, backend: str = "auto") -> Iterator[FastWeights]:
    """Check the support set, and give the weights after 0, 1, ... steps of the descent, without gradient."""
    executor, problem, support = prepare(proximal.problem, support, backend)
    for phi in _descent(replace(proximal, problem=problem), executor, _theta(problem, support), support):
        yield FastWeights(problem, phi, backend)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float = 0.0) -> Solved:
    """Solve `A x = b` for every task, all at once; A is symmetric, and ought to be positive definite.

    A task is done when its residual is at most `tolerance |b|`. It is done, too, at a direction p with `p A p <= 0`:
    then it keeps its x, or takes b if that was the first (Nocedal, Wright 2006, algorithm 7.1).

    Args:
        product: A of each task times its vector, `[T, N]` to `[T, N]`.
        b: `[T, N]`.
        steps: how many at most.
        tolerance: 0 takes all steps, and never waits for a GPU to see whether tasks are done.

    >>> a, b = torch.tensor([[[4.0, 1.0], [1.0, 3.0]]]), torch.tensor([[1.0, 2.0]])
    >>> solved = conjugate_gradients(lambda p: (a @ p[..., None])[..., 0], b, steps=2)
    >>> torch.allclose(solved.solution, torch.tensor([[1 / 11, 7 / 11]])), solved.indefinite
    (True, tensor([False]))
    """
    x, residual, direction = torch.zeros_like(b), b, b
    first = square = b.square().sum(1)
    going, indefinite = square > 0, torch.zeros_like(square, dtype=torch.bool)
    for step in range(steps):
        if tolerance and not going.any():
            break
        image = product(direction)
        curvature = (direction * image).sum(1)
        indefinite = indefinite | (going & ~(curvature > 0))
        going = going & (curvature > 0)
        length = torch.where(going, square / curvature, 0.0 if step else 1.0)[:, None]
        x, residual = x + length * direction, residual - length * image
        before, square = square, residual.square().sum(1)
        direction = residual + torch.where(going, square / before, 0.0)[:, None] * direction
        going = going & (square > tolerance**2 * first)
    return Solved(x, torch.where(first > 0, square / first, 0.0).sqrt(), indefinite)


class _Minimum(torch.autograd.Function):
    """phi from theta, both `[T, P]`. Nothing is kept of the way there."""

    @staticmethod
    def forward(
        ctx: Any, proximal: Proximal, executor: Executor, theta: Tensor, x: Tensor, y: Tensor, weight: Tensor | None
    ) -> Tensor:
        *_, phi = _descent(proximal, executor, theta, Support(x, y, weight))
        phi = phi.clone() if phi is theta else phi
        ctx.proximal, ctx.executor = proximal, executor
        ctx.save_for_backward(phi, x, y, weight)
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        proximal, (phi, *data) = ctx.proximal, ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        problem, adapts = proximal.problem, _adapts(proximal.problem)
        rate = Rate(phi.new_full((), 1 / (proximal.pull + proximal.damping)))
        step = replace(problem, steps=1, rates=dict.fromkeys(problem.rates, rate))
        start = phi.detach().requires_grad_()

        def sweep(needs: tuple[bool, ...]) -> Callable[[Tensor], tuple[Tensor, ...]]:
            """The reverse of one step: from p to `p - H p / pull`, and to the gradients of data."""
            leaves: list[Any] = [
                each if each is None else each.detach().requires_grad_(need)
                for each, need in zip(data, needs, strict=True)
            ]
            asked = [start, *(leaf for leaf, need in zip(leaves, needs, strict=True) if need)]
            x, y, weight = leaves
            with torch.enable_grad():
                end = ctx.executor.adapt(step, Support(x, y, weight, initial=start))
            return lambda p: torch.autograd.grad(end, asked, p, retain_graph=True)

        plain = sweep((False,) * len(data))
        solved = conjugate_gradients(
            lambda p: adapts * (2 * p - plain(p)[0]), adapts * v, proximal.cg_steps, proximal.cg_tolerance
        )
        proximal.report(solved)
        x = solved.solution
        if not any(needs) and len(problem.rates) == len(problem.parameters):
            return None, None, x, None, None, None
        swept, *others = (sweep(needs) if any(needs) else plain)(x)
        given = iter(others)
        return None, None, x + (1 - adapts) * (v + swept), *(next(given) if need else None for need in needs)


def _descent(proximal: Proximal, executor: Executor, theta: Tensor, support: Support) -> Iterator[Tensor]:
    """phi after 0, 1, ... steps, each a call for all tasks and then its pull, which the engine does not know."""
    problem = replace(proximal.problem, steps=1)
    rate = next(iter(problem.rates.values())).value
    pull = proximal.pull * rate * _adapts(problem)
    phi = theta
    yield phi
    for step in range(proximal.problem.steps):
        try:
            moved = executor.adapt(problem, replace(support, initial=phi))
        except NonFiniteError as error:  # of a loop whose only step is its step 0
            raise NonFiniteError(str(error).replace("step 0", f"step {step}", 1)) from None
        phi = torch.addcmul(moved, pull, theta - phi)
        yield phi


def _theta(problem: InnerProblem, support: Support) -> Tensor:
    """Where every task starts, and what it is pulled to, `[T, P]`."""
    if support.initial is not None:
        return support.initial
    return pack(problem.parameters).expand(len(support.x), -1)


def _adapts(problem: InnerProblem) -> Tensor:
    """1 for a weight that adapts, else 0, `[P]`."""
    return pack(
        {
            name: torch.full_like(value, float(name in problem.rates), requires_grad=False)
            for name, value in problem.parameters.items()
        }
    )
