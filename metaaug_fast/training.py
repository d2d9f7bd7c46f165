"""The training loop: progress, validation, checkpoints that resume bit for bit, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from . import checkpoint as checkpoints
from .errors import CheckpointError
from .evaluation import Evaluation
from .tasks import TaskBatch

POINTS = 200
"""How many points a training curve gets."""


class Resumable(Protocol):
    """An endless stream of batches that can say where it stands, as `data.Episodes` is."""

    def __next__(self) -> TaskBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Point:
    """Means over the meta-steps since the point before; accuracy is None for regression."""

    step: int
    loss: float
    accuracy: float | None = None
    tasks_per_second: float = 0.0


@dataclass(frozen=True)
class ValidationPoint:
    """What `evaluate` found after so many meta-steps: the mean and half its 95 % interval."""

    step: int
    mean: float
    interval: float


@dataclass
class History:
    """What a run did.

    training, validation: the curves. seconds: time in meta-steps, validation and checkpoints left out, summed over
    resumed runs. stopped_by: the signal that ended it early, or None.
    """

    training: list[Point] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    seconds: float = 0.0
    stopped_by: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for a report or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> History:
        """The inverse of `as_dict`."""
        return cls(
            [Point(**point) for point in content["training"]],
            [ValidationPoint(**point) for point in content["validation"]],
            content["seconds"],
            content["stopped_by"],
        )


def train(
    learner: nn.Module,
    episodes: Resumable,
    steps: int,
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    before_step: Callable[[int], None] | None = None,
    validate: Callable[[], Evaluation] | None = None,
    validate_every: int = 500,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> History:
    """Run meta-steps until `steps` are done in all, or until SIGINT or SIGTERM (a second one interrupts at once).

    Args:
        learner: one with a meta-loss, `learner(tasks)`, where an optimizer is given; otherwise one that updates itself,
            `learner.step(tasks)`, as Reptile does.
        episodes: where `next(episodes)` is a batch of tasks.
        steps: meta-steps in all, those before a resumption included.
        optimizer: of the learner's parameters. scheduler: stepped after it.
        before_step: called with the number of meta-steps done, for example to set `reptile.meta_lr`.
        validate: called every `validate_every` steps and at the end, for example a call of `evaluate`; no gradient.
        checkpoint: a file to write every `checkpoint_every` steps, at the end and at a stop. It holds the learner, the
            optimizer, the scheduler, the place in the episodes, torch's CPU generator, the history and `config`.
        resume: a checkpoint to go on from, exactly as if there had been no stop.
        config: anything JSON, kept in the checkpoint for the caller.
        progress: a bar with loss, accuracy and tasks per second.

    Raises:
        ValueError: a count is out of range. CheckpointError: the checkpoint to resume is broken or does not fit.
        NonFiniteError: a loss is NaN or infinite; the last checkpoint stays as it was.

    >>> import metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
    >>> episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=4)
    >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    >>> train(learner, episodes, steps=3, optimizer=optimizer, progress=False).training[-1].step
    3
    """
    for name, count in (("steps", steps), ("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        if count < 1:
            raise ValueError(f"{name} must be >= 1 (got {count})")
    run = _Run(learner, episodes, optimizer, scheduler, dict(config or {}))
    if resume is not None:
        run.load(resume)
    device = next(learner.parameters()).device
    recorded, shown = _Meter(), _Meter()
    every = max(1, steps // POINTS)
    shown_at = 0.0
    with (
        _stop_signals() as received,
        tqdm(total=steps, initial=run.step, desc="training", unit="step", disable=not progress) as bar,
    ):
        while run.step < steps:
            started = time.perf_counter()
            if before_step is not None:
                before_step(run.step)
            tasks = next(episodes).to(device)
            loss, accuracy = run.update(tasks)
            seconds = time.perf_counter() - started
            for meter in (recorded, shown):
                meter.add(loss, accuracy, tasks.tasks, seconds)
            run.history.seconds += seconds
            bar.update()
            if validate is not None and (run.step == steps or run.step % validate_every == 0):
                found = validate()
                run.history.validation.append(ValidationPoint(run.step, found.mean, found.interval))
            # Read once: a signal that comes later stops the next step.
            stopped_by = received[0].name if received else None
            last = run.step == steps or stopped_by is not None
            if last or time.monotonic() - shown_at > 0.2:
                bar.set_postfix_str(_describe(shown.point(run.step)), refresh=last)
                shown, shown_at = _Meter(), time.monotonic()
            saves = checkpoint is not None and (last or run.step % checkpoint_every == 0)
            if last or saves or run.step % every == 0:
                run.history.training.append(recorded.point(run.step))
                recorded = _Meter()
            run.history.stopped_by = stopped_by
            if checkpoint is not None and saves:
                run.save(checkpoint)
            if stopped_by is not None:
                break
    return run.history


@dataclass
class _Run:
    """All that a checkpoint holds."""

    learner: nn.Module
    episodes: Resumable
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    config: dict[str, Any]
    step: int = 0
    history: History = field(default_factory=History)

    def update(self, tasks: TaskBatch) -> tuple[Tensor, Tensor | None]:
        """One meta-step; its mean loss and accuracy."""
        if self.optimizer is None:
            out = self.learner.step(tasks)  # type: ignore[operator]
        else:
            out = self.learner(tasks)
            self.optimizer.zero_grad()
            out.loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        self.step += 1
        return out.loss.detach(), None if out.accuracy is None else out.accuracy.mean()

    def save(self, path: str | Path) -> None:
        checkpoints.save(
            path,
            {
                "config": self.config,
                "step": self.step,
                "learner": self.learner.state_dict(),
                "optimizer": self.optimizer and self.optimizer.state_dict(),
                "scheduler": self.scheduler and self.scheduler.state_dict(),
                "episodes": self.episodes.state_dict(),
                "generator": torch.get_rng_state(),
                "history": self.history.as_dict(),
            },
        )

    def load(self, path: str | Path) -> None:
        state = checkpoints.load(path)
        try:
            self.learner.load_state_dict(state["learner"])
            for name, part in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
                if (part is None) != (state[name] is None):
                    raise ValueError(f"{name}: one has it, the other has not")
                if part is not None:
                    part.load_state_dict(state[name])
            self.episodes.load_state_dict(state["episodes"])
            torch.set_rng_state(state["generator"])
            self.step, self.history = state["step"], History.from_dict(state["history"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} does not fit what is to be resumed ({reason})") from error
        self.history.stopped_by = None


class _Meter:
    """Means over some meta-steps, summed on the device so that nothing waits for it."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.accuracy: Tensor | float | None = 0.0
        self.steps = self.tasks = 0
        self.seconds = 0.0

    def add(self, loss: Tensor, accuracy: Tensor | None, tasks: int, seconds: float) -> None:
        self.loss = self.loss + loss
        self.accuracy = None if accuracy is None or self.accuracy is None else self.accuracy + accuracy
        self.steps += 1
        self.tasks += tasks
        self.seconds += seconds

    def point(self, step: int) -> Point:
        accuracy = None if self.accuracy is None else float(self.accuracy) / self.steps
        return Point(step, float(self.loss) / self.steps, accuracy, self.tasks / self.seconds)


def _describe(point: Point) -> str:
    accuracy = "" if point.accuracy is None else f"accuracy {point.accuracy:.1%}, "
    return f"loss {point.loss:.4f}, {accuracy}{point.tasks_per_second:,.0f} tasks/s"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM instead of dying of them; signals reach only a program's main thread."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
