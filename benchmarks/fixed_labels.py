"""Labels that can be learned by heart, and what augmentation does about it: `python benchmarks/fixed_labels.py DIR`.

DIR holds the official archives of Omniglot. MAML, 5-way 1-shot as by its recipe, is meta-trained on tasks in which each
character has the same label for good (`mf.data.FixedLabels`), without augmentation and with labels shuffled within and
across tasks, and on tasks of random labels; then tested on 600 episodes of new characters, with labels at random. "In
groups" is the setting of Rajendran, Irpan, Jang 2020 (arXiv 2007.05549): five characters that always come together. As
in their code, each character of a task is turned by a random right angle. Every row trains for `--steps`, but
at most `--minutes`: rows compare where their meta-steps are the same. Few `--characters` are sooner known by heart.

"Unadapted" is the accuracy on 600 training tasks before any step on their support sets: what is known by heart, 20 % by
chance. Batch norm makes all accuracies transductive.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import metaaug_fast as mf
from metaaug_fast.augment import Compose, QuarterTurns, ShuffleLabels
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.report.tables import markdown

WAYS, TASKS, STEPS, CHARACTERS = 5, 32, 4000, 1100
HEAD = ("labels in training", "augmentation", "accuracy, %", "unadapted, %", "meta-steps", "minutes", "published, %")
SHUFFLES: dict[str, list[Callable]] = {
    "none": [], "intra-shuffle": [ShuffleLabels()], "inter-shuffle": [ShuffleLabels(across=True)],
}  # fmt: skip
ROWS = {
    ("fixed, in groups", "none"): "98.1",
    ("fixed, in groups", "intra-shuffle"): "98.5",
    ("fixed, in groups", "inter-shuffle"): "98.7",
    ("fixed", "none"): "",
    ("fixed", "intra-shuffle"): "",
    ("random", "none"): "",
}
"""What to train on, and the paper's own accuracy (its table 1)."""


def row(labels: str, augmentation: str, root: Path, minutes: float, steps: int, characters: int) -> tuple[str, ...]:
    """A line of the table."""
    data = mf.data.Omniglot(root, split="train", rotations=False).subset(range(characters))
    source = data if labels == "random" else mf.data.FixedLabels(data, groups="groups" in labels)
    transform = Compose(QuarterTurns(), *SHUFFLES[augmentation])
    training = mf.data.Episodes(source, WAYS, shots=1, queries=1, tasks=TASKS, transform=transform)
    new = mf.data.Episodes(mf.data.Omniglot(root, split="test"), WAYS, shots=1, queries=1, tasks=TASKS)
    torch.manual_seed(0)
    learner = mf.MAML(mf.models.strided_conv4(ways=WAYS), inner_lr=0.4, inner_steps=1)
    history = mf.train(learner, training, steps, meta_lr=1e-3, minutes=minutes, progress=False)
    judged = mf.evaluate(learner, new)
    by_heart = mf.evaluate(learner, training, by_step=True).by_step[0]
    return (
        labels,
        augmentation,
        f"{100 * judged.mean:.2f} ± {100 * judged.interval:.2f}",
        f"{100 * by_heart:.1f}",
        f"{history.training[-1].step:,}",
        f"{history.seconds / 60:.1f}",
        ROWS[labels, augmentation] if characters == CHARACTERS else "",
    )


def main() -> None:
    """Train them all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=4.0, help="a row may train (4)")
    parser.add_argument("--steps", type=int, default=STEPS, help="a row trains (the recipe's 4,000)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="to train on (the papers' 1,100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(as many as torch takes)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = []
    for labels, augmentation in ROWS:
        rows.append(row(labels, augmentation, options.root, options.minutes, options.steps, options.characters))
        print(f"{time.strftime('%H:%M:%S')} {rows[-1]}", flush=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"\nOmniglot, {options.characters:,} characters, MAML 5-way 1-shot, seed 0; {machine}, ", end="")
    print(f"{options.threads} threads\n\n{markdown(HEAD, rows)}")


if __name__ == "__main__":
    main()
