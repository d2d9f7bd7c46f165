"""From many sources to a target of few labels: pre-train, meta-train, fine-tune; beside plainer ways, over seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_flag, check_number
from ..data import ClassSamples, Episodes
from ..data.draws import shuffled
from ..learners.hard_tasks import HardTasks
from ..learners.meta_transfer import LEARNS, MetaTransfer
from ..learners.supervised import classifier_accuracy, fit
from .build import fitted, make_learner, make_model
from .config import Config, Sampling
from .evaluation import student
from .training import train

WAYS = {
    "scratch": "the same network trained on the same labels alone",
    "head alone": "pre-trained, then only a new head",
    "fine-tuned": "pre-trained, then all weights and a new head",
    "meta-transfer": "pre-trained, meta-trained, then the head and what `learns` says, scales and shifts by default",
}
"""The ways to a classifier of the target that are compared."""

_GREY = (0.299, 0.587, 0.114)  # of red, green and blue, by ITU-R 601, as Pillow has it
_AT_ONCE = 500  # pictures that are brought to a shape


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """How far each phase goes.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    pretrain_steps: int = _option(2000, "of classification over all source classes")
    meta_steps: int = _option(300, "with scales, shifts and the head")
    tasks: int = _option(4, "a meta-step")
    train_shots: int = _option(
        5, "support samples a class in meta-training, or the target's shots where these are fewer"
    )
    queries: int = _option(5, "query samples a class in meta-training")
    tune_steps: int = _option(200, "on the target's labels, in each of the ways that are compared")
    pretrain_lr: float = _option(1e-3, "of Adam in pre-training")
    meta_lr: float = _option(1e-3, "of Adam in meta-training")
    tune_lr: float = _option(3e-3, "of Adam on the target's labels")
    learns: str = _option("scale_shift", "what fine-tuning moves besides the head: scale_shift, weights, all or head")
    target_weight: float = _option(0.0, "lambda: sum_i L(T_i) + lambda L(T_target) in meta-training; 0 leaves it out")
    easy: bool = _option(False, "no hard tasks")
    test: int = _option(10_000, "held-out pictures at most, the same number of each class")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                check_count(each.name, value, low=1)
            if each.type == "float":
                check_number(each.name, value)
        check_choice("learns", self.learns, LEARNS)
        check_flag("easy", self.easy)


@dataclass(frozen=True)
class Figures:
    """The target accuracies of one way, a seed each, with so many labels a class.

    interval: half the 95 % interval of the mean over seeds, by Student's t; None: of one seed there is none.
    """

    shots: int
    way: str
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.accuracies))

    @property
    def interval(self) -> float | None:
        count = len(self.accuracies)
        return None if count < 2 else student(count - 1) * float(np.std(self.accuracies, ddof=1)) / count**0.5

    def minus(self, other: Figures) -> Figures:
        """The differences to another way's, seed by seed, for both had the same labels and weights to begin with.

        >>> str(Figures(1, "one", (0.5, 0.75)).minus(Figures(1, "other", (0.25, 0.5))))
        '25.0 % +- 0.0 %'
        """
        pairs = zip(self.accuracies, other.accuracies, strict=True)
        return Figures(self.shots, f"{self.way} - {other.way}", tuple(one - another for one, another in pairs))

    def __str__(self) -> str:
        half = "" if self.interval is None else f" +- {100 * self.interval:.1f} %"
        return f"{100 * self.mean:.1f} %{half}"


@dataclass(frozen=True)
class Transferred:
    """What a transfer gave.

    pictures: held-out ones, judged on. seconds: of each phase, over all seeds. sources: what was learned from.
    """

    config: Config
    recipe: Recipe
    sources: tuple[str, ...]
    target: str
    figures: tuple[Figures, ...]
    pictures: int
    seeds: int
    seconds: Mapping[str, float]

    def gains(self) -> list[Figures]:
        """What meta-transfer is better by than each other way, in pairs of the same seed."""
        found = {(each.shots, each.way): each for each in self.figures}
        shots = dict.fromkeys(count for count, _ in found)
        others = [way for way in WAYS if way != "meta-transfer"]
        return [found[count, "meta-transfer"].minus(found[count, way]) for count in shots for way in others]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        figures = [
            asdict(each) | {"mean": each.mean, "interval": each.interval} for each in (*self.figures, *self.gains())
        ]
        return {
            "versions": {"metaaug_fast": version("metaaug_fast"), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "sources": list(self.sources),
            "target": self.target,
            "config": {name: self.config.as_dict()[name] for name in ("learner", "model", "data")},
            "recipe": asdict(self.recipe),
            "seeds": self.seeds,
            "held_out_pictures": self.pictures,
            "ways": WAYS,
            "figures": figures,
            "seconds": dict(self.seconds),
        }


def transfer(
    config: Config,
    sources: Mapping[str, ClassSamples],
    target: ClassSamples,
    shots: Sequence[int] = (5,),
    *,
    seeds: int = 5,
    recipe: Recipe | None = None,
    convert: bool = False,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Transferred:
    """Learn from the classes of many sources, then from few labels of a target; judge it on the target's other samples.

    Each seed draws weights and labels anew; the held-out samples are always the same. Of every class of the target half
    is held out, or fewer: `recipe.test` of all classes together, or what `shots` leave.

    Args:
        config: its learner, "meta_transfer", and its model.
        sources: by name.
        target: all its classes are to be told apart.
        shots: labels a class; each number is a row of its own.
        seeds: how many.
        convert: bring pictures of other shapes to the target's; else they are refused.
        say: gets a few lines of text.
        progress: bars of meta-training.

    Raises:
        TypeError, ValueError: an argument is out of range, a source does not fit the target or has too few classes, or
            a class of the target no more samples than `shots`.
        KeyboardInterrupt: a signal stopped meta-training.

    >>> from metaaug_fast.runs.config import configure
    >>> content = {"learner": {"name": "meta_transfer"}, "data": {"name": "glyphs"}}
    >>> config = configure({**content, "model": {"name": "strided_conv4", "hidden": 4}})
    >>> data = ClassSamples.from_arrays(torch.randint(0, 256, (96, 8, 8), dtype=torch.uint8), torch.arange(96) % 8)
    >>> recipe = Recipe(pretrain_steps=2, meta_steps=2, tune_steps=2, queries=2)
    >>> found = transfer(config, {"noise": data.subset(range(5))}, data.subset([5, 6, 7]), seeds=1, recipe=recipe)
    3 classes of 18 held-out samples; meta-tasks of 3 ways, 5 shots
    seed 0, 5 labels a class: scratch ... %, head alone ... %, fine-tuned ... %, meta-transfer ... %
    >>> [each.way for each in found.figures]
    ['scratch', 'head alone', 'fine-tuned', 'meta-transfer']
    """
    recipe = recipe or Recipe()
    check_count("seeds", seeds, low=1)
    if not shots:
        raise ValueError("shots must be one number or more (got none)")
    for count in shots:
        check_count("shots", count, low=1)
    pool, test = divided(target, max(shots), recipe.test)
    shape = target.sample_shape
    source = joined({name: brought(name, data, target, convert, say) for name, data in sources.items()})
    ways = len(target)
    config = fitted(replace(config, sampling=Sampling(ways=ways)), shape, None)
    numbers = {count: min(count, recipe.train_shots) for count in shots}
    for number in numbers.values():
        _episodes(source, ways, number, recipe, 0)  # says what is wrong before any work
    in_words = ", ".join(map(str, dict.fromkeys(numbers.values())))
    say(f"{ways} classes of {len(test[1])} held-out samples; meta-tasks of {ways} ways, {in_words} shots")
    found: dict[tuple[int, str], list[float]] = {(count, way): [] for count in shots for way in WAYS}
    clock = _Clock()
    for seed in range(seeds):
        config = replace(config, training=replace(config.training, seed=seed))
        learner = make_learner(config, device)
        assert isinstance(learner, MetaTransfer)
        with clock.of("pre-training"):
            learner.pretrain(source, recipe.pretrain_steps, lr=recipe.pretrain_lr, seed=seed)
        state = {name: value.clone() for name, value in learner.state_dict().items()}
        for count in shots:
            learner.load_state_dict(state)
            torch.manual_seed(seed)
            episodes = _episodes(source, ways, numbers[count], recipe, seed)
            ways_there = _ways_there(config, learner, episodes, few(pool, count, seed), recipe, clock, progress)
            reached = []
            for way, network in ways_there:
                with clock.of("judging"):
                    found[count, way].append(classifier_accuracy(network, test))
                reached.append(f"{way} {100 * found[count, way][-1]:.1f} %")
            say(f"seed {seed}, {_labels(count)}: {', '.join(reached)}")
    figures = tuple(Figures(*key, tuple(values)) for key, values in found.items())
    return Transferred(config, recipe, tuple(sources), config.data.name, figures, len(test[1]), seeds, clock.seconds)


def _ways_there(
    config: Config,
    learner: MetaTransfer,
    episodes: Episodes,
    labels: tuple[Tensor, Tensor],
    recipe: Recipe,
    clock: _Clock,
    progress: bool,
) -> Iterator[tuple[str, nn.Module]]:
    """Classifiers of the target from few labels, each by one of `WAYS`; the learner is pre-trained, and then more."""
    seed, steps, lr = config.training.seed, recipe.tune_steps, recipe.tune_lr
    assert config.model is not None
    network = make_model(config.model).to(next(learner.parameters()).device)
    with clock.of("fine-tuning"):
        fit(network.train(), *labels, steps, lr=lr, seed=seed)
    yield "scratch", network.eval()
    for way, learns in (("head alone", "head"), ("fine-tuned", "weights")):
        with clock.of("fine-tuning"):
            network = learner.fine_tune(*labels, steps, learns=learns, lr=lr, seed=seed)
        yield way, network
    learner.join_target(*labels, recipe.target_weight)
    tasks = episodes if recipe.easy else HardTasks(learner, episodes)
    with clock.of("meta-training"):
        history = train(learner, tasks, recipe.meta_steps, meta_lr=recipe.meta_lr, progress=progress)
    if history.stopped_by is not None:  # by a signal: no figure is of a training cut short
        raise KeyboardInterrupt
    with clock.of("fine-tuning"):
        network = learner.fine_tune(*labels, steps, learns=recipe.learns, lr=lr, seed=seed)
    yield "meta-transfer", network


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def divided(target: ClassSamples, shots: int, test: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The samples that labels are drawn from, of each class, and the held-out ones, with their class ids.

    Half of a class is held out, or fewer: `test` of all classes together, or what so many shots leave.

    Raises:
        ValueError: a class has no more samples than `shots`.

    >>> target = ClassSamples.from_arrays(torch.arange(20.0)[:, None], torch.arange(20) % 2)
    >>> pool, (x, y) = divided(target, shots=7, test=100)
    >>> [len(each) for each in pool], y.tolist()
    ([7, 7], [0, 0, 0, 1, 1, 1])
    """
    pool, held_out = [], []
    for index, name in enumerate(target.names):
        samples = target.class_samples(index)
        if len(samples) <= shots:
            raise ValueError(
                f"shots must leave samples of every class to judge on (got {shots}; class {name!r} has {len(samples)})"
            )
        count = max(1, min(len(samples) // 2, len(samples) - shots, test // len(target)))
        order = torch.from_numpy(shuffled(len(samples), seed=0))
        held_out.append(samples[order[:count]])
        pool.append(samples[order[count:]])
    return pool, (torch.cat(held_out), _ids(held_out))


def few(pool: Sequence[Tensor], shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many samples of each class, with class ids; more shots of one seed hold the fewer.

    >>> few([torch.arange(5), torch.arange(5, 9)], 2, seed=0)[1].tolist()
    [0, 0, 1, 1]
    """
    chosen = [each[torch.from_numpy(shuffled(len(each), seed + 1)[:shots])] for each in pool]
    return torch.cat(chosen), _ids(chosen)


def _ids(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])


def brought(
    name: str, data: ClassSamples, target: ClassSamples, convert: bool, say: Callable[[str], None] = print
) -> ClassSamples:
    """A source whose samples have the target's shape: grey from colour or colour from grey, and resized (bilinear).

    Raises:
        ValueError: they have another shape and are not to be converted, or another type, or are no pictures.
    """
    shape, given, kind = target.sample_shape, data.sample_shape, target.samples.dtype
    if data.ids or data.samples.dtype != kind:
        raise ValueError(f"sources must have samples of the target's type, {kind} (got {data.samples.dtype} of {name})")
    if given == shape:
        return data
    pictures = kind == torch.uint8 and len(given) == len(shape) == 3 and {given[0], shape[0]} <= {1, 3}
    if not pictures or not convert:
        way_out = "; convert brings pictures to it" if pictures else ""
        raise ValueError(f"sources must have samples of the target's shape, {shape} (got {given} of {name}{way_out})")
    say(f"{name}: pictures {given} are brought to {shape}")
    order = torch.arange(len(data.samples)) if data.order is None else data.order
    samples = torch.cat([_converted(data.samples[rows], shape) for rows in order.split(_AT_ONCE)])
    return ClassSamples(samples, data.first, data.counts, data.names, data.styles)


def _converted(pictures: Tensor, shape: tuple[int, ...]) -> Tensor:
    x = pictures.float()
    if x.shape[1] > shape[0]:
        x = (x * torch.tensor(_GREY).view(3, 1, 1)).sum(1, keepdim=True)
    if x.shape[2:] != shape[1:]:
        x = F.interpolate(x, shape[1:], mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).expand(-1, *shape)


def joined(sources: Mapping[str, ClassSamples]) -> ClassSamples:
    """All classes of data sets of one shape and type, in one, without styles.

    Raises:
        ValueError: there is none.

    >>> data = ClassSamples.from_arrays(torch.rand(6, 2), ["a", "b"] * 3)
    >>> joined({"one": data, "other": data}).names
    ('one: a', 'one: b', 'other: a', 'other: b')
    """
    if not sources:
        raise ValueError("sources must be one data set or more (got none)")
    return ClassSamples.from_classes(
        {f"{name}: {data.names[i]}": data.class_samples(i) for name, data in sources.items() for i in range(len(data))}
    )


def _episodes(source: ClassSamples, ways: int, shots: int, recipe: Recipe, seed: int) -> Episodes:
    return Episodes(source, ways=ways, shots=shots, queries=recipe.queries, tasks=recipe.tasks, seed=seed)


def _labels(count: int) -> str:
    return f"{count} label{'s' * (count > 1)} a class"
