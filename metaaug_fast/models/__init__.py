"""The networks of the few-shot papers, as plain `nn.Module`s; all but those of token ids the fused engine runs whole.

Each is made from `(ways, sample_shape)`: how many outputs, and the shape of one input; and from `vocabulary`, where
that is of token ids. All end in a layer named `head`,
so `adapt="head.*"` adapts the classifier alone; with `ways=None` there is no head, and the network is an encoder that
gives features `[N, D]`, for learners that compare. Initial weights are PyTorch's defaults except where a docstring says
otherwise. Batch norms keep PyTorch's running statistics, which only the policies `batch_norm="running"` and `"frozen"`
read.
"""

from .conv4 import conv4, strided_conv4
from .deep_averaging import MeanEmbedding, deep_averaging
from .minilm import SentenceEncoder, minilm
from .mlp import mlp, omniglot_mlp, perceptron
from .resnet12 import ResidualBlock, resnet12
from .velocity_net import velocity_net

MODELS = {
    "mlp": perceptron,
    "omniglot_mlp": omniglot_mlp,
    "conv4": conv4,
    "strided_conv4": strided_conv4,
    "resnet12": resnet12,
    "deep_averaging": deep_averaging,
    "minilm": minilm,
    "velocity_net": velocity_net,
}
"""The names by which a run knows them."""

__all__ = [
    "MeanEmbedding",
    "ResidualBlock",
    "SentenceEncoder",
    "conv4",
    "deep_averaging",
    "minilm",
    "mlp",
    "omniglot_mlp",
    "perceptron",
    "resnet12",
    "strided_conv4",
    "velocity_net",
]
