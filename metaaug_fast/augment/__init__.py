"""Learned augmentation: of what tasks adapt on, for how well they then do on real queries."""

from .learned import LearnedLabels, LearnedWeights
from .policy import AugmentationPolicy, PolicyTransform, support_network
from .transforms import PICTURES, TRANSFORMS, VECTORS, Drawn, Transform

__all__ = [
    "PICTURES",
    "TRANSFORMS",
    "VECTORS",
    "AugmentationPolicy",
    "Drawn",
    "LearnedLabels",
    "LearnedWeights",
    "PolicyTransform",
    "Transform",
    "support_network",
]
