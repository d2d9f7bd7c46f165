"""What MetaGAN adds to its base in as many meta-steps: `python benchmarks/metagan.py DIR --threads 1`.

DIR holds Omniglot's official archives. 5-way 1-shot, 5 queries a class, 8 tasks a meta-step; MAML on a strided network
and Relation Networks, by cross-entropy, both of 16 filters, each alone and in MetaGAN with two weights of what is
adversarial, 1 being the paper's. In a seed all arms of a base start from the same network, and see the same episodes.
Judged on 600 episodes of the 423 test characters, the same in every row. Means over seeds, gains over the base in pairs
of a seed, with 95 % intervals by Student's t. Half an hour on a core that others use, too.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import metaaug_fast as mf
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.data import Episodes, Omniglot
from metaaug_fast.models import conv4, strided_conv4
from metaaug_fast.report.tables import markdown, with_interval

HEAD = ("learner", "weight", "meta-steps", "accuracy, %", "gain, points", "minutes")
WEIGHTS = (0.2, 1.0)
EPISODES = 600

BASES: dict[str, tuple[int, Callable[[], mf.Learner]]] = {
    "MAML": (1500, lambda: mf.MAML(strided_conv4(5, hidden=16))),
    "Relation Networks": (250, lambda: mf.RelationNet(conv4(hidden=16, pools=2, maps=True), loss="cross_entropy")),
}
"""Meta-steps, and the learner."""


def trained(base: str, weight: float | None, seed: int, root: Path) -> tuple[float, float]:
    """Accuracy in percent and minutes of training; of no weight, the base alone."""
    steps, make = BASES[base]
    torch.manual_seed(seed)
    learner = make() if weight is None else mf.MetaGAN(make(), weight=weight)
    episodes = Episodes(Omniglot(root, split="train"), ways=5, shots=1, queries=5, tasks=8, seed=seed)
    started = time.perf_counter()
    mf.train(learner, episodes, steps, progress=False)
    minutes = (time.perf_counter() - started) / 60
    judging = Episodes(Omniglot(root, split="test"), ways=5, shots=1, queries=5, tasks=20, seed=-2)
    return 100 * mf.evaluate(learner, judging, EPISODES).mean, minutes


def main() -> None:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5, help="at least two (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(as many as torch takes)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    arms = [(base, weight) for base in BASES for weight in (None, *WEIGHTS)]
    found: dict[tuple[str, float | None], list[tuple[float, float]]] = {arm: [] for arm in arms}
    for seed in range(options.seeds):
        for (base, weight), results in found.items():
            results.append(trained(base, weight, seed, options.root))
            print(f"seed {seed}, {base}, weight {weight}: {results[-1][0]:.1f} %", flush=True)
    rows = []
    for (base, weight), results in found.items():
        accuracies = [accuracy for accuracy, _ in results]
        gains = [accuracy - alone for accuracy, (alone, _) in zip(accuracies, found[base, None], strict=True)]
        rows.append(
            (
                base if weight is None else f"MetaGAN on {base}",
                "" if weight is None else f"{weight:g}",
                f"{BASES[base][0]:,}",
                with_interval(accuracies),
                "" if weight is None else with_interval(gains, sign="+"),
                f"{sum(minutes for _, minutes in results) / len(results):.1f}",
            )
        )
    print(markdown(HEAD, rows))
    print(f"{options.seeds} seeds; {options.threads} threads, {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
