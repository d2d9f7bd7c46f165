"""MAML with samples from outside beside MAML alone: `benchmarks/retrieval.py DIR_OMNIGLOT DIR_CLINC --threads 1`.

Characters of Omniglot with Glyphs as the pool, and intents of CLINC150 with unlabelled sentences; a quarter of an hour
on a core. Both learners of a row start as one and take as many meta-steps; both are judged on the same episodes of
classes that no training has seen, and the difference is a mean over these. Markdown is printed, sheets of what was
found are kept in `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.augment import Retrieval
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.data.wordpiece import wordpiece
from metaaug_fast.models.minilm import VOCABULARY
from metaaug_fast.report.plots import plot_samples
from metaaug_fast.report.tables import markdown, with_interval

HEAD = (
    "tasks",
    "pool",
    "join",
    "MAML alone, %",
    "with retrieval, %",
    "difference",
    "worth of what is found",
    "minutes",
)
LENGTH = 24
EACH = 40
"""Sentences of an intent in episodes, and as many in the pool."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("omniglot", type=Path, metavar="DIR_OMNIGLOT")
    parser.add_argument("clinc", type=Path, metavar="DIR_CLINC")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument(
        "--first", type=int, default=300, help="meta-steps on Omniglot that a row's learners share (300)"
    )
    parser.add_argument("--steps", type=int, default=200, help="meta-steps that each then takes (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/retrieval"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*sentences have more than")
    print(f"{options.episodes} episodes, seed {options.seed}, torch {torch.__version__}, {options.threads} threads\n")
    print(markdown(HEAD, [*characters(options), *intents(options)]))


def characters(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each number of shots and way to join, of Omniglot."""
    train, test = (mf.data.Omniglot(options.omniglot, split=split) for split in ("train", "test"))
    rows = []
    for shots in (1, 5):
        torch.manual_seed(options.seed)
        maml = mf.MAML(mf.models.strided_conv4(5), inner_lr=0.4)
        setting = {"ways": 5, "shots": shots, "queries": 5}
        episodes = mf.data.Episodes(train, tasks=16, seed=options.seed, **setting)
        judged = mf.data.Episodes(test, tasks=8, seed=-2, **setting)
        mf.train(maml, episodes, options.first, meta_lr=1e-3, progress=False)
        alone = trained(maml, episodes, options)
        for join in ("samples", "mixed"):
            began = time.perf_counter()
            learner = Retrieval(copy.deepcopy(maml), mf.data.Glyphs(split="all"), maml.model[:-1], join=join)
            learner = trained(learner, episodes, options)
            rows.append(row(f"Omniglot, 5-way {shots}-shot", "Glyphs", alone, learner, judged, options, began))
            if join == "samples":
                sheet(learner, judged.batch(0), options.out / f"found-{shots}.png")
    return rows


def intents(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each number of shots and pool, of CLINC150; a sentence is encoded once."""
    began = time.perf_counter()
    encoder = mf.models.minilm()
    text = {"tokenizer": "wordpiece", "length": LENGTH, "vocabulary": VOCABULARY}
    splits = {split: mf.data.Clinc150(options.clinc, split, **text) for split in ("train", "validation", "test")}
    ids = {split: [source.class_samples(index) for index in range(len(source))] for split, source in splits.items()}
    in_tasks = {split: embedded(encoder, [each[:EACH] for each in ids[split]]) for split in ("train", "test")}
    content = json.loads((options.clinc / "data_full.json").read_text())
    said = [text for part, pairs in content.items() if part.startswith("oos") for text, _ in pairs]
    others = [padded(wordpiece(said)), *ids["validation"]]
    strangers = torch.cat(embedded(encoder, others))
    unlabelled = torch.cat(embedded(encoder, [each[EACH : 2 * EACH] for split in in_tasks for each in ids[split]]))
    pools = {
        "out of scope, other intents": strangers,
        f"and {EACH} unlabelled ones of each intent": torch.cat([strangers, unlabelled]),
    }
    print(f"{len(unlabelled) + len(strangers)} sentences of pools and those of tasks were encoded in", end=" ")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)
    rows = []
    for shots in (1, 5):
        torch.manual_seed(options.seed)
        head = nn.Linear(strangers.shape[1], 20)
        for value in head.parameters():
            nn.init.zeros_(value)
        maml = mf.MAML(nn.Sequential(head), inner_lr=10.0, inner_steps=20, learn_inner_lr=True)
        setting = {"ways": 20, "shots": shots, "queries": 5, "tasks": 8}
        episodes, judged = (
            mf.data.Episodes(labelled(in_tasks[split]), seed=seed, **setting)
            for split, seed in (("train", options.seed), ("test", -2))
        )
        alone = trained(copy.deepcopy(maml), episodes, options)
        for name, pool in pools.items():
            began = time.perf_counter()
            learner = trained(Retrieval(copy.deepcopy(maml), pool, per_class=5), episodes, options)
            rows.append(row(f"CLINC150, 20-way {shots}-shot", name, alone, learner, judged, options, began))
    return rows


def trained(learner: mf.Learner, episodes: mf.data.Episodes, options: argparse.Namespace) -> mf.Learner:
    """A copy after the meta-steps on the same tasks as every other."""
    learner, tasks = copy.deepcopy(learner), copy.deepcopy(episodes)
    mf.train(learner, tasks, options.steps, meta_lr=1e-3, progress=False)
    return learner.eval()


@torch.no_grad()
def row(
    tasks: str,
    pool: str,
    alone: mf.Learner,
    learner: Retrieval,
    episodes: mf.data.Episodes,
    options: argparse.Namespace,
    began: float,
) -> tuple[str, ...]:
    """A line of the table."""
    found: list[list[Tensor]] = []
    for index in range(-(-options.episodes // episodes.tasks)):
        batch = episodes.batch(index)
        worth = learner.found(*batch.tensors[:2]).worth.mean(1)
        found.append([alone(batch).accuracy, learner(batch).accuracy, worth])
    before, after, worth = (100 * torch.cat(each)[: options.episodes].double() for each in zip(*found, strict=True))
    minutes = (time.perf_counter() - began) / 60
    line = (
        tasks,
        pool,
        learner.join,
        with_interval(before),
        with_interval(after),
        with_interval(after - before, sign="+"),
    )
    line = (*line, f"{float(worth.mean()) / 100:.2f}", f"{minutes:.1f}")
    print(" | ".join(line), flush=True)
    return line


def sheet(learner: Retrieval, batch: mf.TaskBatch, path: Path) -> None:
    """The support samples of a task's classes, and what was found for each, with what it is worth."""
    x, y = (each[0] for each in batch.tensors[:2])
    with torch.no_grad():
        found = learner.found(x[None], y[None])
    rows, worth = (each.view(-1, learner.per_class) for each in (found.rows, found.worth))
    own = torch.stack([x[y == label] for label in range(len(rows))])
    plot_samples({"support": own, "found": learner.pool[rows]}, path, {"found": worth})


@torch.no_grad()
def embedded(encoder: nn.Module, classes: list[Tensor]) -> list[Tensor]:
    """Features of sentences, class by class; encoded by length, so that little padding is computed."""
    x = torch.cat(classes)
    order = (x != 0).sum(1).argsort()
    found = [encoder(part[:, : int((part != 0).any(0).sum())]) for part in x[order].split(100)]
    return list(torch.cat(found)[order.argsort()].split([len(each) for each in classes]))


def labelled(classes: list[Tensor]) -> mf.data.ClassSamples:
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(each) for each in classes]))
    return mf.data.ClassSamples.from_arrays(torch.cat(classes), labels)


def padded(sentences: list[list[int]]) -> Tensor:
    return torch.tensor([[*ids[:LENGTH], *[0] * (LENGTH - len(ids))] for ids in sentences])


if __name__ == "__main__":
    main()
