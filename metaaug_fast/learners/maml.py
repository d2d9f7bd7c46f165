"""MAML and first-order MAML (Finn, Abbeel, Levine 2017, arXiv 1703.03400, algorithm 2), with options of MAML++."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..engine.losses import Loss
from ..engine.problem import LearningRate
from .unrolled import UnrolledLearner


class MAML(UnrolledLearner):
    """Learn weights theta from which a few gradient steps solve a new task.

        theta_i = theta - inner_lr * grad loss(theta; support of task i)        inner_steps times
        minimise the mean over tasks of loss(theta_i; query of task i)          with any torch optimizer

    `maml.parameters()` are the model's, the learned rates `inner_lr` and the affines `per_step`.

    Args:
        model: any module; its parameters are the meta-parameters.
        inner_lr: a number, one for each step `[K]`, or a mapping by name: see `inner_loop`.
        inner_steps: K.
        first_order: take inner gradients for constants (FOMAML). May be changed at any time.
        loss, adapt, label_smoothing, momentum, weight_decay, backend, task_chunk, precision: see `inner_loop`.
        learn_inner_lr: make `inner_lr` a parameter, in the form in which it is given.
        batch_norm: "batch", "running", "frozen" (see `inner_loop`), or "per_step" as in MAML++ (Antoniou et al. 2018,
            arXiv 1810.09502): "batch" with affines of their own for each step, `[K, C]`. These are meta-parameters
            that do not adapt, and the model's own affines are frozen: nothing reads them any more.

    Raises:
        ValueError: an argument is out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> maml = mf.MAML(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, loss="mse")
    >>> optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    >>> tasks = mf.TaskBatch(*(torch.randn(25, 10, 1) for _ in range(4)))
    >>> out = maml(tasks)
    >>> out.loss.backward()
    >>> optimizer.step()
    >>> out.task_losses.shape
    torch.Size([25])
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.4,
        inner_steps: int = 1,
        first_order: bool = False,
        loss: Loss = "cross_entropy",
        adapt: str | Iterable[str] | None = None,
        learn_inner_lr: bool = False,
        batch_norm: str = "batch",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, first_order, loss, batch_norm, backend, **options)
        self._settle(adapt, learn_inner_lr)
