"""What was made for a model, as long as the model is what it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .exclusive import ONE_AT_A_TIME

Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """Values for models, by their mode and further keys; those of a model are forgotten when a part of it is replaced.

    Values must not hold their model, or it would never be freed.

    >>> sizes, model = Remembered(), nn.Linear(2, 3)
    >>> sizes.get(model, "weight", lambda: model.weight.numel())
    6
    >>> model.weight = nn.Parameter(model.weight[:1])
    >>> sizes.get(model, "weight", lambda: model.weight.numel())
    2
    """

    def __init__(self) -> None:
        self._models: WeakKeyDictionary[nn.Module, tuple[list[object], list[nn.Module], dict[Hashable, Made]]] = (
            WeakKeyDictionary()
        )

    def get(self, model: nn.Module, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value for a model and a key, made if there is none."""
        mark, parts = fingerprint(model)
        mode = [each for part in (model, *parts) for each in (part.training, part.__dict__.get("p"))]  # a dropout's
        with ONE_AT_A_TIME:
            known = self._models.get(model)
            if known is None or known[0] != mark:
                known = self._models[model] = mark, parts, {}
            values, key = known[2], (key, *mode)
            if key not in values:
                values[key] = make()
            return values[key]


def fingerprint(module: nn.Module) -> tuple[list[object], list[nn.Module]]:
    """A value that changes when parts of a module are replaced, converted, frozen or unfrozen; and its submodules.

    Identities are unique only while their objects live: who keeps the value keeps the submodules too. Runs in every
    meta-step, hence no `named_parameters`, which takes three times as long.
    """
    parts: list[nn.Module] = [module]
    parameters: list[nn.Parameter] = []
    buffers: list[Tensor | None] = []
    with ONE_AT_A_TIME:
        for part in parts:
            if part._parameters:
                parameters += [value for value in part._parameters.values() if value is not None]
            if part._buffers:
                buffers += part._buffers.values()
            if part._modules:
                parts += [child for child in part._modules.values() if child is not None]
    tensors = [*parameters, *(value for value in buffers if value is not None)]
    # A tensor's `data` may be set to another's of any kind. What is lazy has no shape, which its class tells.
    shaped = [value for value in tensors if type(value) in _PLAIN or not is_lazy(value)]
    mark = [*map(id, parts), *map(id, parameters), *map(id, buffers), *map(type, tensors), *map(_KIND, shaped)]
    return mark, parts[1:]


_PLAIN = (nn.Parameter, Tensor)
_KIND = attrgetter("requires_grad", "dtype", "device", "shape")
