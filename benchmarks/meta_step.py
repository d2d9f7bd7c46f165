"""What a meta-step of each learner costs beside MAML's, and ANIL's on bodies of any kind beside a task-by-task loop.

`python benchmarks/meta_step.py`: 16 tasks, 5-way 1-shot with 5 queries a class, five inner steps, one network for all;
medians of rounds in which everybody takes turns. Learners without an inner loop are timed as they are. The bodies see
5-way 5-shot with 3 queries a class: a loop runs one on K times the support set and once the query set, which bounds
what there is to gain.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.learners import LEARNERS
from metaaug_fast.report.tables import markdown

TASKS, STEPS, ROUNDS = 16, 5, 7


class Block(nn.Module):
    """Of ResNet-18, with SiLU, which the engine does not fuse."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.shortcut(x))


def resnet18(ways: int = 5) -> nn.Sequential:
    """For 32 x 32 pixels."""
    widths = ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    blocks = [Block(*each) for each in (*widths, (512, 512, 1))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, ways))


class Vit(nn.Module):
    """A vision transformer of six layers on 4 x 4 patches of 32 x 32 pixels."""

    def __init__(self, ways: int = 5, width: int = 192) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 8, 8), nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.places).mean(1))


def tasks_of(shape: tuple[int, ...], tasks: int, shots: int, queries: int) -> mf.TaskBatch:
    """Random ones of five ways."""
    y = [torch.arange(5).repeat_interleave(count).repeat(tasks, 1) for count in (shots, queries)]
    x = [torch.rand(tasks, 5 * count, *shape) for count in (shots, queries)]
    return mf.TaskBatch(x[0], y[0], x[1], y[1])


def loop(model: nn.Module, head: str, tasks: mf.TaskBatch, lr: float) -> None:
    """ANIL as scripts write it: task by task, step by step, in the autograd graph."""
    losses = []
    for x, y, query_x, query_y in zip(*tasks.tensors, strict=True):
        theta = dict(model.named_parameters())
        names = [name for name in theta if name.startswith(head)]
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
            moved = torch.autograd.grad(loss, [theta[name] for name in names], create_graph=True)
            theta |= {name: theta[name] - lr * gradient for name, gradient in zip(names, moved, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, theta, (query_x,)), query_y))
    torch.stack(losses).mean().backward()


def medians(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first is a warm-up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def learners() -> list[tuple[str, ...]]:
    """A row for each learner; two for those whose steps are not all alike."""
    tasks = tasks_of((1, 28, 28), TASKS, 1, 5)
    makers = {name: (make, {}) for name, make in LEARNERS.items() if name != "prompt"}  # that of sentences
    makers["mamlpp, behind its first epochs"] = mf.MAMLpp, {"multi_step_epochs": 1, "epoch_steps": 1}
    makers["imaml, a conjugate gradient"] = mf.IMAML, {"cg_steps": 1}
    calls = {}
    for name, (make, given) in makers.items():
        model = mf.models.conv4(ways=None if make.encoder else 5, hidden=32)
        if make(model).inner_steps is not None:
            given = {"inner_steps": STEPS, **given}
        learner = make(model, **given)
        optimizers = learner.optimizers(1e-3)
        calls[name] = lambda learner=learner, optimizers=optimizers: learner.meta_step(tasks, optimizers)
    found = medians(calls)
    return [(name, f"{ms:.0f}", f"{ms / found['maml']:.2f}") for name, ms in found.items()]


def bodies() -> list[tuple[str, ...]]:
    """A row for each body that ANIL does not adapt."""
    rows = []
    for name, model, head in (("ViT, 6 layers of 192", Vit(), "head"), ("ResNet-18 with SiLU", resnet18(), "10")):
        tasks = tasks_of((3, 32, 32), 4, 5, 3)
        anil = mf.ANIL(model, inner_lr=0.01, inner_steps=STEPS, head=head)
        found = medians({
            "ours": lambda anil=anil, tasks=tasks: anil(tasks).loss.backward(),
            "loop": lambda model=model, head=head, tasks=tasks: loop(model, f"{head}.", tasks, 0.01),
        }, rounds=3)  # fmt: skip
        rows.append((name, f"{found['ours']:,.0f}", f"{found['loop']:,.0f}", f"{found['loop'] / found['ours']:.1f}"))
    return rows


def main() -> None:
    """Print both tables."""
    warnings.simplefilter("ignore", mf.errors.FallbackWarning)
    print(markdown(("learner, Conv4-32, T=16 K=5", "ms a meta-step", "of MAML's"), learners()))
    print()
    print(markdown(("ANIL, T=4 K=5 S=25 Q=15, body", "ms", "task by task, ms", "times as fast"), bodies()))


if __name__ == "__main__":
    main()
