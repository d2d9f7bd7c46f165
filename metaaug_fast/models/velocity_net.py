"""A residual network from planes to planes, for generators that learn by flow matching."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..checks import check_count
from .parts import check_picture, check_ways

_DILATIONS = (1, 2)
"""Of the blocks in turn, so that few of them see a whole character."""


def velocity_net(
    ways: int | None = 1, sample_shape: Sequence[int] = (2, 28, 28), hidden: int = 32, blocks: int = 3
) -> nn.Module:
    """Residual blocks of two 3x3 convolutions at one size, and a convolution as `head`: planes to planes.

    Each block is also told the means of the input's planes, one of which is time: a small perceptron of these scales
    and shifts its channels (FiLM, Perez et al. 2018, arXiv 1709.07871). Group norms, so that samples stay apart.

    Args:
        ways: planes of the output. None: their mean over space instead of a head, features `[N, hidden]`.
        sample_shape: inputs are `[N, *sample_shape]`, `(planes, height, width)`.
        hidden: channels within.
        blocks: how many; every second one is dilated.

    Raises:
        TypeError, ValueError: a number is no count, or `sample_shape` no picture's.

    >>> import torch
    >>> velocity_net(1, (2, 28, 28))(torch.zeros(3, 2, 28, 28)).shape
    torch.Size([3, 1, 28, 28])
    """
    check_ways(ways)
    check_count("hidden", hidden, low=1)
    check_count("blocks", blocks, low=1)
    return _VelocityNet(check_picture(sample_shape)[0], ways, hidden, blocks)


class _VelocityNet(nn.Module):
    def __init__(self, inputs: int, ways: int | None, hidden: int, blocks: int) -> None:
        super().__init__()
        self.told = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(hidden, _DILATIONS[index % 2]) for index in range(blocks))
        self.norm = _norm(hidden)
        self.head = None if ways is None else nn.Conv2d(hidden, ways, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        told = self.told(x.mean((2, 3)))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, told)
        h = self.norm(h).relu()
        output: Tensor = h.mean((2, 3)) if self.head is None else self.head(h)
        return output


class _Block(nn.Module):
    """`[N, hidden, H, W]` and what it is told, `[N, hidden]`, to `[N, hidden, H, W]`."""

    def __init__(self, hidden: int, dilation: int) -> None:
        super().__init__()
        self.norm1 = _norm(hidden)
        self.conv1 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
        self.norm2 = _norm(hidden)
        self.scale = nn.Linear(hidden, hidden)
        self.shift = nn.Linear(hidden, hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x).relu()))
        h = h + h * self.scale(told)[:, :, None, None] + self.shift(told)[:, :, None, None]
        y: Tensor = x + self.conv2(h.relu())
        return y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(groups for groups in range(1, 9) if channels % groups == 0), channels)
