"""Neural processes on curves and on pictures: `python benchmarks/neural_process.py DIR --threads 1`, DIR holding MNIST.

Curves: log-likelihood of a target point on 1,000 new curves, beside that of exact regression by the kernel of each
curve, which no learner is told, and of one normal distribution: of the context's mean and deviation, or the family's.
Pictures: MNIST's digits, pictures that no training has seen, completed from some of their pixels, at random or row by
row from the top; beside one normal distribution for the context and one for each place over the training pictures.
Means over tasks with 95 % intervals, one seed of training each. A sheet of completed digits is written.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import metaaug_fast as mf
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.data import ClassSamples, Draws, Episodes, GaussianProcesses, Pixels
from metaaug_fast.report.plots import plot_samples
from metaaug_fast.report.tables import markdown

FAMILIES = {
    "one kernel": GaussianProcesses(),
    "kernels vary": GaussianProcesses(length=(0.1, 0.6), amplitude=(0.1, 1.0)),
}
CURVES, CONTEXTS, POINTS = 1000, (3, 10), 50
PICTURES, GIVEN, SIDE = 500, (10, 100, 764), 28
LEARNERS = {"CNP": False, "with attention": True}
HELD_OUT = 300
UNSEEN = -1
"""The seed of tasks to judge on; trainings have others."""

Tasks = list[mf.TaskBatch]
Found = list[Distribution]


@dataclass
class Trained:
    """A learner, and what its training took: meta-steps, and minutes of a core."""

    learner: mf.CNP
    steps: int
    minutes: float

    @torch.no_grad()
    def __call__(self, tasks: Tasks) -> Found:
        adapted = [self.learner.adapt(each.support_x, each.support_y) for each in tasks]
        return [one.distribution(each.query_x) for one, each in zip(adapted, tasks, strict=True)]


class Waves(nn.Module):
    """Sines and cosines of random projections of a place (Tancik et al. 2020, arXiv 2006.10739), 2 to `features`."""

    directions: Tensor

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("directions", scale * torch.randn(2, features // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.directions
        return torch.cat([angles.sin(), angles.cos()], -1)


def of_numbers() -> nn.Module:
    return mf.models.perceptron(None, (1,), (128, 128))


def of_places() -> nn.Module:
    return nn.Sequential(Waves(128, 4.0), nn.Linear(128, 128))


def trained(
    encoder: Callable[[], nn.Module], episodes: Episodes, min_std: float, meta_lr: float, steps: int, seed: int
) -> dict[str, Trained]:
    """Both learners on the same tasks."""
    made = {}
    for name, attention in LEARNERS.items():
        torch.manual_seed(seed)
        learner = mf.CNP(encoder(), outputs=1, attention=attention, min_std=min_std, features=128)
        begin = time.process_time()
        mf.train(learner, copy.copy(episodes), steps, meta_lr=meta_lr, schedule="cosine", progress=False)
        made[name] = Trained(learner.eval(), steps, (time.process_time() - begin) / 60)
    return made


def normal(mean: Tensor, std: Tensor, like: Tensor) -> Distribution:
    return Independent(Normal(mean.expand_as(like), std.expand_as(like)), 1)


def of_context(tasks: Tasks, floor: float = 0.1) -> Found:
    """One normal distribution for all queries: the mean and the deviation of the context's targets."""
    pairs = [torch.std_mean(each.support_y, 1, keepdim=True) for each in tasks]
    return [normal(m, s.clamp(min=floor), each.query_y) for (s, m), each in zip(pairs, tasks, strict=True)]


def likelihoods(found: Found, tasks: Tasks) -> Tensor:
    """Log-likelihood of a target point, the mean over each task's."""
    return torch.cat([one.log_prob(each.query_y).mean(1) for one, each in zip(found, tasks, strict=True)])


def squares(found: Found, tasks: Tasks) -> Tensor:
    """Squared error of the means, the mean over each task's."""
    return torch.cat([(one.mean - each.query_y).square().mean((1, 2)) for one, each in zip(found, tasks, strict=True)])


def mean_of(values: Tensor) -> str:
    """With half of its 95 % interval, of one value a task."""
    return f"{float(values.mean()):.2f} ± {1.96 * float(values.std()) / len(values) ** 0.5:.2f}"


def curves(steps: int, seed: int) -> list[tuple[str, ...]]:
    """A line for each way to predict: the likelihoods for each family and number of context points."""
    lines: dict[str, list[str]] = {}
    minutes: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        episodes = Episodes(family, shots=max(CONTEXTS), queries=20, tasks=16, seed=seed)
        learners = trained(of_numbers, episodes, family.noise, 1e-3, steps, seed)
        low, high = family.amplitude
        spread = torch.tensor((low**2 + low * high + high**2) / 3 + family.noise**2).sqrt()
        for context in CONTEXTS:
            new = Episodes(family, shots=context, queries=POINTS, tasks=100, seed=UNSEEN)
            tasks = [new.batch(index) for index in range(CURVES // 100)]
            kernels = [family.kernels(Draws(UNSEEN, index, 100)) for index in range(CURVES // 100)]
            ways: dict[str, Found] = {
                "exact, each curve's kernel known": [
                    family.predict(each, *kernel) for each, kernel in zip(tasks, kernels, strict=True)
                ],
                **{name: learner(tasks) for name, learner in learners.items()},
                "family's mean and deviation": [normal(torch.zeros(()), spread, each.query_y) for each in tasks],
                "context's mean and deviation": of_context(tasks),
            }
            for name, found in ways.items():
                lines.setdefault(name, []).append(mean_of(likelihoods(found, tasks)))
        for name, each in learners.items():
            minutes.setdefault(name, []).append(f"{each.minutes:.1f}")
    return [(name, *values, " and ".join(minutes.get(name, []))) for name, values in lines.items()]


def given(x: Tensor, y: Tensor, count: int) -> mf.TaskBatch:
    """The first pixels as context, the others to be predicted."""
    return mf.TaskBatch(x[:, :count], y[:, :count], x[:, count:], y[:, count:])


def in_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All pixels of pictures, row by row."""
    order = (2 * SIDE * x[..., :1] + x[..., 1:]).argsort(1)
    return x.gather(1, order.expand_as(x)), y.gather(1, order)


def pictures(root: Path, steps: int, seed: int, sheet: Path) -> list[tuple[str, ...]]:
    """A line for each order and number of given pixels: likelihood and squared error of each way to predict."""
    data = mf.data.Mnist(root, split="all")
    classes = {name: data.class_samples(index) for index, name in enumerate(data.names)}
    known = ClassSamples.from_classes({name: each[:-HELD_OUT] for name, each in classes.items()})
    held_out = ClassSamples.from_classes({name: each[-HELD_OUT:] for name, each in classes.items()})
    episodes = Episodes(Pixels(known), shots=300, queries=200, tasks=8, seed=seed)
    learners = trained(of_places, episodes, 0.1, 2e-3, steps, seed)

    deviation, middle = torch.std_mean(known.samples.flatten(1).float() / 255, 0)

    def of_place(tasks: Tasks) -> Found:
        """A normal distribution for each place, over all pictures of the training."""
        corner = [((each.query_x + 1) / 2 * (SIDE - 1)).round().long() for each in tasks]
        places = [each[..., :1] * SIDE + each[..., 1:] for each in corner]
        return [Independent(Normal(middle[each], deviation[each].clamp(min=0.1)), 1) for each in places]

    new = Episodes(Pixels(held_out), shots=1, queries=SIDE**2 - 1, tasks=50, seed=UNSEEN)
    drawn = [new.batch(index) for index in range(PICTURES // 50)]
    shuffled = [
        (torch.cat([each.support_x, each.query_x], 1), torch.cat([each.support_y, each.query_y], 1)) for each in drawn
    ]
    rows = []
    for order, pixels in {"at random": shuffled, "from the top": [in_rows(*each) for each in shuffled]}.items():
        for count in GIVEN:
            tasks = [given(*each, count) for each in pixels]
            ways = {name: learner(tasks) for name, learner in learners.items()}
            ways |= {"of the place": of_place(tasks), "of the context": of_context(tasks)}
            parts = [(likelihoods(found, tasks), squares(found, tasks)) for found in ways.values()]
            rows.append((order, f"{count}", *(f"{mean_of(one)} ({float(two.mean()):.3f})" for one, two in parts)))
    draw(learners, *shuffled[0], sheet)
    for name, each in learners.items():
        print(f"pictures, {name}: {each.steps:,} meta-steps, {each.minutes:.1f} core minutes")
    return rows


def draw(learners: dict[str, Trained], x: Tensor, y: Tensor, path: Path, rows: int = 6) -> None:
    """For each number of random pixels: these, what the plain learner makes of them, what attention; its deviation."""
    x, y = x[:rows], y[:rows]
    places, truth = in_rows(x, y)

    def sheet(values: Tensor) -> Tensor:
        return 1 - values.reshape(rows, 1, 1, SIDE, SIDE).expand(-1, -1, 3, -1, -1).clamp(0, 1)

    blocks = {}
    for count in GIVEN:
        tasks = mf.TaskBatch(x[:, :count], y[:, :count], places, truth)
        plain, attentive = (learners[name]([tasks])[0] for name in LEARNERS)
        seen = torch.cdist(places, x[:, :count]).amin(-1) < 1e-3
        unseen = torch.tensor([0.62, 0.74, 0.95])[:, None, None]
        context = torch.where(seen.view(rows, 1, 1, SIDE, SIDE), sheet(truth), unseen)
        columns = [context, sheet(plain.mean), sheet(attentive.mean), sheet(2 * attentive.stddev)]
        blocks[f"{count} pixels"] = torch.cat(columns, 1)
    plot_samples({**blocks, "truth": sheet(truth)}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--curve-steps", type=int, default=80_000, help="meta-steps on curves (80,000)")
    parser.add_argument("--picture-steps", type=int, default=2500, help="meta-steps on pictures (2,500)")
    parser.add_argument("--only", choices=("curves", "pictures"), help="(both)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, default=Path("bench/completed.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    if options.only != "pictures":
        head = [f"{family}, {context} points" for family in FAMILIES for context in CONTEXTS]
        rows = curves(options.curve_steps, options.seed)
        print(markdown(("predicted by", *head, "core minutes"), rows), flush=True)
    if options.only != "curves":
        rows = pictures(options.root, options.picture_steps, options.seed, options.sheet)
        head = [*LEARNERS, "mean and deviation of the place", "of the context"]
        print(markdown(("pixels", "given", *head), rows))


if __name__ == "__main__":
    main()
