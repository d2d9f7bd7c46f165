"""How many classes targets are of, and where the samples of each lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..tasks import TaskBatch


def count_ways(ways: int | None, *targets: Tensor) -> int:
    """For targets that become probabilities: `ways`, or the largest of the class ids and 1.

    Raises:
        TypeError, ValueError: `ways` is no count, or there are class ids that it does not count.

    >>> count_ways(None, torch.tensor([0, 2]), torch.tensor([1]))
    3
    """
    if ways is not None:
        check_count("ways", ways, low=1)
    low, high = (int(value) for value in torch.cat([each.flatten() for each in targets]).aminmax())
    if low < 0:
        raise ValueError(f"support_y must hold class ids >= 0 (got {low})")
    if ways is not None and high >= ways:
        raise ValueError(f"support_y must hold class ids 0..{ways - 1} (got {high})")
    return high + 1 if ways is None else ways


def ways_of(tasks: TaskBatch) -> int:
    """How many labels the tasks have; ValueError where targets are no class ids.

    >>> x, y = torch.zeros(1, 3, 2), torch.tensor([[0, 2, 1]])
    >>> ways_of(TaskBatch(x, y, x, y))
    3
    """
    high = 0
    for name, y in (("support_y", tasks.support_y), ("query_y", tasks.query_y)):
        if y.dtype != torch.int64 or y.ndim != 2:
            raise ValueError(f"{name} must be class ids, int64 [T, N] (got {y.dtype} {tuple(y.shape)})")
        low, largest = (int(value) for value in y.aminmax())
        if low < 0:
            raise ValueError(f"{name} must hold class ids >= 0 (got {low})")
        high = max(high, largest)
    return high + 1


class ByClass:
    """Where the samples of each class lie, of labels `[T, N]` with as many samples a class in every task.

    >>> classes = ByClass("y", torch.tensor([[0, 1, 1, 0]]), 2)
    >>> classes.places.tolist(), classes.number.tolist()
    ([[[0, 3], [1, 2]]], [[0, 0, 1, 1]])
    """

    def __init__(self, name: str, y: Tensor, ways: int) -> None:
        counts = F.one_hot(y, ways).sum(1)
        if not bool((counts == counts[0, 0]).all()):
            task = int((counts != counts[0, 0]).any(1).nonzero()[0])
            raise ValueError(
                f"{name} must have as many samples of each class 0..{ways - 1} in every task "
                f"(got {int(counts[0, 0])} of class 0 in task 0, {counts[task].tolist()} in task {task})"
            )
        order = y.argsort(dim=1, stable=True)
        self.y = y
        self.places = order.unflatten(1, (ways, -1))  # [T, ways, samples]
        self.number = order.argsort(1) % self.places.shape[2]  # of each sample within its class

    def taken(self, x: Tensor, task: Tensor, label: Tensor) -> Tensor:
        """In place of the samples of each class, `[T, ways]`, those of another one, by its task and its label."""
        task, label = task.gather(1, self.y), label.gather(1, self.y)
        return x[task, self.places[task, label, self.number]]
