"""What an inner loop gives: a set of weights for each task, which predict."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..tasks import MetaOutput, check_inputs_of, check_samples, check_tensor, class_ids, usable
from .choice import choose_executor
from .exclusive import ONE_AT_A_TIME
from .losses import check_targets, judge
from .problem import NORMS, InnerProblem, check_inputs
from .reference import unpack


class FastWeights:
    """T sets of adapted weights, which predict and can be read, stored and differentiated.

    flat: `[T, P]`, every parameter of the model flattened in `named_parameters` order; a batch-norm affine that is
        held per step is there with all its rows.
    problem: what they were adapted by.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.randn(3, 5, 1), torch.randn(3, 5, 1)
    >>> fast = mf.inner_loop(mf.models.mlp([1, 8, 1]), x, y, loss="mse")
    >>> len(fast), fast(torch.randn(3, 20, 1)).shape
    (3, torch.Size([3, 20, 1]))
    >>> torch.allclose(fast.module(2)(x[2]), fast(x)[2], atol=1e-5)
    True
    """

    def __init__(self, problem: InnerProblem, flat: Tensor, backend: str = "auto") -> None:
        self.problem = problem
        self.flat = flat
        self._backend = backend

    def __len__(self) -> int:
        return len(self.flat)

    def __repr__(self) -> str:
        model, (tasks, size) = type(self.problem.model).__name__, self.flat.shape
        return f"FastWeights({model}, {tasks} tasks x {size} weights, {self.problem.steps} steps)"

    def __call__(self, x: Tensor) -> Tensor:
        """Output `[T, N, ...]` of each task's weights on its `x` `[T, N, ...]`, differentiable once in both.

        Raises:
            TypeError: `x` is no tensor.
            ValueError: `x` does not hold samples for T tasks, or has another dtype or device than the model.
        """
        check_inputs_of(len(self), x)
        check_inputs(self.problem, "x", x)
        executor = choose_executor(self.problem, x.shape[2:], self._backend, ids=x.dtype == torch.int64)
        return executor.predict(self.problem, usable(self.flat), usable(x))

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Loss (the problem's, labels smoothed as there) and accuracy of each task on its `x`, `y`; differentiable.

        Raises:
            ValueError: `x` and `y` do not fit each other, the tasks or the model.
        """
        check_tensor("y", y)
        y = class_ids(y)
        check_samples("", x, y, tasks=len(self))
        loss, smoothing = self.problem.loss, self.problem.label_smoothing
        prediction = self(x)
        check_targets("y", loss, y, tuple(prediction.shape[2:]))
        return judge(loss, prediction, usable(y), smoothing)

    def as_dict(self) -> dict[str, Tensor]:
        """Views of `flat` by name, each `[T, *shape of the model's parameter]`.

        Of a batch-norm affine held per step it is the row that predictions read, that of the last step.
        """
        row = max(self.problem.steps - 1, 0)
        return {
            name: value[:, min(row, value.shape[1] - 1)] if name in self.problem.per_step else value
            for name, value in unpack(self.problem, self.flat).items()
        }

    def module(self, task: int) -> nn.Module:
        """A copy of the model that holds one task's weights, to be called, trained on or saved like any other.

        It predicts as `fast(x)[task]` does. So its batch norms, where `fast` normalises with the batch's own
        statistics, no longer have running ones, and with `batch_norm="frozen"` they are in evaluation mode.

        Raises:
            IndexError: there is no such task.
        """
        weights = {name: value[task].detach() for name, value in self.as_dict().items()}
        with ONE_AT_A_TIME:
            module = copy.deepcopy(self.problem.model)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        for norm in module.modules():
            if isinstance(norm, NORMS) and self.problem.batch_norm in ("batch", "per_step"):
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            elif isinstance(norm, NORMS) and self.problem.batch_norm == "frozen":
                norm.eval()
        return module

    def detach(self) -> FastWeights:
        """The same weights without their history."""
        return FastWeights(self.problem, self.flat.detach(), self._backend)
