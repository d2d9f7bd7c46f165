"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999, algorithms 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_flag, check_number
from ..engine.fast_weights import FastWeights
from ..engine.loop import adapt_tasks_mean
from ..engine.losses import Loss
from ..engine.problem import InnerProblem, LearningRate, Query, Support, inner_problem, patterns, with_steps
from ..engine.reference import unpack
from ..tasks import MetaOutput, TaskBatch, check_samples
from .base import Learner
from .gradient import GradientLearner
from .one_by_one import one_by_one

POLICIES = ("batch", "frozen")
COMBINATIONS = ("sum", "mean", "last")
Move = Callable[[list[Tensor], list[Tensor]], None]


class Reptile(GradientLearner):
    """Learn weights theta by moving them towards those that each task's inner optimizer arrives at.

        theta_i = inner_optimizer(theta; support of task i)                     inner_steps times
        theta  <- theta + meta_lr * mean_i(theta_i - theta)                     batched: algorithm 2
        theta  <- theta + meta_lr * (theta_i - theta), one i after the other    otherwise: algorithm 1

    With SGD inside, theta_i - theta is the sum of the inner gradients, times a rate. `combine` takes their mean, or the
    last alone, in its place (section 6.3).

    Nothing is differentiated through the inner loop. Adam's moments start at zero in every task, whereas the authors'
    code carries the second moment from one task to the next.

    Args:
        model: any module; `step` changes its parameters in place.
        inner_lr, loss, adapt, batch_norm, backend, task_chunk, precision: see `inner_loop`; batch_norm is "batch" or
            "frozen".
        inner_optimizer: "adam" (with `betas`) or "sgd".
        meta_lr: may be set between steps; the paper lets it fall linearly to 0.
        inner_batch: samples in an inner step: the support set is shuffled, cut into batches of this size and
            shuffled again when it is used up. None: all of it in every step.
        batched: tasks start from the same weights and run together.
        combine: "sum", "mean" or "last", which is first-order MAML (FOML), of the inner steps that theta moves along.
        together: predict a task's queries in one batch, whose statistics batch norms take. False: each alone behind
            the support set, as in the paper's other results; a pass over all of that for each query. `step` and
            `meta_step` judge queries in one batch all the same.
        seed: of the shuffling; its state is part of `state_dict()`.

    Raises:
        ValueError: an argument is out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> reptile = mf.Reptile(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, inner_batch=5, loss="mse")
    >>> tasks = mf.TaskBatch(*(torch.randn(4, 10, 1) for _ in range(4)))
    >>> for step in range(3):
    ...     reptile.meta_lr = 1 - step / 3
    ...     out = reptile.step(tasks)
    >>> out.task_losses.shape
    torch.Size([4])
    """

    first_order = True

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 1e-3,
        inner_steps: int = 5,
        inner_optimizer: str = "adam",
        meta_lr: float = 1.0,
        inner_batch: int | None = None,
        batched: bool = True,
        loss: Loss = "cross_entropy",
        adapt: str | Iterable[str] | None = None,
        batch_norm: str = "batch",
        backend: str = "auto",
        *,
        combine: str = "sum",
        together: bool = True,
        betas: tuple[float, float] = (0.0, 0.999),
        seed: int = 0,
        task_chunk: int | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if inner_batch is not None:
            check_count("inner_batch", inner_batch, low=1)
        check_number("meta_lr", meta_lr)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be >= 0 and below 1 (got {betas})")
        check_flag("batched", batched)
        check_flag("together", together)
        check_choice("batch_norm", batch_norm, POLICIES)
        check_choice("combine", combine, COMBINATIONS)
        self.model = model
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_optimizer = inner_optimizer
        self.meta_lr = meta_lr
        self.inner_batch = inner_batch
        self.batched = batched
        self.loss = loss
        self.adapted = patterns(adapt)
        self.batch_norm = batch_norm
        self.backend = backend
        self.combine = combine
        self.together = together
        self.betas = betas
        self.seed = seed
        self.task_chunk = task_chunk
        self.precision = precision
        self._generator = torch.Generator().manual_seed(seed)
        self.problem()

    @torch.no_grad()
    def step(self, tasks: TaskBatch, measure: bool = True) -> MetaOutput | None:
        """One meta-step on the tasks' support sets.

        Args:
            measure: judge the adapted weights on the query sets and return that, without gradient. Without it the
                query sets are not read and the return value is None.

        Raises:
            ValueError: meta_lr is negative or not finite, or the tasks do not fit the model.
            NonFiniteError: NaN or infinity arose; names task (0 where they run one by one) and step.
        """
        return self._step(tasks, measure, lambda tensors, changes: _add(tensors, changes, self.meta_lr))

    @torch.no_grad()
    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """`step`, by optimizers for which `-meta_lr * mean_i(theta_i - theta)` is the gradient."""

        def descend(tensors: list[Tensor], changes: list[Tensor]) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            for tensor, change in zip(tensors, changes, strict=True):
                tensor.grad = -self.meta_lr * change
            for optimizer in optimizers:
                optimizer.step()

        out = self._step(tasks, True, descend)
        assert out is not None
        return out

    def _step(self, tasks: TaskBatch, measure: bool, move: Move) -> MetaOutput | None:
        tasks = TaskBatch.of(tasks)
        check_number("meta_lr", self.meta_lr)
        moves = [self._move(each, measure, move) for each in ([tasks] if self.batched else tasks.split(1))]
        outputs = [output for output in moves if output is not None]
        if not outputs:
            return None
        losses = torch.cat([output.task_losses for output in outputs])
        accuracies = [output.accuracy for output in outputs if output.accuracy is not None]
        return MetaOutput(losses.mean(), losses, torch.cat(accuracies) if accuracies else None)

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """SGD of rate 1, by which schedules scale `meta_lr`; `lr` sets that."""
        if lr is not None:
            check_number("meta_lr", lr)
            self.meta_lr = lr
        return [torch.optim.SGD(self.parameters(), lr=1.0)]

    @torch.no_grad()
    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge the result on its query set, without gradient."""
        return super().forward(tasks, steps=steps)

    @torch.no_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor, **options: Any) -> FastWeights:
        """Adapt to each task `[T, S, ...]`, or one, without gradient; options as of `GradientLearner.adapt`.

        The batches of `inner_batch` samples are the same at every call and independent of those of `step`.
        """
        fast = super().adapt(support_x, support_y, **options)
        return one_by_one(fast, support_x) if self._alone else fast

    @property
    def transductive(self) -> bool:
        """Whether batch norms take their statistics from the queries."""
        return self.together and super().transductive

    @property
    def _alone(self) -> bool:
        return not self.together and super().transductive

    @torch.no_grad()
    def by_step(self, tasks: TaskBatch, steps: int | None = None) -> list[MetaOutput]:
        """The metric after 0, 1, ... steps, without gradient; see `GradientLearner.by_step`."""
        return Learner.by_step(self, tasks, steps) if self._alone else super().by_step(tasks, steps)

    def get_extra_state(self) -> Tensor:
        """Where the shuffling stands."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on shuffling from there."""
        self._generator.set_state(state.cpu())

    def _move(self, tasks: TaskBatch, measure: bool, move: Move) -> MetaOutput | None:
        """Move the weights towards the mean of the tasks' own; what these achieve, if it is to be measured."""
        problem, x, y = self.problem(), tasks.support_x, tasks.support_y
        support = Support(x, y, rows=self._rows(x, y, self.inner_steps, self._generator))
        query = Query(tasks.query_x, tasks.query_y) if measure else None
        mean, output = self._combined(problem, support, query)
        changes = unpack(problem, mean)
        move([problem.parameters[name] for name in problem.rates], [changes[name] for name in problem.rates])
        return output

    def _combined(
        self, problem: InnerProblem, support: Support, query: Query | None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of the inner steps combined, `[P]`, and theta_K judged on a query set."""
        before: Tensor | float = 0.0
        if self.combine == "last" and problem.steps:
            rows = None if support.rows is None else support.rows[:, :-1]
            shorter = with_steps(problem, problem.steps - 1)
            with torch.random.fork_rng(devices=[]):  # so that dropout drops the same again
                before, _ = adapt_tasks_mean(shorter, replace(support, rows=rows), None, self.backend)
        moved, output = adapt_tasks_mean(problem, support, query, self.backend)
        return (moved - before) / (max(problem.steps, 1) if self.combine == "mean" else 1), output

    def _support(self, problem: InnerProblem, given: Support) -> Support:
        if given.rows is not None:
            return given
        rows = self._rows(given.x, given.y, problem.steps, torch.Generator().manual_seed(self.seed))
        return replace(given, rows=rows)

    def _rows(self, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Tensor | None:
        """The samples of each inner step, `[T, K, B]`."""
        if self.inner_batch is None:
            return None
        check_samples("support", x, y)
        tasks, samples = x.shape[:2]
        count = steps * self.inner_batch
        shuffles = torch.rand(tasks, math.ceil(count / samples), samples, generator=generator).argsort(-1)
        return shuffles.flatten(1)[:, :count].view(tasks, steps, self.inner_batch)

    def _inner_problem(self) -> InnerProblem:
        return inner_problem(
            self.model,
            self.inner_lr,
            self.inner_steps,
            loss=self.loss,
            adapt=self.adapted,
            first_order=True,
            batch_norm=self.batch_norm,
            optimizer=self.inner_optimizer,
            betas=self.betas,
            task_chunk=self.task_chunk,
            precision=self.precision,
            prefix="inner_",
        )


def _add(tensors: list[Tensor], changes: list[Tensor], scale: float) -> None:
    """Add `scale * changes` to the tensors; in one kernel on a GPU, where this torch offers that."""
    if hasattr(torch, "_foreach_add_"):
        torch._foreach_add_(tensors, changes, alpha=scale)
        return
    for tensor, change in zip(tensors, changes, strict=True):
        tensor.add_(change, alpha=scale)
