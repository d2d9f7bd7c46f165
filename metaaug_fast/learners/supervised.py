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
from ..models import conv4, mlp
from ..tasks import check_tensor, class_ids

_AT_ONCE = 512


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


def train_classifier(
    data: Any,
    model: nn.Module | None = None,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> nn.Module:
    """An ordinary classifier of all classes of a data set, trained as `fit` does, in evaluation mode.

    Args:
        data: `ClassSamples`, what `ClassSamples.from_dataset` reads, or a tuple of samples `[N, ...]` and ids `[N]`.
        model: is trained in place. None: a new `conv4` of 32 filters for pictures, or an `mlp` for vectors.
        steps, lr, batch: see `fit`.
        seed: of a new model's weights, and of batches.

    Raises:
        TypeError, ValueError: the data do not fit the model, or there is none that suits them.
        NonFiniteError: the loss is NaN or infinite.

    >>> import metaaug_fast as mf
    >>> letters = mf.data.Glyphs().subset(range(3))
    >>> network = train_classifier(letters, steps=20)
    >>> 0 <= classifier_accuracy(network, letters) <= 1
    True
    """
    x, y = labelled(data)
    check_labelled(x, y)
    check_integer("seed", seed)
    if model is None:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            model = _classifier(tuple(x.shape[1:]), int(y.max()) + 1).to(x.device)
    fit(model.train(), x, y, steps, lr=lr, batch=batch, seed=seed)
    return model.eval()


@torch.no_grad()
def classifier_accuracy(network: nn.Module, data: Any) -> float:
    """The share, 0 to 1, of a data set's samples that a classifier is right about; data as of `train_classifier`."""
    x, y = labelled(data)
    check_labelled(x, y)
    like = next(network.parameters())
    right = [
        network(inputs(some, like)).argmax(1).cpu() == ids.cpu()
        for some, ids in zip(x.split(_AT_ONCE), y.split(_AT_ONCE), strict=True)
    ]
    return float(torch.cat(right).double().mean())


def _classifier(sample_shape: tuple[int, ...], ways: int) -> nn.Module:
    if len(sample_shape) == 3:
        return conv4(ways, sample_shape, hidden=32)
    if len(sample_shape) == 1:
        return mlp([sample_shape[0], 64, ways])
    raise ValueError(f"model must be given for samples of such a shape (got {list(sample_shape)})")


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
