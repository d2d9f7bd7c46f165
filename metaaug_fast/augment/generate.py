"""New pictures of a class from few of its own, by flow matching (Lipman et al. 2023, arXiv 2210.02747)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator as Random
from torch import Tensor, nn

from ..checks import check_count, check_number
from ..learners.base import class_members
from ..learners.gradient import GradientLearner
from ..models.velocity_net import velocity_net
from ..tasks import TaskBatch, check_tensor
from .parts import checked_few

_TOGETHER = 32
"""Classes of which pictures are drawn at a time."""


class FlowTasks:
    """Turns pictures of one class a task into the regression task of the flow that ends in that class.

        x_t = (1 - t) x_0 + t x_1       x_0 ~ N(0, I), x_1 a picture in -1..1, t in 0..1
        (x_t, t) -> x_1 - x_0           the velocity; a mean squared error, as the fused inner loop takes it

    It is a `transform` of `Episodes`, which gives it their seed: the same episode gets the same noise. Every picture
    has `repeats` rows, each with a noise and a time of its own; a task's times are spread evenly over 0..1. A row holds
    the planes of x_t, one of t, and those of `context` other pictures of the class's support set, so that a network can
    see of which class it is to be. Where there are too few others, these planes are 0, which is grey.

    Args:
        repeats: rows of each picture.
        context: pictures that a row shows beside its own.
        patch: pixels `[C, H, W]` become planes `[C * patch^2, H / patch, W / patch]`, as of `pixel_unshuffle`: the
            network sees further for less.

    Raises:
        TypeError, ValueError: an argument is no count.

    >>> import metaaug_fast as mf
    >>> flow = FlowTasks(repeats=2, context=1, patch=2)
    >>> episodes = mf.data.Episodes(mf.data.Glyphs(), ways=1, shots=5, queries=4, tasks=8, transform=flow)
    >>> tasks = next(episodes)
    >>> tasks.support_x.shape, tasks.query_y.shape
    (torch.Size([8, 10, 9, 14, 14]), torch.Size([8, 8, 4, 14, 14]))
    >>> learner = mf.MAML(flow.network((1, 28, 28), hidden=8), inner_lr=0.01, loss="mse")
    >>> learner(tasks).loss.backward()
    """

    def __init__(self, repeats: int = 4, context: int = 0, patch: int = 1) -> None:
        for name, count, low in (("repeats", repeats, 1), ("context", context, 0), ("patch", patch, 1)):
            check_count(name, count, low=low)
        self.repeats = repeats
        self.context = context
        self.patch = patch

    def network(self, sample_shape: Sequence[int], **options: Any) -> nn.Module:
        """A network for pictures of a shape, `models.velocity_net` with its options."""
        channels, height, width = self._planes(torch.Size(sample_shape))
        return velocity_net(channels, (channels * (1 + self.context) + 1, height, width), **options)

    def __call__(self, tasks: TaskBatch) -> TaskBatch:
        """Tasks of pictures in 0..1, one class each, as tasks of velocities.

        Raises:
            TypeError, ValueError: they are no such pictures, or a task has several classes.
        """
        tasks = TaskBatch.of(tasks)
        for name, y in (("support_y", tasks.support_y), ("query_y", tasks.query_y)):
            if y.is_floating_point() or bool(y.any()):
                raise ValueError(
                    f"{name} must be class 0 throughout, a class a task: Episodes(..., ways=1) (got others)"
                )
        for name, x in (("support_x", tasks.support_x), ("query_x", tasks.query_x)):
            _check_pictures(name, x)
        return TaskBatch(*self.rows(tasks.support_x), *self.rows(tasks.query_x, tasks.support_x))

    def rows(self, x: Tensor, given: Tensor | None = None, generator: Random | None = None) -> tuple[Tensor, Tensor]:
        """Inputs `[T, N * repeats, planes, ...]` and velocities of pictures `[T, N, C, H, W]`.

        Args:
            given: pictures `[T, k, C, H, W]` that are shown beside. None: `x`, where a row does not show its own.
        """
        own = torch.arange(x.shape[1], device=x.device).repeat_interleave(self.repeats)
        end = _centred(x)[:, own]
        start = _normal(end.shape, x, generator)
        places = _uniform(end.shape[:2], x, generator).argsort(-1)
        time = (places + _uniform(end.shape[:2], x, generator)) / len(own)
        beside = self.beside(x, len(own), generator, own) if given is None else self.beside(given, len(own), generator)
        return self.inputs(torch.lerp(start, end, time[..., None, None, None]), time, beside), self.planes(end - start)

    def beside(self, given: Tensor, rows: int, generator: Random | None = None, own: Tensor | None = None) -> Tensor:
        """What rows show beside: `context` of `given` `[T, k, C, H, W]` at random, as `[T, rows, context * C, H, W]`.

        own: `[rows]`, the picture of `given` that a row does not show.
        """
        tasks, count = given.shape[:2]
        order = _uniform((tasks, rows, count + self.context), given, generator)
        order[..., count:] += 1  # grey, where no other is left
        if own is not None:
            order.scatter_(2, own.expand(tasks, -1).unsqueeze(2), 2.0 + self.context)
        chosen = order.argsort(-1)[..., : self.context]
        grey = given.new_zeros(tasks, self.context, *given.shape[2:])
        known = torch.cat([_centred(given), grey], 1)
        return known[torch.arange(tasks, device=given.device)[:, None, None], chosen].flatten(2, 3)

    def inputs(self, x: Tensor, time: Tensor, beside: Tensor) -> Tensor:
        """What the network sees of x_t `[T, N, C, H, W]` at `time` `[T, N]`, `[T, N, planes, H / patch, W / patch]`."""
        seen = self.planes(torch.cat([x, beside], 2))
        return torch.cat([seen, time[..., None, None, None].expand(*seen.shape[:2], 1, *seen.shape[3:])], 2)

    def planes(self, x: Tensor) -> Tensor:
        """Pixels as planes, `[T, N, C * patch^2, H / patch, W / patch]`.

        Raises:
            ValueError: `patch` does not divide the sides.
        """
        self._planes(x.shape[2:])
        return F.pixel_unshuffle(x, self.patch)

    def pixels(self, planes: Tensor) -> Tensor:
        """Planes as pixels, `[T, N, C, H, W]`."""
        return F.pixel_shuffle(planes, self.patch)

    def _planes(self, shape: torch.Size) -> tuple[int, int, int]:
        channels, height, width = shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch must divide the sides of pictures (got {self.patch}, pictures {tuple(shape)})")
        return channels * self.patch**2, height // self.patch, width // self.patch


class Generator:
    """Draws new pictures of a class: a learner adapts the flow to a few, then noise follows it.

        theta_i = what `learner` adapts to the rows of task i's pictures
        x_(t + 1 / steps) = x_t + v(x_t, t; theta_i) / steps            from t = start to 1, of x_0 ~ N(0, I)

    Four routes, by learner and `flow`: `MAML` (second order through the inner loop), `Reptile` (as FIGR, Clouatre and
    Demers 2019, arXiv 1901.02199), `CAVIA`, which moves only a conditioning vector, and `MAML` without inner steps,
    whose network is told of the class by the pictures in `flow.context` alone.

    Args:
        learner: with `loss="mse"`, and a model such as `flow.network` gives; trained on tasks that `flow` has made.
        flow: how pictures become rows, in training and here.
        steps: of Euler's method.
        start: where to start, a real picture of the class being mixed in: 0 is noise alone; the nearer to 1, the more
            what is drawn resembles that picture (SDEdit, Meng et al. 2022, arXiv 2108.01073).
        inner_steps: of the learner. None: its own.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or out of range.

    >>> import torch, metaaug_fast as mf
    >>> flow = FlowTasks(context=1, patch=2)
    >>> learner = mf.MAML(flow.network((1, 28, 28), hidden=8), inner_steps=0, loss="mse")
    >>> generator = Generator(learner, flow, steps=4)
    >>> generator.draw(torch.rand(3, 5, 1, 28, 28), per_class=2, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2, 1, 28, 28])
    >>> x, y = generator.more(torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 1, 1]), per_class=2)
    >>> x.shape, y
    (torch.Size([4, 1, 28, 28]), tensor([0, 0, 1, 1]))
    """

    def __init__(
        self,
        learner: GradientLearner,
        flow: FlowTasks,
        steps: int = 32,
        start: float = 0.0,
        inner_steps: int | None = None,
    ) -> None:
        if not isinstance(learner, GradientLearner):
            raise TypeError(f"learner must be one that adapts by gradient steps (got {type(learner).__name__})")
        if learner.loss != "mse":
            raise ValueError(f"learner must minimise 'mse', the loss of a flow (got {learner.loss!r})")
        if not isinstance(flow, FlowTasks):
            raise TypeError(f"flow must be FlowTasks (got {type(flow).__name__})")
        check_count("steps", steps, low=1)
        check_number("start", start)
        if start >= 1:
            raise ValueError(f"start must be below 1 (got {start})")
        if inner_steps is not None:
            check_count("inner_steps", inner_steps)
        self.learner = learner
        self.flow = flow
        self.steps = steps
        self.start = start
        self.inner_steps = inner_steps

    @torch.no_grad()
    def draw(self, x: Tensor, per_class: int, generator: Random | None = None) -> Tensor:
        """New pictures `[T, per_class, C, H, W]` in 0..1 of T classes, from a few of each, `[T, k, C, H, W]` in 0..1.

        Args:
            generator: of all noise; None: torch's own. The same state gives the same pictures, bit for bit.

        Raises:
            TypeError, ValueError: `x` is no such pictures, or fits the learner's model not; `per_class` is below 1.
            NonFiniteError: NaN or infinity arose in the inner loop.
        """
        check_tensor("x", x)
        _check_pictures("x", x)
        check_count("per_class", per_class, low=1)
        flow = self.flow
        adapted = self.learner.adapt(*flow.rows(x, generator=generator), steps=self.inner_steps)
        turns = torch.arange(per_class, device=x.device) % x.shape[1]
        noise = _normal((len(x), per_class, *x.shape[2:]), x, generator)
        beside = flow.beside(x, per_class, generator)
        state = torch.lerp(noise, _centred(x)[:, turns], self.start)
        times = torch.linspace(self.start, 1, self.steps + 1, dtype=torch.float64).tolist()
        for now, then in itertools.pairwise(times):
            velocity = adapted(flow.inputs(state, state.new_full(state.shape[:2], now), beside))
            state = state + (then - now) * flow.pixels(velocity)
        return ((state + 1) / 2).clamp(0, 1)

    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Random | None = None) -> tuple[Tensor, Tensor]:
        """New pictures of each class of one task, `[ways * per_class, C, H, W]` and their ids, class after class.

        Args:
            x: pictures `[S, C, H, W]` in 0..1.
            y: class ids `[S]`, 0..ways-1.
            per_class, generator: see `draw`.

        Raises:
            TypeError, ValueError: as `draw`, or the labels are no class ids, or a class has no picture.
        """
        y = checked_few(x, y, per_class, generator)
        _check_pictures("x", x, "S, C, H, W")
        counts = class_members(y.unsqueeze(0), torch.int64)[0].sum(0)
        made = x.new_empty(len(counts), per_class, *x.shape[1:])
        for count in counts.unique().tolist():  # those of as many pictures together
            for classes in (counts == count).nonzero()[:, 0].split(_TOGETHER):
                rows = (y == classes.unsqueeze(1)).nonzero()[:, 1].view(len(classes), count)
                made[classes] = self.draw(x[rows], per_class, generator)
        return made.flatten(0, 1), torch.arange(len(counts), device=y.device).repeat_interleave(per_class)


def _check_pictures(name: str, x: Tensor, dimensions: str = "T, N, C, H, W") -> None:
    """Raise ValueError unless `x` is pictures of such dimensions in 0..1."""
    if x.ndim != len(dimensions.split(",")) or not x.numel():
        raise ValueError(f"{name} must be pictures [{dimensions}] (got shape {tuple(x.shape)})")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point pictures in 0..1 (got {x.dtype}; pictures: x.float() / 255)")
    low, high = (float(value) for value in torch.aminmax(x))
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must be pictures in 0..1 (got {low:g}..{high:g})")


def _centred(x: Tensor) -> Tensor:
    return 2 * x - 1


def _uniform(shape: Sequence[int], like: Tensor, generator: Random | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _normal(shape: Sequence[int], like: Tensor, generator: Random | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
