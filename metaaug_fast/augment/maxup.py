"""Meta-MaxUp (Ni, Goldblum, Sharaf, Kong, Goldstein 2021, arXiv 2010.07092): of m versions of a task, the hardest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count
from ..data.draws import Draws
from ..data.episodes import Episodes, transformed
from ..tasks import TaskBatch

_VERSIONS = 1 << 41  # where what versions draw begins, which no run of episodes gets to, nor hard tasks


class MaxUp:
    """Episodes each of whose tasks is the hardest of m augmented versions, for the learner as it is now.

        minimise over the learner the mean over tasks of max over i = 1..m of L(M_i(task))

    with M_i drawn from a pool of transforms, and L the meta-loss. The gradient of a maximum is that of the version that
    attains it, so any learner's own meta-step on these tasks is a step of Meta-MaxUp. The maximum is over whole tasks;
    the authors' code takes it for each query. What is drawn is given by the episodes' seed and position, and buffers of
    the learner stay as they are, so that a run can be resumed bit for bit.

    Args:
        learner: whose losses count, the one to be trained: m more passes for each meta-step, without a gradient.
        episodes: the tasks.
        pool: functions of a `TaskBatch`, such as those of `augment.tasks`; each version is made by one of them, drawn
            anew. They have to give samples of the same shapes; class ids become probabilities where others have such.
        m: versions, at least 1; 4 as the authors have it.

    Raises:
        TypeError, ValueError: `m` is no count, the pool is empty or holds what is no function, `learner` is no learner
            or `episodes` are none; where tasks are drawn, versions that differ in shape, and as the learner.

    >>> import metaaug_fast as mf
    >>> learner = mf.MAML(mf.models.strided_conv4(ways=5, hidden=4))
    >>> mixing = mf.augment.AugmentationPolicy(["mixup"]).transform(batched=True)
    >>> pool = [mf.augment.OnQueries(mixing), mf.augment.QuarterTurns()]
    >>> tasks = mf.augment.MaxUp(learner, mf.data.Episodes(mf.data.Glyphs(), tasks=2), pool, m=2)
    >>> mf.train(learner, tasks, steps=2, progress=False).training[-1].step
    2
    """

    def __init__(
        self, learner: nn.Module, episodes: Episodes, pool: Sequence[Callable[[TaskBatch], Any]], m: int = 4
    ) -> None:
        check_count("m", m, low=1)
        if not isinstance(learner, nn.Module):
            raise TypeError(f"learner must be a Learner (got {learner!r})")
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes must be Episodes (got {episodes!r})")
        if not isinstance(pool, Sequence) or not all(map(callable, pool)):
            raise TypeError(f"pool must be a list of functions of a TaskBatch (got {pool!r})")
        if not pool:
            raise ValueError("pool must hold at least one transform (got none)")
        self.learner = learner
        self.episodes = episodes
        self.pool = tuple(pool)
        self.m = m

    def __iter__(self) -> MaxUp:
        return self

    def __next__(self) -> TaskBatch:
        episodes, index = self.episodes, self.episodes.position
        tasks = next(episodes)
        device = next((each.device for each in self.learner.parameters()), tasks.support_x.device)
        key = Draws(episodes.seed, _VERSIONS + index, episodes.tasks, episodes.first).key
        return transformed(self._hardest, tasks.to(device), key)

    @torch.no_grad()
    def _hardest(self, tasks: TaskBatch) -> TaskBatch:
        """Of each task the version with the largest loss."""
        drawn = torch.randint(len(self.pool), (self.m,)).tolist()
        versions = [TaskBatch.of(self.pool[each](tasks)) for each in drawn]
        columns = [_alike(name, [vars(each)[name] for each in versions]) for name in vars(tasks)]
        buffers = [(buffer, buffer.clone()) for buffer in self.learner.buffers()]
        losses = []
        for each in zip(*columns, strict=True):
            losses.append(self.learner(TaskBatch(*each)).task_losses)
            for buffer, before in buffers:
                buffer.copy_(before)
        best = torch.stack(losses).argmax(0)
        task = torch.arange(len(best), device=best.device)
        return TaskBatch(*(torch.stack(column)[best, task] for column in columns))

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands, as of `Episodes`."""
        return self.episodes.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict()`."""
        self.episodes.load_state_dict(state)


def _alike(name: str, values: list[Tensor]) -> list[Tensor]:
    """One tensor of all versions; class ids as probabilities where another version has such."""
    like = next((each for each in values if each.is_floating_point()), values[0])
    if like.is_floating_point() and like.ndim == 3 and name.endswith("_y"):
        values = [each if each.is_floating_point() else _soft(name, each, like) for each in values]
    for each in values:
        if each.shape != like.shape or each.dtype != like.dtype:
            raise ValueError(
                f"pool must give {name} of the same shape and dtype in all versions "
                f"(got {each.dtype} {tuple(each.shape)} and {like.dtype} {tuple(like.shape)})"
            )
    return values


def _soft(name: str, y: Tensor, like: Tensor) -> Tensor:
    ways = like.shape[-1]
    if y.numel() and int(y.max()) >= ways:
        raise ValueError(f"{name} must hold class ids below {ways}, for others are probabilities (got {int(y.max())})")
    return F.one_hot(y, ways).to(like.dtype)
