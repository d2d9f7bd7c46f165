"""A learner and the policy that augments what it adapts on, trained as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from ..checks import check_integer
from ..learners.around import Around
from ..learners.base import Learner, one_task_too
from ..tasks import MetaOutput, TaskBatch
from .parts import check_second_order
from .policy import AugmentationPolicy
from .transforms import Drawn

_POLICY_RATE = 30.0
"""How much faster than weights the policy learns: its numbers are logits."""


class Augmented(Around):
    """A learner that adapts on what a policy makes of support sets, as one that `mf.train` trains.

        minimise the mean over tasks of loss(learner adapted to policy(S); query)      over the learner and the policy

    In training the policy draws by torch's generator. In evaluation a task is always learned in the same way: one set
    of numbers for each copy, which serves every sample of every task, with choices of 0 or 1; none is mixed with
    another one.

    Args:
        learner: any that takes plain meta-steps, of second order, and soft labels if the policy mixes.
        policy: for the learner's samples.
        seed: of the numbers of evaluation.

    Raises:
        TypeError: an argument is of the wrong kind. ValueError: the learner is of first order.

    >>> import torch, metaaug_fast as mf
    >>> policy = mf.augment.AugmentationPolicy(["noise", "scaling"], copies=2, originals=True)
    >>> learner = Augmented(mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1), policy)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> learner.meta_step(tasks, learner.optimizers()).task_losses.shape
    torch.Size([8])
    """

    def __init__(self, learner: Learner, policy: AugmentationPolicy, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(learner, Learner):
            raise TypeError(f"learner must be a Learner (got {type(learner).__name__})")
        if type(learner).meta_step is not Learner.meta_step:
            raise TypeError(f"learner must take plain meta-steps (got {type(learner).__name__}, which takes its own)")
        check_second_order(learner)
        if not isinstance(policy, AugmentationPolicy):
            raise TypeError(f"policy must be an AugmentationPolicy (got {type(policy).__name__})")
        check_integer("seed", seed)
        self.learner = learner
        self.policy = policy
        self.seed = seed
        self.encoder = learner.encoder  # type: ignore[misc]

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """The learner's, and Adam, of a rate 30 times as high, on the policy."""
        rate = _POLICY_RATE * (1e-3 if lr is None else lr)
        return [*self.learner.optimizers(lr), torch.optim.Adam(self.policy.parameters(), rate, fused=True)]

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's augmented support set, and judge the result on its query set.

        Raises:
            TypeError, ValueError: the tasks fit neither the learner nor the policy.
        """
        tasks = TaskBatch.of(tasks)
        out: MetaOutput = self.learner(self._larger(tasks), steps=steps)
        return replace(out, loss=self.policy.loss(out))

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, **options: Any) -> Any:
        """What the learner learns from `[T, S, ...]`, augmented; one task may lack its T."""
        made = self.policy.augment(support_x, support_y, drawn=self._drawn(support_x))
        return self.learner.adapt(*made, **options)

    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """New samples of one task, as of `AugmentationPolicy.more`."""
        return self.policy.more(x, y, per_class, generator)

    def specification(
        self, tasks: TaskBatch, *, first_order: bool, step_weights: Tensor | None = None
    ) -> MetaOutput | None:
        """The learner's, of augmented support sets."""
        return self.learner.specification(self._larger(tasks), first_order=first_order, step_weights=step_weights)

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """The learner's executor."""
        return self.learner.runs_on(sample_shape, ids)

    def _larger(self, tasks: TaskBatch) -> TaskBatch:
        return self.policy(tasks, drawn=self._drawn(tasks.support_x))

    def _drawn(self, x: Tensor) -> dict[str, Drawn] | None:
        """None in training; in evaluation, one set of numbers for each copy of `x` `[T, S, ...]`."""
        if self.training:
            return None
        tasks, count = x.shape[:2]
        generator = Generator(device=x.device).manual_seed(self.seed)
        one = self.policy.draw(x[:1, :1], generator)
        itself = torch.arange(self.policy.copies * count, device=x.device).expand(tasks, -1)

        def spread(part: Tensor) -> Tensor:
            return part.unsqueeze(2).expand(tasks, -1, count, *part.shape[2:]).flatten(1, 2)

        return {
            name: Drawn(
                spread(each.choice),
                None if each.number is None else spread(each.number),
                None if each.rest is None else spread(each.rest),
                None if each.partner is None else itself,
            )
            for name, each in one.items()
        }
