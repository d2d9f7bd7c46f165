"""A data set of few samples a class, and more of each."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ..checks import check_count, check_integer
from ..data.samples import ClassSamples
from ..learners.supervised import inputs, labelled


class Augmenter(Protocol):
    """What makes more of a task's few; `AugmentationPolicy`, `Hallucination`, `Generator` and `Retrieval` do."""

    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples `[N, ...]` and class ids `[N]` from `[S, ...]` and `[S]`: `per_class` of each class, or at most."""
        ...


def generate_augmented_data(augmenter: Augmenter, data: Any, per_class: int, seed: int = 0) -> ClassSamples:
    """New samples of the classes of a data set, as one that joins it: `data + generate_augmented_data(...)`.

    All its classes are one task of the augmenter. Bytes stay bytes, that is pictures within 0 and 1.

    Args:
        augmenter: of `metaaug_fast.augment`, or anything with such a method `more`; a module stays in its mode, but is
            in evaluation here.
        data: `ClassSamples`, or what `ClassSamples.from_dataset` reads.
        per_class: new samples of each class; `Retrieval` finds at most so many.
        seed: of all that is drawn. The same gives the same data, bit for bit.

    Raises:
        TypeError, ValueError: the augmenter has no `more`, does not take such samples or gives none; `per_class` is
            below 1.

    >>> import metaaug_fast as mf
    >>> few = mf.data.Glyphs().subset(range(5))
    >>> policy = mf.augment.AugmentationPolicy(["rotation", "scale"], probability=0.8)
    >>> generate_augmented_data(policy, few, per_class=30)
    ClassSamples(5 classes, 30 to 30 samples each of shape (1, 28, 28))
    """
    if not callable(getattr(augmenter, "more", None)):
        raise TypeError(
            f"augmenter must have a method more(x, y, per_class, generator) (got {type(augmenter).__name__})"
        )
    check_count("per_class", per_class, low=1)
    check_integer("seed", seed)
    data = data if isinstance(data, ClassSamples) else ClassSamples.from_dataset(data)
    if not len(data):
        raise ValueError("data must have classes (got none)")
    x, y = labelled(data)
    module: Any = augmenter if isinstance(augmenter, nn.Module) else getattr(augmenter, "learner", None)
    module = module if isinstance(module, nn.Module) else nn.Module()
    like = next(module.parameters(), torch.empty(0, device=x.device))
    generator = Generator(device=like.device).manual_seed(seed)
    training = module.training
    module.eval()
    try:
        made, labels = augmenter.more(inputs(x, like), y.to(like.device), per_class, generator)
    finally:
        module.train(training)
    if not len(made):
        raise ValueError("augmenter must give new samples (got none, as where nothing that is found is worth taking)")
    if x.dtype == torch.uint8:
        made = (made.clamp(0, 1) * 255).round()
    made, labels = made.to(x), labels.to(x.device)
    return ClassSamples.from_classes({data.names[label]: made[labels == label] for label in labels.unique().tolist()})
