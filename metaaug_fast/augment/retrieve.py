"""Samples from outside: unlabelled ones that are near to a class's few join them, for as much as they are worth."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_number
from ..data.samples import ClassSamples
from ..engine.encoding import encode
from ..engine.problem import NORMS
from ..learners.around import Around
from ..learners.base import Learner, class_means, class_members, one_task_too
from ..learners.supervised import inputs, labelled
from ..learners.unrolled import UnrolledLearner
from ..tasks import MetaOutput, TaskBatch, check_samples, check_tensor, class_ids
from .parts import Behind, checked_few, labels_of

JOINS = ("samples", "mixed", "features")

_WORTH_RATE = 30.0
"""How much faster than weights the three numbers learn that say what a sample is worth: they are of logits."""

_PART = 256
"""So many samples of the pool are encoded at a time."""


class Found(NamedTuple):
    """What joins support sets, class after class: where it lies in the pool, its class, and what it is worth (0 to 1).

    Each `[T, ways * per_class]`.
    """

    rows: Tensor
    labels: Tensor
    worth: Tensor


class Retrieval(Around):
    """MAML, or a relative, whose support sets S grow by what is nearest to them in another set of samples, the pool.

        c_k = mean of f(x) over the support samples of class k
        R_k = the `per_class` samples r of the pool with the least |f(r) - c_k|, as samples of class k
        w(r) = sigmoid(worth . (|f(r) - c_k|, min of |f(r) - c_j| over other classes - |f(r) - c_k|) / s + bias)
        theta_i = theta - inner_lr * grad of (sum of loss over S + sum of w(r) loss(r, k) over R) / (|S| + sum of w(r))
        minimise the mean over tasks of loss(theta_i; query of task i)                       over theta, worth and bias

    s is the mean distance of support samples from the means of other classes. What a sample is worth is learned through
    the inner loop, whose gradient arrives at `sample_weight`: a pool of strangers learns to be left alone, and what is
    worth nothing leaves the learner as it is alone. Batch norms, though, and `ProtoMAML`'s class means, see all alike.

    Args:
        learner: of the MAML family, of second order, with a named loss, and trained by plain meta-steps.
        pool: samples `[M, ...]` such as the support sets', bytes (which are divided by 255), numbers or token ids; or
            `ClassSamples`, of whose labels no use is made.
        features: f, a module `[N, ...]` to `[N, D]`, of which a copy is kept as it is now: the learner's own body, say,
            once it has learned. Batch norms that have kept no statistics, as MAML's have not, take those of the pool.
            None: samples as they are.
        per_class: samples of the pool for each class of a task.
        join: "samples", as they are; "mixed": between them and the nearest support sample of their class; or
            "features": the learner sees f of all samples, also of queries.
        mix: the part of a mixed sample that comes from the pool.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the pool has too few samples.

    >>> import torch, metaaug_fast as mf
    >>> maml = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1)
    >>> learner = Retrieval(maml, torch.randn(50, 4), per_class=2)
    >>> y = torch.arange(3).repeat(2, 1)
    >>> learner(mf.TaskBatch(torch.randn(2, 3, 4), y, torch.randn(2, 3, 4), y)).loss.backward()
    >>> found = learner.found(torch.randn(2, 3, 4), y)
    >>> found.rows.shape, found.labels[0].tolist(), found.worth.shape
    (torch.Size([2, 6]), [0, 0, 1, 1, 2, 2], torch.Size([2, 6]))
    """

    pool: Tensor
    pool_features: Tensor

    def __init__(
        self,
        learner: UnrolledLearner,
        pool: Tensor | ClassSamples,
        features: nn.Module | None = None,
        per_class: int = 3,
        join: str = "samples",
        mix: float = 0.5,
    ) -> None:
        super().__init__()
        _check_learner(learner)
        if features is not None and not isinstance(features, nn.Module):
            raise TypeError(f"features must be an nn.Module (got {type(features).__name__})")
        check_count("per_class", per_class, low=1)
        check_choice("join", join, JOINS)
        check_number("mix", mix)
        if mix > 1:
            raise ValueError(f"mix must be at most 1 (got {mix})")
        samples = _samples_of(pool)
        if len(samples) < per_class:
            raise ValueError(f"pool must have at least per_class, {per_class}, samples (got {len(samples)})")
        if samples.dtype == torch.int64:
            if join == "mixed":
                raise ValueError("join must be 'samples' or 'features' for token ids (got 'mixed')")
            if features is None:
                raise ValueError("features must be a module for token ids (got None)")
        like = next(learner.parameters())
        self.learner = learner
        self.features = None if features is None else copy.deepcopy(features).to(like).requires_grad_(False).eval()
        self.per_class = per_class
        self.join = join
        self.mix = mix
        self.worth = nn.Linear(2, 1, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.worth.weight)
        nn.init.zeros_(self.worth.bias)
        self.register_buffer("pool", inputs(samples, like), persistent=False)
        with torch.no_grad():
            if self.features is not None:
                _settle_norms(self.features, self.pool)
            parts = [self._features(part[None])[0] for part in self.pool.split(_PART)]
        self.register_buffer("pool_features", torch.cat(parts), persistent=False)

    def train(self, mode: bool = True) -> Retrieval:
        """The mode of the learner; features stay in evaluation mode."""
        super().train(mode)
        if self.features is not None:
            self.features.eval()
        return self

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """The learner's, and Adam, of a rate 30 times as high, on what says how much samples are worth."""
        rate = _WORTH_RATE * (1e-3 if lr is None else lr)
        return [*self.learner.optimizers(lr), torch.optim.Adam(self.worth.parameters(), rate, fused=True)]

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and what is found for it, and judge the result on its query set.

        Raises:
            TypeError, ValueError: the tasks fit neither the learner nor the pool.
        """
        larger, weights = self._larger(TaskBatch.of(tasks))
        output: MetaOutput = self.learner(larger, steps=steps, sample_weight=weights)
        return output

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Any:
        """What the learner learns from `[T, S, ...]` and what is found for it; one task may lack its T."""
        x, y, weights = self._joined(support_x, support_y)
        adapted = self.learner.adapt(x, y, steps=steps, sample_weight=weights)
        return Behind(adapted, self._seen) if self.join == "features" else adapted

    def found(self, support_x: Tensor, support_y: Tensor) -> Found:
        """What joins support sets `[T, S, ...]`, class ids `[T, S]`, the nearest of each class first.

        Raises:
            TypeError, ValueError: the samples are not as the pool's, or the labels no ids of at least two classes.
        """
        check_samples("support", support_x, support_y)
        return self._found(self._checked(support_x), class_ids(support_y), self.per_class)

    @torch.no_grad()
    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """New samples of one task: the nearest of the pool, each taken with the probability of what it is worth.

        Args:
            x: `[S, ...]`.
            y: class ids `[S]`.
            per_class: at most so many of each class.
            generator: of what is taken; None: torch's own.

        Returns:
            `[N, ...]`, as they are or mixed, and their class ids `[N]`.

        Raises:
            TypeError, ValueError: as `found`, or what joins are features.

        >>> import torch, metaaug_fast as mf
        >>> learner = Retrieval(mf.MAML(mf.models.mlp([4, 16, 3])), torch.randn(50, 4), join="mixed")
        >>> x, y = learner.more(torch.randn(3, 4), torch.arange(3), per_class=10)
        >>> x.shape[1:], bool(y.bincount().max() <= 10)
        (torch.Size([4]), True)
        """
        if self.join == "features":
            raise ValueError("join must be 'samples' or 'mixed' for more samples (got 'features')")
        many_x, many_y = x[None], checked_few(x, y, per_class, generator)[None]
        features = self._checked(many_x)
        found = self._found(features, many_y, min(per_class, len(self.pool)))
        taken = found.worth[0].bernoulli(generator=generator) > 0
        return self._joining(many_x, many_y, features, found)[0, taken], found.labels[0, taken]

    def specification(
        self, tasks: TaskBatch, *, first_order: bool, step_weights: Tensor | None = None
    ) -> MetaOutput | None:
        """The learner's, of the larger support sets and their weights."""
        larger, weights = self._larger(tasks)
        return self.learner.specification(
            larger, first_order=first_order, step_weights=step_weights, sample_weight=weights
        )

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """The learner's executor of what it sees."""
        if self.join == "features":
            return self.learner.runs_on(tuple(self.pool_features.shape[1:]))
        return self.learner.runs_on(sample_shape, ids)

    def _larger(self, tasks: TaskBatch) -> tuple[TaskBatch, Tensor]:
        x, y, weights = self._joined(tasks.support_x, tasks.support_y)
        return TaskBatch(x, y, self._seen(tasks.query_x), tasks.query_y), weights

    def _joined(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The larger support sets, and their weights of mean 1."""
        features = self._checked(x)
        found = self._found(features, y, self.per_class)
        weights = torch.cat([found.worth.new_ones(y.shape), found.worth], 1)
        seen = features if self.join == "features" else x
        more = self._joining(x, y, features, found)
        return torch.cat([seen, more], 1), torch.cat([y, found.labels], 1), weights / weights.mean(1, keepdim=True)

    def _found(self, features: Tensor, y: Tensor, per_class: int) -> Found:
        means = class_means(features, y)
        tasks, ways = means.shape[:2]
        if ways < 2:
            raise ValueError("support_y must have at least two classes (got 1)")
        strangers = 1 - class_members(y, features.dtype)
        scale = (torch.cdist(features, means) * strangers).sum((1, 2)) / strangers.sum((1, 2))
        scale = scale.where(scale > 0, 1)  # all samples are one
        apart = torch.cdist(means.flatten(0, 1), self.pool_features).unflatten(0, (tasks, ways))
        rows = apart.topk(per_class, largest=False)[1].flatten(1)
        labels = labels_of(ways, per_class, y)
        own = nn.functional.one_hot(labels, ways).bool()
        columns = apart.mT[torch.arange(tasks, device=y.device).unsqueeze(1), rows]  # [T, ways * per_class, ways]
        near = columns[own].view(labels.shape)
        others = columns.masked_fill(own, torch.inf).amin(2)
        worth = self.worth(torch.stack([near, others - near], 2) / scale[:, None, None]).squeeze(2).sigmoid()
        return Found(rows, labels, worth)

    def _joining(self, x: Tensor, y: Tensor, features: Tensor, found: Found) -> Tensor:
        """What joins, `[T, ways * per_class, ...]`."""
        if self.join == "features":
            return self.pool_features[found.rows]
        more = self.pool[found.rows]
        if self.join == "samples":
            return more
        others = found.labels.unsqueeze(2) != y.unsqueeze(1)
        near = torch.cdist(self.pool_features[found.rows], features).masked_fill(others, torch.inf).argmin(2)
        own = x[torch.arange(len(x), device=x.device).unsqueeze(1), near]
        return self.mix * more + (1 - self.mix) * own

    def _seen(self, x: Tensor) -> Tensor:
        """What the learner is given of samples `[T, N, ...]`."""
        return self._checked(x) if self.join == "features" else x

    def _checked(self, x: Tensor) -> Tensor:
        """Features of samples that must be as the pool's."""
        if x.shape[2:] != self.pool.shape[1:] or x.dtype != self.pool.dtype or x.device != self.pool.device:
            wanted, got = (
                f"{each.dtype} {list(shape)} on {each.device}"
                for each, shape in ((self.pool, self.pool.shape[1:]), (x, x.shape[2:]))
            )
            raise ValueError(f"x must hold samples such as the pool's, {wanted} (got {got})")
        return self._features(x)

    def _features(self, x: Tensor) -> Tensor:
        """f of samples `[T, N, ...]`, `[T, N, D]`."""
        if self.features is None:
            return x.flatten(2)
        features = encode(self.features, x.flatten(0, 1))
        if features.ndim != 2 or len(features) != x.shape[0] * x.shape[1]:
            raise ValueError(f"features must give [N, D] (got shape {tuple(features.shape)})")
        return features.unflatten(0, x.shape[:2])


def _check_learner(learner: object) -> None:
    if not isinstance(learner, UnrolledLearner):
        raise TypeError(f"learner must be one of the MAML family (got {type(learner).__name__})")
    if type(learner).meta_step is not Learner.meta_step:
        raise TypeError(f"learner must take plain meta-steps (got {type(learner).__name__}, which takes its own)")
    if learner.first_order:
        raise ValueError(
            "learner must be of second order, for what samples are worth has no gradient otherwise "
            "(got first_order=True)"
        )
    if callable(learner.problem().loss):
        raise ValueError("learner must have a named loss, whose samples can be weighed (got a callable)")


def _settle_norms(features: nn.Module, pool: Tensor) -> None:
    """Give batch norms that have kept no statistics, and would leave everything as it is, the mean ones of the pool."""
    norms = [each for each in features.modules() if isinstance(each, NORMS)]
    fresh = {
        each: each.momentum for each in norms if each.num_batches_tracked is not None and not each.num_batches_tracked
    }
    if not fresh:
        return
    for norm in fresh:
        norm.train().momentum = None  # of all batches alike
    for part in pool.tensor_split(-(-len(pool) // _PART)):  # none of one sample, which has no variance
        features(part)
    for norm, momentum in fresh.items():
        norm.eval().momentum = momentum


def _samples_of(pool: object) -> Tensor:
    """Samples `[M, ...]`, at least one."""
    if isinstance(pool, ClassSamples):
        pool = labelled(pool)[0] if len(pool) else pool.samples[:0]
    check_tensor("pool", pool)
    assert isinstance(pool, Tensor)
    if pool.ndim < 2 or not pool.numel():
        raise ValueError(f"pool must hold samples [M, ...], M > 0 (got shape {tuple(pool.shape)})")
    if not pool.is_floating_point() and pool.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"pool must be bytes, numbers or token ids, int64 (got {pool.dtype})")
    return pool
