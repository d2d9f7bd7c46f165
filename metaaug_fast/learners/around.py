"""What learners share that stand around another one."""

from __future__ import annotations

from typing import Any

from .base import Learner


class Around(Learner):
    """A learner around another one, `learner`, with the inner loop that this has.

    >>> import torch, metaaug_fast as mf
    >>> around = Around()
    >>> around.learner = mf.MAML(torch.nn.Linear(4, 3), inner_steps=5)
    >>> around.inner_steps, around.first_order, around.loss, around.transductive
    (5, False, 'cross_entropy', False)
    """

    learner: Any

    @property
    def inner_steps(self) -> int | None:  # type: ignore[override]
        """The learner's."""
        steps: int | None = self.learner.inner_steps
        return steps

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        """The learner's."""
        return bool(self.learner.first_order)

    @property
    def loss(self) -> Any:  # type: ignore[override]
        """The learner's; AttributeError where it has none."""
        return self.learner.loss

    @property
    def order_matters(self) -> bool:  # type: ignore[override]
        """The learner's."""
        return bool(self.learner.order_matters)

    @property
    def names_matter(self) -> bool:  # type: ignore[override]
        """The learner's."""
        return bool(self.learner.names_matter)

    @property
    def transductive(self) -> bool:
        """The learner's."""
        return bool(self.learner.transductive)
