"""What learners share that adapt a module in an inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..engine.executor import fingerprint
from ..engine.fast_weights import FastWeights
from ..engine.loop import adapt_tasks
from ..engine.problem import InnerProblem, Support, with_steps


class Learner(nn.Module):
    """A module whose settings make an `InnerProblem`, built once and again after a setting or a tensor was replaced.

    A subclass sets `inner_lr` and `backend` and writes `_inner_problem`.
    """

    inner_lr: Any
    backend: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Counted rather than only cleared, for another thread may just be building a problem of the old setting.
        self.__dict__["_settings"] = self.__dict__.get("_settings", 0) + 1
        self.__dict__["_built"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

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
