"""What learners share whose support sets grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from ..checks import check_count
from ..learners.base import Learner, class_members
from ..tasks import MetaOutput, check_samples, check_tensor, class_ids


class Behind:
    """Adapted tasks of features, given the samples that these are of.

    >>> import metaaug_fast as mf
    >>> y = torch.arange(2).repeat(1, 2)
    >>> adapted = mf.ProtoNet(torch.nn.Identity()).adapt(torch.randn(1, 4, 3), y)
    >>> Behind(adapted, lambda x: x[..., :3])(torch.randn(1, 6, 8)).shape
    torch.Size([1, 6, 2])
    """

    def __init__(self, adapted: Any, features: Callable[[Tensor], Tensor]) -> None:
        self.adapted = adapted
        self.features = features

    def __len__(self) -> int:
        return len(self.adapted)

    def __call__(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.adapted(self.features(x))
        return prediction

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Losses and accuracies of the predictions for `x`."""
        judged: MetaOutput = self.adapted.evaluate(self.features(x), y)
        return judged


def check_second_order(learner: Learner) -> None:
    """ValueError where what makes support samples would be trained, and the learner has no gradient for it."""
    if learner.first_order and torch.is_grad_enabled():
        raise ValueError(
            f"learner must be of second order, for what augments learns through the inner loop (got "
            f"{type(learner).__name__} of first order)"
        )


def checked_few(x: Tensor, y: Tensor, per_class: int, generator: Generator | None) -> Tensor:
    """The class ids of one task's few, for so many more of each.

    Raises:
        TypeError, ValueError: they are no samples `[S, ...]` and class ids of which each has a sample, or an argument
            is of the wrong kind.
    """
    check_tensor("x", x)
    check_tensor("y", y)
    check_samples("", x[None], y[None])
    check_count("per_class", per_class, low=1)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None (got {generator!r})")
    y = class_ids(y)
    class_members(y[None], torch.int64)
    return y


def in_turn(labels: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Each class's samples in turn, `per_class` in all: which, and in which round, `[T, ways * per_class]` each.

    >>> rows, rounds = in_turn(torch.tensor([[1, 0, 1]]), per_class=3)
    >>> rows.tolist(), rounds.tolist()
    ([[1, 1, 1, 0, 2, 0]], [[0, 1, 2, 0, 0, 1]])
    """
    counts = class_members(labels, torch.int64).sum(1).unsqueeze(2)  # [T, ways, 1]
    numbers = torch.arange(per_class, device=labels.device).expand(*counts.shape[:2], -1)
    places = counts.cumsum(1) - counts + numbers % counts
    rows = labels.argsort(dim=1, stable=True).gather(1, places.flatten(1))
    return rows, (numbers // counts).flatten(1)


def labels_of(ways: int, per_class: int, like: Tensor) -> Tensor:
    """Class ids of so many samples, class after class, for the tasks of `like`.

    >>> labels_of(2, 3, torch.zeros(1, 5, dtype=torch.int64))
    tensor([[0, 0, 0, 1, 1, 1]])
    """
    return torch.arange(ways, device=like.device).repeat_interleave(per_class).expand(len(like), -1)
