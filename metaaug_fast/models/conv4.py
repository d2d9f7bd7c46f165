"""The four-block convolutional networks of few-shot learning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from ..checks import check_count, check_flag
from .parts import check_picture, check_ways, choice, head, taking

_NORMS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "batch": lambda channels, height, width: nn.BatchNorm2d(channels),
    "layer": lambda channels, height, width: nn.LayerNorm([channels, height, width]),
    "group": lambda channels, height, width: nn.GroupNorm(_groups(channels), channels),
    "instance": lambda channels, height, width: nn.GroupNorm(channels, channels),
    "none": lambda channels, height, width: nn.Identity(),
}
_BLOCKS = 4


def conv4(
    ways: int | None = 5,
    sample_shape: Sequence[int] = (1, 28, 28),
    hidden: int = 64,
    norm: str = "batch",
    pool: bool = True,
    pools: int = 4,
    maps: bool = False,
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, norm, ReLU and 2x2 max-pooling, flattened into a linear `head`.

    The few-shot embedding of Matching Networks (Vinyals et al. 2016, arXiv 1606.04080) and Prototypical Networks
    (Snell et al. 2017, arXiv 1703.05175); with `sample_shape=(3, 84, 84), hidden=32` the mini-ImageNet network of MAML
    (Finn et al. 2017, arXiv 1703.03400).

    Args:
        ways: outputs. None: no head, features `[N, D]`.
        sample_shape: inputs are `[N, *sample_shape]`, `(channels, height, width)`.
        hidden: filters of every convolution.
        norm: "batch", "layer", "group" (the most groups, up to 8, that divide `hidden`), "instance" (with an affine)
            or "none".
        pool: with False, convolutions of stride 2 take the place of stride 1 and pooling.
        pools: so many blocks, the first ones, halve the picture; the encoder of Relation Networks (Sung et al. 2018,
            arXiv 1711.06025) has 2.
        maps: leave feature maps `[N, hidden, height, width]` as they are, for learners that compare them; then there is
            no head, and `ways` does not matter.

    Raises:
        TypeError, ValueError: a number is no count, the picture too small for its poolings (four: below 16), or `norm`
            unknown.

    >>> import torch
    >>> conv4(ways=5, sample_shape=(3, 32, 32))(torch.zeros(10, 3, 32, 32)).shape
    torch.Size([10, 5])
    >>> conv4(ways=None)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 64])
    >>> conv4(pools=2, maps=True)(torch.zeros(10, 1, 28, 28)).shape
    torch.Size([10, 64, 7, 7])
    """
    check_ways(ways)
    check_count("pools", pools)
    check_flag("maps", maps)
    if pools > _BLOCKS:
        raise ValueError(f"pools must be at most {_BLOCKS}, one a block (got {pools})")
    shape = check_picture(sample_shape, 2**pools if pool else 1)
    blocks, (height, width) = _conv_blocks(shape, hidden, norm, pool, pools)
    if maps:
        return taking(sample_shape, nn.Sequential(blocks))
    layers = OrderedDict(**blocks, flatten=nn.Flatten(), **head(hidden * height * width, ways))
    return taking(sample_shape, nn.Sequential(layers))


def strided_conv4(
    ways: int | None = 5,
    sample_shape: Sequence[int] = (1, 28, 28),
    hidden: int = 64,
    norm: str = "batch",
    mean: bool = True,
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
    check_ways(ways)
    blocks, (height, width) = _conv_blocks(check_picture(sample_shape), hidden, norm, pool=False)
    if mean:
        blocks["mean"] = nn.AdaptiveAvgPool2d(1)
    features = hidden if mean else hidden * height * width
    return taking(sample_shape, nn.Sequential(OrderedDict(**blocks, flatten=nn.Flatten(), **head(features, ways))))


def _conv_blocks(
    sample_shape: tuple[int, int, int], hidden: int, norm: str, pool: bool, halving: int = _BLOCKS
) -> tuple[OrderedDict[str, nn.Module], tuple[int, int]]:
    """The four named blocks, and height and width of what comes out of them."""
    check_count("hidden", hidden, low=1)
    make_norm = choice("norm", norm, _NORMS)
    inputs, *size = sample_shape
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(_BLOCKS):
        halves = index < halving
        inside = [(side + 1) // 2 for side in size] if halves and not pool else size
        layers = [
            nn.Conv2d(inputs if index == 0 else hidden, hidden, 3, stride=2 if halves and not pool else 1, padding=1),
            make_norm(hidden, *inside),
            nn.ReLU(),
        ]
        blocks[f"block{index + 1}"] = nn.Sequential(*layers, *([nn.MaxPool2d(2)] if halves and pool else []))
        size = [side // 2 for side in inside] if halves and pool else inside
    return blocks, (size[0], size[1])


def _groups(channels: int) -> int:
    return max(groups for groups in range(1, 9) if channels % groups == 0)
