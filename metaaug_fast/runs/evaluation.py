"""How good a learner is on tasks it has not seen: a mean over many episodes and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Episodes
from ..engine.problem import NORMS
from ..learners.gradient import Learner
from ..tasks import TaskBatch


@dataclass(frozen=True)
class Evaluation:
    """Mean over episodes of the query metric.

    Args:
        metric: `"accuracy"` (a share, 0 to 1) for classes, otherwise the name of the loss.
        mean: over episodes. interval: half the 95 % interval, `1.96 sd / sqrt(episodes)`.
        loss: mean query loss. steps: inner steps taken.
        transductive: whether batch norm saw the whole query batch, which makes accuracies higher.
        by_step: the mean metric after 0, 1, ... `steps` inner steps, where it was asked for.
    """

    metric: str
    mean: float
    interval: float
    loss: float
    episodes: int
    steps: int
    transductive: bool
    by_step: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return asdict(self)

    def __str__(self) -> str:
        if self.metric == "accuracy":
            figure = f"accuracy {100 * self.mean:.2f} % +- {100 * self.interval:.2f} %"
            kind = f", {'transductive' if self.transductive else 'not transductive'}"
        else:
            figure, kind = f"{self.metric} {self.mean:.4f} +- {self.interval:.4f}", ""
        steps = f"{self.steps} inner step{'s' * (self.steps != 1)}"
        return f"{figure} (95 % interval, {self.episodes} episodes, {steps}{kind})"


def evaluate(
    learner: Learner, episodes: Episodes, count: int = 600, *, steps: int | None = None, by_step: bool = False
) -> Evaluation:
    """Adapt to `count` episodes without gradients and judge the adapted tasks on their queries.

    The episodes are the first of the sequence, wherever its iteration stands, so repeated calls judge alike. The
    learner's modules are in evaluation mode meanwhile (no dropout).

    Args:
        learner: MAML, Reptile or another with `forward(tasks, steps=...)` to a `MetaOutput`.
        episodes: of unseen classes; their `tasks` is how many are adapted at once.
        count: how many episodes, at least 2; the field reports 600 or more.
        steps: inner steps, the learner's own by default.
        by_step: also the metric after every smaller number of steps.

    Raises:
        ValueError: fewer than two episodes, or a negative number of steps.

    >>> import metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
    >>> evaluate(learner, Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=10), 25).episodes
    25
    """
    if count < 2:
        raise ValueError(f"count must be >= 2 episodes, an interval needs a spread (got {count})")
    problem = learner.problem()
    steps = problem.steps if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps must be >= 0 (got {steps})")
    wanted = range(steps + 1) if by_step else [steps]
    device = next(learner.parameters()).device
    found: dict[int, list[Tensor]] = {number: [] for number in wanted}
    losses: list[Tensor] = []
    training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            for tasks in _first(episodes, count):
                tasks = tasks.to(device)
                for number in wanted:
                    out = learner(tasks, steps=number)
                    found[number].append(out.task_losses if out.accuracy is None else out.accuracy)
                losses.append(out.task_losses)
    finally:
        learner.train(training)
    values = {number: torch.cat(each).double().cpu() for number, each in found.items()}
    loss = problem.loss if isinstance(problem.loss, str) else problem.loss.__name__
    return Evaluation(
        metric=loss if out.accuracy is None else "accuracy",
        mean=float(values[steps].mean()),
        interval=1.96 * float(values[steps].std()) / math.sqrt(count),
        loss=float(torch.cat(losses).double().mean()),
        episodes=count,
        steps=steps,
        transductive=is_transductive(learner),
        by_step=tuple(float(value.mean()) for value in values.values()) if by_step else (),
    )


def is_transductive(learner: Learner) -> bool:
    """Whether an evaluation's batch norms take their statistics from the queries.

    >>> import metaaug_fast as mf
    >>> is_transductive(mf.MAML(mf.models.conv4(ways=5))), is_transductive(mf.MAML(mf.models.mlp([1, 8, 1])))
    (True, False)
    """
    problem = learner.problem()
    return problem.batch_norm in ("batch", "per_step") and any(isinstance(m, NORMS) for m in problem.model.modules())


def _first(episodes: Episodes, count: int) -> Iterator[TaskBatch]:
    """The first `count` tasks of the sequence, in batches."""
    for index in range(math.ceil(count / episodes.tasks)):
        batch, left = episodes.batch(index), count - index * episodes.tasks
        yield batch[:left] if left < batch.tasks else batch
