"""A batch of few-shot tasks: the one shape in which data reach every learner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_count

_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class TaskBatch:
    """T tasks, each with a support set to adapt on and a query set to be judged on.

    Args:
        support_x: inputs, `[T, S, ...]`, float32 or float64.
        support_y: class ids `[T, S]` (int64, `0..ways-1` within a task), probabilities `[T, S, C]`, or
            regression targets of the shape of the model's output.
        query_x: inputs, `[T, Q, ...]`, with the trailing shape and dtype of `support_x`.
        query_y: targets as `support_y`.

    Raises:
        TypeError: something other than a tensor was given.
        ValueError: shapes, dtypes or devices do not fit together, a set is empty, or a tensor is not dense.

    >>> import torch
    >>> batch = TaskBatch(torch.zeros(4, 5, 1), torch.zeros(4, 5, 1), torch.zeros(4, 10, 1), torch.zeros(4, 10, 1))
    >>> batch.tasks
    4
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        check_samples("support", self.support_x, self.support_y)
        check_samples("query", self.query_x, self.query_y, tasks=self.tasks)
        if self.query_x.shape[2:] != self.support_x.shape[2:]:
            raise ValueError(
                "query_x must have the sample shape of support_x "
                f"(got {tuple(self.query_x.shape[2:])} and {tuple(self.support_x.shape[2:])})"
            )
        if self.query_x.dtype != self.support_x.dtype:
            raise ValueError(
                f"query_x must have the dtype of support_x (got {self.query_x.dtype}, {self.support_x.dtype})"
            )
        if self.query_x.device != self.support_x.device:
            raise ValueError(
                f"query_x must be on the device of support_x (got {self.query_x.device}, {self.support_x.device})"
            )

    @property
    def tasks(self) -> int:
        """The number of tasks, T."""
        return self.support_x.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support inputs and targets, query inputs and targets."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, index: int | slice) -> TaskBatch:
        """Some of the tasks; one of them is a batch of one task.

        >>> import torch
        >>> batch = TaskBatch(*(torch.zeros(4, 5, 1) for _ in range(4)))
        >>> batch[-1].tasks, batch[1:].tasks
        (1, 3)
        """
        if isinstance(index, slice):
            return TaskBatch(*(each[index] for each in self.tensors))
        if not -self.tasks <= index < self.tasks:
            raise IndexError(f"task must be one of {self.tasks} (got {index})")
        return self[index % self.tasks : index % self.tasks + 1]

    def split(self, tasks: int) -> list[TaskBatch]:
        """Batches of so many tasks; the last may have fewer."""
        check_count("tasks", tasks, low=1)
        return [self[begin : begin + tasks] for begin in range(0, self.tasks, tasks)]

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """The batch on another device, which need not wait for a GPU; a dtype is for inputs and floating targets."""
        moved = []
        for value in self.tensors:
            there = sent(value, value.new_empty(0).to(*args, **kwargs).device)
            moved.append(there.to(*args, **kwargs) if value.is_floating_point() else there)
        return TaskBatch(*moved)


@dataclass(frozen=True)
class MetaOutput:
    """loss: mean over tasks. task_losses: `[T]`; both differentiable. accuracy: `[T]` for class ids, else None.

    The gradient of `loss`, of `task_losses.mean()` and of `task_losses.sum()` is there with the loss; one that weighs
    tasks unequally costs a second sweep.
    """

    loss: Tensor
    task_losses: Tensor
    accuracy: Tensor | None = field(default=None)


def sent(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the CPU to a GPU through a copy in pinned memory, which nothing waits for."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def usable(value: Tensor) -> Tensor:
    """The tensor, or a copy of one made under `torch.inference_mode`, which no graph may keep."""
    return value.clone() if value.is_inference() else value


def is_one_task(x: Tensor, y: Tensor) -> bool:
    """Whether `x`, `y` are samples of one task, `[N, ...]`, rather than of T of them, `[T, N, ...]`.

    >>> is_one_task(torch.zeros(5, 2), torch.arange(5)), is_one_task(torch.zeros(9, 5, 2), torch.zeros(9, 5, 1))
    (True, False)
    """
    if y.ndim < 2 or not y.is_floating_point():
        return y.ndim < 2
    return y.shape[:2] != x.shape[:2] or x.ndim == y.ndim == 2


def check_batch(tasks: object) -> None:
    """Raise TypeError unless `tasks` is a `TaskBatch`."""
    if not isinstance(tasks, TaskBatch):
        raise TypeError(f"tasks must be a TaskBatch (got {type(tasks).__name__})")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor, and ValueError unless it is a dense one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (got {type(value).__name__})")
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise ValueError(f"{name} must be a dense tensor, neither sparse, nested nor quantised (got {kind})")


def check_samples(name: str, x: Tensor, y: Tensor, tasks: int | None = None) -> None:
    """Raise TypeError or ValueError unless `x` is `[T, N, ...]` and `y` its `[T, N, ...]` targets.

    name: of the set, `support` or `query`, whose tensors are the caller's `support_x` and `support_y`; without one they
        are `x` and `y`.
    """
    x_name, y_name = (f"{name}_x", f"{name}_y") if name else ("x", "y")
    check_tensor(x_name, x)
    check_tensor(y_name, y)
    if x.ndim < 2:
        raise ValueError(f"{x_name} must be [tasks, samples, ...] (got shape {tuple(x.shape)})")
    if tasks is not None and x.shape[0] != tasks:
        raise ValueError(f"{x_name} must have as many tasks as support_x (got {x.shape[0]}, {tasks})")
    if x.shape[0] == 0:
        raise ValueError(f"{x_name} must hold at least one task (got shape {tuple(x.shape)})")
    if x.shape[1] == 0:
        raise ValueError(f"{x_name} must hold at least one sample a task (got shape {tuple(x.shape)})")
    if x.dtype not in _FLOATS and not (x.is_floating_point() and x.is_cuda):
        raise ValueError(f"{x_name} must be float32 or float64 on the CPU (got {x.dtype})")
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{y_name} must have the tasks and samples of {x_name} (got {tuple(y.shape[:2])}, {tuple(x.shape[:2])})"
        )
    if y.device != x.device:
        raise ValueError(f"{y_name} must be on the device of {x_name} (got {y.device}, {x.device})")
    if x.is_meta:
        raise ValueError(f"{x_name} must hold values (got a tensor on the meta device)")
