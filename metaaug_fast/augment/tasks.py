"""Task augmentation: functions of a `TaskBatch` that give another one of as many tasks, for `Episodes(transform=...)`.

The modes of Ni, Goldblum, Sharaf, Kong, Goldstein 2021 (arXiv 2010.07092), by what is changed: `OnSupport`,
`OnQueries`, `QuarterTurns` (their task mode: new classes), `MoreShots` (their shot mode). Rajendran, Irpan, Jang 2020
(arXiv 2007.05549): `ShuffleLabels`. Yao, Zhang, Finn 2022 (MLTI, arXiv 2106.02695): `InterpolateTasks`.

What is random comes from torch's CPU generator, which `Episodes` seeds for its transform, and is sent to where the
tasks are: the same numbers on every device. (A policy draws on the samples' device.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_flag, check_positive, check_probability
from ..tasks import TaskBatch, sent
from .policy import AugmentationPolicy, PolicyTransform
from .targets import ByClass, ways_of
from .transforms import check_samples_of

Change = AugmentationPolicy | PolicyTransform | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What changes a set of samples: a policy, or a function from `x` `[T, N, ...]`, `y` `[T, N, ...]` to other ones."""


class Compose:
    """Transforms of tasks, one after the other: functions of a `TaskBatch` that give what `TaskBatch.of` takes.

    Raises:
        TypeError, ValueError: one is no function, or there is none. Where it is called, as each of them.

    >>> import metaaug_fast as mf
    >>> mixing = mf.augment.AugmentationPolicy(["mixup"], ways=5).transform(batched=True)
    >>> transform = mf.augment.Compose(mf.augment.QuarterTurns(), mf.augment.OnQueries(mixing))
    >>> mf.data.Episodes(mf.data.Glyphs(), ways=5, tasks=2, transform=transform).batch(0)
    TaskBatch(support_x [2, 5, 1, 28, 28] float32, support_y [2, 5] int64, ... query_y [2, 25, 5] float32)
    """

    def __init__(self, *transforms: Callable[[TaskBatch], Any]) -> None:
        if not transforms:
            raise ValueError("transforms must be at least one (got none)")
        for each in transforms:
            if not callable(each):
                raise TypeError(f"transforms must be functions of a TaskBatch (got {each!r})")
        self.transforms = transforms

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """The tasks after all of them."""
        tasks = TaskBatch.of(tasks)
        for each in self.transforms:
            tasks = TaskBatch.of(each(tasks))
        return tasks


class OnSupport:
    """Change the samples to learn from: the support mode.

    Args:
        change: a policy, by `augment`, or what its `transform()` gives; or a function of `x` `[T, N, ...]` and `y` that
            gives `(x, y)`.

    Raises:
        TypeError: `change` is neither. Where it is called, TypeError, ValueError: the samples do not fit.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.ones(2, 5, 3), torch.arange(5).repeat(2, 1)
    >>> mf.augment.OnSupport(lambda x, y: (2 * x, y))(mf.TaskBatch(x, y, x, y)).support_x[0, 0]
    tensor([2., 2., 2.])
    """

    def __init__(self, change: Change) -> None:
        if not callable(change):
            raise TypeError(f"change must be an AugmentationPolicy or a function of (x, y) (got {change!r})")
        self.change = change

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks with other support sets."""
        tasks = TaskBatch.of(tasks)
        x, y = _changed(self.change, "support", tasks.support_x, tasks.support_y)
        return replace(tasks, support_x=x, support_y=y)


class OnQueries(OnSupport):
    """Change the samples to be judged on, as `OnSupport`: the query mode. Of soft targets there is no accuracy.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.ones(2, 5, 3), torch.arange(5).repeat(2, 1)
    >>> mf.augment.OnQueries(mf.augment.AugmentationPolicy(["mixup"]))(mf.TaskBatch(x, y, x, y)).query_y.shape
    torch.Size([2, 5, 5])
    """

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks with other query sets."""
        tasks = TaskBatch.of(tasks)
        x, y = _changed(self.change, "query", tasks.query_x, tasks.query_y)
        return replace(tasks, query_x=x, query_y=y)


class MoreShots(OnSupport):
    """Add changed copies of all support samples behind them: the shot mode. It serves at test time, too.

    Args:
        change: see `OnSupport`; it gets the copies alone, and has to keep their number and shape.
        copies: of each sample, at least 1.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.ones(2, 3, 4), torch.arange(3).repeat(2, 1)
    >>> noisier = mf.augment.MoreShots(mf.augment.AugmentationPolicy(["noise"]), copies=2)
    >>> noisier(mf.TaskBatch(x, y, x, y)).support_y[0].tolist()
    [0, 1, 2, 0, 1, 2, 0, 1, 2]
    """

    def __init__(self, change: Change, copies: int = 1) -> None:
        super().__init__(change)
        check_count("copies", copies, low=1)
        self.copies = copies

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks of more shots."""
        tasks = TaskBatch.of(tasks)
        x, y = tasks.support_x, tasks.support_y
        many, many_y = (each.repeat(1, self.copies, *(1,) * (each.ndim - 2)) for each in (x, y))
        made, made_y = _changed(self.change, "support", many, many_y)
        if made.shape != many.shape:
            raise ValueError(f"change must keep the shape of x, {tuple(many.shape)} (got {tuple(made.shape)})")
        if made_y.is_floating_point() and not y.is_floating_point():
            y = F.one_hot(y, made_y.shape[-1]).to(made_y.dtype)
        return replace(tasks, support_x=torch.cat([x, made], 1), support_y=torch.cat([y, made_y], 1))


class QuarterTurns:
    """Turn all pictures of a class alike, in support and query: a class turned by a right angle counts as a new one.

    Args:
        p: the probability that a class of a task is turned, by 90, 180 or 270 degrees; 0.75: all four are as likely.

    Raises:
        TypeError, ValueError: `p` is no probability. Where it is called, ValueError: samples are no square pictures, or
            targets no class ids.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.rand(2, 5, 1, 8, 8), torch.arange(5).repeat(2, 1)
    >>> turned = mf.augment.QuarterTurns()(mf.TaskBatch(x, y, x, y))
    >>> turned.support_x.equal(turned.query_x)
    True
    """

    def __init__(self, p: float = 0.75) -> None:
        check_probability("p", p)
        self.p = p

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks of other classes."""
        tasks = TaskBatch.of(tasks)
        support_x, support_y, query_x, query_y = tasks.tensors
        if support_x.ndim != 5 or support_x.shape[-2] != support_x.shape[-1]:
            raise ValueError(f"support_x must be square pictures [T, S, C, H, H] (got shape {tuple(support_x.shape)})")
        shape = (len(tasks), ways_of(tasks))
        turned = torch.rand(shape, dtype=torch.float64) < self.p
        turns = sent(torch.randint(1, 4, shape) * turned, support_x.device)
        support_x, query_x = _turned(support_x, turns.gather(1, support_y)), _turned(query_x, turns.gather(1, query_y))
        return replace(tasks, support_x=support_x, query_x=query_x)


class ShuffleLabels:
    """Give the classes of each task their labels in a new random order, the same in support and query.

    Where a class always has the same label, as of `FixedLabels`, a model can learn this, and nothing from support sets.

    Args:
        across: False: intra-shuffle, the above. True: inter-shuffle: first what has label c in a task changes places
            with what has it in another one, for each label anew; all classes of the batch are used once, with all their
            samples. So classes that always came together no longer do, and of `FixedLabels` no task gets one twice.
            (The authors draw from the whole data set. Of other tasks two may share a class, and one get it twice.)

    Raises:
        TypeError: `across` is no flag. Where it is called, ValueError: targets are no class ids; across tasks, some
            class has more samples than another one.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.rand(2, 5, 3), torch.arange(5).repeat(2, 1)
    >>> shuffled = mf.augment.ShuffleLabels()(mf.TaskBatch(x, y, x, y))
    >>> shuffled.support_y.equal(shuffled.query_y), shuffled.support_y.sort().values.equal(y)
    (True, True)
    """

    def __init__(self, across: bool = False) -> None:
        check_flag("across", across)
        self.across = across

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks with other labels, and across tasks of other classes."""
        tasks = TaskBatch.of(tasks)
        support_x, support_y, query_x, query_y = tasks.tensors
        ways, device = ways_of(tasks), support_x.device
        if self.across:
            support, query = ByClass("support_y", support_y, ways), ByClass("query_y", query_y, ways)
            source = _orders(ways, len(tasks), device).mT
            same = torch.arange(ways, device=device).expand(len(tasks), -1)
            support_x, query_x = support.taken(support_x, source, same), query.taken(query_x, source, same)
        label = _orders(len(tasks), ways, device)
        return TaskBatch(support_x, label.gather(1, support_y), query_x, label.gather(1, query_y))


class InterpolateTasks:
    """Mix each task with another one of the batch at the input, with l from Beta(alpha, alpha) for each task: MLTI.

        x = l x_i + (1 - l) x_j     in support and query alike

    Of class ids, classes of the two are paired at random and mixed sample by sample; each pair is a new class, with its
    label in task i. Other targets, such as of regression, are mixed as inputs are, samples paired in their order. Task
    j may be i itself. (The authors mix at a layer drawn at random, of which this is the first.)

    Raises:
        TypeError, ValueError: `alpha` is not above 0. Where it is called, ValueError: inputs are no numbers, targets of
            support and query of two kinds, or some class has more samples than another one.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.rand(8, 5, 3), torch.arange(5).repeat(8, 1)
    >>> mixed = mf.augment.InterpolateTasks()(mf.TaskBatch(x, y, x, y))
    >>> mixed.support_x.equal(mixed.query_x), mixed.support_y.equal(y)
    (True, True)
    """

    def __init__(self, alpha: float = 2.0) -> None:
        check_positive("alpha", alpha)
        self.alpha = alpha

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks between the tasks."""
        tasks = TaskBatch.of(tasks)
        support_x, support_y, query_x, query_y = tasks.tensors
        if not support_x.is_floating_point():
            raise ValueError(f"support_x must be floating point to be mixed (got {support_x.dtype})")
        if support_y.is_floating_point() != query_y.is_floating_point():
            raise ValueError(f"query_y must be targets as support_y (got {query_y.dtype} and {support_y.dtype})")
        ids, count, device = not support_y.is_floating_point(), len(tasks), support_x.device
        if ids:
            ways = ways_of(tasks)
            support, query = ByClass("support_y", support_y, ways), ByClass("query_y", query_y, ways)
        other = sent(torch.randint(count, (count,)), device)
        two = torch.full((count, 2), self.alpha, dtype=torch.float64)
        share = sent(torch.distributions.Dirichlet(two).sample()[:, 0], device)
        if not ids:
            return TaskBatch(*(_mixed(each, each[other], share) for each in tasks.tensors))
        source, pairs = other[:, None].expand(-1, ways), _orders(count, ways, device)
        support_x = _mixed(support_x, support.taken(support_x, source, pairs), share)
        query_x = _mixed(query_x, query.taken(query_x, source, pairs), share)
        return replace(tasks, support_x=support_x, query_x=query_x)


def _changed(change: Change, name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A set of samples after a change."""
    policy = change.policy if isinstance(change, PolicyTransform) else change
    if isinstance(policy, AugmentationPolicy):
        check_samples_of(f"{name}_x", policy.transforms, x)  # there it would be called the support set
        return policy.augment(x, y)
    found = policy(x, y)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, Tensor) for each in found)):
        raise TypeError(f"change must return tensors (x, y) (got {type(found).__name__})")
    return found


def _orders(rows: int, count: int, device: torch.device) -> Tensor:
    """`0..count-1` in a random order in each row."""
    return sent(torch.rand(rows, count, dtype=torch.float64).argsort(1), device)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Pictures `[T, N, C, H, H]` turned counter-clockwise by so many right angles, `[T, N]`."""
    turns = turns[..., None, None, None]
    x = torch.where(turns >= 2, x.flip(3, 4), x)
    return torch.where(turns % 2 == 1, x.rot90(1, (3, 4)), x)


def _mixed(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    share = share.to(one.dtype).view(-1, *(1,) * (one.ndim - 1))
    return share * one + (1 - share) * other
