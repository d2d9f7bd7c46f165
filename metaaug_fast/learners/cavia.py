"""CAVIA, fast context adaptation (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, arXiv 1810.03642, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count
from ..engine.problem import LearningRate, parameters_of
from .parts import replaced
from .unrolled import UnrolledLearner

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm2d)


class CAVIA(UnrolledLearner):
    """MAML whose inner loop moves context parameters phi alone, which start at 0; the weights theta are for all tasks.

        phi_i = 0 - inner_lr * grad_phi loss(phi, theta; support of task i)     inner_steps times
        minimise the mean over tasks of loss(phi_i, theta; query of task i)     over theta

    The model becomes a `Contextual` one, in which chosen layers see phi; it is fused where the model is.

    Args:
        model: any module with linear layers or convolutions. It stays as it is, and shares its parameters.
        inner_lr, inner_steps, learn_inner_lr: see `MAML`.
        context: how many context parameters.
        layers: names of the layers that see them. None: see `Contextual`.
        first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see
            `MAML`.

    Raises:
        TypeError, ValueError: no layer can see the context, none goes by such a name, or another argument is out of
            range.

    >>> import torch, metaaug_fast as mf
    >>> cavia = mf.CAVIA(mf.models.mlp([1, 40, 40, 1]), context=5, loss="mse", backend="fused")
    >>> fast = cavia.adapt(torch.randn(3, 10, 1), torch.randn(3, 10, 1))
    >>> fast.as_dict()["context"].shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 1.0,
        inner_steps: int = 2,
        context: int = 100,
        layers: Sequence[str] | None = None,
        learn_inner_lr: bool = False,
        **options: Any,
    ) -> None:
        contextual = Contextual(model, context, layers)
        super().__init__(contextual, inner_lr, inner_steps, **options)
        self.layers = contextual.layers
        self._settle("context", learn_inner_lr)


class Contextual(nn.Module):
    """A network that shares a user's parameters and in which some layers see context parameters phi, `context` `[C]`.

        a linear layer:         W x + U phi + b                         phi joined to its input, with weights of its own
        any other layer:        (1 + G phi) * h(x) + B phi              FiLM, for each channel of its output

    phi is 0 and asks for no gradient, so it predicts as the model does until phi moves. U, G and B start as those of
    `nn.Linear`. (The authors' code learns the 1, too, and an offset.)

    Args:
        model: stays as it is.
        context: C.
        layers: names of linear layers, convolutions or norms. None: of a network with convolutions every norm behind
            one, or, where there are none, every convolution; else the first linear layer.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> contextual = Contextual(model, 5)
    >>> contextual.layers, [name for name, _ in contextual.named_parameters()][:2]
    (('0',), ['context', 'network.0.joined'])
    >>> x = torch.randn(6, 3)
    >>> torch.equal(contextual(x), model(x))
    True
    """

    def __init__(self, model: nn.Module, context: int = 100, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        parameters_of(model)
        check_count("context", context, low=1)
        self.layers = _default_layers(model) if layers is None else _checked(model, layers)
        like = next(model.parameters())
        self.context = nn.Parameter(like.new_zeros(context), requires_grad=False)
        self.network = replaced(model, {path: _seeing(model.get_submodule(path), self.context) for path in self.layers})

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x)
        return output


def _seeing(layer: nn.Module, context: nn.Parameter) -> nn.Module:
    return _Joined(layer, context) if isinstance(layer, nn.Linear) else _Film(layer, context)


class _Joined(nn.Module):
    """A linear layer to whose input the context is joined."""

    def __init__(self, layer: nn.Linear, context: nn.Parameter) -> None:
        super().__init__()
        self.context = context
        self.joined = _weight(layer.weight, layer.out_features, len(context), layer.in_features + len(context))
        self.nothing = _fixed(layer.weight.new_zeros(len(context), layer.in_features))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(_repeated(self.context, x, self.nothing), self.joined)


class _Film(nn.Module):
    """A layer whose output the context scales and shifts, channel by channel."""

    def __init__(self, layer: nn.Module, context: nn.Parameter) -> None:
        super().__init__()
        channels, like = _channels(layer), next(layer.parameters(), context)
        self.context = context
        self.scale = _weight(like, channels, len(context), len(context))
        self.shift = _weight(like, channels, len(context), len(context))
        self.nothing = _fixed(like.new_zeros(len(context), channels))
        self.one = _fixed(like.new_ones(channels))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        places = tuple(range(2, h.ndim))
        context = _repeated(self.context, h.mean(places) if places else h, self.nothing)
        of_channels = (slice(None), slice(None), *(None for _ in places))
        scale, shift = F.linear(context, self.scale, self.one), F.linear(context, self.shift)
        return h * scale[of_channels] + shift[of_channels]


def _repeated(context: Tensor, x: Tensor, nothing: Tensor) -> Tensor:
    """The context for each of the samples x `[N, features]`, by an op that the fused engine has."""
    return F.linear(x, nothing, context)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _weight(like: Tensor, rows: int, columns: int, inputs: int) -> nn.Parameter:
    """As `nn.Linear` draws it for so many inputs."""
    return nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device).uniform_(-1, 1) / inputs**0.5)


def _channels(layer: Any) -> int:
    for name in ("out_channels", "num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    raise AssertionError(layer)


def _default_layers(model: nn.Module) -> tuple[str, ...]:
    named = dict(model.named_modules())
    convs = [path for path, module in named.items() if isinstance(module, CONVS)]
    norms = [path for path, module in named.items() if isinstance(module, NORMS)]
    linear = [path for path, module in named.items() if isinstance(module, nn.Linear)]
    found = (norms or convs) if convs else linear[:1]
    if not found:
        raise ValueError(f"model must have linear layers or convolutions (got none in {type(model).__name__})")
    return tuple(found)


def _checked(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    named = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, *CONVS, *NORMS))}
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be names of layers (got {layers!r})")
    unknown = [path for path in layers if path not in named]
    if unknown or not layers:
        raise ValueError(
            f"layers must name linear layers, convolutions or norms (got {list(layers)}; there are {', '.join(named)})"
        )
    return tuple(layers)
