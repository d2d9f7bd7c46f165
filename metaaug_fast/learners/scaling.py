"""Networks whose weights are frozen, scaled and shifted, as in meta-transfer learning."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.problem import parameters_of
from .parts import replaced

SCALED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ScaledLayer(nn.Module):
    """A linear layer or convolution that computes `(W * scale) x + (b + shift)`, of frozen W and b.

    >>> layer = nn.Conv2d(2, 3, 5)
    >>> ours, x = ScaledLayer(layer), torch.randn(4, 2, 8, 8)
    >>> ours.scale.shape, torch.equal(ours(x), layer(x))
    (torch.Size([3, 2, 1, 1]), True)
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.weight
        shape = (len(weight), 1) if weight.ndim == 2 else (*weight.shape[:2], *(1,) * (weight.ndim - 2))
        self.scale = nn.Parameter(weight.detach().new_ones(shape))
        self.shift = nn.Parameter(weight.detach().new_zeros(len(weight)))
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """As it is scaled."""
        weight: Tensor = self.layer.weight * self.scale
        return weight

    @property
    def bias(self) -> Tensor:
        """As it is shifted."""
        bias: Tensor = self.shift if self.layer.bias is None else self.layer.bias + self.shift
        return bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        output: Tensor = self.layer._conv_forward(x, self.weight, self.bias)
        return output


def scaled(model: nn.Module, head: str) -> nn.Module:
    """The model with a `ScaledLayer` for every linear layer and convolution outside of its head.

    It shares all parameters. Layers of the user's own classes stay as they are, for these may compute something else.

    Raises:
        ValueError: there is none.

    >>> scaled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2")[0].scale.shape
    torch.Size([4, 1])
    """
    parameters_of(model)
    layers = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in SCALED and head and not f"{path}.".startswith(f"{head}.")
    }
    if not layers:
        raise ValueError(
            f"model must have a linear layer or a convolution before its head, {head!r} (got none in "
            f"{type(model).__name__})"
        )
    made = {id(layer): ScaledLayer(layer) for layer in layers.values()}
    return replaced(model, {path: made[id(layer)] for path, layer in layers.items()})


def plain(network: nn.Module) -> nn.Module:
    """The same network of the layers that were scaled, each with a bias: what the fused engine knows.

    All parameters are shared, but a bias where there was none is new and frozen. See `weights`.

    >>> network = scaled(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)), "2")
    >>> [name for name, _ in plain(network).named_parameters()]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    made = {id(layer): _with_bias(layer) for layer in scaled_layers(network)}
    places = {path: made[id(each)] for path, each in network.named_modules(remove_duplicate=False) if id(each) in made}
    return replaced(network, places)


def _with_bias(scaled_layer: ScaledLayer) -> nn.Module:
    twin: nn.Module = copy.copy(scaled_layer.layer)
    bias = nn.Parameter(torch.zeros_like(scaled_layer.shift), requires_grad=False)
    own = {name: value for name, value in twin._parameters.items() if value is not None}
    twin._parameters = {"weight": own["weight"], "bias": own.get("bias", bias)}
    return twin


def weights(network: nn.Module) -> dict[str, Tensor]:
    """As they are scaled and shifted, by their names in the plain network.

    >>> network = scaled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2")
    >>> {name: value.shape for name, value in weights(network).items()}
    {'0.weight': torch.Size([4, 3]), '0.bias': torch.Size([4])}
    """
    layers = [(path, each) for path, each in network.named_modules() if isinstance(each, ScaledLayer)]
    return {f"{path}.{name}": getattr(layer, name) for path, layer in layers for name in ("weight", "bias")}


@torch.no_grad()
def reset(network: nn.Module) -> None:
    """Let every scale be 1 and every shift 0."""
    for layer in scaled_layers(network):
        layer.scale.fill_(1)
        layer.shift.zero_()


def scaled_layers(network: nn.Module) -> list[ScaledLayer]:
    """All of a network."""
    return [each for each in network.modules() if isinstance(each, ScaledLayer)]
