"""What augmentation gives an ordinary classifier of few labels: `python benchmarks/gains.py DATA --threads 1`.

DATA is a folder with the data in `omniglot`, `mnist`, `cifar10` and `cifar100`. Twenty test characters of Omniglot at a
time, after learning from its background characters; the digits of MNIST, after Omniglot and Glyphs; the classes of
CIFAR-10, after CIFAR-100. Every augmenter is learned once, from classes that are not judged, with one sample a class in
each task. Then, for each seed, so many labelled samples of each class are drawn, an augmenter makes `EXTRA` more of
each, and a new network, `conv4` of 32 filters, is trained on both together and judged on other samples. All get as many
steps; the network's weights and the labelled samples of a seed are the same for all.

"By hand" is what is usual: turns, shifts and scales of characters, mirrored and shifted colour pictures. "Random
policy" has the learned policy's probabilities and strengths dealt out to its transforms anew in each seed. "Policy on
generator's" transforms the samples and a quarter as many generated ones. Distilled samples are learned from the few
alone, as many as these. Batch norms go by running statistics: no accuracy is transductive. Means over seeds with 95 %
intervals by Student's t; differences are of pairs of a seed. An hour and a half on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import metaaug_fast as mf
from metaaug_fast.augment import (
    AugmentationPolicy,
    Augmented,
    FlowTasks,
    FromScratch,
    Generator,
    Hallucination,
    PictureGenerator,
    Retrieval,
    distil,
    generate_augmented_data,
)
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.files import write_json
from metaaug_fast.report.tables import markdown
from metaaug_fast.runs.transfer import Figures, joined

SHOTS = (1, 2, 5, 10)
EXTRA, STEPS, FILTERS = 32, 200, 32
WAYS, TASKS, QUERIES = 5, 4, 5
"""Of what augmenters are learned on."""
HELD_OUT = 200
"""Samples of a class that judge, at most."""
TRANSFORMS = ("rotation", "translation", "scale", "shear", "elastic", "noise", "cutout", "blur", "brightness")

Split = Callable[[int], tuple[ClassSamples, ClassSamples]]
"""Of a seed, the samples that labels are drawn from, and those that judge."""


class Problem(NamedTuple):
    """Classes to learn an augmenter from, others to judge it on, and a source of samples from outside."""

    learned_from: ClassSamples
    split: Split
    outside: ClassSamples
    by_hand: AugmentationPolicy
    transforms: tuple[str, ...]


def problems(data: Path) -> dict[str, Callable[[], Problem]]:
    """All by name."""
    turned = AugmentationPolicy(
        ["rotation", "translation", "scale"], 1.0, {"rotation": 15 / 90, "translation": 0.2, "scale": 0.2}
    )
    mirrored = AugmentationPolicy(
        ["horizontal_flip", "translation"], {"horizontal_flip": 0.5, "translation": 1.0}, {"translation": 0.25}
    )

    def omniglot(split: str) -> ClassSamples:
        return mf.data.Omniglot(data / "omniglot", split=split, rotations=False)

    def characters() -> Problem:
        test = omniglot("test")

        def split(seed: int) -> tuple[ClassSamples, ClassSamples]:
            return parted(test.subset(np.random.default_rng(seed).permutation(len(test))[:20]), seed, 10)

        return Problem(omniglot("train"), split, mf.data.Glyphs(split="train"), turned, TRANSFORMS)

    def digits() -> Problem:
        letters = mf.data.Glyphs(split="train")
        target = mf.data.Mnist(data / "mnist", split="all")
        both = joined({"omniglot": omniglot("train"), "glyphs": letters})
        return Problem(both, lambda seed: parted(target, seed, HELD_OUT), letters, turned, TRANSFORMS)

    def colours() -> Problem:
        target = mf.data.Cifar10(data / "cifar10", split="all")
        learned_from, outside = (mf.data.Cifar100(data / "cifar100", split=split) for split in ("train", "test"))
        transforms = (*TRANSFORMS, "contrast", "horizontal_flip", "vertical_flip")
        return Problem(learned_from, lambda seed: parted(target, seed, HELD_OUT), outside, mirrored, transforms)

    return {"Omniglot": characters, "MNIST": digits, "CIFAR-10": colours}


def parted(data: ClassSamples, seed: int, held_out: int) -> tuple[ClassSamples, ClassSamples]:
    """Samples of each class that labels are drawn from, and `held_out` others."""
    pool, judging = {}, {}
    for index, name in enumerate(data.names):
        samples = data.class_samples(index)
        order = torch.from_numpy(np.random.default_rng([seed, index]).permutation(len(samples)))
        judging[name], pool[name] = samples[order[:held_out]], samples[order[held_out : held_out + max(SHOTS)]]
    return ClassSamples.from_classes(judging), ClassSamples.from_classes(pool)


def first(data: ClassSamples, count: int) -> ClassSamples:
    """So many samples of each class."""
    return ClassSamples.from_classes({name: data.class_samples(i)[:count] for i, name in enumerate(data.names)})


# --- what is learned ---


def network(problem: Problem, filters: int = 16) -> nn.Module:
    return mf.models.strided_conv4(WAYS, problem.learned_from.sample_shape, hidden=filters)


def trained(learner: mf.Learner, problem: Problem, steps: int, transform: Any = None, **sizes: int) -> Any:
    """Meta-trained on the problem's other classes."""
    sizes = {"ways": WAYS, "shots": 1, "queries": QUERIES, "tasks": TASKS} | sizes
    episodes = Episodes(problem.learned_from, **sizes, transform=transform)
    mf.train(learner, episodes, steps, schedule="cosine", progress=False)
    return learner


def policy(problem: Problem) -> AugmentationPolicy:
    start = AugmentationPolicy(problem.transforms, 0.5, 0.2, copies=4, originals=True)
    found: AugmentationPolicy = trained(Augmented(FromScratch(network(problem)), start), problem, 600).policy
    return found


def hallucination(problem: Problem) -> Hallucination:
    made_by = PictureGenerator(problem.learned_from.sample_shape[0])
    found: Hallucination = trained(Hallucination(FromScratch(network(problem)), made_by, per_class=4), problem, 400)
    return found


def generator(problem: Problem) -> Generator:
    flow = FlowTasks(repeats=4, patch=2)
    shape = problem.learned_from.sample_shape
    model = flow.network(shape, hidden=24, blocks=3)
    learner = mf.Reptile(model, 1e-3, 5, loss="mse", inner_batch=10, meta_lr=0.5)
    trained(learner, problem, 1000, flow, ways=1, shots=5, queries=1)
    return Generator(learner, flow, steps=8, start=0.4, inner_steps=20)


def retrieval(problem: Problem) -> Retrieval:
    body = network(problem, 32)[:-1]
    trained(mf.ProtoNet(body), problem, 300, tasks=8)
    learner = Retrieval(FromScratch(network(problem)), problem.outside, body, per_class=4)
    found: Retrieval = trained(learner, problem, 200)
    return found


LEARNED: dict[str, Callable[[Problem], Any]] = {
    "policy": policy,
    "hallucination": hallucination,
    "generator": generator,
    "retrieval": retrieval,
}
"""Augmenters that are learned on other classes."""


# --- what is compared ---


def dealt_out(policy: AugmentationPolicy, seed: int) -> AugmentationPolicy:
    """The policy with its probabilities and strengths dealt out to its transforms at random."""
    order, settings = np.random.default_rng(seed), policy.as_dict()
    strengths = {name: strength for name, (_, strength) in settings.items() if strength is not None}
    chances = order.permutation([chance for chance, _ in settings.values()])
    return AugmentationPolicy(
        settings,
        dict(zip(settings, chances.tolist(), strict=True)),
        dict(zip(strengths, order.permutation([*strengths.values()]).tolist(), strict=True)),
    )


def distilled(few: ClassSamples, seed: int) -> ClassSamples:
    """As many samples, learned for what a network that is trained on them does on the few themselves."""
    model = mf.models.strided_conv4(len(few), few.sample_shape, hidden=16)
    per_class = int(few.counts.min())
    return distil(model, few, per_class, steps=30, starts=2, inner_steps=8, seed=seed).data(few.names)


def more_of(problem: Problem) -> dict[str, Callable[[ClassSamples, int], ClassSamples | None]]:
    """How the few of a seed become more, by the name of a row; None: they stay as they are."""

    @cache
    def learned(name: str) -> Any:
        began = time.perf_counter()
        torch.manual_seed(0)
        augmenter = LEARNED[name](problem)
        tqdm.write(f"{name} learned in {(time.perf_counter() - began) / 60:.1f} minutes")
        if isinstance(augmenter, AugmentationPolicy):
            tqdm.write(str(augmenter))
        return augmenter

    def by(name: str, few: ClassSamples, seed: int, extra: int = EXTRA) -> ClassSamples:
        return generate_augmented_data(learned(name), few, extra, seed)

    return {
        "original only": lambda few, seed: None,
        "by hand": lambda few, seed: generate_augmented_data(problem.by_hand, few, EXTRA, seed),
        "random policy": lambda few, seed: generate_augmented_data(
            dealt_out(learned("policy"), seed), few, EXTRA, seed
        ),
        **{name: partial(by, name) for name in LEARNED},
        "policy and hallucination": lambda few, seed: (
            by("policy", few, seed, EXTRA // 2) + by("hallucination", few, seed, EXTRA // 2)
        ),
        "policy on generator's": lambda few, seed: by(
            "policy", few + by("generator", few, seed, EXTRA // 4), seed, EXTRA
        ),
        "distilled": distilled,
    }


def accuracies(problem: Problem, more: Callable[[ClassSamples, int], Any], seeds: int) -> dict[str, list[float]]:
    """Of a row, by labels a class, a number for each seed."""
    found: dict[str, list[float]] = {str(shots): [] for shots in SHOTS}
    for seed in range(seeds):
        judging, pool = problem.split(seed)
        for shots in SHOTS:
            few = first(pool, shots)
            extra = more(few, seed)
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                classifier = mf.models.conv4(len(few), few.sample_shape, hidden=FILTERS)
            mf.train_classifier(few if extra is None else few + extra, classifier, steps=STEPS, seed=seed)
            found[str(shots)].append(mf.classifier_accuracy(classifier, judging))
    return found


def figures(name: str, problem: Problem, seeds: int, path: Path) -> dict[tuple[str, int], Figures]:
    """Accuracies over seeds, by row and labels; rows that `path` holds for as many seeds are taken from there."""
    known = json.loads(path.read_text()) if path.exists() else {}
    rows = more_of(problem)
    for row, more in tqdm(rows.items(), desc=name):
        if {len(each) for each in known.get(row, {}).values()} != {seeds}:
            known[row] = accuracies(problem, more, seeds)
            write_json(path, known)
    return {
        (row, int(shots)): Figures(int(shots), row, tuple(values))
        for row in rows
        for shots, values in known[row].items()
    }


def table(name: str, found: dict[tuple[str, int], Figures]) -> str:
    """A row for each way, accuracies and what they are better by than the original alone, and than by hand."""
    rows = []
    for row in dict.fromkeys(row for row, _ in found):
        cells = [percent(found[row, shots]) for shots in SHOTS]
        beside = [
            percent(found[row, shots].minus(found[other, shots]), "+")
            for other in ("original only", "by hand")
            for shots in (1, 5)
        ]
        rows.append((row, *cells, *beside))
    head = (
        f"{name}, labels a class",
        *map(str, SHOTS),
        *(f"{gain} at {shots}" for gain in ("gain", "beside by hand") for shots in (1, 5)),
    )
    return markdown(head, rows)


def percent(figures: Figures, sign: str = "") -> str:
    return f"{100 * figures.mean:{sign}.1f} ± {100 * (figures.interval or 0):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--problems", nargs="+", help="some of Omniglot, MNIST, CIFAR-10 (all)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/gains"),
        metavar="DIR",
        help="of accuracies, kept row by row: an interrupted run goes on",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for name, make in problems(options.data).items():
        if options.problems and name not in options.problems:
            continue
        began = time.perf_counter()
        found = figures(name, make(), options.seeds, options.out / f"{name.lower()}.json")
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.threads} threads"
        minutes = (time.perf_counter() - began) / 60
        print(f"{table(name, found)}\n\n{options.seeds} seeds, {minutes:.0f} minutes; {machine}\n", flush=True)


if __name__ == "__main__":
    main()
