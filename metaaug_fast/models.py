"""The networks of the few-shot papers, as plain `nn.Module`s that the fused engine runs whole.

All end in a layer named `head`, so `adapt="head.*"` adapts the classifier alone. Initial weights are PyTorch's
defaults except where a docstring says otherwise. Batch norms keep PyTorch's running statistics, which only the
policies `batch_norm="running"` and `"frozen"` read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}
_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "layer": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "group": lambda channels, size: nn.GroupNorm(_groups(channels), channels),
    "instance": lambda channels, size: nn.GroupNorm(channels, channels),
    "none": lambda channels, size: nn.Identity(),
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
    _check_choice("activation", activation, _ACTIVATIONS)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), 1):
        layers[f"linear{index}"] = nn.Linear(inputs, outputs)
        if batch_norm:
            layers[f"norm{index}"] = nn.BatchNorm1d(outputs)
        layers[f"{activation}{index}"] = _ACTIVATIONS[activation]()
    layers["head"] = nn.Linear(sizes[-2], sizes[-1])
    return nn.Sequential(layers)


def omniglot_mlp(ways: int = 5, image: int = 28) -> nn.Sequential:
    """Omniglot's network without convolutions: 784-256-128-64-64-ways, batch norm and ReLU after each hidden layer.

    From MAML (arXiv 1703.03400, section 5.2). As in its authors' code, weights start from a normal distribution of
    standard deviation 0.01, truncated at two deviations, and biases from 0.

    >>> import torch
    >>> omniglot_mlp(ways=5)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 5])
    """
    _check_at_least(1, ways=ways, image=image)
    model = mlp([image * image, 256, 128, 64, 64, ways], batch_norm=True)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(module.bias)
    return model


def conv4(
    ways: int = 5, channels: int = 1, hidden: int = 64, image: int = 28, norm: str = "batch", pool: bool = True
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, norm, ReLU and 2x2 max-pooling, flattened into a linear `head`.

    The few-shot embedding of Matching Networks (Vinyals et al. 2016, arXiv 1606.04080) and Prototypical Networks
    (Snell et al. 2017, arXiv 1703.05175); with `channels=3, hidden=32, image=84` the mini-ImageNet network of MAML
    (Finn et al. 2017, arXiv 1703.03400).

    Args:
        ways: outputs.
        channels, image: inputs are `[N, channels, image, image]`.
        hidden: filters of every convolution.
        norm: "batch", "layer", "group" (the most groups, up to 8, that divide `hidden`), "instance" (with an affine)
            or "none".
        pool: with False, convolutions of stride 2 take the place of stride 1 and pooling.

    Raises:
        ValueError: a number is below 1, the image too small for four poolings (below 16), or `norm` unknown.

    >>> import torch
    >>> conv4(ways=5)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 5])
    """
    blocks, size = _conv_blocks(ways, channels, hidden, image, norm, pool)
    return nn.Sequential(OrderedDict(**blocks, flatten=nn.Flatten(), head=nn.Linear(hidden * size * size, ways)))


def strided_conv4(
    ways: int = 5, channels: int = 1, hidden: int = 64, image: int = 28, norm: str = "batch", mean: bool = True
) -> nn.Sequential:
    """Four 3x3 convolutions of stride 2, each with norm and ReLU, then the mean over space and a linear `head`.

    The Omniglot network of MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), whose code takes the mean; with
    `mean=False` the features are flattened instead. That code pads even sizes at the bottom and right only, starts
    convolutions from Xavier's uniform distribution and the head from a standard normal, and has no batch-norm scale;
    here padding is symmetric and the rest PyTorch's own. Other arguments and errors are those of `conv4`.

    >>> import torch
    >>> strided_conv4(ways=20)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 20])
    """
    blocks, size = _conv_blocks(ways, channels, hidden, image, norm, pool=False)
    if mean:
        blocks["mean"] = nn.AdaptiveAvgPool2d(1)
    features = hidden if mean else hidden * size * size
    return nn.Sequential(OrderedDict(**blocks, flatten=nn.Flatten(), head=nn.Linear(features, ways)))


def resnet12(
    ways: int = 5,
    channels: int = 3,
    widths: Sequence[int] = (64, 160, 320, 640),
    image: int = 84,
    small: bool = False,
) -> nn.Sequential:
    """Four residual blocks of three 3x3 convolutions and a max-pooling, the mean over space and a linear `head`.

    The widths and the initial weights (Kaiming normal, fan out) are those of MetaOptNet (Lee et al. 2019, arXiv
    1904.03758), the blocks those of TADAM (Oreshkin et al. 2018, arXiv 1805.10123). MetaOptNet's dropout and DropBlock
    are left out.

    Args:
        ways: outputs.
        channels, image: inputs are `[N, channels, image, image]`, `image >= 16`.
        widths: filters of the four blocks.
        small: TADAM's narrower blocks, 64-128-256-512, in place of `widths`.

    Raises:
        ValueError: `widths` are not four numbers >= 1, or another number is out of range.

    >>> import torch
    >>> resnet12(widths=(8, 8, 8, 8), image=32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """
    widths = (64, 128, 256, 512) if small else tuple(widths)
    if len(widths) != 4 or min(widths) < 1:
        raise ValueError(f"widths must be four numbers >= 1 (got {widths})")
    _check_at_least(1, ways=ways, channels=channels)
    _check_at_least(16, image=image)
    inputs = (channels, *widths[:-1])
    blocks = {f"block{index + 1}": ResidualBlock(inputs[index], widths[index]) for index in range(4)}
    head = nn.Linear(widths[-1], ways)
    model = nn.Sequential(OrderedDict(**blocks, mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=head))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
    return model


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut: `[N, inputs, H, W] -> [N, outputs, H // 2, W // 2]`.

    Batch norm follows every convolution; LeakyReLU(0.1) the first two and the sum, which max-pooling then halves.

    >>> import torch
    >>> ResidualBlock(3, 8)(torch.zeros(2, 3, 10, 10)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(inputs, outputs, 3),
            nn.LeakyReLU(0.1),
            *_conv_bn(outputs, outputs, 3),
            nn.LeakyReLU(0.1),
            *_conv_bn(outputs, outputs, 3),
        )
        self.shortcut = nn.Sequential(*_conv_bn(inputs, outputs, 1))
        self.tail = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x) + self.shortcut(x))


def _conv_bn(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)


def _conv_blocks(
    ways: int, channels: int, hidden: int, image: int, norm: str, pool: bool
) -> tuple[OrderedDict[str, nn.Module], int]:
    """The four named blocks and the height (= width) of what comes out of them."""
    _check_at_least(1, ways=ways, channels=channels, hidden=hidden)
    _check_at_least(16 if pool else 1, image=image)
    _check_choice("norm", norm, _NORMS)
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    size = image
    for index in range(4):
        inside = size if pool else (size + 1) // 2
        layers = [
            nn.Conv2d(channels if index == 0 else hidden, hidden, 3, stride=1 if pool else 2, padding=1),
            _NORMS[norm](hidden, inside),
            nn.ReLU(),
        ]
        blocks[f"block{index + 1}"] = nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))
        size = inside // 2 if pool else inside
    return blocks, size


def _groups(channels: int) -> int:
    return max(groups for groups in range(1, 9) if channels % groups == 0)


def _check_at_least(low: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < low:
            raise ValueError(f"{name} must be >= {low} (got {value})")


def _check_choice(name: str, value: str, known: dict) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)} (got {value!r})")
