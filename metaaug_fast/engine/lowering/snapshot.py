"""What a module consisted of at one moment: to see whether it has changed since, and to take a change back."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set)
_PLAIN = (
    bool, int, float, str, type(None), type, torch.dtype, torch.device, torch.Size, nn.Module,
    types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
_TENSORS = ("_parameters", "_buffers")


class Snapshot:
    """The attributes of every module in a model, and the contents of those that are lists, dicts or sets.

    complete: whether nothing is hidden deeper, so that equal snapshots mean an equal module (parameters' values aside).

    >>> model = nn.Sequential(nn.Dropout(0.5))
    >>> before = Snapshot(model)
    >>> before.change()
    >>> model[0].p = 0.1
    >>> before.change()
    ('0', 'p')
    """

    def __init__(self, model: nn.Module) -> None:
        # Weak references, so that a cache of snapshots keeps no model alive.
        self._modules = [
            (path, weakref.ref(module), {name: (value, _contents(value)) for name, value in vars(module).items()})
            for path, module in model.named_modules()
        ]
        lazy = [value for value in model.parameters() if nn.parameter.is_lazy(value)]
        self._shapes = [] if lazy else [(weakref.ref(value), value.shape) for value in model.parameters()]
        self.complete = not lazy and all(
            _is_plain(name, value) for _, _, state in self._modules for name, (value, _) in state.items()
        )

    def change(self) -> tuple[str, str] | None:
        """Path and attribute of the first change since, or None."""
        for path, reference, state in self._modules:
            now = vars(reference())
            if len(now) != len(state):
                return path, next(iter(now.keys() ^ state.keys()))
            for name, (value, contents) in state.items():
                if now.get(name, state) is not value or (contents is not None and not _same(contents, value)):
                    return path, name
        for parameter, shape in self._shapes:
            value = parameter()
            if value is None or value.shape != shape:
                return "", "parameters"
        return None

    def restore(self) -> None:
        """Put every attribute and its contents back."""
        for _, reference, state in self._modules:
            now = vars(reference())
            now.clear()
            for name, (value, contents) in state.items():
                now[name] = value
                if contents is not None and not _same(contents, value):
                    value.clear()
                    value.extend(contents) if isinstance(value, list) else value.update(contents)


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, _CONTAINERS) else None


def _same(contents: Any, value: Any) -> bool:
    if not contents or len(contents) != len(value):
        return len(contents) == len(value)
    if isinstance(value, dict):
        return all(value.get(name, contents) is each for name, each in contents.items())
    if isinstance(value, set):
        return contents == value
    return all(a is b for a, b in zip(contents, value, strict=True))


def _is_plain(name: str, value: Any) -> bool:
    allowed = (*_PLAIN, Tensor) if name in _TENSORS else _PLAIN
    return all(isinstance(each, allowed) for each in _atoms(value))


def _atoms(value: Any) -> Iterator[Any]:
    """The value, or what a container holds; a tuple, which cannot change, at any depth."""
    if isinstance(value, _CONTAINERS):
        value = tuple(value.values() if isinstance(value, dict) else value)
    if type(value) is tuple:
        for each in value:
            yield from _atoms(each) if type(each) is tuple else (each,)
    else:
        yield value
