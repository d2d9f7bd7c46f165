"""What learners share that adapt a module by gradient steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import reference
from ..engine.choice import choose_executor
from ..engine.fast_weights import FastWeights
from ..engine.loop import adapt_tasks, judge_steps
from ..engine.problem import NORMS, InnerProblem, Query, Support, with_seed, with_steps
from ..engine.remembered import fingerprint
from ..tasks import MetaOutput, TaskBatch
from .base import Learner, check_steps, one_task_too


class GradientLearner(Learner):
    """A learner whose settings make an `InnerProblem`, built once and again after a setting or a tensor was replaced.

    A subclass sets `model`, `inner_lr`, `inner_steps` and `backend`, and writes `_inner_problem`.
    """

    model: nn.Module
    inner_lr: Any
    inner_steps: int
    backend: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Counted rather than only cleared, for another thread may just be building a problem of the old setting.
        self.__dict__["_settings"] = self.__dict__.get("_settings", 0) + 1
        self.__dict__["_built"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    @property
    def transductive(self) -> bool:
        """Whether batch norms take their statistics from the queries.

        >>> import metaaug_fast as mf
        >>> mf.MAML(mf.models.conv4(ways=5)).transductive, mf.MAML(mf.models.mlp([1, 8, 1])).transductive
        (True, False)
        """
        problem = self.problem()
        own_batch = problem.batch_norm in ("batch", "per_step")
        return own_batch and any(isinstance(module, NORMS) for module in problem.model.modules())

    def problem(self, steps: int | None = None) -> InnerProblem:
        """The inner problem of this learner, with its own number of steps or another.

        Beyond the learner's own steps, rates and batch-norm affines that are given per step stay as in the last one.
        """
        mark = self.__dict__["_settings"], fingerprint(self)[0], _contents(self.inner_lr)
        built = self.__dict__["_built"]
        if built is None or built[0] != mark:
            built = self.__dict__["_built"] = mark, self._inner_problem()
        return built[1] if steps is None else with_steps(built[1], steps)

    def _inner_problem(self) -> InnerProblem:
        raise NotImplementedError

    @one_task_too
    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int | None = None,
        sample_weight: Tensor | None = None,
        rows: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> FastWeights:
        """Adapt to each task `[T, S, ...]`, differentiably; arguments as in `inner_loop`. One task may lack its T.

        Raises:
            ValueError: the support set fits neither the model nor itself.
        """
        problem = self.problem(steps)
        given = Support(support_x, support_y, sample_weight, rows, initial)
        return adapt_tasks(problem, self._support(problem, given), self.backend)

    @torch.no_grad()
    def by_step(self, tasks: TaskBatch, steps: int | None = None) -> list[MetaOutput]:
        """The metric after 0, 1, ... steps, without gradient, from one pass of the inner loop.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is no count.
        """
        tasks = TaskBatch.of(tasks)
        problem = self.problem(check_steps(self, steps))
        support = self._support(problem, Support(tasks.support_x, tasks.support_y))
        return judge_steps(problem, support, Query(tasks.query_x, tasks.query_y), self.backend)

    def _support(self, problem: InnerProblem, given: Support) -> Support:
        """What tasks adapt on: what is given, and where a learner has its own way, its rows and where tasks start."""
        return given

    def specification(
        self,
        tasks: TaskBatch,
        *,
        first_order: bool,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> MetaOutput | None:
        """What `forward` computes, by `reference.meta_loss`."""
        problem = self.problem()
        support = self._support(problem, Support(tasks.support_x, tasks.support_y, sample_weight))
        problem = replace(with_seed(problem), first_order=first_order)
        return reference.meta_loss(problem, support, Query(tasks.query_x, tasks.query_y, step_weights))

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """The executor of samples of a shape: "fused" or "fallback"."""
        return choose_executor(self.problem(), sample_shape, self.backend, ids=ids).name


def _contents(value: Any) -> Any:
    """What may be changed in rates in place, as lists and mappings can be, and tensors of which a problem holds a copy.

    Parameters are part of the learner's own fingerprint.
    """
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (nn.Module, nn.Parameter)):
        return None
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.tolist() if value.is_inference() else value._version
    if isinstance(value, Mapping):
        return {name: _contents(each) for name, each in value.items()}
    return [_contents(each) for each in value] if isinstance(value, list) else value
