"""Multi-layer perceptrons: MAML's sinusoid regressor, and its Omniglot network without convolutions."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from ..checks import check_count
from .parts import check_ways, choice, head, taking

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


def mlp(sizes: Sequence[int], activation: str = "relu", batch_norm: bool = False) -> nn.Sequential:
    """Linear layers `sizes[0] -> ... -> sizes[-1]` with an activation, and optionally batch norm before it, in between.

    `mlp([1, 40, 40, 1])` is the sinusoid regressor of MAML (Finn, Abbeel, Levine 2017, arXiv 1703.03400, section 5.1).
    Inputs of any sample shape are flattened to `sizes[0]` features.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.

    >>> import torch
    >>> mlp([1, 40, 40, 1])(torch.zeros(10, 1)).shape
    torch.Size([10, 1])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be two or more layer widths >= 1 (got {list(sizes)})")
    return perceptron(sizes[-1], sizes[:1], sizes[1:-1], activation, batch_norm)


def perceptron(
    ways: int | None = 5,
    sample_shape: Sequence[int] = (1,),
    hidden: Sequence[int] = (40, 40),
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Sequential:
    """An `mlp` made like the other networks, from its outputs and the shape of an input, which it flattens.

    Raises:
        ValueError: a size is below 1, or the activation unknown.

    >>> import torch
    >>> perceptron(ways=5, sample_shape=(1, 28, 28))(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 5])
    """
    check_ways(ways)
    for size in hidden:
        check_count("hidden", size, low=1)
    layer = choice("activation", activation, _ACTIVATIONS)
    widths = [math.prod(sample_shape), *hidden]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise(widths), 1):
        layers[f"linear{index}"] = nn.Linear(inputs, outputs)
        if batch_norm:
            layers[f"norm{index}"] = nn.BatchNorm1d(outputs)
        layers[f"{activation}{index}"] = layer()
    return taking(sample_shape, nn.Sequential(OrderedDict(**layers, **head(widths[-1], ways))))


def omniglot_mlp(ways: int | None = 5, sample_shape: Sequence[int] = (1, 28, 28)) -> nn.Sequential:
    """Omniglot's network without convolutions: 784-256-128-64-64-ways, batch norm and ReLU after each hidden layer.

    From MAML (arXiv 1703.03400, section 5.2). As in its authors' code, weights start from a normal distribution of
    standard deviation 0.01, truncated at two deviations, and biases from 0.

    >>> import torch
    >>> omniglot_mlp(ways=5)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 5])
    """
    model = perceptron(ways, sample_shape, (256, 128, 64, 64), batch_norm=True)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(module.bias)
    return model
