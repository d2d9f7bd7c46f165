"""Hallucinated samples (Wang, Girshick, Hebert, Hariharan 2018, arXiv 1801.05401): more of a class, made of its few."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_integer
from ..engine.encoding import encode
from ..learners.around import Around
from ..learners.base import Learner, one_task_too
from ..tasks import MetaOutput, TaskBatch, check_tensor
from .parts import Behind, check_second_order, checked_few, in_turn, labels_of


class Hallucination(Around):
    """A learner that learns tasks from their support sets and from samples that a generator G makes of these.

        S_G = {(G(x, z), y)}       `per_class` of each class, x its support samples in turn, z ~ N(0, I)
        minimise what `learner` minimises, its support sets being S and S_G, over it and G

    End to end: the gradient arrives at G through the support set, for MAML through the steps of the inner loop. With a
    body, samples are features behind it: G makes features of features, and the learner works on these.

    In training z is drawn by torch's generator. In evaluation the same z serve each class of each task, so that a task
    is always learned in the same way.

    Args:
        learner: any, of samples or, with a body, of the body's features.
        generator: a module, `[N, ...]` and z `[N, noise]` to `[N, ...]`, such as `VectorGenerator` and
            `PictureGenerator`.
        per_class: samples made, of each class of a task. 0: none.
        noise: numbers in z.
        body: `[N, ...]` to features `[N, D]`, learned with the rest. None: samples are as they are.
        seed: of the z of evaluation.

    Raises:
        TypeError, ValueError: an argument is no module, or out of range.

    >>> import torch, metaaug_fast as mf
    >>> protonet = mf.ProtoNet(torch.nn.Identity())
    >>> body = mf.models.conv4(ways=None, hidden=8)
    >>> learner = Hallucination(protonet, VectorGenerator(8, noise=8), per_class=3, noise=8, body=body)
    >>> y = torch.arange(5).repeat(2, 1)
    >>> learner(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y)).loss.backward()
    >>> made, labels = learner.make(torch.rand(2, 5, 1, 28, 28), y)
    >>> made.shape, labels.shape
    (torch.Size([2, 15, 8]), torch.Size([2, 15]))
    """

    turns: Tensor

    def __init__(
        self,
        learner: Learner,
        generator: nn.Module,
        per_class: int = 5,
        noise: int = 16,
        body: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(learner, Learner):
            raise TypeError(f"learner must be a Learner (got {type(learner).__name__})")
        for name, module in (("generator", generator), ("body", body)):
            if not isinstance(module, nn.Module) and not (name == "body" and module is None):
                raise TypeError(f"{name} must be an nn.Module (got {type(module).__name__})")
        check_count("per_class", per_class)
        check_count("noise", noise, low=1)
        check_integer("seed", seed)
        self.learner = learner
        self.generator = generator
        self.body = body
        self.per_class = per_class
        self.noise = noise
        self.register_buffer("turns", torch.randn(per_class, noise, generator=torch.Generator().manual_seed(seed)))
        self.encoder = learner.encoder  # type: ignore[misc]

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and what is made of it, and judge the result on its query set.

        Raises:
            TypeError, ValueError: the tasks fit neither the learner nor the generator, or the learner is of first
                order, which gives the generator no gradient.
        """
        check_second_order(self.learner)
        output: MetaOutput = self.learner(self._more(TaskBatch.of(tasks)), steps=steps)
        return output

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, **options: Any) -> Any:
        """What the learner learns from `[T, S, ...]` and what is made of it; one task may lack its T."""
        adapted = self.learner.adapt(*self._with_made(self._seen(support_x), support_y), **options)
        return adapted if self.body is None else Behind(adapted, self._seen)

    def make(self, support_x: Tensor, support_y: Tensor) -> tuple[Tensor, Tensor]:
        """Samples made of support sets `[T, S, ...]`, class ids `[T, S]`: `[T, ways * per_class, ...]`, and their ids.

        Raises:
            TypeError, ValueError: the labels are no class ids, or the generator gives other shapes.
        """
        check_tensor("support_x", support_x)
        check_tensor("support_y", support_y)
        return self._made(self._seen(support_x), support_y, self._drawn(support_x, support_y))

    @torch.no_grad()
    def more(
        self, x: Tensor, y: Tensor, per_class: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """New samples of one task, made of its own with z from `generator`.

        Args:
            x: `[S, ...]`.
            y: class ids `[S]`.
            per_class: so many of each class.
            generator: None: torch's own.

        Returns:
            `[ways * per_class, ...]` and their class ids, class after class.

        Raises:
            TypeError, ValueError: the samples are none such, or what is made are features behind a body.

        >>> import metaaug_fast as mf
        >>> learner = Hallucination(mf.ProtoNet(torch.nn.Identity()), VectorGenerator(4, noise=8), noise=8)
        >>> x, y = learner.more(torch.rand(3, 4), torch.tensor([0, 0, 1]), per_class=2)
        >>> x.shape, y.tolist()
        (torch.Size([4, 4]), [0, 0, 1, 1])
        """
        if self.body is not None:
            raise ValueError("body must be None for more samples (got one, behind which features are made)")
        y = checked_few(x, y, per_class, generator)
        z = x.new_empty(int(y.max()) + 1, per_class, self.noise).normal_(generator=generator)
        made, labels = self._made(x[None], y[None], z.flatten(0, 1)[None])
        return made[0], labels[0]

    def specification(
        self, tasks: TaskBatch, *, first_order: bool, step_weights: Tensor | None = None
    ) -> MetaOutput | None:
        """The learner's, of the larger support sets."""
        return self.learner.specification(self._more(tasks), first_order=first_order, step_weights=step_weights)

    def _more(self, tasks: TaskBatch) -> TaskBatch:
        count = tasks.support_x.shape[1]
        x = self._seen(torch.cat([tasks.support_x, tasks.query_x], 1)) if self.body is not None else None
        support, query = (tasks.support_x, tasks.query_x) if x is None else (x[:, :count], x[:, count:])
        return TaskBatch(*self._with_made(support, tasks.support_y), query, tasks.query_y)

    def _with_made(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        more_x, more_y = self._made(x, y, self._drawn(x, y))
        return torch.cat([x, more_x], 1), torch.cat([y, more_y], 1)

    def _drawn(self, x: Tensor, y: Tensor) -> Tensor:
        """z for what is made in training, or in evaluation, `[T, ways * per_class, noise]`."""
        rounds = in_turn(y, self.per_class)[1]
        return x.new_empty(*rounds.shape, self.noise).normal_() if self.training else self.turns.to(x)[rounds]

    def _made(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Samples made of `x` with z, and their class ids, `[T, ways * per_class, ...]`."""
        per_class = z.shape[1] // (int(y.max()) + 1)
        rows, labels = in_turn(y, per_class)[0], labels_of(int(y.max()) + 1, per_class, y)
        seeds = x[torch.arange(len(x), device=x.device).unsqueeze(1), rows]
        made = self.generator(seeds.flatten(0, 1), z.flatten(0, 1))
        if made.shape != (labels.numel(), *x.shape[2:]):
            raise ValueError(
                f"generator must give samples [N, {', '.join(map(str, x.shape[2:]))}] (got {tuple(made.shape)})"
            )
        return made.unflatten(0, labels.shape), labels

    def _seen(self, x: Tensor) -> Tensor:
        """What the learner is given of samples `[T, N, ...]`."""
        return x if self.body is None else encode(self.body, x.flatten(0, 1)).unflatten(0, x.shape[:2])


class VectorGenerator(nn.Module):
    """Three linear layers of x and z with ReLUs between, which at first give x back where it is not negative.

    As in the paper, whose features are behind a ReLU, their weights begin as identities.

    Args:
        features: of x.
        noise: numbers in z.

    >>> x = torch.rand(4, 8)
    >>> torch.allclose(VectorGenerator(8, noise=3)(x, torch.randn(4, 3)), x)
    True
    """

    def __init__(self, features: int, noise: int = 16) -> None:
        super().__init__()
        check_count("features", features, low=1)
        check_count("noise", noise, low=1)
        sizes = (features + noise, features, features, features)
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """`[N, features]` and `[N, noise]` to `[N, features]`."""
        h = torch.cat([x, z], 1)
        for layer in self.layers[:-1]:
            h = layer(h).relu()
        output: Tensor = self.layers[-1](h)
        return output


class PictureGenerator(nn.Module):
    """Convolutions of x beside planes of z, which decide where the picture is painted over, and how: within 0 and 1.

        G(x, z) = (1 - a) x + a b              a, b in 0..1 for each pixel; a is small at first

    Args:
        channels: of pictures.
        noise: numbers in z.
        hidden: channels within.

    >>> x = torch.rand(4, 1, 28, 28)
    >>> made = PictureGenerator(1, noise=3)(x, torch.randn(4, 3))
    >>> made.shape, bool(((made >= 0) & (made <= 1)).all()), float((made - x).abs().max()) < 0.5
    (torch.Size([4, 1, 28, 28]), True, True)
    """

    little: Tensor

    def __init__(self, channels: int = 1, noise: int = 16, hidden: int = 16) -> None:
        super().__init__()
        for name, count in {"channels": channels, "noise": noise, "hidden": hidden}.items():
            check_count(name, count, low=1)
        self.first = nn.Conv2d(channels + noise, hidden, 5, padding=2)
        self.second = nn.Conv2d(hidden, hidden, 5, padding=2)
        self.last = nn.Conv2d(hidden, 2 * channels, 5, padding=2)
        self.register_buffer("little", torch.tensor([3.0] * channels + [0.0] * channels)[:, None, None])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """`[N, C, H, W]` and `[N, noise]` to `[N, C, H, W]`."""
        planes = z[:, :, None, None].expand(-1, -1, *x.shape[2:])
        h = self.second(self.first(torch.cat([x, planes], 1)).relu()).relu()
        where, paint = (self.last(h) - self.little).sigmoid().chunk(2, 1)
        return (1 - where) * x + where * paint
