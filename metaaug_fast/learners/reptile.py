"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999, algorithms 1 and 2)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import check_flag
from ..engine.fast_weights import FastWeights
from ..engine.loop import adapt_tasks_mean
from ..engine.losses import Loss
from ..engine.problem import InnerProblem, LearningRate, Query, Support, inner_problem, patterns
from ..engine.reference import unpack
from ..tasks import MetaOutput, TaskBatch, check_batch, check_samples
from .gradient import Learner

POLICIES = ("batch", "frozen")


class Reptile(Learner):
    """Learn weights theta by moving them towards those that each task's inner optimizer arrives at.

        theta_i = inner_optimizer(theta; support of task i)                     inner_steps times
        theta  <- theta + meta_lr * mean_i(theta_i - theta)                     batched: algorithm 2
        theta  <- theta + meta_lr * (theta_i - theta), one i after the other    otherwise: algorithm 1

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
        betas: tuple[float, float] = (0.0, 0.999),
        seed: int = 0,
        task_chunk: int | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if inner_batch is not None and (type(inner_batch) is not int or inner_batch < 1):
            raise ValueError(f"inner_batch must be >= 1 or None (got {inner_batch})")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be >= 0 and below 1 (got {betas})")
        check_flag("batched", batched)
        if batch_norm not in POLICIES:
            raise ValueError(f"batch_norm must be one of {', '.join(POLICIES)} (got {batch_norm!r})")
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
        check_batch(tasks)
        if type(self.meta_lr) not in (int, float) or not 0 <= self.meta_lr <= sys.float_info.max:
            raise ValueError(f"meta_lr must be >= 0 and finite (got {self.meta_lr})")
        moves = [self._move(each, measure) for each in ([tasks] if self.batched else tasks.split(1))]
        outputs = [output for output in moves if output is not None]
        if not outputs:
            return None
        losses = torch.cat([output.task_losses for output in outputs])
        accuracies = [output.accuracy for output in outputs if output.accuracy is not None]
        return MetaOutput(losses.mean(), losses, torch.cat(accuracies) if accuracies else None)

    @torch.no_grad()
    def forward(self, tasks: TaskBatch, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge the result on its query set, without gradient."""
        check_batch(tasks)
        return self.adapt(tasks.support_x, tasks.support_y, steps).evaluate(tasks.query_x, tasks.query_y)

    @torch.no_grad()
    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        steps: int | None = None,
        *,
        sample_weight: Tensor | None = None,
        rows: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> FastWeights:
        """Adapt to each task `[T, S, ...]` without gradient; arguments as in `inner_loop`.

        The batches of `inner_batch` samples are the same at every call and independent of those of `step`.
        """
        if rows is None:
            rows = self._rows(support_x, support_y, self.problem(steps).steps, torch.Generator().manual_seed(self.seed))
        return super().adapt(support_x, support_y, steps, sample_weight=sample_weight, rows=rows, initial=initial)

    def get_extra_state(self) -> Tensor:
        """Where the shuffling stands."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on shuffling from there."""
        self._generator.set_state(state.cpu())

    def _move(self, tasks: TaskBatch, measure: bool) -> MetaOutput | None:
        """Move the weights towards the mean of the tasks' own; what these achieve, if it is to be measured."""
        problem, x, y = self.problem(), tasks.support_x, tasks.support_y
        support = Support(x, y, rows=self._rows(x, y, self.inner_steps, self._generator))
        query = Query(tasks.query_x, tasks.query_y) if measure else None
        mean, output = adapt_tasks_mean(problem, support, query, self.backend)
        changes = unpack(problem, mean)
        moved = [problem.parameters[name] for name in problem.rates]
        _add(moved, [changes[name] for name in problem.rates], self.meta_lr)
        return output

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
