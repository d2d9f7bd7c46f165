"""An outer step of the augmentation policy on Conv4 beside the same written with autograd and with `torch.func.vmap`.

`python benchmarks/augment_policy.py`: 8 tasks, 5-way 5-shot of 28 x 28, one inner step, the gradient of the queries'
loss for the network and for a policy of all transforms of pictures; medians and spreads of rounds in which everybody
takes turns, after all gradients were compared. The loop transforms and adapts task by task; vmap gets its support sets
from the same batched transforms as ours. Both have their batch norms written out, without which vmap is wrong and the
loop slow. Two threads, if there are as many cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import metaaug_fast as mf
from metaaug_fast.bench.rivals import written_out
from metaaug_fast.report.tables import markdown

TASKS, WAYS, SHOTS, RATE = 8, 5, 5, 0.4
FASTER = {"task by task": 2.5, "vmap": 1.5}
"""How many times as slow each has to be at least."""
SHARE = 0.25
"""Of a step, what the transforms may take at most."""


class Step:
    """One outer step in each of the ways, of the same numbers: gradients of the policy, then of the model."""

    def __init__(self, queries: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        x = [torch.rand(TASKS, WAYS * count, 1, 28, 28, dtype=dtype) for count in (SHOTS, queries)]
        y = [torch.arange(WAYS).repeat_interleave(count).repeat(TASKS, 1) for count in (SHOTS, queries)]
        self.tasks = mf.TaskBatch(x[0], y[0], x[1], y[1])
        self.policy = mf.augment.AugmentationPolicy(mf.augment.PICTURES).to(dtype)
        self.learner = mf.MAML(mf.models.conv4(ways=WAYS).to(dtype), inner_lr=RATE, backend="fused")
        self.net = written_out(self.learner.model)
        self.upstream = torch.randn_like(x[0])

    def drawn(self) -> dict[str, mf.augment.Drawn]:
        """The same for everybody."""
        return self.policy.draw(self.tasks.support_x, torch.Generator().manual_seed(1))

    def ours(self) -> list[Tensor]:
        out = self.learner(self.policy(self.tasks, drawn=self.drawn()))
        return self._gradients(out.loss, self.learner.model)

    def task_by_task(self) -> list[Tensor]:
        drawn, start = self.drawn(), dict(self.net.named_parameters())
        total: list[Tensor] = []
        for task in range(TASKS):
            own = {
                name: mf.augment.Drawn(*(None if part is None else part[task : task + 1] for part in each))
                for name, each in drawn.items()
            }
            one = self.policy(self.tasks[task], drawn=own)
            inner = F.cross_entropy(functional_call(self.net, start, (one.support_x[0],)), one.support_y[0])
            moved = torch.autograd.grad(inner, list(start.values()), create_graph=True)
            fast = {name: value - RATE * g for (name, value), g in zip(start.items(), moved, strict=True)}
            outer = F.cross_entropy(functional_call(self.net, fast, (one.query_x[0],)), one.query_y[0]) / TASKS
            found = self._gradients(outer, self.net)  # the graph of one task lives at a time
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    def vmap(self) -> list[Tensor]:
        def judged(p: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            inner = grad(lambda p: F.cross_entropy(functional_call(self.net, p, (x,)), y))(p)
            fast = {name: value - RATE * inner[name] for name, value in p.items()}
            return F.cross_entropy(functional_call(self.net, fast, (query_x,)), query_y)

        made = self.policy(self.tasks, drawn=self.drawn())
        losses = vmap(judged, (None, 0, 0, 0, 0))(dict(self.net.named_parameters()), *made.tensors)
        return self._gradients(losses.mean(), self.net)

    def transforms(self) -> list[Tensor]:
        """What of a step the policy takes, forwards and backwards."""
        made, y = self.policy.augment(self.tasks.support_x, self.tasks.support_y, drawn=self.drawn())
        return list(torch.autograd.grad((made * self.upstream).sum() + y.square().sum(), self.policy.parameters()))

    def _gradients(self, loss: Tensor, model: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [*self.policy.parameters(), *model.parameters()]))


def check(queries: int) -> dict[str, float]:
    """The largest relative error of any gradient beside the loop's, in float64.

    One that is 0 but for rounding, as of a bias in front of a batch norm, counts beside the largest.
    """
    step = Step(queries, torch.float64)
    expected = step.task_by_task()
    floor = 1e-3 * max(float(each.norm()) for each in expected)
    errors = {}
    for name, call in (("ours", step.ours), ("vmap", step.vmap)):
        pairs = zip(call(), expected, strict=True)
        errors[name] = max(float((got - right).norm()) / max(float(right.norm()), floor) for got, right in pairs)
        assert errors[name] < 1e-8, errors
    return errors


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Print the table, and which targets are missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--queries", type=int, default=5, help="of a class")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    errors = check(options.queries)
    step = Step(options.queries)
    calls = {
        "ours": step.ours, "task by task": step.task_by_task, "vmap": step.vmap, "transforms alone": step.transforms,
    }  # fmt: skip
    before = os.getloadavg()[0]
    times = timed(calls, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["ours"]
    rows = [
        (name, f"{medians[name]:.0f}", f"{min(values):.0f} .. {max(values):.0f}", f"{medians[name] / ours:.2f}")
        for name, values in times.items()
    ]
    print(f"{options.threads} threads, load {before:.1f} before and {os.getloadavg()[0]:.1f} after; ", end="")
    print(f"gradients in float64 differ by {max(errors.values()):.0e} at most\n")
    title = (
        f"Conv4-64, T={TASKS} K=1 S={WAYS * SHOTS} Q={WAYS * options.queries}, {len(mf.augment.PICTURES)} transforms"
    )
    print(markdown((title, "ms", "from .. to", "of ours"), rows))
    print()
    for name, least in FASTER.items():
        met = "met" if medians[name] >= least * ours else "missed"
        print(f"{name}: {medians[name] / ours:.2f} times as slow, target {least}: {met}")
    share = medians["transforms alone"] / ours
    print(f"transforms: {share:.3f} of a step, target {SHARE}: {'met' if share <= SHARE else 'missed'}")


if __name__ == "__main__":
    main()
