"""Every learner of pictures on Omniglot, side by side: `python benchmarks/learners.py DIR`.

DIR holds the official archives. Each learner trains by its own recipe, for as long as that says but at most
`--minutes`, validating 20 times, and is tested on 600 episodes of the papers' 423 characters. The table is printed as
markdown, and kept with its JSON reports in `--out`; a recipe that has a report there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.report.tables import markdown
from metaaug_fast.runs.config import configure, merged, recipe, recipes
from metaaug_fast.runs.experiment import beside, run

HEAD = (
    "recipe", "tasks", "accuracy, %", "transductive", "calibration error, %", "likelihood, -log", "meta-steps",
    "minutes", "minutes to 95 %", "published, %",
)  # fmt: skip
ENOUGH = 0.95
PUBLISHED = {
    "maml-omniglot": "98.7 ± 0.4",
    "maml-omniglot-20way": "95.8 ± 0.3",
    "maml-omniglot-20way-first_order": "89.4 ± 0.5",
    "reptile-omniglot": "97.68 ± 0.04",
    "reptile-omniglot-nontransductive": "95.39 ± 0.09",
    "protonet-omniglot": "98.8",
    "matching-omniglot": "98.1",
    "relation-omniglot": "99.6 ± 0.2",
    "snail-omniglot": "99.07 ± 0.16",
    "cnp-omniglot": "95.3",
    "mamlpp-omniglot": "99.47",
    "meta_sgd-omniglot": "99.53 ± 0.26",
    "imaml-omniglot": "99.16",
}
"""The papers' own figures for this setting; each recipe has its source."""


def report_of(name: str, root: Path, minutes: float, out: Path) -> dict[str, Any]:
    """What a recipe's run reports, from the file if there is one."""
    path = out / f"{name}.safetensors"
    if not beside(path, ".json").exists():
        given = {"data": {"root": str(root)}, "training": {"minutes": minutes}}
        content = merged(recipe(name), given)
        content["training"]["validate_every"] = max(1, content["training"]["steps"] // 20)
        run(configure(content, []), path, progress=False)
    return json.loads(beside(path, ".json").read_text())


def row(name: str, report: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    history, judged = report["history"], report["evaluation"]
    reached = (point["seconds"] for point in history["validation"] if point["mean"] >= ENOUGH)
    first = next(reached, None)
    sampling = report["config"]["sampling"]
    return (
        name,
        f"{sampling['ways']}-way {sampling['shots']}-shot",
        f"{100 * judged['mean']:.2f} ± {100 * judged['interval']:.2f}",
        "yes" if judged["transductive"] else "no",
        f"{100 * judged['calibration_error']:.1f}",
        f"{judged['nll']:.3f}",
        f"{history['training'][-1]['step']:,}",
        f"{history['seconds'] / 60:.1f}",
        "not reached" if first is None else f"{first / 60:.1f}",
        PUBLISHED.get(name, ""),
    )


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=15.0, help="a learner may train (15)")
    parser.add_argument("--out", type=Path, default=Path("bench/learners"))
    parser.add_argument("--only", nargs="*", help="recipes (all of Omniglot)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(as many as torch takes)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    names = options.only or [name for name in recipes() if "-omniglot" in name]
    rows = [row(name, report_of(name, options.root, options.minutes, options.out)) for name in names]
    table = markdown(HEAD, rows)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"\nOmniglot, seed 0, 600 test episodes; {machine}, {options.threads} threads\n\n{table}")
    (options.out / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
