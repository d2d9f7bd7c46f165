"""The ways to make more of a few pictures that the console program knows, with their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from .. import augment
from ..augment import Augmenter, FlowTasks, Hallucination, PictureGenerator, Retrieval
from ..checks import check_choice, check_count, check_number, check_probability
from ..data import ClassSamples, Episodes
from ..learners.base import Learner
from ..learners.maml import MAML
from ..learners.unrolled import UnrolledLearner
from ..models import strided_conv4

_TRANSFORMS = [name for name in augment.PICTURES if augment.TRANSFORMS[name].acts != "mix"]

THROUGH: Mapping[str, type[UnrolledLearner]] = {"scratch": augment.FromScratch, "maml": MAML}
"""What adapts on augmented samples, by the name that an option has for it."""


def _option(default: Any, help: str, *, low: int = 1, share: bool = False, later: bool = False) -> Any:
    """low: of a count. share: a number in 0..1. later: an augmenter that has learned takes it, too."""
    return field(default=default, metadata={"help": help, "low": low, "share": share, "later": later})


@dataclass(frozen=True)
class Method:
    """A way to make more of a few pictures, with its settings.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    steps: int = _option(300, "meta-steps in all, those before a resumption included")
    shots: int = _option(
        5, "samples a class, in meta-training and of the new classes where no folder is given", later=True
    )
    hidden: int = _option(32, "channels of the network")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                check_count(each.name, value, each.metadata["low"])
            elif each.type == "float":
                (check_probability if each.metadata["share"] else check_number)(each.name, value)
            elif not isinstance(value, str):
                raise TypeError(f"{each.name} must be text (got {value!r})")

    def check(self, few: ClassSamples, per_class: int) -> None:
        """ValueError where it cannot make so many of such a few."""

    def augmenter(self, learner: Any, progress: bool = False) -> Augmenter:
        """What makes samples: of `learner`, which has learned, if there is one."""
        made: Augmenter = learner
        return made


@dataclass(frozen=True)
class Learned(Method):
    """One that is meta-trained on the classes of a data set."""

    queries: int = _option(5, "query samples a class")
    tasks: int = _option(4, "a meta-step")
    meta_lr: float = _option(1e-3, "of Adam")

    def learner(self, shape: Sequence[int], pool: ClassSamples | None) -> Learner:
        """What is meta-trained, for pictures of a shape, with fresh weights."""
        raise NotImplementedError

    def episodes(self, data: ClassSamples, seed: int) -> Episodes:
        """What it is meta-trained on."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Unrolled(Learned):
    """Through the inner loop of networks that adapt on what was augmented."""

    steps: int = _option(150, "meta-steps in all, those before a resumption included")
    hidden: int = _option(16, "channels of the network")
    ways: int = _option(5, "classes of a task in meta-training")
    through: str = _option("scratch", f"networks that begin anew in each task, or MAML's: {', '.join(THROUGH)}")
    inner_lr: float = _option(0.05, "of these networks")
    inner_steps: int = _option(15, "of these networks", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("through", self.through, THROUGH)

    def adapting(self, shape: Sequence[int]) -> UnrolledLearner:
        """The networks."""
        return THROUGH[self.through](strided_conv4(self.ways, shape, self.hidden), self.inner_lr, self.inner_steps)

    def episodes(self, data: ClassSamples, seed: int) -> Episodes:
        """Few-shot tasks of these classes."""
        return Episodes(data, self.ways, self.shots, self.queries, self.tasks, seed)


@dataclass(frozen=True)
class Policy(_Unrolled):
    """Transforms, how often and how strongly."""

    transforms: str = _option(
        "rotation,translation,scale,shear,elastic", f"between commas, of {', '.join(_TRANSFORMS)}"
    )
    probability: float = _option(0.5, "of each transform, at the start", share=True)
    strength: float = _option(0.3, "of each transform, at the start", share=True)
    copies: int = _option(2, "of every support sample in meta-training, each transformed anew")

    def __post_init__(self) -> None:
        super().__post_init__()
        policy = self.policy()
        if others := [each.name for each in policy.transforms if each.name not in _TRANSFORMS]:
            raise ValueError(
                f"transforms must be of pictures, each of which stays one of its class (got {', '.join(others)})"
            )

    def policy(self) -> augment.AugmentationPolicy:
        """As it is at the start."""
        names = [name.strip() for name in self.transforms.split(",")]
        return augment.AugmentationPolicy(names, self.probability, self.strength, copies=self.copies, originals=True)

    def learner(self, shape: Sequence[int], pool: ClassSamples | None) -> Learner:
        """The networks and the policy."""
        return augment.Augmented(self.adapting(shape), self.policy())


@dataclass(frozen=True)
class Hallucinate(_Unrolled):
    """A generator of samples out of samples and noise."""

    made: int = _option(3, "samples that join each class of a task in meta-training")
    noise: int = _option(16, "numbers that a sample is made of, beside another one")

    def learner(self, shape: Sequence[int], pool: ClassSamples | None) -> Learner:
        """The networks, and the generator."""
        return Hallucination(self.adapting(shape), PictureGenerator(shape[0], self.noise), self.made, self.noise)


@dataclass(frozen=True)
class Retrieve(_Unrolled):
    """Samples of a pool, and what they are worth."""

    found: int = _option(3, "samples of the pool that join each class of a task in meta-training")
    join: str = _option("samples", "as they are, or mixed with a sample of the class: samples, mixed")
    mix: float = _option(0.5, "the part of a mixed sample that comes from the pool", share=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join not in ("samples", "mixed"):
            raise ValueError(f"join must be one of samples, mixed (got {self.join!r})")

    def learner(self, shape: Sequence[int], pool: ClassSamples | None) -> Learner:
        """The networks with the pool, in which pixels say what is near."""
        if pool is None:
            raise ValueError("pool must be given for retrieve (got none)")
        return Retrieval(self.adapting(shape), pool, per_class=self.found, join=self.join, mix=self.mix)


@dataclass(frozen=True)
class Generate(Learned):
    """New pictures, by a flow that is shown a few of the class."""

    steps: int = _option(500, "meta-steps in all, those before a resumption included")
    hidden: int = _option(48, "channels of the network")
    blocks: int = _option(4, "of the network")
    tasks: int = _option(8, "classes a meta-step")
    repeats: int = _option(4, "noises and times of every picture")
    context: int = _option(2, "pictures of the class that the network is shown", low=0)
    patch: int = _option(2, "side of the squares of pixels that become planes; must divide a picture's")
    start: float = _option(0.4, "0: drawn from noise alone; the nearer to 1, the more alike to a real one", later=True)
    draw_steps: int = _option(32, "of Euler's method in drawing", later=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= 1:
            raise ValueError(f"start must be below 1 (got {self.start})")

    def flow(self) -> FlowTasks:
        """How pictures become tasks."""
        return FlowTasks(self.repeats, self.context, self.patch)

    def learner(self, shape: Sequence[int], pool: ClassSamples | None) -> Learner:
        """The flow, told of the class by its pictures alone."""
        network = self.flow().network(shape, hidden=self.hidden, blocks=self.blocks)
        return MAML(network, inner_steps=0, loss="mse")

    def episodes(self, data: ClassSamples, seed: int) -> Episodes:
        """A class a task."""
        return Episodes(data, 1, self.shots, self.queries, self.tasks, seed, transform=self.flow())

    def augmenter(self, learner: Any, progress: bool = False) -> Augmenter:
        """The flow, which draws."""
        return augment.Generator(learner, self.flow(), self.draw_steps, self.start)


@dataclass(frozen=True)
class Distil(Method):
    """The samples that teach a network most of the few; nothing is meta-trained."""

    steps: int = _option(300, "on the samples")
    inner_lr: float = _option(0.02, "of training on the samples, at the start")
    inner_steps: int = _option(10, "of training on the samples")
    starts: int = _option(4, "networks a step, drawn anew")
    lr: float = _option(0.02, "of Adam on the samples")
    batch: int = _option(128, "real samples that judge a step")

    def check(self, few: ClassSamples, per_class: int) -> None:
        """Each of its samples begins as a real one."""
        smallest = int(few.counts.sum(1).min())
        if per_class > smallest:
            raise ValueError(
                f"per_class must be at most the samples of every class, each of which becomes one "
                f"(got {per_class}; a class has {smallest})"
            )

    def augmenter(self, learner: Any, progress: bool = False) -> Augmenter:
        """Distillation of what it is given."""
        return _Distiller(self, progress)


@dataclass(frozen=True)
class _Distiller:
    method: Distil
    progress: bool

    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """The learned samples `[ways * per_class, ...]` of bytes / 255, and their class ids."""
        own, ways = self.method, int(y.max()) + 1
        data = ClassSamples.from_classes({f"{label:09}": (x[y == label] * 255).round().byte() for label in range(ways)})
        seed = int(torch.randint(2**31, (), generator=generator, device=x.device))
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            model = strided_conv4(ways, x.shape[1:], own.hidden).to(x.device)
        made = augment.distil(
            model, data, per_class, steps=own.steps, inner_lr=own.inner_lr, inner_steps=own.inner_steps, lr=own.lr,
            starts=own.starts, batch=own.batch, seed=seed, progress=self.progress,
        )  # fmt: skip
        return made.x.detach(), made.y


METHODS: Mapping[str, type[Method]] = {
    "policy": Policy,
    "hallucinate": Hallucinate,
    "generate": Generate,
    "retrieve": Retrieve,
    "distill": Distil,
}
"""By the name that the console program has for them."""


def name_of(method: Method) -> str:
    """As in `METHODS`."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)
