"""How often conformal sets hold the right class of new tasks: `python benchmarks/coverage.py DIR CHECKPOINT ...`.

DIR holds Omniglot's official archives, a checkpoint is one of `metaaug-fast train`. Sets are calibrated on 600 episodes
of the validation characters, 5-way 1-shot, and judged on 2,000 of the papers' 423 test characters.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import metaaug_fast as mf
from metaaug_fast.report.tables import markdown

CALIBRATION, TEST, TASKS = 600, 2000, 20
COVERAGES = (0.9, 0.95, 0.99)


def judged(found: mf.Conformal, episodes: mf.data.Episodes) -> tuple[str, str]:
    """Share of right classes within their sets, with a 95 % interval over tasks, and the mean size of a set."""
    covered, sizes = [], []
    for index in range(TEST // TASKS):
        tasks = episodes.batch(index)
        sets = found.adapt(tasks.support_x, tasks.support_y).sets(tasks.query_x)
        covered.append(sets.gather(2, tasks.query_y.unsqueeze(2)).squeeze(2).double().mean(1))
        sizes.append(sets.double().sum(2).mean(1))
    share = torch.cat(covered)
    interval = 1.96 * float(share.std()) / math.sqrt(TEST)
    return f"{100 * float(share.mean()):.1f} ± {100 * interval:.1f}", f"{float(torch.cat(sizes).mean()):.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    options = parser.parse_args()
    validation, test = (
        mf.data.Episodes(mf.data.Omniglot(options.root, split), tasks=TASKS, seed=seed)
        for split, seed in (("validation", -1), ("test", -2))
    )
    rows = []
    for path in options.checkpoints:
        learner = mf.load(path)
        for coverage in COVERAGES:
            found = mf.conformal(learner, validation, coverage, count=CALIBRATION)
            rows.append((path.stem, f"{100 * coverage:g}", *judged(found, test)))
    print(markdown(("checkpoint", "asked for, %", "covered, %", "classes a set"), rows))


if __name__ == "__main__":
    main()
