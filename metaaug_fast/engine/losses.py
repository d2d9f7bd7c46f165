"""The losses of the inner and the outer loop, written in plain torch: means over the samples of one task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tasks import MetaOutput

LOSSES = ("cross_entropy", "mse", "bce")
Loss = str | Callable[[Tensor, Tensor], Tensor]


_TWINS = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "bce",
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse",
    F.binary_cross_entropy_with_logits: "bce",
}
# Options under which a twin is the named loss: of `ignore_index` the default, which no class id is.
_NEUTRAL = {"weight": None, "pos_weight": None, "reduction": "mean", "ignore_index": -100}


def named(loss: Loss) -> tuple[Loss, float, str]:
    """The loss by its name where it is one of torch's own, its label smoothing, and what keeps it from having a name.

    Raises:
        ValueError: `loss` is neither callable nor one of `LOSSES`.

    >>> named(nn.CrossEntropyLoss(label_smoothing=0.1))
    ('cross_entropy', 0.1, '')
    >>> named(F.mse_loss)
    ('mse', 0.0, '')
    >>> named(nn.CrossEntropyLoss(weight=torch.ones(5)))[1:]
    (0.0, 'its weight')
    """
    if isinstance(loss, str) and loss in LOSSES:
        return loss, 0.0, ""
    if not callable(loss):
        raise ValueError(f"loss must be callable or one of {', '.join(LOSSES)} (got {loss!r})")
    options: dict[str, Any] = {}
    twin: Any = type(loss)
    if isinstance(loss, nn.Module):
        options = {name: getattr(loss, name) for name in (*_NEUTRAL, "label_smoothing") if hasattr(loss, name)}
    else:
        twin = loss
        if isinstance(loss, functools.partial) and not loss.args:
            twin, options = loss.func, dict(loss.keywords)
    name = _TWINS.get(twin) if isinstance(twin, Hashable) else None
    if name is None:
        return loss, 0.0, ""
    smoothing = options.pop("label_smoothing", 0.0)
    for option, value in options.items():
        if option not in _NEUTRAL or (value is not _NEUTRAL[option] and value != _NEUTRAL[option]):
            return loss, 0.0, f"its {option}"
    return name, smoothing, ""


def sample_losses(loss: str, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each sample, `[N]`, from a prediction `[N, ...]`.

    cross_entropy: `-sum_c y_c log softmax(z)_c`, y class ids `[N]` or probabilities `[N, C]`, smoothed as
    `(1 - s) y + s / C`. mse and bce: means over a sample's elements.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(prediction, target, reduction="none", label_smoothing=label_smoothing)
    each = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    return each(prediction, target.to(prediction.dtype), reduction="none").reshape(len(prediction), -1).mean(1)


def task_loss(
    loss: Loss, prediction: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean loss of one task's samples; with sample weights `w`, `sum_i w_i loss_i / N`."""
    if callable(loss):
        return loss(prediction, target)
    each = sample_losses(loss, prediction, target, label_smoothing)
    return (each if weight is None else each * weight).mean()


def judge(loss: Loss, prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> MetaOutput:
    """Losses, and accuracies for class ids, of predictions `[T, N, ...]`; differentiable."""
    if callable(loss):
        losses = torch.stack([task_loss(loss, *task) for task in zip(prediction, target, strict=True)])
    else:
        flat = sample_losses(loss, prediction.flatten(0, 1), target.flatten(0, 1), label_smoothing)
        losses = flat.view(len(prediction), -1).mean(1)
    return MetaOutput(losses.mean(), losses, accuracies(loss, prediction, target), prediction.detach())


def has_accuracy(loss: Loss, target: Tensor) -> bool:
    """Whether a prediction can be right or wrong."""
    return (loss == "cross_entropy" or callable(loss)) and not target.is_floating_point()


def accuracies(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor | None:
    """`accuracy` of predictions `[..., N, C]`, or None where none can be right or wrong."""
    fits = prediction.ndim == target.ndim + 1
    return accuracy(prediction.detach(), target) if fits and has_accuracy(loss, target) else None


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of samples, over dimension -2 of logits `[..., N, C]`, whose largest logit is the target's class."""
    classes = target if target.dtype == torch.int64 else target.argmax(-1)
    return (prediction.argmax(-1) == classes).to(prediction.dtype).mean(-1)


def check_targets(name: str, loss: Loss, target: Tensor, output_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `[T, N, ...]` targets fit a model whose output per sample is `output_shape`."""
    if callable(loss):
        return
    if loss == "cross_entropy":
        if len(output_shape) != 1:
            raise ValueError(f"cross_entropy needs a model output [N, classes] (got {tuple(output_shape)} per sample)")
        classes = output_shape[0]
        if target.is_floating_point():
            if target.shape[2:] != (classes,):
                raise ValueError(
                    f"{name} as probabilities must be [T, N, {classes}] (got shape {tuple(target.shape)}); "
                    "class ids must be int64"
                )
            return
        if target.dtype != torch.int64:
            raise ValueError(f"{name} as class ids must be int64 (got {target.dtype})")
        if target.ndim != 2:
            raise ValueError(f"{name} as class ids must be [T, N] (got shape {tuple(target.shape)})")
        low, high = (int(value) for value in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must hold class ids 0..{classes - 1} (got {low if low < 0 else high})")
        return
    if target.shape[2:] != tuple(output_shape):
        got = tuple(target.shape[2:])
        raise ValueError(f"{name} must have the model's output shape {tuple(output_shape)} per sample (got {got})")
    if not target.is_floating_point():
        raise ValueError(f"{name} must be floating point for the loss {loss!r} (got {target.dtype})")
