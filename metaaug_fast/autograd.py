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
        values = [value.detach().requires_grad_() for value in gradients if isinstance(value, Tensor)]
        guarded = iter(torch._C._functions.DelayedError(_MESSAGE, len(values))(*values) if values else ())
        return tuple(next(guarded) if isinstance(value, Tensor) else value for value in gradients)

    return wrapper
