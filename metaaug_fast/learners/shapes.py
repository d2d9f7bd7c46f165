"""What a network takes and what it gives of one sample, found by trying a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..engine.exclusive import ONE_AT_A_TIME

_SIDES = (28, 32, 64, 84, 224)  # of pictures, where any size may be meant
_USUAL = {1: 28, 3: 84}  # sides, by channels: Omniglot's and mini-ImageNet's
_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)

Shape = tuple[int, ...]


def sample_shape_of(model: nn.Module) -> Shape | None:
    """The shape of one input: what the model says in an attribute `sample_shape`, or what its first layer takes.

    Of convolutions it is the only size, among those that are usual, which the model takes. One that takes any is held
    to be meant for Omniglot's 28x28 pictures of one channel, or mini-ImageNet's 84x84 of three; who finds another shape
    later says so.

    None: it is not known.

    >>> from metaaug_fast.models import conv4
    >>> sample_shape_of(conv4(ways=5)), sample_shape_of(nn.Linear(6, 3)), sample_shape_of(nn.Conv2d(1, 2, 3))
    ((1, 28, 28), (6,), (1, 28, 28))
    >>> sample_shape_of(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(1800, 5)))
    (3, 32, 32)
    """
    declared = getattr(model, "sample_shape", None)
    if declared is not None:
        return tuple(declared)
    first = _first_layer(model)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    return _meant(_tried(model)) if isinstance(first, nn.Conv2d) else None


def features_of(model: nn.Module, features: int | None = None) -> int:
    """How many features an encoder gives, or channels where it gives maps, `[N, features, ...]`.

    Args:
        features: as the caller says. None: to be found by giving a copy of the model samples of zeros, of the sizes
            that it takes; where they give different numbers, that of `sample_shape_of` counts.

    Raises:
        TypeError, ValueError: `features` is no count, or not given where it cannot be found.

    >>> from metaaug_fast.models import conv4
    >>> features_of(conv4(ways=None, hidden=8)), features_of(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)))
    (8, 4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
    if features is not None:
        check_count("features", features, low=1)
        return features
    given = _tried(model)
    found = {shape[0] for shape in given.values()}
    if len(found) > 1 and (shape := _meant(given)) is not None:
        found = {given[shape][0]}
    if len(found) != 1:
        why = f"it gives {' or '.join(map(str, sorted(found)))} by the size of its inputs" if found else "it is unknown"
        raise ValueError(f"features must be given: how many {type(model).__name__} gives, for {why} (got None)")
    return found.pop()


def gives_maps(model: nn.Module) -> bool:
    """Whether an encoder gives feature maps `[N, C, H, W]`, as far as trying it shows.

    >>> from metaaug_fast.models import conv4
    >>> gives_maps(conv4(maps=True)), gives_maps(conv4(ways=None))
    (True, False)
    """
    return any(len(shape) == 3 for shape in _tried(model).values())


def _tried(model: nn.Module) -> dict[Shape, Shape]:
    """The shape of one sample's output, for each shape of an input that the model may be meant for and takes."""
    found = {}
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), torch.no_grad():
        twin = copy.deepcopy(model).eval()
        for x in _inputs(model):
            try:
                output = twin(x)
            except Exception:  # the user's forward may raise anything at what it does not take
                continue
            if isinstance(output, Tensor) and output.ndim >= 2 and len(output) == len(x):
                found[tuple(x.shape[1:])] = tuple(output.shape[1:])
    return found


def _meant(tried: dict[Shape, Shape]) -> Shape | None:
    """The input that a model is meant for, of those that it takes: the only one, or the papers' pictures."""
    if len(tried) == 1:
        return next(iter(tried))
    return next((shape for shape in tried if shape[1:] == 2 * (_USUAL.get(shape[0]),)), None)


def _inputs(model: nn.Module) -> Iterator[Tensor]:
    like = next(model.parameters(), torch.zeros(()))
    first, declared = _first_layer(model), getattr(model, "sample_shape", None)
    if isinstance(first, nn.Embedding):
        yield torch.zeros(2, 4, dtype=torch.int64, device=like.device)
    elif declared is not None:
        yield like.new_zeros(2, *declared)
    elif isinstance(first, nn.Linear):
        yield like.new_zeros(2, first.in_features)
    elif isinstance(first, nn.Conv2d):
        for side in _SIDES:
            yield like.new_zeros(2, first.in_channels, side, side)
    elif isinstance(first, nn.Conv1d):
        for side in _SIDES:
            yield like.new_zeros(2, first.in_channels, side)


def _first_layer(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if isinstance(module, _FIRST)), None)
