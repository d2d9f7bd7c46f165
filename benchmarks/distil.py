"""Ten digits that teach a network most: `python benchmarks/distil.py DIR --threads 1`, DIR holding MNIST's files.

A network of random weights takes ten steps on a few pictures, and is judged on 2,000 others. Those pictures are learned
(Wang, Zhu, Torralba, Efros 2018, arXiv 1811.10959), with the rate of each step, or real ones drawn at random, with the
best of a few rates; one of each class, or ten. Means over networks that no learning has seen, with 95 % intervals.
Batch norms go by the batch: accuracies are transductive. A sheet of the learned pictures is written.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.augment import DistilledSet, distil, random_starts
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.data import ClassSamples
from metaaug_fast.learners.supervised import inputs, labelled
from metaaug_fast.report.plots import plot_samples
from metaaug_fast.report.tables import markdown

HEAD = ("pictures a class", "learned, %", "real, %", "best rate of these", "minutes")
HELD_OUT, NETWORKS, RATES = 200, 40, (0.1, 0.3, 1.0, 3.0)
UNSEEN = 1_000_000
"""The seed of networks to judge on; those that are learned on have smaller ones."""


@torch.no_grad()
def judged(few: DistilledSet, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The accuracy of each new network that was trained on `few`."""
    starts = random_starts(model, NETWORKS, seed=UNSEEN)
    parts = [few(model, x, y, some).accuracy for some in starts.split(4)]
    return torch.cat([part for part in parts if part is not None])


def percent(accuracies: Tensor) -> str:
    half = 1.96 * float(accuracies.std()) / len(accuracies) ** 0.5
    return f"{100 * float(accuracies.mean()):.1f} ± {100 * half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=300, help="of learning (300)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, default=Path("bench/distilled.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    data = mf.data.Mnist(options.root, split="all")
    classes = {name: data.class_samples(index) for index, name in enumerate(data.names)}
    train = ClassSamples.from_classes({name: each[HELD_OUT:2000] for name, each in classes.items()})
    held_out, y = labelled(ClassSamples.from_classes({name: each[:HELD_OUT] for name, each in classes.items()}))
    x = inputs(held_out, torch.empty(0))
    model = mf.models.strided_conv4(len(train), hidden=16)
    rows, sheet = [], {}
    for per_class in (1, 10):
        began = time.perf_counter()
        learned = distil(model, train, per_class, steps=options.steps)
        real_x, real_y = labelled(
            ClassSamples.from_classes({name: each[-per_class:] for name, each in classes.items()})
        )
        real = {rate: judged(DistilledSet(inputs(real_x, x), real_y, rate), model, x, y) for rate in RATES}
        best = max(real, key=lambda rate: float(real[rate].mean()))
        minutes = (time.perf_counter() - began) / 60
        found = judged(learned, model, x, y)
        rows.append((str(per_class), percent(found), percent(real[best]), f"{best:g}", f"{minutes:.1f}"))
        pictures = learned.x.detach().unflatten(0, (len(train), per_class))
        sheet[f"{per_class} a class"] = pictures[:, :5]
        print(markdown(HEAD, rows[-1:]), flush=True)
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    plot_samples(sheet, options.sheet)
    print(f"\n{markdown(HEAD, rows)}\n\n{options.sheet}; torch {torch.__version__}, {options.threads} threads")


if __name__ == "__main__":
    main()
