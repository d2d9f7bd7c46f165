"""Distilled data sets (Wang, Zhu, Torralba, Efros 2018, arXiv 1811.10959): the few samples that teach most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_count, check_flag, check_integer, check_number, check_positive
from ..data.samples import ClassSamples
from ..engine.loop import meta_loss
from ..engine.problem import Query, Support, inner_problem, parameters_of
from ..errors import NonFiniteError
from ..learners.supervised import inputs
from ..tasks import MetaOutput, check_tensor, class_ids
from .from_scratch import random_starts


class DistilledSet(nn.Module):
    """A few samples x~ of known classes, learned for what a network that is trained on them alone does on real ones.

        theta_j' = theta_j - lr * grad loss(theta_j; x~, y~)                 inner_steps times, from each start theta_j
        minimise the mean over j of loss(theta_j'; real samples)             over x~ and lr

    The starts are the tasks of one fused inner loop, whose gradient arrives through its support set. Drawn anew for
    each update, they make samples that teach any start; one start that stays, a meta-learned one say, makes samples
    for that. The learned rates, one for each step, belong to the samples.

    Args:
        x: `[S, ...]`, at first.
        y: class ids `[S]`.
        inner_lr: at first.
        inner_steps: on all of x~.

    Raises:
        TypeError, ValueError: the samples do not fit each other, or a number is out of range.

    >>> import metaaug_fast as mf
    >>> few = DistilledSet(torch.rand(5, 1, 28, 28), torch.arange(5), inner_steps=3)
    >>> model = mf.models.conv4(ways=5, hidden=4)
    >>> out = few(model, torch.rand(8, 1, 28, 28), torch.arange(8) % 5, random_starts(model, 2))
    >>> out.loss.backward()
    >>> few.x.grad.shape, few.log_lr.grad.shape, few.data()
    (torch.Size([5, 1, 28, 28]), torch.Size([3]), ClassSamples(5 classes, 1 to 1 samples each of shape (1, 28, 28)))
    """

    y: Tensor

    def __init__(self, x: Tensor, y: Tensor, inner_lr: float = 0.02, inner_steps: int = 10) -> None:
        super().__init__()
        check_tensor("x", x)
        check_tensor("y", y)
        if not x.ndim or y.shape != x.shape[:1] or not x.is_floating_point():
            raise ValueError(
                f"x and y must be floating samples [S, ...] and class ids [S] (got {x.dtype} {tuple(x.shape)}, "
                f"{tuple(y.shape)})"
            )
        check_positive("inner_lr", inner_lr)
        check_count("inner_steps", inner_steps, low=1)
        self.x = nn.Parameter(x.detach().clone())
        self.log_lr = nn.Parameter(torch.full((inner_steps,), inner_lr, dtype=x.dtype, device=x.device).log())
        self.register_buffer("y", class_ids(y).clone())

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, starts: Tensor | None = None) -> MetaOutput:
        """The loss on real samples `[N, ...]`, class ids `[N]`, after training on x~; a task for each start.

        Batch norms go by the batch, so that accuracies are transductive.

        Args:
            starts: `[T, P]`, in the order of `model.named_parameters()`. None: the model's own weights, T = 1.

        Raises:
            TypeError, ValueError: the samples do not fit the model. NonFiniteError: NaN or infinity arose.
        """
        count = 1 if starts is None else len(starts)
        problem = inner_problem(model, self.log_lr.exp(), len(self.log_lr))
        support = Support(self.x.expand(count, *self.x.shape), self.y.expand(count, -1), initial=starts)
        return meta_loss(problem, support, Query(x.expand(count, *x.shape), y.expand(count, -1)))

    def data(self, names: Sequence[str] | None = None) -> ClassSamples:
        """The samples as a data set, without their gradient; its classes by the names of the real ones, if given."""
        x, y = self.x.detach().float().cpu(), self.y.cpu()
        return ClassSamples.from_arrays(x, y if names is None else [names[index] for index in y.tolist()])


def distil(
    model: nn.Module,
    data: ClassSamples,
    per_class: int = 1,
    *,
    steps: int = 300,
    inner_lr: float = 0.02,
    inner_steps: int = 10,
    lr: float = 0.02,
    starts: int = 4,
    own_start: bool = False,
    batch: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> DistilledSet:
    """Learn `per_class` samples of each class of `data`, by Adam from real ones drawn at random.

    Args:
        model: a classifier of the data's classes. It stays as it is.
        data: real samples. Pictures stay within 0 and 1.
        steps: of Adam on samples and rates.
        inner_lr, inner_steps: of training on the samples; the rates are learned.
        lr: of Adam.
        starts: of the network at a time, drawn anew in each step.
        own_start: the model's own weights are the one start.
        batch: real samples that judge a step.
        seed: of starts and samples.
        progress: a bar.

    Raises:
        TypeError, ValueError: an argument is out of range, or a class has fewer than `per_class` samples.
        NonFiniteError: NaN or infinity arose.

    >>> import metaaug_fast as mf
    >>> few = distil(mf.models.conv4(ways=5, hidden=4), mf.data.Glyphs().subset(range(5)), steps=2, batch=8)
    >>> few.x.shape, bool((few.x.detach() - few.x.detach().clamp(0, 1)).any())
    (torch.Size([5, 1, 28, 28]), False)
    """
    if not isinstance(data, ClassSamples):
        raise TypeError(f"data must be ClassSamples (got {type(data).__name__})")
    for name, count in {"per_class": per_class, "steps": steps, "starts": starts, "batch": batch}.items():
        check_count(name, count, low=1)
    check_number("lr", lr)
    check_flag("own_start", own_start)
    check_integer("seed", seed)
    smallest = int(data.counts.sum(1).min()) if len(data) else 0
    if smallest < per_class:
        raise ValueError(f"per_class must be at most the samples of every class (got {per_class}; one has {smallest})")
    like = next(iter(parameters_of(model).values()))
    generator = torch.Generator().manual_seed(seed)
    classes = [inputs(data.class_samples(index), like) for index in range(len(data))]
    chosen = [each[torch.randperm(len(each), generator=generator)[:per_class].to(each.device)] for each in classes]
    few = DistilledSet(torch.cat(chosen), _labels(chosen), inner_lr, inner_steps)
    x, y = torch.cat(classes), _labels(classes)
    pictures = data.samples.dtype == torch.uint8
    optimizer = torch.optim.Adam(few.parameters(), lr, fused=True)
    for step in tqdm(range(steps), desc="distilling", unit="step", disable=not progress):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator).to(x.device)
        beginnings = None if own_start else random_starts(model, starts, seed + step)
        loss = few(model, x[rows], y[rows], beginnings).loss
        if not loss.isfinite():
            raise NonFiniteError(f"the loss is {float(loss.detach())} after {step} steps of rate {lr:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if pictures:
            with torch.no_grad():
                few.x.clamp_(0, 1)
    return few


def _labels(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(part),), index, device=part.device) for index, part in enumerate(parts)])
