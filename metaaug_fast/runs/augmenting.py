"""More of a few pictures a class: an augmenter is learned or taken, it makes new ones, and a classifier judges them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import augment, files
from ..checks import check_count, check_integer
from ..data import ClassSamples
from ..data.draws import shuffled
from ..data.readers.folder import Folder
from ..errors import CheckpointError, in_one_line
from ..learners.base import Learner
from ..learners.supervised import classifier_accuracy, train_classifier
from . import checkpoint as checkpoints
from .build import make_sources
from .config import Part
from .history import TIME, History
from .methods import METHODS, Learned, Method, name_of
from .resume import check_state
from .training import train
from .transfer import Figures, brought

LEARNED, PICTURES, REPORT = "learned.safetensors", "pictures", "report.json"
"""In the folder of a run: its checkpoint, the augmented folder, and the report of it, which the caller writes."""

_SHOWN = 100
"""Bytes of a class's name that its folder has at most: file systems take 255, a number and more included."""


@dataclass(frozen=True)
class Judge:
    """How original and augmented data are compared: classifiers on each, with equal steps, over seeds.

    Raises:
        TypeError, ValueError: a number is no count.
    """

    seeds: int = 3
    steps: int = 300

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds, low=1)
        check_count("judge_steps", self.steps, low=1)


@dataclass(frozen=True)
class Enlarged:
    """What a run gave.

    few, new, test: the classes, and what was made of them; new is None where a signal stopped the learning, test where
    there is nothing to judge on. figures: accuracies. history: of meta-training; None where there was none. config: as
    in the checkpoint. seconds: of each phase.
    """

    method: Method
    learner: Learner | None
    few: ClassSamples
    new: ClassSamples | None
    test: ClassSamples | None
    figures: tuple[Figures, ...]
    history: History | None
    config: Mapping[str, Any]
    seconds: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        made = {} if self.new is None else dict(zip(self.new.names, self.new.counts.sum(1).tolist(), strict=True))
        counts = self.few.counts.sum(1).tolist()
        rows = zip(self.few.names, folder_names(self.few.names), counts, strict=True)
        classes = [
            {"name": name, "folder": folder, "originals": count, "new": made.get(name, 0)}
            for name, folder, count in rows
        ]
        return {
            "versions": {"metaaug_fast": version("metaaug_fast"), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            **self.config,
            "settings": asdict(self.method),
            "classes": classes,
            "held_out_pictures": 0 if self.test is None else int(self.test.counts.sum()),
            "figures": [asdict(each) | {"mean": each.mean, "interval": each.interval} for each in self.figures],
            "history": None if self.history is None else self.history.as_dict(),
            "seconds": dict(self.seconds),
        }


def enlarge(
    method: Method,
    data: Part,
    out: str | Path,
    *,
    few: str | Path | None = None,
    test: str | Path | None = None,
    classes: int = 5,
    per_class: int = 20,
    pool: Part | None = None,
    learned: str | Path | None = None,
    resume: bool = False,
    size: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Enlarged:
    """Meta-train an augmenter, make more of a few pictures a class, write both as a folder, and judge it.

    Into the folder `out` go `learned.safetensors`, the checkpoint, and `pictures`, a folder for each class with the
    originals and then the new ones, as `mf.data.Folder` reads it; both are whole or as they were.

    Args:
        method: what is learned.
        data: the training classes that it learns from; pictures in bytes.
        few: a folder with a folder of pictures for each class, which are brought to the shape of `data`. None: classes
            of the test split of `data`, with `method.shots` samples each.
        test: such a folder of the same classes, to judge on. None: nothing is judged, or without `few`, the other
            samples of the classes.
        classes: how many, where `few` is None.
        per_class: new samples of each class.
        pool: the outside data set that `retrieve` finds samples in; where it is `data`, its validation split.
        learned: a checkpoint of such a run, whose augmenter is taken; nothing is trained then.
        resume: go on from the checkpoint in `out`, exactly as if there had been no stop.
        size: side that pictures are brought to; None: those of a folder must have one size.
        minutes: of training, at most.
        seed: of weights, tasks, new classes and new samples.
        judge: None: `Judge()`.
        device: where all is computed.
        say: gets a few lines of text.
        progress: bars.

    Raises:
        TypeError, ValueError, OSError: an argument is out of range, or data are missing or unfit; before any work.
        CheckpointError: the checkpoint is damaged or of another run.
        FileWriteError: `out` cannot be written; nothing is half-written.
    """
    out, judge = Path(out), judge or Judge()
    check_count("per_class", per_class, low=1)
    check_count("classes", classes, low=2)
    check_integer("seed", seed, low=0)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63 (got {seed})")
    if test is not None and few is None:
        raise ValueError("test must go with few, whose classes it has (got test alone)")
    if (learned is not None or resume) and not isinstance(method, Learned):
        raise ValueError(f"learned and resume must not be given for {name_of(method)}, which learns nothing before")
    if learned is not None and resume:
        raise ValueError("learned must not be given with resume, which goes on with learning (got both)")
    config: dict[str, Any] = {"augment": name_of(method), "seed": seed}
    if pool is not None:
        config["pool"] = pool.as_dict()
    files.try_writing(out / REPORT)
    files.try_writing_folder(out / PICTURES)
    wanted = ["train"] if isinstance(method, Learned) and learned is None else []
    sources: dict[str, Any] = make_sources(data, wanted + ["test"] * (few is None)) if wanted or few is None else {}
    for source in sources.values():
        _check_pictures("data", source, data.name)
        config["data"] = data.as_dict()
    shape = next((source.sample_shape for source in sources.values()), None)
    if learned is not None:
        before = _configuration(learned, name_of(method))
        shape = tuple(before["sample_shape"])
        config["learned"] = {"file": str(learned), "data": before["data"], "seed": before["seed"]}
    own: ClassSamples
    held_out: ClassSamples | None
    if few is None:
        own, held_out = _new_classes(_brought(data.name, sources["test"], shape, say), classes, method.shots, seed)
    else:
        own, held_out = _folders(few, test, shape, size, out, say)
    shape = own.sample_shape
    method.check(own, per_class)
    outside = None if pool is None else _pool(pool, data, shape, say)
    counts = own.counts.sum(1)
    each = f"{counts.min()}" + (f" to {counts.max()}" if counts.min() < counts.max() else "")
    judged = "" if held_out is None else f"; judged on {held_out.counts.sum():,} others"
    say(f"{len(own)} classes of {each} samples; {per_class} new ones of each{judged}")
    clock: dict[str, float] = {}
    learner, history = None, None
    if isinstance(method, Learned):
        torch.default_generator.manual_seed(seed)
        learner = method.learner(shape, outside).to(device)
        if learned is not None:
            _put_into(learner, learned)
        else:
            config |= {"sample_shape": list(shape), "settings": _lasting(method)}
            with timed(clock, "meta-training"):
                history = _trained(
                    method, learner, sources["train"], out / LEARNED, config, seed, resume, minutes, progress
                )
    result = Enlarged(method, learner, own, None, held_out, (), history, config, clock)
    if history is not None and history.stopped_by not in (None, TIME):
        return result
    with timed(clock, "making"):
        augmenter = method.augmenter(learner, progress)
        new = augment.generate_augmented_data(augmenter, own.to(device), per_class, seed).to("cpu")
    write_pictures(out / PICTURES, own, new)
    (out / REPORT).unlink(missing_ok=True)  # of pictures that are gone
    say(f"pictures: {out / PICTURES}")
    if held_out is None:
        return dataclasses.replace(result, new=new)
    with timed(clock, "judging"):
        figures = compared(own.to(device), new.to(device), held_out.to(device), judge)
    return dataclasses.replace(result, new=new, figures=figures)


def learned_method(path: str | Path, name: str, given: Mapping[str, Any]) -> Method:
    """The method that a checkpoint is of, with its settings but for those given that concern what is made alone.

    Raises:
        FileNotFoundError, CheckpointError: there is none, or it is no checkpoint of this method.
        ValueError: a setting is given that it has learned with.
    """
    kind = METHODS[name]
    settings = _configuration(path, name)["settings"]
    later = {each.name for each in dataclasses.fields(kind) if each.metadata["later"]}
    if fixed := sorted(set(given) - later):
        raise ValueError(f"{fixed[0]} must not be given with learned, whose own it is (got {given[fixed[0]]})")
    try:
        return kind(**{**settings, **given})
    except TypeError as error:
        raise CheckpointError(f"{path} has settings that are none of {name} ({in_one_line(error)})") from error


def compared(few: ClassSamples, new: ClassSamples, test: ClassSamples, judge: Judge) -> tuple[Figures, ...]:
    """Accuracies of classifiers trained on the original samples, and on these and the new ones, with equal steps.

    >>> data = ClassSamples.from_arrays(torch.randint(0, 256, (24, 16, 16), dtype=torch.uint8), torch.arange(24) % 2)
    >>> [each.way for each in compared(data, data, data, Judge(seeds=1, steps=2))]
    ['original', 'original + augmented', 'original + augmented - original']
    """
    shots = int(few.counts.sum(1).min())
    ways = {"original": few, "original + augmented": few + new}
    before, after = (
        Figures(
            shots,
            way,
            tuple(
                classifier_accuracy(train_classifier(data, steps=judge.steps, seed=seed), test)
                for seed in range(judge.seeds)
            ),
        )
        for way, data in ways.items()
    )
    return before, after, after.minus(before)


def write_pictures(path: str | Path, few: ClassSamples, new: ClassSamples) -> None:
    """A folder `<class>/<number>.png`, the originals of a class and then its new samples, whole or not there.

    Raises:
        FileWriteError: it cannot be written; an earlier one at `path` is as it was.
    """
    both = few + new
    with files.writing_folder(path) as folder, files.naming(path):
        for index, name in enumerate(folder_names(both.names)):
            (folder / name).mkdir()
            pictures = both.class_samples(index)
            for number, picture in enumerate(pictures):
                pixels = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
                Image.fromarray(pixels.contiguous().numpy()).save(
                    folder / name / f"{number:0{len(str(len(pictures)))}}.png"
                )


def folder_names(names: Sequence[str]) -> list[str]:
    """Names of classes as those of folders, each its own.

    >>> folder_names(["cat", "Greek/alpha", "Greek:alpha", ".x", "Cat"])
    ['cat', 'Greek_alpha', 'Greek_alpha 2', '_x', 'Cat 2']
    """
    found: dict[str, str] = {}
    for name in names:
        plain = "".join("_" if each in '/\\:*?"<>|' or not each.isprintable() else each for each in name)
        plain = plain.encode("utf-8", "replace")[:_SHOWN].decode("utf-8", "ignore").strip() or "_"
        plain = f"_{plain[1:]}" if plain[0] == "." else plain
        unique, number = plain, 1
        while unique.casefold() in found:
            number += 1
            unique = f"{plain} {number}"
        found[unique.casefold()] = unique
    return list(found.values())


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Seconds of a phase."""
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


def _trained(
    method: Learned,
    learner: Learner,
    data: ClassSamples,
    path: Path,
    config: Mapping[str, Any],
    seed: int,
    resume: bool,
    minutes: float | None,
    progress: bool,
) -> History:
    if resume:
        _check_same(path, config)
    every = max(1, method.steps // 10)
    return train(
        learner,
        method.episodes(data, seed),
        method.steps,
        meta_lr=method.meta_lr,
        minutes=minutes,
        checkpoint=path,
        checkpoint_every=every,
        resume=path if resume else None,
        config=config,
        progress=progress,
    )


def _lasting(method: Method) -> dict[str, Any]:
    """The settings that it learns with: not how long, nor what concerns the making alone."""
    return {
        each.name: getattr(method, each.name)
        for each in dataclasses.fields(method)
        if each.name != "steps" and (each.name == "shots" or not each.metadata["later"])
    }


def _configuration(path: str | Path, name: str, load: Callable[..., Any] = checkpoints.load) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    content: Any = load(path).get("config")
    if not isinstance(content, dict) or not {"augment", "data", "seed", "settings", "sample_shape"} <= set(content):
        raise CheckpointError(f"{path} is no checkpoint of metaaug-fast augment")
    if content["augment"] != name:
        raise CheckpointError(f"{path} must be of {name} (got one of {content['augment']})")
    found: dict[str, Any] = content
    return found


def _check_same(path: Path, config: Mapping[str, Any]) -> None:
    """ValueError unless the run that is to go on was started with these settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage, which going on warns of
        before = _configuration(path, config["augment"], lambda path: checkpoints.load_or_previous(path)[0])
    for name in ("sample_shape", "seed", "data", "pool", "settings"):
        one, other = before.get(name), config.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            for key in dict.fromkeys([*one, *other]):
                if one.get(key) != other.get(key):
                    raise ValueError(f"{key} must be {one.get(key)}, as {path} has it (got {other.get(key)})")
        elif one != other:
            raise ValueError(f"{name} must be {one}, as {path} has it (got {other})")


def _put_into(learner: Learner, path: str | Path) -> None:
    state = checkpoints.load(path).get("learner")
    try:
        check_state(learner, state)
        learner.load_state_dict(state)  # type: ignore[arg-type]
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit its settings ({in_one_line(error)})") from error


def _check_pictures(called: str, data: Any, got: str) -> None:
    """ValueError unless data are pictures in bytes."""
    if not isinstance(data, ClassSamples) or data.samples.dtype != torch.uint8 or len(data.sample_shape) != 3:
        raise ValueError(f"{called} must be labelled pictures in bytes (got {got})")
    if data.sample_shape[0] not in (1, 3):
        raise ValueError(f"{called} must have 1 or 3 channels (got {data.sample_shape[0]} of {got})")


def _brought(name: str, data: ClassSamples, shape: Sequence[int] | None, say: Callable[[str], None]) -> ClassSamples:
    if shape is None:
        return data
    like = ClassSamples.from_classes({name: torch.zeros(1, *shape, dtype=torch.uint8)})
    return brought(name, data, like, convert=True, say=say)


def _new_classes(data: ClassSamples, classes: int, shots: int, seed: int) -> tuple[ClassSamples, ClassSamples]:
    """Some classes, with so many samples of each, and with all others."""
    if classes > len(data):
        raise ValueError(f"classes must be at most those of the test split, {len(data)} (got {classes})")
    few, others = {}, {}
    for index in shuffled(len(data), seed)[:classes].tolist():
        samples, name = data.class_samples(index), data.names[index]
        if len(samples) <= shots:
            raise ValueError(
                f"shots must leave samples of every class to judge on (got {shots}; class {name!r} has {len(samples)})"
            )
        order = torch.from_numpy(shuffled(len(samples), seed))
        few[name], others[name] = samples[order[:shots]], samples[order[shots:]]
    return ClassSamples.from_classes(few), ClassSamples.from_classes(others)


def _folders(
    few: str | Path,
    test: str | Path | None,
    shape: Sequence[int] | None,
    size: int | None,
    out: Path,
    say: Callable[[str], None],
) -> tuple[ClassSamples, ClassSamples | None]:
    """The pictures of a user's folder, and of that with others of the same classes."""
    found: dict[str, ClassSamples] = {}
    for name, root in (("few", few), ("test", test)):
        if root is None:
            continue
        place = Path(root).expanduser().resolve()
        if not Path(root).is_dir():
            raise ValueError(f"{name} must be a folder with a folder for each class (there is none at {root})")
        if (out / PICTURES).resolve() in (place, *place.parents):
            raise ValueError(f"{name} must not lie in {out / PICTURES}, which is written anew (got {root})")
        data = Folder(root, "all", size=size)
        found[name] = _brought(str(root), data, shape, say)
        shape = found[name].sample_shape
    own, held_out = found["few"], found.get("test")
    if len({*own.names}) < len(own):
        raise ValueError(f"few must have each class once (got {few}, which is divided and has one twice)")
    if held_out is not None:
        if {*own.names} != {*held_out.names}:
            apart = sorted({*own.names} ^ {*held_out.names})[0]
            raise ValueError(f"test must have the classes of few (got {apart!r} in one of them)")
        held_out = held_out.subset(held_out.names.index(name) for name in own.names)
    return own, held_out


def _pool(pool: Part, data: Part, shape: Sequence[int], say: Callable[[str], None]) -> ClassSamples:
    split = "validation" if pool == data else "all"
    found = make_sources(pool, [split])[split]
    _check_pictures("pool", found, pool.name)
    assert isinstance(found, ClassSamples)
    return _brought(pool.name, found, shape, say)
