"""Routes to new drawings of a character from five: MAML, Reptile, a conditioning vector, and pictures as condition.

`python benchmarks/generate.py DIR --threads 1 --minutes 6`: each route learns on Omniglot's background characters for
as long, DIR holding the data; then each draws characters that no route has seen, from five drawings of each. A
classifier that was trained on ten other drawings of these characters says which one a picture is; five more judge the
classifier. The nearest distance is that to the closest of the five, in units of that of real drawings: far below 1 are
copies. The spread is the distance between drawings of a character, in units of real ones.

MAML and the conditioning vector learn without inner steps at first, a flow to all characters, for half their minutes.
"Not adapted" is the flow to all characters before it has seen the five, which shows what it owes to the picture that
is mixed in. Means over seeds, each with characters and a classifier of its own, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import metaaug_fast as mf
from metaaug_fast.augment import FlowTasks, Generator
from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.learners.gradient import GradientLearner
from metaaug_fast.report.plots import plot_samples
from metaaug_fast.report.tables import markdown, with_interval

SHAPE = (1, 28, 28)
GIVEN, LEARNED, JUDGING = 5, 10, 5
"""Drawings of a character that a route is given, that the classifier learns from, and that judge it."""
WAYS, PER_CLASS, SEEDS = 20, 5, 5
HEAD = ("route", "meta-steps", "start", "recognised, %", "nearest distance", "spread")


class Route(NamedTuple):
    """How a generator is learned and drawn from."""

    flow: FlowTasks
    learner: GradientLearner
    tasks: int
    meta_lr: float
    warm_up: bool = False
    inner_steps: int | None = None


def routes(hidden: int) -> dict[str, Callable[[], Route]]:
    """All by name."""
    plain, told = FlowTasks(repeats=4, patch=2), FlowTasks(repeats=4, context=2, patch=2)

    def network(flow: FlowTasks) -> torch.nn.Module:
        return flow.network(SHAPE, hidden=hidden, blocks=4)

    return {
        "MAML": lambda: Route(
            plain, mf.MAML(network(plain), 0.01, 3, loss="mse", learn_inner_lr=True), 4, 1e-3, warm_up=True
        ),
        "Reptile": lambda: Route(
            plain, mf.Reptile(network(plain), 1e-3, 10, loss="mse", inner_batch=20), 4, 0.5, inner_steps=60
        ),
        "conditioning vector (CAVIA)": lambda: Route(
            plain,
            mf.CAVIA(network(plain), 1.0, 3, context=32, loss="mse", learn_inner_lr=True),
            4,
            1e-3,
            warm_up=True,
        ),
        "pictures as condition": lambda: Route(told, mf.MAML(network(told), inner_steps=0, loss="mse"), 8, 1e-3),
    }


def learn(route: Route, data: ClassSamples, minutes: float, name: str) -> int:
    """Train a route for so long; how many meta-steps that took."""
    flow, learner, tasks, meta_lr, warm_up, _ = route
    episodes = Episodes(data, ways=1, shots=GIVEN, queries=GIVEN, tasks=tasks, seed=0, transform=flow)
    optimizers, steps = learner.optimizers(meta_lr), learner.inner_steps
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    done, began = 0, time.perf_counter()
    with tqdm(total=100, desc=name, mininterval=10) as bar:
        while (part := (time.perf_counter() - began) / (60 * minutes)) < 1:
            learner.inner_steps = 0 if warm_up and part < 0.5 else steps
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * min(1.0, 2 * (1 - part))  # falls in the second half
            out = learner.meta_step(next(episodes), optimizers)
            done += 1
            bar.n = round(100 * part)
            bar.set_postfix_str(f"loss {float(out.loss):.4f}")
    learner.inner_steps = steps
    return done


def drawings(data: ClassSamples, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real drawings `[WAYS, N, 1, 28, 28]` of characters that `seed` chooses: given, to train on, to judge."""
    sampler = Episodes(data, ways=WAYS, shots=GIVEN, queries=LEARNED + JUDGING, tasks=1, seed=seed)
    batch = sampler.batch(0)
    given = batch.support_x[0].unflatten(0, (WAYS, GIVEN))
    others = batch.query_x[0].unflatten(0, (WAYS, LEARNED + JUDGING))
    return given, others[:, :LEARNED], others[:, LEARNED:]


def classifier(x: Tensor, seed: int) -> torch.nn.Module:
    """Trained on real drawings `[WAYS, N, 1, 28, 28]`, each a little turned, sheared, scaled and shifted every time."""
    torch.manual_seed(seed)
    model = mf.models.conv4(ways=WAYS, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = x.flatten(0, 1), torch.arange(WAYS).repeat_interleave(x.shape[1])
    for _ in range(150):
        some = torch.randperm(len(y))[:100]
        moves = torch.eye(2, 3) + 0.12 * torch.randn(len(some), 2, 3)
        grid = F.affine_grid(moves, [len(some), *SHAPE], align_corners=False)
        loss = F.cross_entropy(model(F.grid_sample(x[some], grid, align_corners=False)), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def recognised(model: torch.nn.Module, x: Tensor) -> float:
    """The share of `[WAYS, N, 1, 28, 28]` that are taken for what they should be, in per cent."""
    found = model(x.flatten(0, 1)).argmax(1).unflatten(0, x.shape[:2])
    return 100 * float((found == torch.arange(len(x)).unsqueeze(1)).double().mean())


def nearest(x: Tensor, given: Tensor) -> float:
    """The mean distance to the closest drawing that was given, of the same character."""
    return float(torch.cdist(x.flatten(2), given.flatten(2)).amin(2).mean())


def spread(x: Tensor) -> float:
    """The mean distance between two drawings of a character."""
    return float(torch.stack([F.pdist(each.flatten(1)).mean() for each in x]).mean())


def main() -> None:
    """Learn all routes, judge them, print the table and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=6.0, help="that each route may learn (6)")
    parser.add_argument("--hidden", type=int, default=48, help="channels of the network (48)")
    parser.add_argument("--steps", type=int, default=32, help="of Euler's method (32)")
    parser.add_argument("--seeds", type=int, choices=(5, 10), default=SEEDS, help="sets of characters (5)")
    parser.add_argument("--sheet", type=Path, default=Path("bench/generated.png"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = {part: mf.data.Omniglot(given.root, part, splits="background") for part in ("train", "test")}
    real = [drawings(data["test"], seed) for seed in range(given.seeds)]
    judges = [classifier(learned, seed) for seed, (_, learned, _) in enumerate(real)]
    accuracies = [recognised(judge, held_out) for judge, (_, _, held_out) in zip(judges, real, strict=True)]
    units = [(nearest(held_out, few), spread(held_out)) for few, _, held_out in real]
    rows = [("real drawings", "", "", with_interval(accuracies, 1), "1", "1")]
    print(markdown(HEAD, rows), flush=True)
    sheet = {"given": real[0][0][:8]}
    for name, make in routes(given.hidden).items():
        torch.manual_seed(0)
        route = make()
        steps = learn(route, data["train"], given.minutes, name)
        adapts = {name: route.inner_steps}
        if route.learner.inner_steps:
            adapts[f"{name}, not adapted"] = 0
        for (row, inner_steps), start in itertools.product(adapts.items(), (0.0, 0.4)):
            generator = Generator(route.learner, route.flow, given.steps, start, inner_steps)
            made = [
                generator.draw(few, PER_CLASS, torch.Generator().manual_seed(seed))
                for seed, (few, _, _) in enumerate(real)
            ]
            shares = [recognised(judge, each) for judge, each in zip(judges, made, strict=True)]
            far = [nearest(x, few) / unit for x, (few, _, _), (unit, _) in zip(made, real, units, strict=True)]
            wide = [spread(x) / unit for x, (_, unit) in zip(made, units, strict=True)]
            rows.append(
                (
                    row,
                    f"{steps:,}",
                    f"{start:g}",
                    with_interval(shares, 1),
                    with_interval(far, 2),
                    with_interval(wide, 2),
                )
            )
            print(markdown(HEAD, rows[-1:]), flush=True)
            if start and row == name:
                sheet[name] = made[0][:8]
    given.sheet.parent.mkdir(parents=True, exist_ok=True)
    plot_samples(sheet, given.sheet)
    print(f"\n{markdown(HEAD, rows)}\n\n{given.sheet}")


if __name__ == "__main__":
    main()
