"""The fused engine; csrc/bindings.cpp is the source of these names."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

class OpKind:
    conv2d: ClassVar[OpKind]
    batch_norm: ClassVar[OpKind]
    layer_norm: ClassVar[OpKind]
    group_norm: ClassVar[OpKind]
    relu: ClassVar[OpKind]
    leaky_relu: ClassVar[OpKind]
    gelu: ClassVar[OpKind]
    gelu_tanh: ClassVar[OpKind]
    tanh: ClassVar[OpKind]
    sigmoid: ClassVar[OpKind]
    softplus: ClassVar[OpKind]
    max_pool: ClassVar[OpKind]
    avg_pool: ClassVar[OpKind]
    mean_pool: ClassVar[OpKind]
    flatten: ClassVar[OpKind]
    add: ClassVar[OpKind]
    multiply: ClassVar[OpKind]
    dropout: ClassVar[OpKind]

class LossKind:
    cross_entropy: ClassVar[LossKind]
    mse: ClassVar[LossKind]
    bce: ClassVar[LossKind]

class Precision:
    float32: ClassVar[Precision]
    tf32: ClassVar[Precision]
    bf16: ClassVar[Precision]

class OptimizerKind:
    sgd: ClassVar[OptimizerKind]
    adam: ClassVar[OptimizerKind]

class LayoutKind:
    matrix: ClassVar[LayoutKind]
    vector: ClassVar[LayoutKind]
    picture: ClassVar[LayoutKind]

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

class EncoderInputs:
    x: Tensor
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    wanted: Sequence[bool]
    wants_x: bool
    adjoint: Tensor | None
    number: int

class FusedEngine:
    def __init__(self, graph: Graph, on_gpu: bool) -> None: ...
    def footprint(self, settings: Settings, samples: int, in_double: bool, device: int) -> tuple[int, int]: ...
    def run(self, settings: Settings, inputs: Inputs, outputs: Sequence[str]) -> dict[str, Tensor]: ...
    def encode(self, inputs: EncoderInputs, outputs: Sequence[str]) -> dict[str, Tensor]: ...

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
def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]: ...
def instruction_set() -> str: ...

cuda: bool
why_no_cuda: str
