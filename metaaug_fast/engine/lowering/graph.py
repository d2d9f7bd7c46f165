"""What a trace makes of a module: the list of ops, or what cannot be fused and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...errors import NotFusedError
from .table import Shape


class LoweringError(NotFusedError):
    """The module holds something that the fused engine cannot run; the message names it, its place and the reason."""


@dataclass(frozen=True)
class Op:
    """One row of the graph: `values[output] = kind(values[inputs], params; attributes)`.

    params: names in the model (weight, bias); None where the op has none.
    buffers: running mean and variance of a batch norm that has them; it normalises by them where `fixed` is set.
    shape: of the output, per sample: `(C, H, W)` or `(F,)`.
    path: the user's module path, or the line of a functional call.
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    shape: Shape
    params: tuple[str | None, str | None] = (None, None)
    buffers: tuple[Tensor, ...] = ()
    attributes: dict[str, float | int | tuple[int, int] | None] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Graph:
    """Ops in order of execution. Value 0 is the input; `output` is the prediction, of `output_shape` per sample."""

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    output: int
    output_shape: Shape


@dataclass(frozen=True)
class Refusal:
    """A call that is not fused.

    path, source: as `Op.path`, and the text of that line. shape: of its output, if it could be found.
    """

    name: str
    path: str
    source: str
    reason: str
    shape: Shape | None = None
    params: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f" at {self.path}" if self.path else ""
        return f"{self.name}{place}: {self.reason}" + (f" (in `{self.source}`)" if self.source else "")


@dataclass(frozen=True)
class Survey:
    """All that a trace met, in order.

    shapes: as `Graph.shapes`, outputs of refused calls included. blocker: the refusal to report first. graph: if none.
    """

    steps: tuple[Op | Refusal, ...]
    shapes: tuple[Shape, ...]
    blocker: Refusal | None
    graph: Graph | None
