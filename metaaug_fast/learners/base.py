"""What learners share that adapt a module in an inner loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..inner_loop import FastWeights, adapt_tasks, fingerprint
from ..problem import InnerProblem, Support, with_steps


class Learner(nn.Module):
    """A module whose settings make an `InnerProblem`, built once and again after a setting or a tensor was replaced.

    A subclass sets `backend` and writes `_inner_problem`.
    """

    backend: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_built"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    def problem(self, steps: int | None = None) -> InnerProblem:
        """The inner problem of this learner, with its own number of steps or another.

        Beyond the learner's own steps, rates and batch-norm affines that are given per step stay as in the last one.
        """
        mark, _ = fingerprint(self)
        built = self.__dict__.get("_built")
        if built is None or built[0] != mark:
            built = self.__dict__["_built"] = mark, self._inner_problem()
        return built[1] if steps is None else with_steps(built[1], steps)

    def _inner_problem(self) -> InnerProblem:
        raise NotImplementedError

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
        """Adapt to each task `[T, S, ...]`, differentiably; arguments as in `inner_loop`.

        Raises:
            ValueError: the support set fits neither the model nor itself.
        """
        support = Support(support_x, support_y, sample_weight, rows, initial)
        return adapt_tasks(self.problem(steps), support, self.backend)
