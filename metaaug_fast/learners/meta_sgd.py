"""Meta-SGD (Li, Zhou, Chen, Li 2017, arXiv 1707.09835, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..checks import check_number
from .unrolled import UnrolledLearner


class MetaSGD(UnrolledLearner):
    """MAML with a learned rate for every element: alpha says how far, and with its signs in which direction, to go.

        theta_i = theta - alpha * grad loss(theta; support of task i)       elementwise; inner_steps times
        minimise the mean over tasks of loss(theta_i; query of task i)      over theta and alpha

    `meta_sgd.inner_lr` holds alpha, a parameter of the shape of each that adapts; it may become negative.

    Args:
        model: any module; its parameters are meta-parameters.
        inner_lr: every element of alpha at the start; or a range `(low, high)` from which each is drawn uniformly.
        inner_steps: the paper takes one.
        adapt: see `inner_loop`.
        first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see
            `MAML`.

    Raises:
        TypeError, ValueError: an argument is out of range, or nothing adapts.

    >>> import metaaug_fast as mf
    >>> meta_sgd = mf.MetaSGD(mf.models.mlp([1, 40, 1]), inner_lr=(0.005, 0.1), loss="mse")
    >>> {name: tuple(value.shape) for name, value in meta_sgd.inner_lr.items()}
    {'head/bias': (1,), 'head/weight': (1, 40), 'linear1/bias': (40,), 'linear1/weight': (40, 1)}
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | Sequence[float] = 0.4,
        inner_steps: int = 1,
        adapt: str | Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        low, high = _range(inner_lr)
        super().__init__(model, low, inner_steps, **options)
        self._settle(adapt)
        alpha = {name: torch.empty_like(model.get_parameter(name)).uniform_(low, high) for name in self.problem().rates}
        self.inner_lr = alpha
        self._settle(adapt, learn_inner_lr=True)


def _range(inner_lr: Any) -> tuple[float, float]:
    ends = tuple(inner_lr) if isinstance(inner_lr, (tuple, list)) else (inner_lr, inner_lr)
    if len(ends) != 2:
        raise ValueError(f"inner_lr must be a number or a range (low, high) (got {inner_lr!r})")
    for end in ends:
        check_number("inner_lr", end)
    if ends[0] > ends[1]:
        raise ValueError(f"inner_lr must be a range (low, high) with low <= high (got {inner_lr!r})")
    return ends
