"""Learners as EasyFSL has them: `process_support_set(x, y)`, then a call on queries, one task at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..learners.base import Learner
from ..learners.matching import MatchingNet
from ..learners.protonet import ProtoNet
from ..learners.relation import RelationNet


class FewShotClassifier(nn.Module):
    """Any learner, called as EasyFSL's few-shot classifiers are.

    What it predicts is differentiable in the learner's parameters, so that training scripts in EasyFSL's manner run
    with it; whole batches of tasks, `learner(tasks)`, are faster.

    Args:
        learner: a `Learner` of classes.
        use_softmax: give probabilities in place of the learner's logits.

    Raises:
        TypeError: `learner` is none.

    >>> import torch, metaaug_fast as mf
    >>> classifier = FewShotClassifier(mf.MAML(mf.models.mlp([4, 8, 3])))
    >>> classifier.process_support_set(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    >>> classifier(torch.randn(10, 4)).shape
    torch.Size([10, 3])
    """

    def __init__(self, learner: Learner, use_softmax: bool = False) -> None:
        super().__init__()
        if not isinstance(learner, Learner):
            raise TypeError(f"learner must be a Learner (got {type(learner).__name__})")
        self.learner = learner
        self.use_softmax = use_softmax
        self.adapted: Any = None

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Learn one task from samples `[S, ...]` and class ids `[S]`.

        Raises:
            TypeError, ValueError: they are no support set of one task.
        """
        if isinstance(support_labels, Tensor) and support_labels.ndim != 1:
            raise ValueError(f"support_labels must be class ids [S] of one task (got {list(support_labels.shape)})")
        self.adapted = self.learner.adapt(support_images, support_labels)

    def forward(self, query_images: Tensor) -> Tensor:
        """Scores `[N, ways]` of queries `[N, ...]`.

        Raises:
            RuntimeError: no support set has been processed.
        """
        if self.adapted is None:
            raise RuntimeError("process_support_set must be called before queries are classified (got no support set)")
        scores: Tensor = self.adapted(query_images)
        return scores.softmax(-1) if self.use_softmax else scores

    def is_transductive(self) -> bool:
        """Whether one query's scores depend on the other queries."""
        return self.learner.transductive


class PrototypicalNetworks(FewShotClassifier):
    """`mf.ProtoNet` under EasyFSL's name, from a backbone that gives features `[N, D]`.

    >>> import torch
    >>> classifier = PrototypicalNetworks(nn.Linear(4, 8))
    >>> classifier.process_support_set(torch.randn(4, 4), torch.tensor([0, 1, 1, 0]))
    >>> classifier(torch.randn(10, 4)).shape
    torch.Size([10, 2])
    """

    def __init__(self, backbone: nn.Module, use_softmax: bool = False, **options: Any) -> None:
        super().__init__(ProtoNet(backbone, **options), use_softmax)


class MatchingNetworks(FewShotClassifier):
    """`mf.MatchingNet` under EasyFSL's name; with full context embeddings, as there."""

    def __init__(
        self, backbone: nn.Module, use_softmax: bool = False, full_context: bool = True, **options: Any
    ) -> None:
        super().__init__(MatchingNet(backbone, full_context, **options), use_softmax)


class RelationNetworks(FewShotClassifier):
    """`mf.RelationNet` under EasyFSL's name, from a backbone that gives feature maps or features."""

    def __init__(self, backbone: nn.Module, use_softmax: bool = False, **options: Any) -> None:
        super().__init__(RelationNet(backbone, **options), use_softmax)
