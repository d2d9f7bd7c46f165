"""A backward pass that says so when it is to be differentiated itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    "the gradient of an inner loop cannot be differentiated again (it is exact to second order already); "
    "for higher derivatives use metaaug_fast.reference, which is plain autograd"
)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate the `backward` of an autograd function whose gradients are constants to autograd.

    Under `create_graph=True` they carry a node that raises when it is reached. torch's decorator of this name adds it
    only where the incoming gradient requires one, so that a gradient penalty on a bare loss would silently vanish.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *adjoints: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *adjoints)
        with torch.no_grad():
            gradients = backward(ctx, *adjoints)
        return tuple(
            _Last.apply(value.detach().requires_grad_()) if isinstance(value, Tensor) else value for value in gradients
        )

    return wrapper


class _Last(torch.autograd.Function):
    """The same numbers, whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()  # may be changed in place, as a view could not be

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        raise RuntimeError(_MESSAGE)
