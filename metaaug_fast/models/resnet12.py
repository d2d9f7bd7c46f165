"""ResNet-12, the larger network of few-shot learning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from .parts import check_picture, check_ways, head, taking

_NARROW = (64, 128, 256, 512)


def resnet12(
    ways: int | None = 5,
    sample_shape: Sequence[int] = (3, 84, 84),
    widths: Sequence[int] = (64, 160, 320, 640),
    small: bool = False,
) -> nn.Sequential:
    """Four residual blocks of three 3x3 convolutions and a max-pooling, the mean over space and a linear `head`.

    The widths and the initial weights (Kaiming normal, fan out) are those of MetaOptNet (Lee et al. 2019, arXiv
    1904.03758), the blocks those of TADAM (Oreshkin et al. 2018, arXiv 1805.10123). MetaOptNet's dropout and DropBlock
    are left out.

    Args:
        ways: outputs. None: no head, features `[N, widths[-1]]`.
        sample_shape: inputs are `[N, *sample_shape]`, `(channels, height, width)`, sides >= 16.
        widths: filters of the four blocks.
        small: TADAM's narrower blocks, 64-128-256-512, in place of `widths`.

    Raises:
        ValueError: `widths` are not four numbers >= 1, or another argument is out of range.

    >>> import torch
    >>> resnet12(sample_shape=(3, 32, 32), widths=(8, 8, 8, 8))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """
    widths = _NARROW if small else tuple(widths)
    if len(widths) != 4 or min(widths) < 1:
        raise ValueError(f"widths must be four numbers >= 1 (got {widths})")
    check_ways(ways)
    inputs = (check_picture(sample_shape, 16)[0], *widths[:-1])
    blocks = {f"block{index + 1}": ResidualBlock(inputs[index], widths[index]) for index in range(4)}
    ends = OrderedDict(mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), **head(widths[-1], ways))
    model = nn.Sequential(OrderedDict(**blocks, **ends))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
    return taking(sample_shape, model)


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
