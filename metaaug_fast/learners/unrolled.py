"""What learners share that minimise the query loss after an inner loop, through its steps: MAML and its relatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_flag
from ..engine.loop import meta_loss
from ..engine.losses import Loss
from ..engine.problem import NORMS, InnerProblem, LearningRate, Query, Support, inner_problem, parameters_of, patterns
from ..tasks import MetaOutput, TaskBatch
from .gradient import GradientLearner


class UnrolledLearner(GradientLearner):
    """A learner of where the inner loop starts, and of what steers it, by gradients through its steps.

        theta_{k+1} = theta_k - inner_lr * grad loss(theta_k; support of task i)        k = 0 .. inner_steps - 1
        minimise the mean over tasks of loss(theta_K; query of task i)                  with any torch optimizer

    A subclass calls `_settle` in its constructor, after this one's, with what adapts.

    Args:
        model, inner_lr, inner_steps, first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay,
            task_chunk, precision: see `MAML`.

    Raises:
        ValueError: an argument is out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> class BiasesOnly(mf.learners.UnrolledLearner):
    ...     def __init__(self, model, **options):
    ...         super().__init__(model, **options)
    ...         self._settle(adapt="*bias")
    >>> list(BiasesOnly(mf.models.mlp([1, 40, 1])).problem().rates)
    ['linear1.bias', 'head.bias']
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.4,
        inner_steps: int = 1,
        first_order: bool = False,
        loss: Loss = "cross_entropy",
        batch_norm: str = "batch",
        backend: str = "auto",
        *,
        label_smoothing: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        task_chunk: int | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.model = model
        self.inner_lr: LearningRate | nn.ParameterDict = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.loss = loss
        self.adapted: tuple[str, ...] | None = None
        self.batch_norm = batch_norm
        self.backend = backend
        self.label_smoothing = label_smoothing
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.task_chunk = task_chunk
        self.precision = precision
        self.per_step = nn.ParameterDict(_affines_per_step(model, inner_steps) if batch_norm == "per_step" else {})

    def _settle(self, adapt: str | Iterable[str] | None, learn_inner_lr: bool = False) -> None:
        """Say what adapts, make its rates parameters if they are learned, and check it all.

        The model stays as it was if anything is wrong.
        """
        check_flag("learn_inner_lr", learn_inner_lr)
        self.adapted = patterns(adapt)
        rates = self.problem().rates
        if learn_inner_lr and isinstance(self.inner_lr, Mapping):
            self.inner_lr = nn.ParameterDict({_key(name): _parameter(rate.value) for name, rate in rates.items()})
        elif learn_inner_lr:
            self.inner_lr = _parameter(next(iter(rates.values())).value)
        for key in self.per_step:
            self.model.get_parameter(_name(key)).requires_grad_(False)

    def forward(
        self,
        tasks: TaskBatch,
        *,
        steps: int | None = None,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> MetaOutput:
        """Adapt to every task's support set and judge the result on its query set.

        Args:
            steps: another K than `inner_steps`, for evaluation.
            step_weights: `[K]`, weights of the query losses after each step (MAML++); None: the last step's loss.
            sample_weight: `[T, S]`, of the support samples; see `inner_loop`.

        Raises:
            ValueError: the tasks do not fit the model. NonFiniteError: NaN or infinity arose; names task and step.
        """
        tasks = TaskBatch.of(tasks)
        problem = self.problem(steps)
        support = self._support(problem, Support(tasks.support_x, tasks.support_y, sample_weight))
        return meta_loss(problem, support, Query(tasks.query_x, tasks.query_y, step_weights), self.backend)

    def _inner_problem(self) -> InnerProblem:
        lr: Any = self.inner_lr
        if isinstance(lr, nn.ParameterDict):
            lr = {_name(key): value for key, value in lr.items()}
        dtype = next(self.model.parameters(), torch.empty(0)).dtype
        for rate in lr.values() if isinstance(lr, Mapping) else [lr]:
            if isinstance(rate, nn.Parameter) and rate.dtype != dtype:  # a copy would not follow the optimizer
                raise ValueError(
                    f"inner_lr must have the model's dtype {dtype} (got {rate.dtype}): convert the learner"
                )
        return inner_problem(
            self.model,
            lr,
            self.inner_steps,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            adapt=self.adapted,
            first_order=self.first_order,
            batch_norm=self.batch_norm,
            parameters={_name(key): value for key, value in self.per_step.items()},
            task_chunk=self.task_chunk,
            precision=self.precision,
            prefix="inner_",
        )


def _affines_per_step(model: nn.Module, steps: int) -> dict[str, nn.Parameter]:
    """A copy for each step, `[K, C]`, of the weight and bias of every batch norm."""
    parameters_of(model)
    check_count("inner_steps", steps)
    affines = {
        _key(name): _parameter(value.expand(max(steps, 1), -1))
        for path, norm in model.named_modules()
        if isinstance(norm, NORMS)
        for name, value in norm.named_parameters(path, recurse=False)
    }
    if not affines:
        raise ValueError(
            f"batch_norm='per_step' needs a batch norm with an affine (got none in {type(model).__name__})"
        )
    return affines


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))


def _key(name: str) -> str:
    """A parameter's name as `nn.ParameterDict` takes it, without dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
