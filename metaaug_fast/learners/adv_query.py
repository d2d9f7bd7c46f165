"""Adversarial Querying (Goldblum, Fowl, Goldstein 2020, arXiv 1910.00982)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.problem import LearningRate
from ..tasks import MetaOutput, TaskBatch
from .attacks import Attacking, attack_queries
from .maml import MAML


class AttackedQueries(Attacking):
    """Adversarial Querying around any learner: a class to stand in front of that learner's own.

    In training each meta-loss is that of attacked queries, see `AdversarialQuerying`; in evaluation nothing is
    attacked.

    Args:
        model: as the learner has it.
        radius, attack_steps, attack_step, random_start, low, high: see `AdversarialQuerying`.
        options: the learner's own.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    >>> import torch, metaaug_fast as mf
    >>> class RobustProtoNet(mf.learners.AttackedQueries, mf.ProtoNet):
    ...     pass
    >>> learner = RobustProtoNet(mf.models.conv4(ways=None, hidden=8), radius=0.1, low=0.0, high=1.0)
    >>> y = torch.arange(5).repeat(2, 1)
    >>> learner(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y)).loss.backward()
    """

    def forward(self, tasks: TaskBatch, *, steps: int | None = None, **options: Any) -> MetaOutput:
        """The meta-loss, in training that of attacked queries.

        Raises:
            TypeError, ValueError: the tasks do not fit the learner, or its attack.
        """
        return super().forward(self._attacked(tasks, steps, **options), steps=steps, **options)

    def specification(self, tasks: TaskBatch, **options: Any) -> MetaOutput | None:
        """The learner's, of attacked queries, whose change is a constant."""
        return super().specification(self._attacked(tasks, None, **options), **options)

    def _attacked(self, tasks: TaskBatch, steps: int | None, **options: Any) -> TaskBatch:
        tasks = TaskBatch.of(tasks)
        if not self.training or self.radius == 0:
            return tasks
        given = {"sample_weight": options["sample_weight"]} if options.get("sample_weight") is not None else {}
        return attack_queries(self, tasks, self.attack, steps=steps, **given)


class AdversarialQuerying(AttackedQueries, MAML):
    """Learn weights from which a task adapted to clean samples withstands attacks on its queries.

        theta_i = theta - inner_lr * grad loss(theta; support of task i)                        inner_steps times
        x_adv = the x with |x_adv - x| <= radius of the largest loss(theta_i; x_adv, y)         by PGD, on each query
        minimise the mean over tasks of loss(theta_i; x_adv, y)                                 with any torch optimizer

    The gradient takes x_adv - x for a constant, and goes exactly to second order through the inner loop. In evaluation
    it is MAML; with `radius=0` it is so in training, too. `AttackedQueries` has the same for other learners.

    Args:
        model: any module; its parameters are the meta-parameters.
        radius: how far an element of a query may move.
        attack_steps: of the attack in training.
        attack_step: how far an element moves in one of them. None: `2.5 * radius / attack_steps`, at most `radius`.
        random_start: start the attack at a random place of the ball.
        low, high: between which inputs lie, and stay: 0 and 1 for pictures. None: no limit.
        inner_lr, inner_steps, first_order, loss, adapt, learn_inner_lr, batch_norm, backend, label_smoothing, momentum,
            weight_decay, task_chunk, precision: see `MAML`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> learner = mf.AdversarialQuerying(mf.models.mlp([4, 16, 3]), radius=0.2, inner_lr=0.1, inner_steps=5)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> learner.meta_step(tasks, learner.optimizers()).task_losses.shape
    torch.Size([8])
    """

    def __init__(
        self, model: nn.Module, radius: float = 0.1, inner_lr: LearningRate = 0.4, inner_steps: int = 1, **options: Any
    ) -> None:
        super().__init__(model, radius, inner_lr=inner_lr, inner_steps=inner_steps, **options)
