"""The training loop: progress, validation, checkpoints that resume bit for bit, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from .. import files
from ..checks import check_choice, check_count, check_flag, check_number
from ..errors import NonFiniteError
from ..learners.base import Learner, gradient_step
from ..tasks import MetaOutput, TaskBatch
from .evaluation import Evaluation, device_of, learner_in
from .history import EARLY, TIME, History, Point, ValidationPoint
from .resume import Resumable, Run, parameters_of

POINTS = 200
"""How many points a training curve gets."""


def train(
    learner: nn.Module,
    episodes: Resumable,
    steps: int,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    meta_lr: float | None = None,
    schedule: str = "constant",
    clip_norm: float | None = None,
    before_step: Callable[[int], None] | None = None,
    validate: Callable[[], Evaluation] | None = None,
    validate_every: int = 500,
    patience: int | None = None,
    minutes: float | None = None,
    keep_best: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> History:
    """Run meta-steps until `steps` are done in all, or until SIGINT or SIGTERM (a second one interrupts at once).

    Args:
        learner: a `Learner`, or one inside of `DistributedDataParallel`, whose `meta_step` is then the default one.
        episodes: where `next(episodes)` is a batch of tasks.
        steps: meta-steps in all, those before a resumption included.
        optimizer: what `learner.meta_step` steps. None: `learner.optimizers(meta_lr)`.
        scheduler: of these optimizers, stepped after each meta-step; not ReduceLROnPlateau.
        meta_lr: the meta-learning rate where no optimizer is given; None: the learner's own.
        schedule: what becomes of the rate, where no scheduler is given: "constant", "linear" (to 0), "cosine" (to 0) or
            "halving" (halved after each 2,000 meta-steps, as for Prototypical Networks).
        clip_norm: each optimizer's gradient is scaled down to this norm if it is longer.
        before_step: called with the number of meta-steps done, for example to change a setting of the learner.
        validate: called every `validate_every` steps and at the end, for example a call of `evaluate`; no gradient.
        patience: stop after so many validations without a better one.
        minutes: stop after so many of meta-steps, those before a resumption included.
        keep_best: write the state after the best validation beside `checkpoint`, as `NAME.best.SUFFIX`.
        checkpoint: a file to write every `checkpoint_every` steps, at the end and at a stop. It holds the learner, the
            optimizers, the schedulers, the place in the episodes, torch's CPU generator, the history and `config`. The
            file before is kept as `NAME.previous.SUFFIX`. It is tried before any work, and no other run may write it
            meanwhile.
        resume: a checkpoint to go on from, exactly as if there had been no stop. Where it is damaged, a warning says
            so, and the run goes on from the file before.
        config: anything JSON, kept in the checkpoint for the caller; `mf.load` reads the configuration of a run there.
        progress: a bar with loss, accuracy and tasks per second.

    Raises:
        TypeError: `learner` is none.
        ValueError: an argument is out of range or does not go with another.
        FileNotFoundError, CheckpointError: the checkpoint to resume is missing, damaged, or does not fit; the learner,
            the optimizers, the episodes and torch's generator are as they were.
        FileWriteError: `checkpoint` cannot be written, or another run writes it.
        NonFiniteError: a loss is NaN or infinite; the last checkpoint stays as it was.

    >>> import torch, metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")
    >>> episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=4)
    >>> train(learner, episodes, steps=3, meta_lr=1e-3, progress=False).training[-1].step
    3
    """
    inside = learner_in(learner)
    for name, count in (("steps", steps), ("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
        check_count(name, count, low=1)
    if patience is not None:
        check_count("patience", patience, low=1)
    for name, number in (("clip_norm", clip_norm), ("minutes", minutes)):
        if number is not None:
            check_number(name, number)
    check_flag("keep_best", keep_best)
    if validate is None and (patience is not None or keep_best):
        raise ValueError(f"{'keep_best' if keep_best else 'patience'} needs validate (got None)")
    if keep_best and checkpoint is None:
        raise ValueError("keep_best needs checkpoint, beside which it writes (got None)")
    if learner is not inside and type(inside).meta_step is not Learner.meta_step:
        raise ValueError(
            f"learner must not be wrapped: {type(inside).__name__} updates itself (got {type(learner).__name__})"
        )
    if optimizer is None:
        optimizers = inside.optimizers(meta_lr)
    else:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if meta_lr is not None:
            raise ValueError(f"meta_lr must be None where an optimizer is given, which has its own (got {meta_lr})")
    if scheduler is None:
        schedulers = make_schedulers(schedule, optimizers, steps)
    else:
        schedulers = [scheduler] if isinstance(scheduler, LRScheduler) else list(scheduler)
        if schedule != "constant":
            raise ValueError(f"schedule must be 'constant' where a scheduler is given (got {schedule!r})")
    _check_schedulers(schedulers, optimizers)
    run = Run(inside, episodes, optimizers, schedulers, dict(config or {}))
    best = None if checkpoint is None or not keep_best else files.best_of(checkpoint)
    with contextlib.ExitStack() as stack:
        targets: list[str | Path] = [path for path in (checkpoint, best) if path is not None]
        for path in targets:
            stack.enter_context(files.claimed(path))
        source = None if resume is None else run.resume(resume)
        for path in targets:
            run.try_saving(path)
        if run.step < steps:
            stack.enter_context(_clipped(optimizers, clip_norm))
            update = inside.meta_step if learner is inside else functools.partial(gradient_step, learner)
            _Loop(
                run, steps, update, before_step, validate, validate_every, patience, minutes, checkpoint, best,
                checkpoint_every,
            ).go(progress)  # fmt: skip
        else:
            warnings.warn(
                f"{source} has {run.step} meta-steps already, so none is added (steps is {steps})", stacklevel=2
            )
            if checkpoint is not None and os.path.realpath(checkpoint) != os.path.realpath(str(source)):
                run.save(checkpoint)
    return run.history


@dataclass
class _Loop:
    """Meta-steps, and what comes between them."""

    run: Run
    steps: int
    update: Callable[[TaskBatch, Sequence[Optimizer]], MetaOutput]
    before_step: Callable[[int], None] | None
    validate: Callable[[], Evaluation] | None
    validate_every: int
    patience: int | None
    minutes: float | None
    checkpoint: str | Path | None
    best: str | Path | None
    checkpoint_every: int

    def go(self, progress: bool) -> None:
        """Until all steps are done, or something ends them."""
        run, history = self.run, self.run.history
        device = device_of(run.learner)
        recorded, shown = _Meter(), _Meter()
        every = max(1, self.steps // POINTS)
        shown_at = 0.0
        with (
            _stop_signals() as received,
            tqdm(total=self.steps, initial=run.step, desc="training", unit="step", disable=not progress) as bar,
        ):
            while run.step < self.steps and history.stopped_by is None:
                started = time.perf_counter()
                if self.before_step is not None:
                    self.before_step(run.step)
                tasks = TaskBatch.of(next(run.episodes)).to(device)
                out = self.update(tasks, run.optimizers)
                for scheduler in run.schedulers:
                    scheduler.step()
                run.step += 1
                seconds = time.perf_counter() - started
                for meter in (recorded, shown):
                    meter.add(out, tasks.tasks, seconds)
                history.seconds += seconds
                bar.update()
                improved = self._validated()
                if self.minutes is not None and history.seconds >= 60 * self.minutes:
                    history.stopped_by = TIME
                # Read once: a signal that comes later stops the next step.
                if received:
                    history.stopped_by = received[0].name
                last = run.step == self.steps or history.stopped_by is not None
                if last or time.monotonic() - shown_at > 0.2:
                    bar.set_postfix_str(_describe(shown.point(run.step)), refresh=last)
                    shown, shown_at = _Meter(), time.monotonic()
                saves = self.checkpoint is not None and (last or run.step % self.checkpoint_every == 0)
                if last or saves or improved or run.step % every == 0:
                    history.training.append(_finite(recorded.point(run.step)))
                    recorded = _Meter()
                if self.best is not None and improved:
                    run.save(self.best)
                if self.checkpoint is not None and saves:
                    run.save(self.checkpoint)

    def _validated(self) -> bool:
        """Whether it was time to validate, and the learner was better than ever."""
        run, history = self.run, self.run.history
        if self.validate is None or (run.step != self.steps and run.step % self.validate_every):
            return False
        found = self.validate()
        best = history.best
        history.validation.append(ValidationPoint(run.step, found.mean, found.interval, found.score, history.seconds))
        if best is None or found.score > best.score:
            return True
        since = sum(point.step > best.step for point in history.validation)
        if self.patience is not None and since >= self.patience:
            history.stopped_by = EARLY
        return False


def make_schedulers(schedule: str, optimizers: Sequence[Optimizer], steps: int) -> list[LRScheduler]:
    """Schedulers that scale each optimizer's rate over `steps` meta-steps as `train` says; none for "constant"."""
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return []
    return [LambdaLR(optimizer, functools.partial(SCHEDULES[schedule], steps)) for optimizer in optimizers]


SCHEDULES: Mapping[str, Callable[[int, int], float]] = {
    "constant": lambda steps, done: 1.0,
    "linear": lambda steps, done: max(0.0, 1 - done / steps),
    "cosine": lambda steps, done: 0.5 * (1 + math.cos(math.pi * min(1.0, done / steps))),
    "halving": lambda steps, done: 0.5 ** (done // 2000),
}
"""What a rate is multiplied by after so many of all meta-steps."""


def _check_schedulers(schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer]) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler must be one that steps without a metric (got ReduceLROnPlateau; step it in validate)"
            )
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            raise ValueError("scheduler must be one of the optimizer that is given (got another's)")


@contextlib.contextmanager
def _clipped(optimizers: Sequence[Optimizer], norm: float | None) -> Iterator[None]:
    """Meanwhile each optimizer clips its gradient before it steps, whoever makes it step."""

    def clip(optimizer: Optimizer, *_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters_of(optimizer), float(norm or 0))

    hooks = [] if norm is None else [each.register_step_pre_hook(clip) for each in optimizers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(point: Point) -> Point:
    if not math.isfinite(point.loss):
        raise NonFiniteError(f"the meta-loss is {point.loss} in one of the meta-steps up to {point.step}")
    return point


class _Meter:
    """Means over some meta-steps, summed on the device so that nothing waits for it."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.accuracy: Tensor | float | None = 0.0
        self.steps = self.tasks = 0
        self.seconds = 0.0

    def add(self, out: MetaOutput, tasks: int, seconds: float) -> None:
        self.loss = self.loss + out.loss.detach()
        self.accuracy = None if out.accuracy is None or self.accuracy is None else self.accuracy + out.accuracy.mean()
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
