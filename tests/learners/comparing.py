"""Comparing a learner with its paper, written for one task at a time in plain autograd."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaaug_fast.learners import Learner
from metaaug_fast.tasks import TaskBatch
from tests.exactness import assert_close, gradients, relative_error


def class_tasks(
    *sample_shape: int, tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 3, shuffled: bool = True
) -> TaskBatch:
    """Random tasks in float64 whose support sets hold `shots` samples of each class, in any order."""

    def samples(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(ways).repeat(tasks, count)
        if shuffled:
            labels = labels.gather(1, torch.rand(labels.shape).argsort(1))
        return torch.randn(tasks, ways * count, *sample_shape, dtype=torch.float64), labels

    return TaskBatch(*samples(shots), *samples(queries))


def assert_exact(
    learner: Learner, batch: TaskBatch, unbatched: Callable[..., Tensor], others: dict[str, Tensor] | None = None
) -> None:
    """Losses and all meta-gradients are those of `unbatched(support_x, support_y, query_x, query_y)`, a task's loss.

    others: tensors beside the learner's parameters whose gradients are compared, too.
    """
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad} | (others or {})
    out = learner(batch)
    expected = torch.stack([unbatched(*(each[task] for each in batch.tensors)) for task in range(batch.tasks)])
    assert relative_error(out.task_losses, expected) < 1e-10
    assert_close(gradients(out.loss, named), gradients(expected.mean(), named), 1e-9)


def descended(
    model: nn.Module,
    start: dict[str, Tensor],
    rates: dict[str, Tensor | float],
    x: Tensor,
    y: Tensor,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> dict[str, Tensor]:
    """Weights after some steps down the support loss; those with a rate move. In the graph of all they depend on."""
    weights = {
        name: value.clone() for name, value in start.items()
    }  # a start may depend on others, a gradient does not
    for _ in range(steps):
        moving = [weights[name] for name in rates]
        found = torch.autograd.grad(loss(functional_call(model, weights, (x,)), y), moving, create_graph=True)
        weights |= {name: weights[name] - rates[name] * g for name, g in zip(rates, found, strict=True)}
    return weights
