"""A batch of few-shot tasks: the one shape in which data reach every learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_count

_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_SETS = (("train", "test"), ("support", "query"))


@dataclass(frozen=True, eq=False, repr=False)
class TaskBatch:
    """T tasks, each with a support set to adapt on and a query set to be judged on.

    Arrays and nested lists become tensors. `len(batch)` is T, `batch[i]` and `batch[i:j]` are batches of some of the
    tasks, and batches of the same numbers are equal. `TaskBatch.of` also takes what other libraries hand out.

    Args:
        support_x: inputs, `[T, S, ...]`, float32 or float64; or token ids, int64.
        support_y: class ids `[T, S]` (integers `0..ways-1` within a task, kept as int64), probabilities `[T, S, C]`, or
            regression targets of the shape of the model's output.
        query_x: inputs, `[T, Q, ...]`, with the trailing shape and dtype of `support_x`.
        query_y: targets as `support_y`.

    Raises:
        TypeError: something was given that is no tensor and makes none.
        ValueError: shapes, dtypes or devices do not fit together, a set is empty, or a tensor is not dense.

    >>> import torch
    >>> batch = TaskBatch(torch.zeros(4, 5, 1), torch.zeros(4, 5, 1), torch.zeros(4, 10, 1), torch.zeros(4, 10, 1))
    >>> batch
    TaskBatch(support_x [4, 5, 1] float32, support_y [4, 5, 1] float32, query_x [4, 10, 1] float32, query_y ...)
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            tensor = _as_tensor(name, value)
            object.__setattr__(self, name, class_ids(tensor) if name.endswith("_y") else tensor)
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

    @classmethod
    def of(cls, tasks: Any) -> TaskBatch:
        """A batch of what holds one.

        Args:
            tasks: a `TaskBatch`; `(support_x, support_y, query_x, query_y)`; or, as torchmeta has them, a mapping
                `{"train": (x, y), "test": (x, y)}` (or `"support"` and `"query"`). One task may lack its axis T.

        Raises:
            TypeError, ValueError: it is something else, or as the constructor.

        >>> import torch
        >>> x, y = torch.zeros(5, 3), torch.arange(5)
        >>> TaskBatch.of({"train": (x, y), "test": (x, y)}).tasks
        1
        """
        if isinstance(tasks, TaskBatch):
            return tasks
        sets: Any = tasks
        if isinstance(tasks, Mapping):
            names = next((pair for pair in _SETS if set(pair) <= set(tasks)), None)
            sets = () if names is None else [each for name in names for each in tasks[name]]
        if not isinstance(sets, (tuple, list)) or len(sets) != 4:
            raise TypeError(
                "tasks must be a TaskBatch, (support_x, support_y, query_x, query_y) or "
                f"{{'train': (x, y), 'test': (x, y)}} (got {type(tasks).__name__}"
                + (f" of {len(tasks)})" if isinstance(tasks, (tuple, list)) else ")")
            )
        tensors = [_as_tensor(name, value) for name, value in zip(cls.__annotations__, sets, strict=True)]
        if is_one_task(*tensors[:2]):
            tensors = [each[None] for each in tensors]
        return cls(*tensors)

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskBatch):
            return NotImplemented
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(one.dtype == two.dtype and torch.equal(one, two) for one, two in pairs)

    def __repr__(self) -> str:
        shapes = (
            f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for name, value in vars(self).items()
        )
        return f"TaskBatch({', '.join(shapes)})"

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
    prediction: `[T, Q, ...]` without gradient, where it was at hand.

    The gradient of `loss`, of `task_losses.mean()` and of `task_losses.sum()` is there with the loss; one that weighs
    tasks unequally costs a second sweep.
    """

    loss: Tensor
    task_losses: Tensor
    accuracy: Tensor | None = field(default=None)
    prediction: Tensor | None = field(default=None, repr=False)


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


def class_ids(y: Tensor) -> Tensor:
    """Targets with integers of any kind as the int64 that class ids are; other targets as they are."""
    return y.long() if y.dtype in _INTEGERS else y


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a tensor, or an array or lists of equal lengths that make one (got {type(value).__name__})"
        ) from None


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor, and ValueError unless it is a dense one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (got {type(value).__name__})")
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise ValueError(f"{name} must be a dense tensor, neither sparse, nested nor quantised (got {kind})")


def check_inputs_of(tasks: int, x: object) -> None:
    """Raise TypeError or ValueError unless `x` is `[T, N, ...]` for so many tasks."""
    check_tensor("x", x)
    assert isinstance(x, Tensor)
    if x.ndim < 2 or len(x) != tasks or not x.shape[1]:
        raise ValueError(f"x must be [{tasks}, samples, ...] with samples > 0 (got shape {tuple(x.shape)})")


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
    if x.dtype not in (*_FLOATS, torch.int64) and not (x.is_floating_point() and x.is_cuda):
        way_out = {torch.uint8: f"; pictures: {x_name}.float() / 255"}.get(x.dtype, "")
        raise ValueError(
            f"{x_name} must be float32 or float64 on the CPU, or token ids in int64 (got {x.dtype}{way_out})"
        )
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{y_name} must have the tasks and samples of {x_name} (got {tuple(y.shape[:2])}, {tuple(x.shape[:2])})"
        )
    if y.device != x.device:
        raise ValueError(f"{y_name} must be on the device of {x_name} (got {y.device}, {x.device})")
    if x.is_meta:
        raise ValueError(f"{x_name} must hold values (got a tensor on the meta device)")
