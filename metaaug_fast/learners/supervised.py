"""Plain classification: what comes before and after tasks, and what few-shot learners are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_integer, check_number
from ..data.samples import ClassSamples
from ..engine.encoding import encode
from ..errors import NonFiniteError
from ..tasks import check_tensor, class_ids


def labelled(data: Any) -> tuple[Tensor, Tensor]:
    """Samples and class ids; those of a data set with labels as they are stored, class after class.

    >>> x, y = labelled(ClassSamples.from_arrays(torch.rand(6, 2), ["b", "a", "b", "a", "c", "a"]))
    >>> x.shape, y.tolist()
    (torch.Size([6, 2]), [0, 0, 0, 1, 1, 2])
    """
    if isinstance(data, tuple):
        return data
    if not isinstance(data, ClassSamples):
        data = ClassSamples.from_dataset(data)
    parts = [data.class_samples(index) for index in range(len(data))]
    return torch.cat(parts), torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])


def inputs(x: Tensor, like: Tensor) -> Tensor:
    """Samples as a network takes them: on its device, in its dtype; bytes divided by 255, ids as they are."""
    x = x.to(like.device)
    if x.dtype == torch.int64:
        return x
    return x.to(like.dtype) / 255 if x.dtype == torch.uint8 else x.to(like.dtype)


def fit(
    network: nn.Module, x: Tensor, y: Tensor, steps: int, *, lr: float = 1e-3, batch: int = 64, seed: int = 0
) -> float:
    """Minimise a classifier's cross entropy on samples, over its parameters that require a gradient.

    By Adam, whose rate falls to 0 along a cosine, on batches of `batch` samples; an epoch's last ones, where they are
    fewer, wait for the next shuffle.

    Args:
        x: `[N, ...]`, bytes (divided by 255) or numbers.
        y: class ids `[N]`.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        TypeError, ValueError: the samples do not fit each other or the network, or an argument is out of range.
        NonFiniteError: the loss is NaN or infinite.
    """
    check_count("steps", steps, low=1)
    check_number("lr", lr)
    check_count("batch", batch, low=1)
    check_integer("seed", seed)
    check_labelled(x, y)
    y = class_ids(y)
    like = next(network.parameters())
    learns = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(learns, lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    batch, order = min(batch, len(x)), torch.empty(0, dtype=torch.int64)
    last: list[Tensor] = []
    y = y.to(like.device)
    with torch.enable_grad():
        for step in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[:batch], order[batch:]
            output = encode(network, inputs(x[rows.to(x.device)], like))
            if step == 0:
                _check_labels(y, output)
            loss = F.cross_entropy(output, y[rows.to(y.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            if step >= steps - max(1, steps // 10):
                last.append(loss.detach())
    optimizer.zero_grad()  # what is frozen again must not move in another's step
    found = float(torch.stack(last).mean())
    if not math.isfinite(found):
        raise NonFiniteError(f"the loss is {found} within {steps} steps of rate {lr:g}")
    return found


def check_labelled(x: Tensor, y: Tensor) -> None:
    """Raise TypeError or ValueError unless these are samples and their class ids."""
    check_tensor("x", x)
    check_tensor("y", y)
    if not x.ndim or not len(x) or y.shape != x.shape[:1] or class_ids(y).dtype != torch.int64 or y.min() < 0:
        raise ValueError(
            f"x and y must be samples [N, ...] and class ids >= 0 [N] (got {tuple(x.shape)}, {y.dtype} "
            f"{tuple(y.shape)})"
        )


def _check_labels(y: Tensor, output: Tensor) -> None:
    if output.ndim != 2:
        raise ValueError(f"model must give outputs [N, classes] (got shape {tuple(output.shape)})")
    if y.max() >= output.shape[1]:
        raise ValueError(f"y must be class ids below {output.shape[1]}, the model's outputs (got {int(y.max())})")
