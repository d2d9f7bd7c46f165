"""Says from measurements whether a learner's gradients are exact, and of which order."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import FallbackWarning
from ..report.tables import plain
from ..runs.evaluation import learner_in
from ..tasks import TaskBatch

SECOND, FIRST, EXACT = "second order", "first order", "exact"
TOLERANCE = 1e-8
"""How far exact gradients in float64 may be from the reference, relative to their norm."""
DIFFERENCE_TOLERANCE = 1e-4
"""The same for finite differences, which are not exact themselves."""
SHIFTS = (1e-6, 1e-7, 1e-8, 1e-9)
"""How far differences go, in units of a direction's elements, which are standard normal."""
NEGLIGIBLE = 1e-12
"""What counts as zero beside the norm of all gradients."""


@dataclass(frozen=True)
class GroupErrors:
    """Relative errors of one group of gradients: from references, where there are any, and from finite differences."""

    second_order: float
    first_order: float
    differences: float


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` measured.

    order: "second order", "first order", "exact" (of a learner without a reference: as finite differences say), or
        "neither: " and why. executor: what computed the gradients.
    first_order: what the learner says of itself. errors: by group of gradients; those from a reference are NaN where
        the learner has none.
    """

    order: str
    first_order: bool
    executor: str
    errors: dict[str, GroupErrors]

    @property
    def relative_error(self) -> float:
        """The largest relative error from the reference of the order found (second order if neither was).

        Of a learner without a reference: from finite differences.
        """
        if self.order == FIRST:
            return max(error.first_order for error in self.errors.values())
        if self.order == EXACT:
            return max(error.differences for error in self.errors.values())
        return max(error.second_order for error in self.errors.values())

    @property
    def ok(self) -> bool:
        """Whether the gradients are exact and of the order that the learner says."""
        return self.order in ((FIRST,) if self.first_order else (SECOND, EXACT))

    def __str__(self) -> str:
        said = "" if self.ok else f" (the learner says {FIRST if self.first_order else SECOND})"
        references = (SECOND, FIRST, "differences")
        rows = [
            (group, *(f"{number:.1e}" for number in (error.second_order, error.first_order, error.differences)))
            for group, error in self.errors.items()
        ]
        return (
            f"{self.order}{said}; relative errors of the {self.executor} executor's gradients in float64 from\n"
            f"{plain(('', *references), rows, numbers=references)}"
        )


def check_gradients(
    learner: nn.Module,
    tasks: TaskBatch,
    step_weights: Tensor | None = None,
    *,
    directions: int = 5,
    seed: int = 0,
) -> GradientReport:
    """Compare a learner's meta-gradients with the reference's and with finite differences, all in float64.

    The gradients are those of the parameters, learned rates, support inputs and soft support labels. A copy of the
    learner computes them; the learner, its gradients and torch's random state stay as they are.

    Args:
        learner: one whose `learner(tasks).loss` can be differentiated. Where it has a `specification` of its own in
            plain autograd, as those that adapt by gradients have, that is the reference.
        step_weights: for a learner that takes them.
        tasks: a few small ones: the reference runs one at a time and keeps its whole graph.
        directions: how many random ones central differences are taken along, in each group.
        seed: of directions and dropout masks.

    Raises:
        ValueError: the learner's loss has no gradient, or the tasks do not fit its model.

    >>> import torch, metaaug_fast as mf
    >>> maml = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.1, loss="mse")
    >>> tasks = mf.TaskBatch(*(torch.randn(3, 5, 1) for _ in range(4)))
    >>> report = mf.check_gradients(maml, tasks)
    >>> report.order, report.ok, report.relative_error < 1e-10
    ('second order', True, True)
    """
    learner = copy.deepcopy(learner_in(learner)).double()
    tasks = _leaves(tasks)
    groups = _groups(learner, tasks)
    variables = [variable for group in groups.values() for variable in group]
    options = {} if step_weights is None else {"step_weights": step_weights.double()}

    def loss() -> Tensor:
        torch.default_generator.manual_seed(seed)
        return learner(tasks, **options).loss

    def reference_gradient(first_order: bool) -> list[Tensor] | None:
        torch.default_generator.manual_seed(seed)
        expected = learner.specification(tasks, first_order=first_order, **options)
        return None if expected is None else _gradient(expected.loss, variables)

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        value = loss()
        if not value.requires_grad:
            raise ValueError(f"learner must have a loss that can be differentiated (got {type(learner).__name__})")
        found = _gradient(value, variables)
        second, first = (reference_gradient(first_order) for first_order in (False, True))
        negligible = NEGLIGIBLE * max(_norm(found), _norm(second or found))
        errors, begin = {}, 0
        for name, group in groups.items():
            part = slice(begin, begin := begin + len(group))
            errors[name] = GroupErrors(
                _distance(found[part], second and second[part], negligible),
                _distance(found[part], first and first[part], negligible),
                _difference_error(loss, group, found[part], directions, seed),
            )
        executor = learner.runs_on(tuple(tasks.support_x.shape[2:]), ids=not tasks.support_x.is_floating_point())
    return GradientReport(_order(errors), learner.first_order, executor, errors)


def _leaves(tasks: TaskBatch) -> TaskBatch:
    """A float64 copy whose support inputs, and soft labels, can be differentiated."""
    tasks = tasks.to(torch.float64)
    x, y = (each.detach().clone() for each in tasks.tensors[:2])
    for each in (x, y):
        each.requires_grad_(each.is_floating_point())
    return TaskBatch(x, y, tasks.query_x.detach(), tasks.query_y.detach())


def _groups(learner: nn.Module, tasks: TaskBatch) -> dict[str, list[Tensor]]:
    """The leaves to check, by what they are."""
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    groups: dict[str, list[Tensor]] = {
        "parameters": [value for name, value in named.items() if not name.startswith("inner_lr")],
        "inner_lr": [value for name, value in named.items() if name.startswith("inner_lr")],
        "support_x": [tasks.support_x] if tasks.support_x.requires_grad else [],
        "support_y": [tasks.support_y] if tasks.support_y.requires_grad else [],
    }
    return {name: group for name, group in groups.items() if group}


def _gradient(loss: Tensor, variables: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True))


def _norm(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).norm())


def _distance(found: list[Tensor], expected: list[Tensor] | None, negligible: float) -> float:
    """`|found - expected|` relative to the longer of the two; 0 where both are negligible, NaN where one is missing."""
    if expected is None:
        return math.nan
    longest = max(_norm(found), _norm(expected))
    difference = _norm([one - other for one, other in zip(found, expected, strict=True)])
    return 0.0 if longest <= negligible else difference / longest


@torch.no_grad()
def _difference_error(
    loss: Callable[[], Tensor], variables: list[Tensor], gradients: list[Tensor], directions: int, seed: int
) -> float:
    """Error of the slopes along random directions, relative to their root mean square: the smallest of all shifts.

    The median over directions counts, and ever smaller shifts are tried, because a step over a kink of a ReLU or a
    maximum changes the loss by more than the slope says.
    """
    generator = torch.Generator().manual_seed(seed)
    start = [variable.clone() for variable in variables]
    moves = [
        [torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device) for value in start]
        for _ in range(directions)
    ]
    pairs = [zip(move, gradients, strict=True) for move in moves]
    slopes = torch.tensor(
        [sum(float((one * other).sum()) for one, other in pair) for pair in pairs], dtype=torch.float64
    )
    best = math.inf
    for shift in SHIFTS:
        differences = []
        for move in moves:
            ends = []
            for size in (shift, -shift):
                for variable, value, direction in zip(variables, start, move, strict=True):
                    variable.copy_(value + size * direction)
                ends.append(float(loss()))
            differences.append((ends[0] - ends[1]) / (2 * shift))
        # A slope so small that the loss's own rounding hides it cannot be judged, and must not fail.
        rounding = 8 * torch.finfo(torch.float64).eps * max(1.0, abs(ends[0])) / shift
        found = torch.tensor(differences, dtype=torch.float64)
        size = max(_rms(slopes), _rms(found), rounding / DIFFERENCE_TOLERANCE)
        best = min(best, float((slopes - found).abs().median()) / size)
        if best <= DIFFERENCE_TOLERANCE:
            break
    for variable, value in zip(variables, start, strict=True):
        variable.copy_(value)
    return best


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _order(errors: dict[str, GroupErrors]) -> str:
    """What the errors say: the first statement that holds."""
    wrong = {name: error for name, error in errors.items() if not error.differences <= DIFFERENCE_TOLERANCE}
    if all(math.isnan(error.second_order) for error in errors.values()):
        if not wrong:
            return EXACT
        name, error = max(wrong.items(), key=lambda item: item[1].differences)
        return f"neither: {name} is {error.differences:.1e} from finite differences"
    far = {name: error for name, error in errors.items() if not error.second_order <= TOLERANCE}
    if not far:
        if not wrong:
            return SECOND
        name, error = max(wrong.items(), key=lambda item: item[1].differences)
        return f"neither: {name} agrees with the reference but is {error.differences:.1e} from finite differences"
    if all(error.first_order <= TOLERANCE for error in errors.values()):
        return FIRST
    name, error = max(far.items(), key=lambda item: min(item[1].second_order, item[1].first_order))
    return f"neither: {name} is {error.second_order:.1e} from second order and {error.first_order:.1e} from first order"
