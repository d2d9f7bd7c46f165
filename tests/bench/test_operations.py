"""Operation counts against formulas written by hand."""

import random
from dataclasses import replace

import pytest

from metaaug_fast.bench.operations import count
from metaaug_fast.bench.workloads import Workload


@pytest.fixture
def sizes():
    """Tasks, support, query and steps, other ones in every run."""
    drawn = dict(
        zip(("tasks", "support", "query", "inner_steps"), (random.randint(1, 9) for _ in range(4)), strict=True)
    )
    print(drawn)
    return drawn


def two_layers(sizes, **others):
    workload = Workload("two layers", "mlp", (3,), inner_lr=0.1, ways=None, options={"sizes": (3, 7, 2)}, **sizes)
    return replace(workload, **others)


def conv4(sizes, **others):
    """Each layer's operations of a forward pass on one sample: 28, 14, 7 and 3 pixels, and one at the head."""
    options = {"ways": 5, "hidden": 4}
    workload = Workload("conv4", "conv4", (1, 28, 28), inner_lr=0.1, options=options, **sizes)
    layers = [2 * 28**2 * 4 * 9, *(2 * pixels**2 * 4 * 4 * 9 for pixels in (14, 7, 3)), 2 * 4 * 5]
    return replace(workload, **others), layers


@pytest.mark.parametrize(
    ("others", "first_step", "second_step", "first_query", "second_query"),
    [
        # Inputs do not move: of the first layer y, dw, y' = x w' and dw' = x^T dy'.
        ({}, 4, 9, 2, 3),
        ({"first_order": True}, 2, 3, 2, 3),
        ({"first_order": True, "kind": "reptile"}, 2, 3, 0, 0),
        ({"first_order": True, "kind": "evaluation"}, 2, 3, 1, 1),
    ],
    ids=["second order", "first order", "reptile", "evaluation"],
)
def test_two_layers(sizes, others, first_step, second_step, first_query, second_query):
    tasks, support, query, steps = sizes.values()
    first, second = 2 * 3 * 7, 2 * 7 * 2
    inner = support * steps * (first_step * first + second_step * second)
    outer = query * (first_query * first + second_query * second)
    assert count(two_layers(sizes, **others)).flops == tasks * (inner + outer)


def test_bytes_of_two_layers(sizes):
    tasks, support, query, steps = sizes.values()

    def product(samples, inputs, outputs):
        return 4 * (samples * (inputs + outputs) + inputs * outputs)

    inner = steps * (2 * product(support, 3, 7) + 3 * product(support, 7, 2))
    outer = 2 * product(query, 3, 7) + 3 * product(query, 7, 2)
    assert count(two_layers(sizes, first_order=True)).bytes == tasks * (inner + outer)


def test_convolutions(sizes):
    tasks, support, query, steps = sizes.values()
    second_order, (first, *others) = conv4(sizes)
    outer = query * (2 * first + 3 * sum(others))
    inner = support * steps * (4 * first + 9 * sum(others))
    assert count(second_order).flops == tasks * (inner + outer)
    inner = support * steps * (2 * first + 3 * sum(others))
    assert count(replace(second_order, first_order=True)).flops == tasks * (inner + outer)


def test_head_only(sizes):
    """The body runs once a set, and backward where its gradient comes from; the head's inputs do not move."""
    tasks, support, query, steps = sizes.values()
    second_order, (first, *body, head) = conv4(sizes, adapt="head.*")
    outer = query * (2 * first + 3 * sum(body) + 3 * head)
    inner = support * (2 * first + 3 * sum(body) + steps * 6 * head)  # head: y, dw, x w', x^T dy', dy' w^T + dy w'^T
    assert count(second_order).flops == tasks * (inner + outer)
    inner = support * (first + sum(body) + steps * 2 * head)
    assert count(replace(second_order, first_order=True)).flops == tasks * (inner + outer)
