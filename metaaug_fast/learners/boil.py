"""BOIL, body only update in the inner loop (Oh, Yoo, Kim, Yun 2021, arXiv 2008.08882)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.problem import LearningRate
from .parts import find_head, outside
from .unrolled import UnrolledLearner


class BOIL(UnrolledLearner):
    """MAML whose inner loop moves the body theta alone; the head w stays, so that representations have to change.

        theta_i = theta - inner_lr * grad_theta loss(theta, w; support of task i)       inner_steps times
        minimise the mean over tasks of loss(theta_i, w; query of task i)               over theta and w

    Args:
        model: any module; its parameters are the meta-parameters.
        inner_lr, inner_steps, learn_inner_lr: see `MAML`.
        head: the name of the layer that does not adapt, such as "classifier". None: the linear layer behind which the
            model has no other parameters.
        first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see
            `MAML`.

    Raises:
        ValueError: no head can be found, none goes by that name, nothing else adapts, or another argument is out of
            range.

    >>> import metaaug_fast as mf
    >>> boil = mf.BOIL(mf.models.mlp([4, 8, 8, 3]))
    >>> boil.head, list(boil.problem().rates)
    ('head', ['linear1.weight', 'linear1.bias', 'linear2.weight', 'linear2.bias'])
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.5,
        inner_steps: int = 1,
        head: str | None = None,
        learn_inner_lr: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, **options)
        self.head = find_head(model, head)
        body = outside(model, self.head)
        if not body:
            raise ValueError(f"head must leave other parameters that require a gradient (got {head!r})")
        self._settle(body, learn_inner_lr)
