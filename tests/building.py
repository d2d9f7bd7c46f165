"""What tests build: a network with its tasks, sets, tensors that lie otherwise, a run with all its parts, a process."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from metaaug_fast.data import Episodes, Sinusoids
from metaaug_fast.engine.problem import Query, Support
from metaaug_fast.learners.maml import MAML
from metaaug_fast.learners.reptile import Reptile
from metaaug_fast.tasks import TaskBatch
from tests.exactness import rand, randn

T, S, Q, F, C = 3, 6, 5, 4, 3  # tasks, support and query samples, features, classes
backends = pytest.mark.parametrize("backend", ["fused", "fallback"])


def picture_folder(root, size=28, channels=1, classes=3, each=4, seed=0):
    """`root`, with a folder of random pictures for each class."""
    generator = np.random.default_rng(seed)
    for name in range(classes):
        (root / f"class{name}").mkdir(parents=True)
        for number in range(each):
            shape = (size, size) if channels == 1 else (size, size, 3)
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{name}" / f"{number}.png")
    return root


def perceptron(*middle: nn.Module) -> nn.Sequential:
    """From F features through 7 to C classes, in float64; tanh is in between where nothing else is given."""
    return nn.Sequential(nn.Linear(F, 7), *(middle or [nn.Tanh()]), nn.Linear(7, C)).double()


def tasks(soft: bool = False) -> TaskBatch:
    """Random ones for `perceptron`, with class ids or probabilities."""

    def targets(samples: int) -> Tensor:
        return randn(T, samples, C).softmax(-1) if soft else torch.randint(C, (T, samples))

    return TaskBatch(randn(T, S, F), targets(S), randn(T, Q, F), targets(Q))


def sets(
    shape: tuple[int, ...], tasks: int = 3, supports: int = 5, queries: int = 4, ways: int = 3
) -> tuple[Support, Query]:
    """Random samples of a shape; soft support labels and sample weights, class ids in the query.

    All that can have a gradient asks for it.
    """
    support = Support(randn(tasks, supports, *shape), randn(tasks, supports, ways).softmax(-1), rand(tasks, supports))
    query = Query(randn(tasks, queries, *shape), torch.randint(ways, (tasks, queries)))
    for each in (support.x, support.y, support.sample_weight, query.x):
        each.requires_grad_()
    return support, query


# --- the same values, lying otherwise ---


def negated(value: Tensor) -> Tensor:
    """A view that negates on reading; what has no fractions stays as it is."""
    if not value.is_floating_point():
        return value
    view = torch._neg_view((-value.detach()).contiguous())
    assert view.is_neg()
    assert view.is_contiguous()
    return view


def imaginary(value: Tensor) -> Tensor:
    """The imaginary part of a conjugate, negated and with gaps; what has no fractions stays as it is."""
    if not value.is_floating_point():
        return value
    view = torch.complex(torch.zeros_like(value), -value.detach()).conj().imag
    assert view.is_neg()
    return view


def every_second(value: Tensor) -> Tensor:
    return value.detach().repeat_interleave(2, -1)[..., ::2]


def padded(value: Tensor) -> Tensor:
    """A slice of a tensor with more in every dimension."""
    whole = value.new_zeros([size + 2 for size in value.shape])
    return whole[tuple(slice(1, size + 1) for size in value.shape)].copy_(value.detach())


def permuted(value: Tensor) -> Tensor:
    order = list(reversed(range(value.ndim)))
    return value.detach().permute(order).contiguous().permute(order)


VIEWS = {
    "negated": negated, "imaginary": imaginary, "every second": every_second, "padded": padded, "permuted": permuted,
}  # fmt: skip


# --- runs ---


def parts(seed=0, dropout=0.0, kind="maml", optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2)):
    """A learner with episodes, and an optimizer and a scheduler where it has them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
    episodes = Episodes(Sinusoids(), shots=5, queries=5, tasks=3, seed=seed)
    if kind == "reptile":
        return Reptile(model, inner_lr=0.01, inner_batch=2, loss="mse", seed=seed), episodes, {}
    learner = MAML(model, inner_lr=0.01, loss="mse")
    made = optimizer(learner.parameters())
    return learner, episodes, {"optimizer": made, "scheduler": torch.optim.lr_scheduler.ExponentialLR(made, 0.9)}


def same(one, other) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def python(program: str, timeout: float = 120) -> str:
    """Standard output of a program in a new interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
