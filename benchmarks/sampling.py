"""What share of a training step goes into drawing its tasks: `python benchmarks/sampling.py`.

Real data come from `$METAAUG_DATA`; the 500,000 pictures are random ones in a file of 1.5 GB, which is mapped. Every
row is also checked to draw the same sequence, whoever draws, resumed in the middle. The share of a step is the time
that the loop waits for `next(batches)`, by medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import metaaug_fast as mf
from metaaug_fast.data.mapped import rows_in
from metaaug_fast.report.tables import plain

DATA = Path(os.environ.get("METAAUG_DATA", "../shared/data"))
STEPS, WARM_UP = 40, 5


def many_pictures(folder: Path, count: int = 500_000, classes: int = 1000) -> mf.data.ClassSamples:
    """Random pictures in colour, 32 x 32, in random order of their classes."""
    rng, file = np.random.default_rng(0), folder / "pictures.npy"
    with rows_in(file) as rows:
        for _ in range(count):
            rows.append(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))
    return mf.data.ClassSamples.from_arrays(file, rng.integers(0, classes, count))


def row(name: str, learner: mf.MAML, episodes: mf.data.Episodes, workers: int) -> list[str]:
    """Time to draw and to take a step, and the former's share."""
    expected = [episodes.batch(index) for index in range(4)]
    batches = mf.data.Loader(episodes, workers) if workers else episodes.shard(0, 1)
    drawn = [next(batches) for _ in range(2)]
    batches.load_state_dict({"seed": episodes.seed, "position": 2})
    drawn += [next(batches) for _ in range(2)]
    if drawn != expected:
        raise AssertionError(f"{name} with {workers} workers draws another sequence")
    optimizers, waits, steps = learner.optimizers(), [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        tasks = next(batches)
        waits.append(time.perf_counter() - started)
        learner.meta_step(tasks, optimizers)
        steps.append(time.perf_counter() - started)
    if workers:
        batches.close()
    wait, step = (1000 * statistics.median(times[WARM_UP:]) for times in (waits, steps))
    return [name, str(workers), f"{wait:.2f}", f"{step:.1f}", f"{wait / step:.1%}"]


def main() -> None:
    """Print the table."""
    colour = {"ways": 5, "shots": 5, "queries": 15, "tasks": 4}
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            "Omniglot, 5-way 1-shot, T=32": (
                mf.MAML(mf.models.strided_conv4(ways=5), inner_lr=0.4),
                mf.data.Episodes(mf.data.Omniglot(DATA / "omniglot"), ways=5, queries=1, tasks=32),
            ),
            "CIFAR-FS, 5-way 5-shot, T=4": (
                mf.MAML(mf.models.conv4(5, (3, 32, 32), hidden=32), inner_lr=0.01, inner_steps=5),
                mf.data.Episodes(mf.data.Cifar100(DATA / "cifar100"), **colour),
            ),
            "500,000 mapped pictures, the same": (
                mf.MAML(mf.models.conv4(5, (3, 32, 32), hidden=32), inner_lr=0.01, inner_steps=5),
                mf.data.Episodes(many_pictures(Path(folder)), **colour),
            ),
        }
        rows = [row(name, *parts, workers) for name, parts in sets.items() for workers in (0, 2)]
    print(plain(["tasks", "workers", "wait, ms", "step, ms", "share"], rows))


if __name__ == "__main__":
    main()
