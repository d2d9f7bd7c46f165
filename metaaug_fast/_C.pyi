"""The fused engine; csrc/bindings.cpp is the source of these names."""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

class OpKind(Enum):
    conv2d = 0
    batch_norm = 1
    layer_norm = 2
    group_norm = 3
    relu = 4
    leaky_relu = 5
    gelu = 6
    gelu_tanh = 7
    tanh = 8
    sigmoid = 9
    softplus = 10
    max_pool = 11
    avg_pool = 12
    mean_pool = 13
    flatten = 14
    add = 15
    dropout = 16

class LossKind(Enum):
    cross_entropy = 0
    mse = 1
    bce = 2

class Precision(Enum):
    float32 = 0
    tf32 = 1
    bf16 = 2

class OptimizerKind(Enum):
    sgd = 0
    adam = 1

class LayoutKind(Enum):
    matrix = 0
    vector = 1
    picture = 2

class Pair:
    def __init__(self, y: int, x: int) -> None: ...

class Shape:
    def __init__(self, channels: int, height: int, width: int) -> None: ...

class Op:
    kind: OpKind
    input: tuple[int, int]
    output: int
    param: tuple[int, int]
    buffer: tuple[int, int]
    scalar: tuple[float, float]
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    site: int
    count_padding: bool
    eps: float

class Parameter:
    def __init__(self, layout: LayoutKind, rows: int, outputs: int, inputs: int = ..., kernel: Pair = ...) -> None: ...

class Graph:
    def __init__(self, ops: list[Op], values: list[Shape], parameters: list[Parameter], output: int) -> None: ...

class Settings:
    steps: int
    first_step: int
    loss: LossKind
    optimizer: OptimizerKind
    precision: Precision
    first_order: bool
    label_smoothing: float
    momentum: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    seed: int

class Inputs:
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    rates: Sequence[Tensor | None]
    per_step: Sequence[bool]
    wanted: Sequence[bool]
    support_x: Tensor | None
    support_y: Tensor | None
    support_weight: Tensor | None
    rows: Tensor | None
    initial: Tensor | None
    query_x: Tensor | None
    query_y: Tensor | None
    step_weights: Tensor | None
    task_weights: Tensor | None
    flat_adjoint: Tensor | None
    prediction_adjoint: Tensor | None

class FusedEngine:
    def __init__(self, graph: Graph, on_gpu: bool) -> None: ...
    def footprint(self, settings: Settings, samples: int, in_double: bool, device: int) -> tuple[int, int]: ...
    def run(self, settings: Settings, inputs: Inputs, outputs: Sequence[str]) -> dict[str, Tensor]: ...

def sample_episodes(
    images: Tensor,
    first: Tensor,
    sizes: Tensor,
    key: int,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    in_double: bool,
) -> list[Tensor]: ...
def instruction_set() -> str: ...

cuda: bool
why_no_cuda: str
