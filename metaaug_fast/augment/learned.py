"""Weights and soft labels of a fixed support set, learned for how well those do on queries that adapted to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_number
from ..tasks import TaskBatch, check_tensor, class_ids
from .targets import count_ways


class LearnedWeights(nn.Module):
    """How much each support sample counts: weights > 0 of mean 1 in each task, a softmax of the parameters.

        w = S * softmax(logits),    inner loss = mean over samples of w_i loss_i

    They start at 1. Learned to reweight examples, as Ren et al. 2018 (arXiv 1803.09050) do from one step to the next.

    Args:
        tasks, samples: T and S of the support sets that they belong to.

    Raises:
        TypeError, ValueError: one of them is no count >= 1.

    >>> import torch, metaaug_fast as mf
    >>> maml, weights = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1), mf.augment.LearnedWeights(8, 6)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> maml(tasks, sample_weight=weights()).loss.backward()
    >>> weights.logits.grad.shape
    torch.Size([8, 6])
    """

    def __init__(self, tasks: int, samples: int) -> None:
        super().__init__()
        check_count("tasks", tasks, low=1)
        check_count("samples", samples, low=1)
        self.logits = nn.Parameter(torch.zeros(tasks, samples))

    def forward(self) -> Tensor:
        """`sample_weight`, `[T, S]`."""
        return self.logits.shape[1] * self.logits.softmax(-1)

    def extra_repr(self) -> str:
        return f"tasks={self.logits.shape[0]}, samples={self.logits.shape[1]}"


class LearnedLabels(nn.Module):
    """What class each support sample is of, as probabilities that are learned: a softmax of the parameters.

    Args:
        support_y: class ids `[T, S]`, where they start.
        ways: classes; None: the largest label and 1.
        confidence: at the start, the probability of the class that is given; between 1 / ways and 1.

    Raises:
        TypeError, ValueError: the labels are no class ids, or an argument is out of range.

    >>> import torch, metaaug_fast as mf
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> maml, labels = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1), mf.augment.LearnedLabels(y)
    >>> maml(labels(tasks)).loss.backward()
    >>> labels.logits.grad.shape, bool((labels.probabilities.argmax(-1) == y).all())
    (torch.Size([8, 6, 3]), True)
    """

    def __init__(self, support_y: Tensor, ways: int | None = None, confidence: float = 0.9) -> None:
        super().__init__()
        check_tensor("support_y", support_y)
        support_y = class_ids(support_y)
        if support_y.dtype != torch.int64 or support_y.ndim != 2 or not support_y.numel():
            raise ValueError(
                f"support_y must be class ids, int64 [T, S] (got {support_y.dtype} {tuple(support_y.shape)})"
            )
        ways = count_ways(ways, support_y)
        check_number("confidence", confidence)
        if not 1 / ways < confidence < 1:
            raise ValueError(f"confidence must be above 1 / ways, {1 / ways:g}, and below 1 (got {confidence})")
        # softmax gives the others (1 - confidence) / (ways - 1) each.
        ahead = math.log(confidence / (1 - confidence) * (ways - 1))
        self.logits = nn.Parameter(ahead * F.one_hot(support_y, ways).to(torch.get_default_dtype()))

    @property
    def probabilities(self) -> Tensor:
        """`[T, S, ways]`."""
        return self.logits.softmax(-1)

    def forward(self, tasks: TaskBatch) -> TaskBatch:
        """The tasks with these for labels of their support set.

        Raises:
            TypeError, ValueError: they are no tasks, or not as many samples.
        """
        tasks = TaskBatch.of(tasks)
        if tasks.support_x.shape[:2] != self.logits.shape[:2]:
            expected, got = list(self.logits.shape[:2]), list(tasks.support_x.shape[:2])
            raise ValueError(f"tasks must have support sets {expected} as the labels (got {got})")
        return TaskBatch(tasks.support_x, self.probabilities, tasks.query_x, tasks.query_y)

    def extra_repr(self) -> str:
        tasks, samples, ways = self.logits.shape
        return f"tasks={tasks}, samples={samples}, ways={ways}"
