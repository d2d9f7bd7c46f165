"""Prediction sets that hold the right answer as often as is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..tasks import class_ids
from .evaluation import Repeatable, count_of, device_of, first_tasks, in_evaluation, learner_in


def conformal(
    learner: nn.Module,
    episodes: Repeatable | Iterable[Any],
    coverage: float = 0.9,
    *,
    count: int | None = None,
) -> Conformal:
    """Prediction sets that hold a new task's right answer with a given probability, whatever the learner is worth.

        s = 1 - p(y | x) of each query of `count` episodes; for numbers the largest |y - prediction|
        q = the smallest s such that the tasks' mean share of scores <= s, of a further task infinite, is `coverage`
        set of x = all classes with 1 - p(k | x) <= q; for numbers prediction - q .. prediction + q

    Tasks, not queries, are independent, so each counts as one: hierarchical conformal prediction (Lee, Barber, Willett
    2023, arXiv 2306.06342). For tasks drawn as these are the coverage is at least `coverage`, on average over the draw
    of all tasks. Take episodes of classes that the learner was not trained on.

    Args:
        learner: a `Learner`, or one inside of `DistributedDataParallel`.
        episodes: see `evaluate`.
        coverage: above 0 and below 1.
        count: episodes to calibrate on. None: 600, but of a list all. `coverage / (1 - coverage)` at least.

    Raises:
        TypeError: `learner` is none.
        ValueError: `coverage` is out of range, or there are too few episodes for it.

    >>> import metaaug_fast as mf
    >>> protonet = mf.ProtoNet(mf.models.conv4(ways=None, hidden=8))
    >>> found = conformal(protonet, mf.data.Episodes(mf.data.Glyphs(), tasks=10), 0.9, count=20)
    >>> tasks = mf.data.Episodes(mf.data.Glyphs(), tasks=2, seed=1).batch(0)
    >>> found.adapt(tasks.support_x, tasks.support_y).sets(tasks.query_x).shape
    torch.Size([2, 25, 5])
    """
    check_number("coverage", coverage)
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be above 0 and below 1 (got {coverage})")
    inside = learner_in(learner)
    count = count_of(episodes, count)
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    if count < needed:
        raise ValueError(f"count must be at least {needed} episodes for a coverage of {coverage:g} (got {count})")
    scores, weights = [], []
    with in_evaluation(inside):
        for tasks in first_tasks(episodes, count):
            tasks = tasks.to(device_of(inside))
            prediction = inside.adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
            score = _scores(prediction, tasks.query_y)
            scores.append(score.flatten().double().cpu())
            weights.append(torch.full((score.numel(),), 1 / score.shape[1], dtype=torch.float64))
    every, order = torch.cat(scores).sort()
    shares = torch.cat(weights)[order].cumsum(0) / (count + 1)
    reached = int((shares < coverage - 1e-12).sum())
    return Conformal(inside, coverage, float(every[reached]), count)


@dataclass(frozen=True)
class Conformal:
    """What `conformal` found.

    learner: whose predictions it widens. coverage: that was asked for. threshold: q. episodes: it was found on.
    """

    learner: Any
    coverage: float
    threshold: float
    episodes: int

    def adapt(self, support_x: Tensor, support_y: Tensor, **options: Any) -> Sets:
        """Learn T tasks, or one, as the learner does, to predict sets."""
        with in_evaluation(self.learner):
            return Sets(self.learner, self.learner.adapt(support_x, support_y, **options), self.threshold)


@dataclass(frozen=True)
class Sets:
    """T adapted tasks, or one, that predict sets; `adapted` predicts as ever."""

    learner: Any
    adapted: Any
    threshold: float

    def __len__(self) -> int:
        return len(self.adapted)

    def sets(self, x: Tensor) -> Tensor:
        """Which classes may be right for `x` `[T, N, ...]`: bool `[T, N, ways]`. A set may be empty, or hold all."""
        return 1 - self._predict(x).softmax(-1) <= self.threshold

    def intervals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Between which numbers the answer for `x` may lie: two of `[T, N, ...]`."""
        prediction = self._predict(x)
        return prediction - self.threshold, prediction + self.threshold

    def _predict(self, x: Tensor) -> Tensor:
        with in_evaluation(self.learner):
            prediction: Tensor = self.adapted(x)
        return prediction


def _scores(prediction: Tensor, target: Tensor) -> Tensor:
    """How wrong the right answer of each query is, `[T, Q]`."""
    target = class_ids(target)
    if not target.is_floating_point():
        return 1 - prediction.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if prediction.shape != target.shape:
        raise ValueError(f"episodes must have class ids or numbers for targets (got {list(target.shape)})")
    return (prediction - target).abs().flatten(2).amax(2)
