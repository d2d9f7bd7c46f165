"""Accuracy under attack on Omniglot, side by side: `python benchmarks/robust.py DIR`.

DIR holds the official archives. MAML, ADML and Adversarial Querying train by their recipes, each for `--minutes` at
most, and are tested on the same 600 episodes of the papers' 423 characters: clean, under FGSM and under PGD. The table
is printed as markdown, and kept with the checkpoints in `--out`; a recipe that has a report there already is not
trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import metaaug_fast as mf
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.learners.attacks import PGD
from metaaug_fast.report.tables import markdown
from metaaug_fast.runs.build import make_episodes, make_sources
from metaaug_fast.runs.config import configure, merged, recipe
from metaaug_fast.runs.evaluation import Evaluation
from metaaug_fast.runs.experiment import beside, judge, run
from metaaug_fast.runs.load import configuration

RECIPES = ("maml-omniglot", "adml-omniglot", "adv_query-omniglot")


def trained(name: str, root: Path, minutes: float, seed: int, out: Path) -> tuple[mf.Learner, dict[str, Any]]:
    """A recipe's learner and the report of its run, from the files if they are there."""
    path = out / f"{name}-{seed}.safetensors"
    if not beside(path, ".json").exists():
        content = merged(recipe(name), {"data": {"root": str(root)}, "training": {"minutes": minutes, "seed": seed}})
        content["training"]["validate_every"] = content["training"]["steps"]
        run(configure(content, []), path, progress=False)
    return mf.load(path), json.loads(beside(path, ".json").read_text())


def row(name: str, report: dict[str, Any], found: list[Evaluation]) -> tuple[str, ...]:
    """A line of the table."""
    history = report["history"]
    accuracies = [f"{100 * each.mean:.1f} ± {100 * each.interval:.1f}" for each in found]
    return name, f"{history['training'][-1]['step']:,}", f"{history['seconds'] / 60:.1f}", *accuracies


def main() -> None:
    """Train what is missing, attack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=15.0, help="a learner may train (15)")
    parser.add_argument("--radius", type=float, default=0.1, help="of the attacks, ink is 1 (0.1)")
    parser.add_argument("--steps", type=int, default=20, help="of PGD (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=RECIPES, help="recipes (MAML, ADML and Adversarial Querying)")
    parser.add_argument("--out", type=Path, default=Path("bench/robust"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    attacks = [None, mf.FGSM(options.radius, 0.0, 1.0), PGD(options.radius, options.steps, low=0.0, high=1.0)]
    rows = []
    for name in options.only:
        learner, report = trained(name, options.root, options.minutes, options.seed, options.out)
        path = options.out / f"{name}-{options.seed}.safetensors"
        config = configuration(path, mf.runs.checkpoint.load(path))
        source = make_sources(config.data, ["test"])["test"]
        episodes = make_episodes(config, "test", source)
        rows.append(row(name, report, [judge(config, learner, episodes, attack=attack) for attack in attacks]))
    table = markdown(("recipe", "meta-steps", "minutes", "clean, %", "FGSM, %", f"PGD, {options.steps} steps, %"), rows)
    said = "; ".join(str(attack) for attack in attacks if attack is not None)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(
        f"\nOmniglot, seed {options.seed}, 600 test episodes; {machine}, {options.threads} threads\n{said}\n\n{table}"
    )
    (options.out / f"table-{options.seed}.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
