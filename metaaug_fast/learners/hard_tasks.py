"""Hard tasks, drawn from classes that a learner fails on (Sun, Liu, Chua, Schiele 2019, arXiv 1812.02391)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..checks import check_count, check_integer
from ..data.draws import Draws
from ..data.episodes import Episodes
from ..data.samples import ClassSamples
from ..tasks import TaskBatch
from .base import class_members

_HARD = 1 << 40  # where the batches of hard tasks begin, which no run of episodes gets to


class HardTasks:
    """Episodes among which hard tasks are, drawn online from the classes that the learner has just failed on.

    After each `every` batches of `episodes` there is one of hard tasks. In each of the former's tasks the class with
    the lowest query accuracy, once the learner has learned from the batch, is the failure class m. Hard tasks are new
    samples of the classes {m} alone or, where there are fewer of these than a task has, of these and others.

    The authors' code has no hard tasks; this is their paper's section 4.3.

    Args:
        learner: whose failures count.
        episodes: of labelled samples, without a transform.
        every: batches.

    Raises:
        TypeError, ValueError: `episodes` are others, or `every` is no count.

    >>> import metaaug_fast as mf
    >>> learner = mf.MetaTransfer(mf.models.strided_conv4(ways=5, hidden=4))
    >>> tasks = HardTasks(learner, mf.data.Episodes(mf.data.Glyphs(), tasks=6))
    >>> first, hard = next(tasks), next(tasks)
    >>> len(hard), len(tasks.classes) <= 6
    (6, True)
    """

    def __init__(self, learner: Any, episodes: Episodes, every: int = 1) -> None:
        check_count("every", every, low=1)
        if not isinstance(episodes, Episodes) or not isinstance(episodes.dataset, ClassSamples):
            raise TypeError(f"episodes must be Episodes of labelled samples (got {episodes!r})")
        if episodes.transform is not None:
            raise ValueError("episodes must have no transform, which may move classes (got one)")
        self.learner = learner
        self.episodes = episodes
        self.every = every
        self.classes: list[int] = []
        """Those that the last hard tasks were drawn from."""
        self._failed: list[int] = []  # since the last hard tasks
        self._given: int | None = None  # the batch whose failures are not known yet
        self._normal = self._hard = 0  # batches since the last hard one; hard ones

    def __iter__(self) -> HardTasks:
        return self

    def __next__(self) -> TaskBatch:
        if self._given is not None:
            self._failed += self.failures(self._given)
            self._given = None
            self._normal += 1
        if self._normal < self.every:
            self._given = self.episodes.position
            return next(self.episodes)
        self.classes = sorted(set(self._failed))
        self._failed, self._normal, self._hard = [], 0, self._hard + 1
        tasks = [self._hard_task(task) for task in range(self.episodes.tasks)]
        return TaskBatch(*map(torch.cat, zip(*(task.tensors for task in tasks), strict=True)))

    @torch.no_grad()
    def failures(self, index: int) -> list[int]:
        """The class of the lowest accuracy in each task of the batch of that index, as the learner is now."""
        episodes, training = self.episodes, self.learner.training
        device = next(self.learner.parameters()).device
        tasks = episodes.batch(index).to(device)
        self.learner.eval()
        try:
            found = self.learner.adapt(tasks.support_x, tasks.support_y)(tasks.query_x).argmax(-1)
        finally:
            self.learner.train(training)
        right = class_members(tasks.query_y, torch.float32) * (found == tasks.query_y)[..., None]
        hardest = right.sum(1).argmin(1).cpu().numpy()  # of classes with as many queries
        dataset: Any = episodes.dataset
        draws = Draws(episodes.seed, index, episodes.tasks, episodes.first)
        classes = draws.distinct(len(dataset), episodes.spec.ways)  # what `ClassSamples.sampler` draws first
        return [int(row[place]) for row, place in zip(classes, hardest, strict=True)]

    def _hard_task(self, task: int) -> TaskBatch:
        episodes, dataset = self.episodes, self.episodes.dataset
        assert isinstance(dataset, ClassSamples)
        draws = Draws(episodes.seed, _HARD + self._hard, 1, episodes.first + task)
        ways, failed = episodes.spec.ways, np.array(self.classes)
        chosen = failed[draws.distinct(len(failed), min(ways, len(failed)))[0]]
        if len(chosen) < ways:
            others = np.setdiff1d(np.arange(len(dataset)), failed)
            chosen = np.concatenate([chosen, others[draws.distinct(len(others), ways - len(chosen))[0]]])
        return dataset.subset(chosen).sampler(episodes.spec)(draws)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands."""
        given = -1 if self._given is None else self._given
        counts = [given, self._normal, self._hard]
        return {"episodes": self.episodes.state_dict(), "failed": list(self._failed), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`."""
        given, normal, hard = state["counts"]
        for each in (normal, hard, *state["failed"]):
            check_integer("state", each, low=0)
        self.episodes.load_state_dict(state["episodes"])
        self._failed, self._given = list(state["failed"]), None if given < 0 else given
        self._normal, self._hard = normal, hard
