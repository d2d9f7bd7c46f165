"""ADML, adversarial meta-learning (Yin, Tang, Xu, Wang 2018, arXiv 1806.03316)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.problem import LearningRate
from ..tasks import MetaOutput, TaskBatch
from .attacks import Attacking, attack_queries
from .maml import MAML


class ADML(Attacking, MAML):
    """Learn weights theta by a clean and an adversarial arm, which cross between the inner and the outer loop.

        theta_adv = theta - inner_lr * grad loss(theta; adversarial support of task i)          inner_steps times
        theta_clean = theta - inner_lr * grad loss(theta; clean support of task i)              inner_steps times
        minimise the mean over tasks of
            1/2 loss(theta_adv; clean queries of task i) + 1/2 loss(theta_clean; adversarial queries of task i)

    Each arm is judged on the other one's kind of samples. Adversarial samples are the clean ones after FGSM: support
    samples by theta, queries by theta_clean, which they are meant for, as in the code for this method of Goldblum et
    al. 2020 (arXiv 1910.00982). The gradient takes what the attack adds for a constant. Both arms go through one inner
    loop of 2T tasks. In evaluation it adapts to the support set that it is given, as MAML does; with `radius=0` it is
    so in training, too.

    Args:
        model: any module; its parameters are the meta-parameters.
        radius: how far an element of an input may move.
        attack_steps: 1 is FGSM, more are PGD.
        attack_step: how far an element moves in one of them. None: `2.5 * radius / attack_steps`, at most `radius`.
        random_start: start the attack at a random place of the ball.
        low, high: between which inputs lie, and stay: 0 and 1 for pictures. None: no limit.
        inner_lr, inner_steps, first_order, loss, adapt, learn_inner_lr, batch_norm, backend, label_smoothing, momentum,
            weight_decay, task_chunk, precision: see `MAML`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or nothing adapts.

    >>> import metaaug_fast as mf
    >>> learner = mf.ADML(mf.models.mlp([4, 16, 3]), radius=0.2, inner_lr=0.1, inner_steps=5)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> learner.meta_step(tasks, learner.optimizers()).task_losses.shape
    torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        radius: float = 0.1,
        inner_lr: LearningRate = 0.4,
        inner_steps: int = 1,
        attack_steps: int = 1,
        random_start: bool = False,
        **options: Any,
    ) -> None:
        given = {"inner_lr": inner_lr, "inner_steps": inner_steps, "random_start": random_start, **options}
        super().__init__(model, radius, attack_steps, **given)

    def forward(
        self,
        tasks: TaskBatch,
        *,
        steps: int | None = None,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> MetaOutput:
        """The meta-loss, in training the mean of both arms'; arguments as of `MAML`.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or the attack.
        """
        tasks = TaskBatch.of(tasks)
        options: dict[str, Any] = {"steps": steps, "step_weights": step_weights}
        if not self.training:
            return super().forward(tasks, sample_weight=sample_weight, **options)
        both, weight = self._arms(tasks, steps, sample_weight)
        return _mean_of_arms(super().forward(both, sample_weight=weight, **options))

    def specification(
        self, tasks: TaskBatch, *, sample_weight: Tensor | None = None, **options: Any
    ) -> MetaOutput | None:
        """What `forward` computes, by `reference.meta_loss`."""
        if not self.training:
            return super().specification(tasks, sample_weight=sample_weight, **options)
        both, weight = self._arms(tasks, None, sample_weight)
        out = super().specification(both, sample_weight=weight, **options)
        return None if out is None else _mean_of_arms(out)

    def _arms(
        self, tasks: TaskBatch, steps: int | None, sample_weight: Tensor | None
    ) -> tuple[TaskBatch, Tensor | None]:
        """2T tasks, first those of the adversarial arm, then those of the clean one; and their sample weights."""
        x, y, query_x, query_y = tasks.tensors
        adversarial_x = attack_queries(self, TaskBatch(x, y, x, y), self.attack, steps=0).query_x
        adversarial_query_x = attack_queries(self, tasks, self.attack, steps=steps, sample_weight=sample_weight).query_x
        both = TaskBatch(
            self._joined(adversarial_x, x),
            self._joined(y, y),
            torch.cat([query_x, adversarial_query_x]),
            torch.cat([query_y, query_y]),
        )
        return both, None if sample_weight is None else self._joined(sample_weight, sample_weight)

    def _joined(self, one: Tensor, other: Tensor) -> Tensor:
        """Support data of both arms; a leaf gets no gradient in first order, and what else asks for one is refused."""
        joined = torch.cat([one, other])
        return joined.detach() if self.first_order and other.is_leaf else joined


def _mean_of_arms(out: MetaOutput) -> MetaOutput:
    """The output of T tasks from that of 2T."""
    losses = out.task_losses.unflatten(0, (2, -1)).mean(0)
    accuracy = None if out.accuracy is None else out.accuracy.unflatten(0, (2, -1)).mean(0)
    return replace(out, task_losses=losses, accuracy=accuracy, prediction=None)
