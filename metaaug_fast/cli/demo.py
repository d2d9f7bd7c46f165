"""The demo: MAML learns to tell five new letters apart from one example of each, in a few minutes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..bench.rivals import RIVALS, Call
from ..bench.workloads import Workload
from ..data.division import PARTS
from ..files import try_writing, write_json
from ..learners.maml import MAML
from ..report.plots import plot_episode, plot_learning_curve
from ..runs.build import fitted, make_episodes, make_learner, make_sources
from ..runs.config import configure, recipe
from ..runs.evaluation import Evaluation, evaluate
from ..runs.training import train
from ..tasks import TaskBatch
from . import options as kind
from .options import Parser, add_machine_options, use_machine

EPISODES = 600


def run(arguments: Sequence[str]) -> int:
    """Read the options and show it all."""
    parser = Parser(prog="metaaug-fast demo", description="Train on letters for a few minutes, evaluate and draw.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and checkpoint")
    parser.add_argument("--steps", type=kind.count, default=300, help="meta-steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine_options(parser, with_device=False)
    options = parser.parse_args(arguments)
    use_machine(options)
    demo(options.out, steps=options.steps, progress=not options.quiet)
    return 0


def demo(out: str | Path, steps: int = 300, progress: bool = True) -> None:
    """Meta-train exact second-order MAML on Glyphs, judge it on new letters before and after, time it, and draw.

    Writes into the folder `out`: `maml.safetensors`, which `metaaug-fast evaluate` reads, `maml.json`, `episode.png`
    and `learning_curve.png`.
    """
    out = Path(out)
    try_writing(out / "maml.safetensors")
    config = configure(recipe("maml-glyphs"), ["--steps", str(steps)])
    sources = make_sources(config.data)
    config = fitted(config, sources["train"].sample_shape, None)
    learner = make_learner(config)
    assert isinstance(learner, MAML)
    training, validation, test = (make_episodes(config, split, sources[split]) for split in PARTS)
    other_styles = replace(config, sampling=replace(config.sampling, split_styles=True))
    harder = make_episodes(other_styles, "test", sources["test"])
    print(f"{config.in_words(regression=False)}")
    print(f"{training.dataset} to learn from, {test.dataset} to be judged on\n")

    before = [evaluate(learner, episodes, EPISODES) for episodes in (test, harder)]
    print(f"before training, new letters: {before[0]}")
    history = train(
        learner,
        training,
        steps,
        meta_lr=config.training.meta_lr,
        validate=lambda: evaluate(learner, validation, 200),
        validate_every=max(1, steps // 10),
        checkpoint=out / "maml.safetensors",
        checkpoint_every=100,
        config=config.as_dict(),
        progress=progress,
    )
    if history.stopped_by is not None:
        print(f"stopped by {history.stopped_by}; the checkpoint is {out / 'maml.safetensors'}")
        return
    after = [evaluate(learner, episodes, EPISODES) for episodes in (test, harder)]
    print(f"after training, new letters:  {after[0]}\n")

    ours, theirs = compare(learner, training.batch(0))
    sampling = config.sampling
    title = f"{sampling.ways}-way {sampling.shots}-shot, {EPISODES} episodes of new letters"
    print(f"{title:44} {'before training':18} after {steps} meta-steps")
    for name, first, last in zip(("any typefaces", "queries in other typefaces"), before, after, strict=True):
        print(f"  {name:42} {_percent(first):18} {_percent(last)}")
    print(f"  (95 % intervals; {'transductive' if after[0].transductive else 'not transductive'})")
    print(
        f"meta-gradients a second, {sampling.tasks} tasks, exact second order, {torch.get_num_threads()} threads\n"
        f"  metaaug_fast {ours:.1f}, torch.func vmap {theirs:.1f}: {ours / theirs:.1f} times as many "
        f"(in float64 they differ by {difference(learner, training.batch(0)):.0e}, relative)"
    )
    tasks = test.batch(0)
    with torch.no_grad():
        plot_episode(tasks, learner.adapt(tasks.support_x, tasks.support_y)(tasks.query_x), out / "episode.png")
    plot_learning_curve(history, out / "learning_curve.png", "MAML on Glyphs, 5-way 1-shot")
    write_json(
        out / "maml.json",
        {
            "config": config.as_dict(),
            "before": [each.as_dict() for each in before],
            "after": [each.as_dict() for each in after],
            "meta_gradients_per_second": {"metaaug_fast": ours, "torch.func vmap": theirs},
            "history": history.as_dict(),
        },
    )
    print(f"written: {', '.join(str(out / name) for name in ('episode.png', 'learning_curve.png', 'maml.json'))}")
    print(f"try: metaaug-fast evaluate {out / 'maml.safetensors'}")


def compare(learner: MAML, tasks: TaskBatch, rounds: int = 5) -> tuple[float, float]:
    """Meta-gradients a second here and with `torch.func`: medians over rounds in which they take turns."""
    times: dict[Call, list[float]] = {call: [] for call in _meta_gradients(learner, tasks)}
    for call in times:
        call()
    for _ in range(rounds):
        for call, seconds in times.items():
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    ours, theirs = (1 / statistics.median(seconds) for seconds in times.values())
    return ours, theirs


def difference(learner: MAML, tasks: TaskBatch) -> float:
    """Relative difference in float64 between the two meta-gradients of the first two tasks."""
    calls = _meta_gradients(copy.deepcopy(learner).double(), tasks[:2].to(torch.float64))
    ours, theirs = (torch.cat([part.flatten() for part in call()]) for call in calls)
    return float((ours - theirs).norm() / theirs.norm())


def _meta_gradients(learner: MAML, tasks: TaskBatch) -> tuple[Call, Call]:
    """The learner's own, and that of second order as the benchmark writes it with `torch.func`."""
    model, rate = learner.model, learner.inner_lr
    assert isinstance(rate, (int, float))
    (count, supports, *sample), queries = tasks.support_x.shape, tasks.query_x.shape[1]
    net = type(model).__name__
    workload = Workload("demo", net, tuple(sample), count, supports, queries, learner.inner_steps, rate)
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(learner(tasks).loss, parameters), RIVALS["vmap"].build(workload, model, tasks)


def _percent(result: Evaluation) -> str:
    return f"{100 * result.mean:.1f} % +- {100 * result.interval:.1f} %"
