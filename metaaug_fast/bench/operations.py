"""What a workload costs: floating-point operations and bytes, counted from the lowered graph.

Only products count (convolutions and linear layers, two operations a multiply-add, padding included), and only those
that the recursion needs: nothing is counted twice because an executor computes it again. Per product layer:

    forward                     1     y  = x w
    backward                    2     dw = x^T dy, dx = dy w^T         dx only where something before has a gradient
    tangent of the forward      2     y' = x' w + x w'                 x' and w' only where they move
    tangent of the backward     4     dw' = x'^T dy + x^T dy', dx' = dy' w^T + dy w'^T

so that K exact second-order steps and the query cost about 9K + 3 forwards, first order 3K + 3. Layers before the first
adapted one (ANIL) give the same at every step: forward once a set, backward once a set that their gradient comes from.

Bytes are those of a machine without cache: each product reads both factors and writes its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..engine.lowering.graph import Graph, Op
from ..engine.lowering.trace import lower
from .workloads import Workload


@dataclass(frozen=True)
class Count:
    """Floating-point operations and bytes (float32) of one call."""

    flops: float
    bytes: float

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Count:
        return Count(self.flops * times, self.bytes * times)


def count(workload: Workload) -> Count:
    """Operations and bytes of one call of the workload.

    Raises:
        NotFusedError: the model cannot be lowered.
    """
    problem = workload.learner(workload.model()).problem()
    graph = lower(problem.model, workload.sample)
    support, query = workload.support, workload.query
    total = Count(0, 0)
    for op, product in _products(graph, problem.model):
        moves_in, learns_in = _upstream(graph, op, set(problem.rates)), _upstream(graph, op, set(problem.parameters))
        moves_own = op.params[0] in problem.rates
        steps = workload.inner_steps if moves_in or moves_own else min(workload.inner_steps, 1)
        inner = 1 + moves_own + moves_in
        if not workload.first_order:
            inner += _to_differentiate(moves_own, moves_in, learns_in)
        outer = {"maml": 2 + learns_in, "evaluation": 1, "reptile": 0}[workload.kind]
        total += product(support) * (steps * inner) + product(query) * outer
    return total * workload.tasks


def _to_differentiate(moves_own: bool, moves_in: bool, learns_in: bool) -> int:
    """Products of a layer to go back through an inner step whose weights, or those before, move."""
    if not (moves_own or moves_in):
        return 1 + learns_in
    tangent_forward = moves_own + moves_in
    tangent_backward = 1 + moves_in + learns_in * (1 + moves_own)
    return tangent_forward + tangent_backward


def _products(graph: Graph, model: nn.Module) -> list[tuple[Op, Product]]:
    parameters = dict(model.named_parameters())
    found = []
    for op in graph.ops:
        if op.kind in ("conv2d", "linear"):
            weight = parameters[str(op.params[0])]
            found.append((op, Product(weight, math.prod(op.shape), math.prod(graph.shapes[op.inputs[0]]))))
    return found


@dataclass(frozen=True)
class Product:
    """One product of a layer: `product(N)` is its count on N samples. outputs, inputs: elements of a sample."""

    weight: torch.Tensor
    outputs: int
    inputs: int

    def __call__(self, samples: int) -> Count:
        adds = self.outputs * math.prod(self.weight.shape[1:])
        return Count(2 * samples * adds, 4 * (samples * (self.inputs + self.outputs) + self.weight.numel()))


def _upstream(graph: Graph, op: Op, names: set[str]) -> bool:
    """Whether any of these parameters comes before the op's inputs."""
    makers = {each.output: each for each in graph.ops}
    waiting, seen = list(op.inputs), set[int]()
    while waiting:
        maker = makers.get(value := waiting.pop())
        if maker is None or value in seen:
            continue
        if names & set(maker.params):
            return True
        seen.add(value)
        waiting += maker.inputs
    return False
