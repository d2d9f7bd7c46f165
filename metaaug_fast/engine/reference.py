"""The specification: what every executor computes, as plain autograd, one task and one step at a time.

    theta_{k+1} = theta_k - alpha_k * direction_k        k = 0..K-1
    L           = mean over tasks of query_loss(theta_K)

Slow, and its memory grows with the steps. Run it in float64 to check anything else against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..tasks import MetaOutput
from .losses import accuracies, task_loss
from .norms import BatchStatistics, forward
from .problem import InnerProblem, Query, Support, with_steps


def pack(parameters: Mapping[str, Tensor]) -> Tensor:
    """Parameters flattened and joined in their order, `[P]`: the layout of every packed weight in this package.

    >>> pack({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    tensor([1., 2., 3.])
    """
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unpack(problem: InnerProblem, flat: Tensor) -> dict[str, Tensor]:
    """The inverse of `pack`: views of `flat` `[..., P]` by name, each `[..., *parameter.shape]`."""
    shapes = {name: value.shape for name, value in problem.parameters.items()}
    parts = flat.split([shape.numel() for shape in shapes.values()], -1)
    return {
        name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def adapt(problem: InnerProblem, support: Support) -> Tensor:
    """Adapted weights of every task, `[T, P]`, in the autograd graph of everything they depend on (not with Adam).

    >>> from metaaug_fast.engine.problem import Support, inner_problem
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> problem = inner_problem(model, lr=0.5, steps=1, loss="mse")
    >>> adapt(problem, Support(torch.ones(1, 1, 1), torch.ones(1, 1, 1))).tolist()  # 0 - 0.5 * 2 * (0 - 1)
    [[1.0]]
    """
    return torch.stack([pack(_trajectory(problem, support, task)[-1]) for task in range(len(support.x))])


def meta_loss(problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
    """The meta-step: adapt every task, then take its query loss after the last step, or after each, weighted.

    The module's running statistics are read (policies "running" and "frozen") and never written: see
    `running_statistics`.
    """
    judged = [problem.steps] if query.step_weights is None else range(1, problem.steps + 1)
    losses, predictions = [], []
    for task in range(len(support.x)):
        trajectory = _trajectory(problem, support, task)
        outputs = [_query(problem, trajectory[step], query.x[task], task, step) for step in judged]
        each = [task_loss(problem.loss, output, query.y[task], None, problem.label_smoothing) for output in outputs]
        losses.append(each[0] if query.step_weights is None else query.step_weights @ torch.stack(each))
        predictions.append(outputs[-1].detach())
    task_losses = torch.stack(losses)
    return MetaOutput(task_losses.mean(), task_losses, accuracies(problem.loss, torch.stack(predictions), query.y))


@torch.no_grad()
def judge_steps(problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
    """What `meta_loss` gives after 0, 1, ... K steps, each from a start of its own; without gradient.

    >>> from metaaug_fast.engine.problem import inner_problem
    >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1, 1)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> problem = inner_problem(model, lr=0.25, steps=2, loss="mse")
    >>> [float(out.loss) for out in judge_steps(problem, Support(x, x), Query(x, x))]  # at the weights 0, 1/2, 3/4
    [1.0, 0.25, 0.0625]
    """
    judged = []
    for steps in range(problem.steps + 1):
        seen = support if support.rows is None else replace(support, rows=support.rows[:, :steps])
        judged.append(meta_loss(with_steps(problem, steps), seen, query))
    return judged


def running_statistics(problem: InnerProblem, support: Support, query: Query) -> list[BatchStatistics]:
    """What every batch norm saw in the last query pass, stacked over tasks: the policy "running" learns from these."""
    seen: list[list[BatchStatistics]] = []
    for task in range(len(support.x)):
        theta = _trajectory(problem, support, task)[-1]
        seen.append([])
        _query(problem, theta, query.x[task], task, problem.steps, seen[-1])
    return [
        BatchStatistics(
            each[0].name,
            each[0].momentum,
            torch.stack([one.mean for one in each]).detach(),
            torch.stack([one.variance for one in each]).detach(),
        )
        for each in zip(*seen, strict=True)
    ]


def _query(
    problem: InnerProblem,
    theta: dict[str, Tensor],
    x: Tensor,
    task: int,
    step: int,
    statistics: list[BatchStatistics] | None = None,
) -> Tensor:
    return forward(problem, theta, x, task=task, step=step, query=True, statistics=statistics)


@torch.enable_grad()
def _trajectory(problem: InnerProblem, support: Support, task: int) -> list[dict[str, Tensor]]:
    """One task's weights theta_0 .. theta_K."""
    theta = problem.parameters if support.initial is None else unpack(problem, support.initial[task])
    # The inner gradient is taken with respect to all weights, also those that have no meta-gradient.
    theta = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in theta.items()}
    moment = {name: torch.zeros_like(theta[name]) for name in problem.rates}
    square = dict(moment)
    trajectory = [theta]
    for step in range(problem.steps):
        loss = _support_loss(problem, support, theta, task, step)
        adapted = [theta[name] for name in problem.rates]
        gradients = torch.autograd.grad(
            loss, adapted, create_graph=not problem.first_order, allow_unused=True, materialize_grads=True
        )
        theta = dict(theta)
        for (name, rate), gradient in zip(problem.rates.items(), gradients, strict=True):
            gradient = gradient + problem.weight_decay * theta[name]
            if problem.optimizer == "sgd":
                moment[name] = direction = problem.momentum * moment[name] + gradient
            else:
                first, second = problem.betas
                gradient = gradient.detach()
                moment[name] = first * moment[name] + (1 - first) * gradient
                square[name] = second * square[name] + (1 - second) * gradient.square()
                deviation = (square[name] / (1 - second ** (step + 1))).sqrt() + problem.eps
                direction = moment[name] / (1 - first ** (step + 1)) / deviation
            theta[name] = theta[name] - rate.at(step) * direction
        trajectory.append(theta)
    return trajectory


def _support_loss(problem: InnerProblem, support: Support, theta: dict[str, Tensor], task: int, step: int) -> Tensor:
    rows = slice(None) if support.rows is None else support.rows[task, step]
    weight = None if support.sample_weight is None else support.sample_weight[task, rows]
    prediction = forward(problem, theta, support.x[task, rows], task=task, step=step)
    return task_loss(problem.loss, prediction, support.y[task, rows], weight, problem.label_smoothing)
