"""The training loop: progress, validation, checkpoints that resume bit for bit, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from .. import files
from ..tasks import TaskBatch
from .evaluation import Evaluation
from .history import History, Point, ValidationPoint
from .resume import Resumable, Run

POINTS = 200
"""How many points a training curve gets."""


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
        optimizer: of the learner's parameters. scheduler: of that optimizer, stepped after it; not ReduceLROnPlateau.
        before_step: called with the number of meta-steps done, for example to set `reptile.meta_lr`.
        validate: called every `validate_every` steps and at the end, for example a call of `evaluate`; no gradient.
        checkpoint: a file to write every `checkpoint_every` steps, at the end and at a stop. It holds the learner, the
            optimizer, the scheduler, the place in the episodes, torch's CPU generator, the history and `config`. The
            file before is kept as `NAME.previous.SUFFIX`. It is tried before any work, and no other run may write it
            meanwhile.
        resume: a checkpoint to go on from, exactly as if there had been no stop. Where it is damaged, a warning says
            so, and the run goes on from the file before.
        config: anything JSON, kept in the checkpoint for the caller.
        progress: a bar with loss, accuracy and tasks per second.

    Raises:
        ValueError: a count is out of range, or the scheduler cannot be stepped.
        FileNotFoundError, CheckpointError: the checkpoint to resume is missing, damaged, or does not fit; the learner,
            the optimizer, the scheduler, the episodes and torch's generator are as they were.
        FileWriteError: `checkpoint` cannot be written, or another run writes it.
        NonFiniteError: a loss is NaN or infinite; the last checkpoint stays as it was.

    >>> import torch, metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
    >>> episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=4)
    >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    >>> train(learner, episodes, steps=3, optimizer=optimizer, progress=False).training[-1].step
    3
    """
    for name, count in (("steps", steps), ("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        if count < 1:
            raise ValueError(f"{name} must be >= 1 (got {count})")
    _check_scheduler(scheduler, optimizer)
    run = Run(learner, episodes, optimizer, scheduler, dict(config or {}))
    with files.claimed(checkpoint) if checkpoint is not None else contextlib.nullcontext():
        source = None if resume is None else run.resume(resume)
        if checkpoint is not None:
            run.try_saving(checkpoint)
        if run.step < steps:
            _loop(run, steps, before_step, validate, validate_every, checkpoint, checkpoint_every, progress)
        else:
            warnings.warn(
                f"{source} has {run.step} meta-steps already, so none is added (steps is {steps})", stacklevel=2
            )
            if checkpoint is not None and os.path.realpath(checkpoint) != os.path.realpath(str(source)):
                run.save(checkpoint)
    return run.history


def _loop(
    run: Run,
    steps: int,
    before_step: Callable[[int], None] | None,
    validate: Callable[[], Evaluation] | None,
    validate_every: int,
    checkpoint: str | Path | None,
    checkpoint_every: int,
    progress: bool,
) -> None:
    device = next(run.learner.parameters()).device
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
            tasks = next(run.episodes).to(device)
            loss, accuracy = _update(run, tasks)
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


def _check_scheduler(scheduler: LRScheduler | None, optimizer: Optimizer | None) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must be one that steps without a metric (got ReduceLROnPlateau; step it yourself in validate)"
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must be one of the optimizer that is given (got another's)")


def _update(run: Run, tasks: TaskBatch) -> tuple[Tensor, Tensor | None]:
    """One meta-step; its mean loss and accuracy."""
    if run.optimizer is None:
        out = run.learner.step(tasks)  # type: ignore[operator]
    else:
        out = run.learner(tasks)
        run.optimizer.zero_grad()
        out.loss.backward()
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
    run.step += 1
    return out.loss.detach(), None if out.accuracy is None else out.accuracy.mean()


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
