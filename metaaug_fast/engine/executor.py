"""What runs an inner problem: the fused engine, the fallback, or both behind one another."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..tasks import MetaOutput
from .problem import InnerProblem, Query, Support


class Executor(Protocol):
    """What runs an `InnerProblem` whose arguments have been checked.

    P counts all of `problem.parameters`, flattened in their order, per-step tensors whole.
    """

    name: str
    output_shape: tuple[int, ...]

    def adapt(self, problem: InnerProblem, support: Support) -> Tensor:
        """Weights after K steps, `[T, P]`, differentiable; with Adam forward only."""
        ...

    def adapt_mean(
        self, problem: InnerProblem, support: Support, query: Query | None = None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of `theta_K - theta_0`, `[P]`, without gradient; and theta_K judged on a query set."""
        ...

    def predict(self, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        """Outputs `[T, N, *output_shape]` of weights `[T, P]`, differentiable once."""
        ...

    def meta_loss(self, problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
        """Adapt, and judge the result on the query set: a whole meta-step."""
        ...

    def judge_steps(self, problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
        """theta_0 .. theta_K judged on the query set, K + 1 of them, without gradient; no running statistics move."""
        ...
