"""How good a learner is on tasks it has not seen: a mean over many episodes and its 95 % interval."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_integer
from ..engine.losses import named
from ..learners.attacks import PGD, attack_queries
from ..learners.base import Learner, check_steps
from ..tasks import MetaOutput, TaskBatch
from .calibration import calibration_error


class Repeatable(Protocol):
    """A sequence of batches of `tasks` tasks that can be read anywhere, as `data.Episodes` is."""

    @property
    def tasks(self) -> int: ...
    def batch(self, index: int) -> TaskBatch: ...


@dataclass(frozen=True)
class Evaluation:
    """Mean over episodes of the query metric.

    Args:
        metric: `"accuracy"` (a share, 0 to 1) for classes, otherwise the name of the loss.
        mean: over episodes. interval: half the 95 % interval, `t sd / sqrt(episodes)` with Student's t (1.96 for many).
        loss: mean query loss. steps: inner steps taken; None: there is no inner loop.
        transductive: whether a prediction depends on the other queries, which makes accuracies higher.
        by_step: the mean metric after 0, 1, ... `steps` inner steps, where it was asked for.
        calibration_error: expected calibration error of the predictions' softmax, 0 to 1, over all queries; see
            `calibration_error`. nll: their mean negative log-likelihood. Both None where there are no classes, or where
            `by_step` left no predictions.
        attack: on the queries; None: they are clean.
    """

    metric: str
    mean: float
    interval: float
    loss: float
    episodes: int
    steps: int | None
    transductive: bool
    by_step: tuple[float, ...] = ()
    calibration_error: float | None = None
    nll: float | None = None
    attack: PGD | None = None

    @property
    def score(self) -> float:
        """The more the better: the accuracy, or the loss below zero."""
        return self.mean if self.metric == "accuracy" else -self.mean

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return asdict(self)

    def __str__(self) -> str:
        about = [f"{self.episodes} episodes"]
        if self.steps is not None:
            about.append(f"{self.steps} inner step{'s' * (self.steps != 1)}")
        if self.metric == "accuracy":
            about.append("transductive" if self.transductive else "not transductive")
            figure = f"accuracy {100 * self.mean:.2f} % +- {100 * self.interval:.2f} %"
        else:
            figure = f"{self.metric} {self.mean:.4f} +- {self.interval:.4f}"
        if self.attack is not None:
            about.append(f"under {self.attack}")
        text = f"{figure} (95 % interval, {', '.join(about)})"
        if self.calibration_error is None or self.nll is None:
            return text
        return f"{text}; calibration error {100 * self.calibration_error:.2f} %, negative log-likelihood {self.nll:.4f}"


def evaluate(
    learner: nn.Module,
    episodes: Repeatable | Iterable[Any],
    count: int | None = None,
    *,
    steps: int | None = None,
    by_step: bool = False,
    attack: PGD | None = None,
) -> Evaluation:
    """Adapt to `count` episodes without gradients and judge the adapted tasks on their queries.

    The episodes are the first of the sequence, wherever its iteration stands, so repeated calls judge alike. The
    learner's modules are in evaluation mode meanwhile (no dropout).

    Args:
        learner: a `Learner`, or one inside of `DistributedDataParallel`.
        episodes: of unseen classes; their `tasks` is how many are adapted at once. Or any iterable of batches, in a
            form that `TaskBatch.of` takes, such as a list or a loader.
        count: how many episodes, at least 2; the field reports 600 or more. None: 600, but of a list all.
        steps: inner steps, the learner's own by default.
        by_step: also the metric after every smaller number of steps, from the same pass.
        attack: a `PGD` or `FGSM`. Queries are attacked against the learner as it has adapted to the clean support set,
            and it is judged on what they have become; all of a task's queries move at once. Random starts are the same
            in each call.

    Raises:
        TypeError: `learner` is none, or `attack`.
        ValueError: fewer than two episodes, or than `count`, a negative number of steps, steps without an inner loop,
            `by_step` under an attack, or queries that the attack cannot take.

    >>> import metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
    >>> evaluate(learner, mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=10), 25).episodes
    25
    """
    learner = learner_in(learner)
    count = count_of(episodes, count)
    taken = learner.inner_steps if check_steps(learner, steps) is None else steps
    if by_step and taken is None:
        raise ValueError(f"by_step must be False for {type(learner).__name__}, which has no inner loop (got True)")
    _check_attack(attack, by_step)
    device = device_of(learner)
    judged: list[list[MetaOutput]] = []  # batch by batch, step by step
    targets: list[Tensor] = []
    with in_evaluation(learner):
        for tasks in first_tasks(episodes, count):
            tasks = _attacked(learner, tasks.to(device), steps, attack, len(judged))
            judged.append(learner.by_step(tasks, steps) if by_step else [_adapted(learner, tasks, steps)])
            targets.append(tasks.query_y)
    last = [outputs[-1] for outputs in judged]
    accurate = last[0].accuracy is not None
    values = torch.cat([_metric(output) for output in last]).double().cpu()
    means = [torch.cat([_metric(output) for output in each]).double().mean() for each in zip(*judged, strict=True)]
    sure = _certainty([output.prediction for output in last], targets) if accurate else (None, None)
    return Evaluation(
        metric="accuracy" if accurate else _name(getattr(learner, "loss", "loss")),
        mean=float(values.mean()),
        interval=student(count - 1) * float(values.std()) / math.sqrt(count),
        loss=float(torch.cat([output.task_losses for output in last]).double().mean()),
        episodes=count,
        steps=taken,
        transductive=learner.transductive,
        by_step=tuple(map(float, means)) if by_step else (),
        calibration_error=sure[0],
        nll=sure[1],
        attack=attack,
    )


def count_of(episodes: Repeatable | Iterable[Any], count: int | None) -> int:
    """How many episodes to judge on: what is given, or 600, or as many as a list holds; at least 2."""
    if count is None:
        count = sum(len(TaskBatch.of(each)) for each in episodes) if isinstance(episodes, (list, tuple)) else 600
    check_integer("count", count)
    if count < 2:
        raise ValueError(f"count must be >= 2 episodes, an interval needs a spread (got {count})")
    return count


@contextlib.contextmanager
def in_evaluation(learner: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; then in the mode before."""
    training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        learner.train(training)


def _adapted(learner: Learner, tasks: TaskBatch, steps: int | None) -> MetaOutput:
    """What `forward` finds in evaluation, with the predictions."""
    options = {} if steps is None else {"steps": steps}
    adapted = learner.adapt(tasks.support_x, tasks.support_y, **options)
    return adapted.evaluate(tasks.query_x, tasks.query_y)


def _check_attack(attack: object, by_step: bool) -> None:
    if attack is not None and not isinstance(attack, PGD):
        raise TypeError(f"attack must be a PGD, an FGSM or None (got {attack!r})")
    if attack is not None and by_step:
        raise ValueError("by_step must be False under an attack, which is one on the last step's weights (got True)")


def _attacked(learner: Learner, tasks: TaskBatch, steps: int | None, attack: PGD | None, index: int) -> TaskBatch:
    """The batch of that index with attacked queries; torch's generators stay as they are."""
    if attack is None:
        return tasks
    device = tasks.query_x.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(index)
        return attack_queries(learner, tasks, attack, steps=steps)


def _certainty(predictions: Sequence[Tensor | None], targets: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Calibration error and negative log-likelihood over all queries; None where they have no classes."""
    log_p, classes = [], []
    for prediction, target in zip(predictions, targets, strict=True):
        if prediction is None or target.is_floating_point() or prediction.ndim != 3:
            return None, None
        log_p.append(prediction.double().log_softmax(-1).flatten(0, 1).cpu())
        classes.append(target.flatten().cpu())
    every, right = torch.cat(log_p), torch.cat(classes)
    return calibration_error(every.exp(), right), float(F.nll_loss(every, right))


def learner_in(module: nn.Module) -> Learner:
    """The learner, taken out of a wrapper such as DDP; TypeError if there is none."""
    inside = module if isinstance(module, Learner) else getattr(module, "module", None)
    if not isinstance(inside, Learner):
        raise TypeError(f"learner must be a Learner (got {type(module).__name__})")
    return inside


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lies; the CPU if it has none."""
    return next((held.device for held in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _metric(output: MetaOutput) -> Tensor:
    return output.task_losses if output.accuracy is None else output.accuracy


def _name(loss: Any) -> str:
    loss = named(loss)[0] if callable(loss) else loss
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def first_tasks(episodes: Repeatable | Iterable[Any], count: int) -> Iterator[TaskBatch]:
    """The first `count` tasks of the sequence, in batches."""
    batches = map(episodes.batch, itertools.count()) if hasattr(episodes, "batch") else iter(episodes)
    left = count
    while left > 0:
        given = next(batches, None)
        if given is None:
            raise ValueError(f"episodes must hold as many tasks as count, {count} (got {count - left})")
        batch = TaskBatch.of(given)
        yield batch[:left] if left < batch.tasks else batch
        left -= batch.tasks


def student(freedom: int) -> float:
    """Student's t for a 95 % interval, for so many degrees of freedom.

    Bisects the closed form of its distribution (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

    >>> [round(student(freedom), 3) for freedom in (1, 2, 9, 599)]
    [12.706, 4.303, 2.262, 1.964]
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        sine, cosine = math.sin(angle), math.cos(angle)
        term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
        for index in range(freedom // 2):
            total += term
            step = 2 * index + 2 if freedom % 2 else 2 * index + 1
            term *= cosine**2 * step / (step + 1)
        inside = (angle + sine * total) * 2 / math.pi if freedom % 2 else sine * total
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
