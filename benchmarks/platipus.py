"""Several ways to read three points: `python benchmarks/platipus.py docs/draws.png`.

PLATIPUS and MAML are meta-trained on sinusoids and lines, as often as each other (`mf.data.AmbiguousCurves`), from
`--shots` noisy points, with the same network, inner loop and number of meta-steps, and tested on 300 other tasks.

A predicted curve is read as what fits it better at 100 inputs over the range: the best line, `a x + b`, or the best
sinusoid, `a sin x + b cos x`, which has an amplitude and a phase; both by least squares. It counts as a reading only
where the root mean square it leaves is below half of what the other one leaves; else it is neither. A task has both
readings if a draw in ten is a line, and a draw in ten a sinusoid. MAML has one curve, and so at most one reading.

Tasks are ambiguous whose points, by Bayes's rule, make a line more probable than a tenth and less than nine tenths, and
clear otherwise; the row of that name has draws of curves from the exact posterior, over a grid of parameters. "Right"
is the share of draws whose reading is the true one. The error is of the mean prediction at 100 inputs, without noise;
"best draw" is that of the draw that is closest in each task. Times are the processor's, of training.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metaaug_fast as mf
from metaaug_fast.data import AmbiguousCurves, Draws, Episodes
from metaaug_fast.report.plots import plot_draws
from metaaug_fast.report.tables import markdown
from metaaug_fast.runs.evaluation import student

HEAD = (
    "learner", "error", "best draw", "both, ambiguous, %", "both, clear, %", "right, ambiguous, %", "right, clear, %",
    "ms a meta-step", "minutes",
)  # fmt: skip
INNER = {"inner_lr": 0.01, "inner_steps": 5, "loss": "mse"}
PLATIPUS = {"kl_weight": 0.3, "init_std": 0.1, "gamma_p": 0.01, "gamma_q": 0.01}
NOISE, TESTED, TASKS, POINTS, SEED = 0.3, 300, 25, 100, 1_000_003
HIDDEN, ACTIVATION, META_LR = (40, 40), "tanh", 0.003
LINE, SINUSOID, NEITHER = 0, 1, 2


def readings(x: Tensor, curves: Tensor) -> Tensor:
    """`LINE`, `SINUSOID` or `NEITHER` of each curve, `[..., N]` at inputs `[N]`."""
    left = []
    for basis in ([torch.ones_like(x), x], [x.sin(), x.cos()]):
        orthonormal, _ = torch.linalg.qr(torch.stack(basis, 1).double())
        values = curves.double()
        left.append((values - values @ orthonormal @ orthonormal.T).square().mean(-1).sqrt())
    line, sinusoid = left
    found = torch.full(line.shape, NEITHER)
    found[line < sinusoid / 2] = LINE
    found[sinusoid < line / 2] = SINUSOID
    return found


def bayes(tasks: mf.TaskBatch, source: AmbiguousCurves, draws: int, cells: int = 100) -> tuple[Tensor, Tensor]:
    """What the points leave open: each task's probability of being a line, `[T]`, and draws of curves `[T, D, N]`.

    Exact but for the grid of `cells` times `cells` parameters of each family.
    """
    grid = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    x, y, inputs = (value.double().squeeze(-1) for value in (tasks.support_x, tasks.support_y, tasks.query_x))

    def curves(at: Tensor) -> Tensor:
        slope, intercept, amplitude, phase = (
            low + (high - low) * grid for low, high in (source.slope, source.intercept, source.amplitude, source.phase)
        )
        line = slope[:, None, None] * at + intercept[:, None]
        sinusoid = amplitude[:, None, None] * (at - phase[:, None]).sin()
        return torch.cat([line.flatten(0, 1), sinusoid.flatten(0, 1)])

    prior = torch.tensor([source.lines, 1 - source.lines]).double().repeat_interleave(cells**2)
    fits = torch.stack([(own_y - curves(own_x)).square().sum(-1) for own_x, own_y in zip(x, y, strict=True)])
    posterior = (prior.log() - fits / (2 * source.noise**2)).softmax(-1)
    drawn = posterior.multinomial(draws, replacement=True, generator=torch.Generator().manual_seed(0))
    return posterior[:, : cells**2].sum(-1), curves(inputs[0])[drawn]


def tests(shots: int) -> tuple[mf.TaskBatch, Tensor]:
    """Test tasks whose queries are true curves at even inputs, and which are lines, `[T]`."""
    source = AmbiguousCurves(noise=NOISE)
    drawn = Episodes(source, shots=shots, queries=1, tasks=TESTED, seed=SEED).batch(0)
    line, first, second = (torch.from_numpy(each) for each in source.curves(Draws(SEED, 0, TESTED)))
    x = torch.linspace(*source.x, POINTS, dtype=torch.float64).expand(TESTED, -1)
    y = torch.where(line, first * x + second, first * (x - second).sin())
    batch = mf.TaskBatch(*drawn.tensors[:2], x.unsqueeze(-1).float(), y.unsqueeze(-1).float())
    return batch, line.squeeze(1)


def learner(kind: str, seed: int, draws: int) -> mf.Learner:
    """A fresh one."""
    torch.manual_seed(seed)
    model = mf.models.mlp([1, *HIDDEN, 1], activation=ACTIVATION)
    if kind == "MAML":
        return mf.MAML(model, **INNER)
    options: dict[str, Any] = INNER | PLATIPUS
    return mf.PLATIPUS(model, draws=draws, **options)


@torch.no_grad()
def curves_of(trained: mf.Learner, tasks: mf.TaskBatch) -> Tensor:
    """What each draw predicts at the queries, `[T, D, N]`; of MAML one."""
    adapted: Any = trained.eval().adapt(tasks.support_x, tasks.support_y)
    found = adapted.each(tasks.query_x) if hasattr(adapted, "each") else adapted(tasks.query_x).unsqueeze(1)
    return found.squeeze(-1)


def figures(curves: Tensor, tasks: mf.TaskBatch, line: Tensor, chance: Tensor) -> list[float]:
    """A row's numbers, as far as they are about tests."""
    truth = tasks.query_y.squeeze(-1)
    read = readings(tasks.query_x[0].squeeze(-1), curves)
    lines, sinusoids = ((read == kind).double().mean(1) for kind in (LINE, SINUSOID))
    both = (lines >= 0.1) & (sinusoids >= 0.1)
    right = torch.where(line, lines, sinusoids)
    ambiguous = (chance > 0.1) & (chance < 0.9)
    errors = (curves - truth.unsqueeze(1)).square().mean(-1)
    mean = (curves.mean(1) - truth).square().mean()
    shares = [each[which].double().mean() for each in (both, right) for which in (ambiguous, ~ambiguous)]
    return [float(mean), float(errors.amin(1).mean()), *(100 * float(share) for share in shares)]


def main() -> None:
    """Train both for each seed, print the table, and draw some tasks of the first seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=6000, help="meta-steps (6,000)")
    parser.add_argument("--shots", type=int, default=3, help="points to adapt to (3)")
    parser.add_argument("--draws", type=int, default=20, help="of PLATIPUS for a task (20)")
    parser.add_argument("--seeds", type=int, default=4, help="trainings of each learner (4)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tasks, line = tests(options.shots)
    chance, best = bayes(tasks, AmbiguousCurves(noise=NOISE), options.draws)
    ambiguous = (chance > 0.1) & (chance < 0.9)
    rows = [("Bayes's rule", *_with_intervals(torch.tensor([figures(best, tasks, line, chance)])), "", "")]
    for kind in ("MAML", "PLATIPUS"):
        found = []
        for seed in range(options.seeds):
            trained = learner(kind, seed, options.draws)
            source = AmbiguousCurves(noise=NOISE)
            episodes = Episodes(source, shots=options.shots, queries=20, tasks=TASKS, seed=seed)
            cpu = time.process_time()
            mf.train(
                trained, episodes, options.steps, meta_lr=META_LR, schedule="linear", clip_norm=10.0, progress=False
            )
            seconds = time.process_time() - cpu
            curves = curves_of(trained, tasks)
            found.append([*figures(curves, tasks, line, chance), 1000 * seconds / options.steps, seconds / 60])
            print(f"{time.strftime('%H:%M:%S')} {kind} {found[-1]}", flush=True)
            if kind == "PLATIPUS" and seed == 0:
                shown = ambiguous.nonzero().squeeze(1)[:4]
                plot_draws(mf.TaskBatch(*(each[shown] for each in tasks.tensors)), curves[shown], options.picture)
        rows.append((kind, *_with_intervals(torch.tensor(found, dtype=torch.float64))))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(
        f"\n{options.shots} points, {int(ambiguous.sum())} of {TESTED} tasks ambiguous, {options.draws} draws, ", end=""
    )
    print(f"{options.steps:,} meta-steps, {options.seeds} seeds; {machine}, {options.threads} threads")
    print(f"\n{markdown(HEAD, rows)}")


def _with_intervals(values: Tensor) -> list[str]:
    """Mean over seeds `[seeds, columns]`, with a 95 % interval for all but times."""
    means, seeds = values.mean(0).tolist(), len(values)
    spread = values.std(0).mul(student(seeds - 1) / seeds**0.5).tolist() if seeds > 1 else [float("nan")] * len(means)
    digits = (2, 2, 0, 0, 0, 0)
    texts = [
        f"{mean:.{places}f} ± {wide:.{places}f}" if seeds > 1 else f"{mean:.{places}f}"
        for mean, wide, places in zip(means, spread, digits, strict=False)
    ]
    return [*texts, *(f"{mean:.1f}" for mean in means[len(digits) :])]


if __name__ == "__main__":
    main()
