"""Inputs changed so that losses grow, of many tasks at once: FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_flag, check_number
from ..tasks import TaskBatch
from .base import Learner, check_steps


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on inputs, uphill (Madry et al. 2018, arXiv 1706.06083).

        x_0 = x + uniform in -radius .. radius                                        or x, without a random start
        x_{k+1} = x_k + step * sign(gradient of the losses at x_k), clipped to |x_{k+1} - x| <= radius and low..high

    Each element of an input may move by `radius`, whatever the others do (the maximum norm). All tasks and samples
    move at once.

    Args:
        radius: how far an element may move, in the units of the inputs; 0 gives them back.
        steps: how many.
        step: how far an element moves in one. None: `2.5 * radius / steps`, but at most `radius`.
        random_start: start at a random place of the ball, drawn by torch's generator.
        low, high: between which the elements of all inputs lie, and stay: 0 and 1 for pictures. None: no limit.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    >>> attack = PGD(0.1, steps=20, low=0, high=1)
    >>> attack.step, str(attack)
    (0.0125, 'pgd of radius 0.1, 20 steps of 0.0125 from a random start, in 0..1')
    >>> x = torch.tensor([[0.05, 0.5, 0.98]])
    >>> attack(lambda moved: moved * torch.tensor([-1.0, 0.0, 1.0]), x)[0, [0, 2]].tolist()
    [0.0, 1.0]
    """

    radius: float
    steps: int = 20
    step: float | None = None
    random_start: bool = True
    low: float | None = None
    high: float | None = None
    name: str = field(default="pgd", init=False)

    def __post_init__(self) -> None:
        check_attack(self.radius, self.steps, self.step, self.random_start, self.low, self.high)
        if self.step is None:
            object.__setattr__(self, "step", min(self.radius, 2.5 * self.radius / self.steps))

    def __str__(self) -> str:
        start = " from a random start" if self.random_start else ""
        steps = f"{self.steps} step{'s' * (self.steps != 1)} of {self.step:g}"
        limits = ["" if limit is None else f"{limit:g}" for limit in (self.low, self.high)]
        return f"{self.name} of radius {self.radius:g}, {steps}{start}" + (f", in {'..'.join(limits)}" * any(limits))

    def __call__(self, losses: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Inputs near `x`, of its shape, at which the losses are larger.

        How far they have moved is a constant to autograd: a gradient goes through to `x` as it comes.

        Args:
            losses: of the inputs, of any shape; those of a sample depend on that sample, or, as under batch norm, on
                some of the others. The gradient is that of their sum. Parameters get no `.grad`.
            x: `[T, N, ...]`, or of any other shape.

        Raises:
            ValueError: `x` does not lie in `low..high`, is no floating tensor, or the losses do not depend on it.
        """
        self._check_inputs(x)
        if self.radius == 0:
            return x
        assert self.step is not None  # as __post_init__ leaves it
        low, high = self._limits
        moved = clean = x.detach()
        lowest, highest = (clean - self.radius).clamp(min=low), (clean + self.radius).clamp(max=high)
        if self.random_start:
            moved = (clean + self.radius * (2 * torch.rand_like(clean) - 1)).clamp(lowest, highest)
        for _ in range(self.steps):
            moved = (moved + self.step * _slope(losses, moved).sign()).clamp(lowest, highest)
        return x + (moved - clean) if x.requires_grad else moved

    @property
    def _limits(self) -> tuple[float, float]:
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    def _check_inputs(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"inputs must be floating point to be attacked (got {x.dtype})")
        if self.low is None and self.high is None:
            return
        least, most = (float(value) for value in torch.aminmax(x.detach()))
        low, high = self._limits
        if least < low or most > high:
            got = least if least < low else most
            raise ValueError(
                f"inputs must lie between low and high, {low:g} and {high:g}, to be attacked (got {got:g})"
            )


class FGSM(PGD):
    """The fast gradient sign method (Goodfellow, Shlens, Szegedy 2015, arXiv 1412.6572): one step, of the whole radius.

        x + radius * sign(gradient of the losses at x), clipped to low..high

    Args:
        radius, low, high: see `PGD`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    >>> FGSM(0.25)(lambda x: x**2, torch.tensor([-1.0, 0.0, 0.5]))
    tensor([-1.2500,  0.0000,  0.7500])
    """

    def __init__(self, radius: float, low: float | None = None, high: float | None = None) -> None:
        super().__init__(radius, 1, radius, False, low, high)
        object.__setattr__(self, "name", "fgsm")


def check_attack(
    radius: float,
    steps: int,
    step: float | None,
    random_start: bool,
    low: float | None,
    high: float | None,
    prefix: str = "",
) -> None:
    """Raise TypeError or ValueError unless a `PGD` can be made of these.

    prefix: of the caller's names for `steps` and `step`.
    """
    check_number("radius", radius)
    check_count(f"{prefix}steps", steps, low=1)
    if step is not None:
        check_number(f"{prefix}step", step)
    check_flag("random_start", random_start)
    for name, limit in (("low", low), ("high", high)):
        if limit is not None:
            check_number(name, limit, low=-math.inf)
    if low is not None and high is not None and low >= high:
        raise ValueError(f"low must be below high, {high:g} (got {low:g})")


def attack_queries(
    learner: Learner, tasks: TaskBatch, attack: PGD, *, steps: int | None = None, **options: Any
) -> TaskBatch:
    """The tasks, with queries that were attacked against the learner as it has adapted to each support set.

    What is climbed is the loss that `adapted.evaluate` finds. The learner stays as it is, running statistics, too.

    Args:
        learner: any; it adapts without gradients, in the mode that it is in.
        steps: of its inner loop; None: its own. options: of its `adapt`.

    Raises:
        TypeError, ValueError: the tasks do not fit the learner, or the queries the attack.

    >>> import metaaug_fast as mf
    >>> y = torch.arange(3).repeat(2, 2)
    >>> tasks = mf.TaskBatch(torch.randn(2, 6, 4), y, torch.randn(2, 6, 4), y)
    >>> learner = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1)
    >>> attacked = attack_queries(learner, tasks, PGD(0.5))
    >>> bool((learner(attacked).task_losses > learner(tasks).task_losses).all())
    True
    """
    if check_steps(learner, steps) is not None:
        options["steps"] = steps
    before = [(buffer, buffer.clone()) for buffer in learner.buffers()]
    with torch.no_grad():
        adapted = learner.adapt(tasks.support_x, tasks.support_y, **options)
    query_x = attack(lambda x: adapted.evaluate(x, tasks.query_y).task_losses, tasks.query_x)
    with torch.no_grad():
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
    return TaskBatch(tasks.support_x, tasks.support_y, query_x, tasks.query_y)


class Attacking(Learner):
    """A learner that attacks in training: its settings, to stand in front of the learner that it is otherwise.

    Args:
        model: as the learner has it.
        radius, random_start, low, high: see `PGD`; `attack_steps` and `attack_step` are its `steps` and `step`.
        options: the learner's own.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        radius: float = 0.1,
        attack_steps: int = 7,
        attack_step: float | None = None,
        random_start: bool = True,
        low: float | None = None,
        high: float | None = None,
        **options: Any,
    ) -> None:
        check_attack(radius, attack_steps, attack_step, random_start, low, high, "attack_")
        super().__init__(model, **options)
        self.radius = radius
        self.attack_steps = attack_steps
        self.attack_step = attack_step
        self.random_start = random_start
        self.low = low
        self.high = high

    @property
    def attack(self) -> PGD:
        """As the settings are now."""
        return PGD(self.radius, self.attack_steps, self.attack_step, self.random_start, self.low, self.high)


def _slope(losses: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of the losses."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total = losses(x).sum()
        if not total.requires_grad:
            raise ValueError("losses must depend on the inputs by operations that autograd knows (got a constant)")
        (slope,) = torch.autograd.grad(total, x)
    return slope
