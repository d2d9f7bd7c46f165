"""Tasks kept in a file, so that others judge their learners on the very same ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from ..files import write_atomically
from ..tasks import TaskBatch

_FORMAT = {"format": "metaaug_fast tasks 1"}


def save_tasks(path: str | Path, batches: Iterable[Any]) -> None:
    """Write batches of tasks to a safetensors file, whole or not at all; tensors are `0.support_x`, `0.support_y`, ...

    Args:
        batches: in forms that `TaskBatch.of` takes, at least one; such as `[episodes.batch(i) for i in range(20)]`.

    Raises:
        TypeError, ValueError: something else is among them, or there is none. FileWriteError: `path` cannot be written.

    >>> import tempfile, torch
    >>> batch = TaskBatch(*(torch.randn(4, 5, 1) for _ in range(4)))
    >>> path = Path(tempfile.mkdtemp()) / "tasks.safetensors"
    >>> save_tasks(path, [batch, batch[:2]])
    >>> load_tasks(path) == [batch, batch[:2]]
    True
    """
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous().clone()
        for number, each in enumerate(batches)
        for name, value in vars(TaskBatch.of(each)).items()
    }
    if not tensors:
        raise ValueError("batches must hold at least one batch (got none)")
    write_atomically(path, safetensors.torch.save(tensors, metadata=_FORMAT))


def load_tasks(path: str | Path) -> list[TaskBatch]:
    """The batches that `save_tasks` wrote, for `mf.evaluate(learner, load_tasks(path))`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is damaged or another.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tasks at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if file.metadata() != _FORMAT:
                raise ValueError("it has another format")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = tuple(TaskBatch.__annotations__)
        batches = [TaskBatch(*(tensors[f"{n}.{name}"] for name in names)) for n in range(len(tensors) // len(names))]
    except Exception as error:  # damage can raise anything
        raise ValueError(f"{path} is no whole file of tasks ({' '.join(str(error).split())})") from error
    return batches
