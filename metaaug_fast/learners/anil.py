"""ANIL, almost no inner loop (Raghu, Raghu, Bengio, Vinyals 2020, arXiv 1909.09157)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.problem import LearningRate
from .parts import find_head, inside
from .unrolled import UnrolledLearner


class ANIL(UnrolledLearner):
    """MAML whose inner loop moves the head w alone; the body theta is reused by all tasks as it is.

        w_i = w - inner_lr * grad_w loss(theta, w; support of task i)           inner_steps times
        minimise the mean over tasks of loss(theta, w_i; query of task i)       over theta and w

    It is `MAML(model, adapt="HEAD.*")`.

    Args:
        model: any module; its parameters are the meta-parameters.
        inner_lr, inner_steps, learn_inner_lr: see `MAML`.
        head: the name of the layer that adapts, such as "classifier". None: the linear layer behind which the model has
            no other parameters.
        first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see
            `MAML`.

    Raises:
        ValueError: no head can be found, none goes by that name, or another argument is out of range.

    >>> import metaaug_fast as mf
    >>> anil = mf.ANIL(mf.models.conv4(ways=5))
    >>> anil.head, list(anil.problem().rates)
    ('head', ['head.weight', 'head.bias'])
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.1,
        inner_steps: int = 5,
        head: str | None = None,
        learn_inner_lr: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, **options)
        self.head = find_head(model, head)
        self._settle(inside(self.head), learn_inner_lr)
